/* Attention on its own, for the attention backend, its parity tests and benchmarks. */
#include "attention.h"

typedef struct {
    Attention attention;
    AttentionPlan plan;
    int threads;
} AttentionStep;

static char *layout(AttentionStep *s, char *base, const Batch *batch, const KvPool *pool, int64_t num_heads, int threads) {
    int64_t group = num_heads / pool->num_kv_heads;
    s->plan.tiles = (Tile *)base;
    base += round_up(attention_max_tiles(batch, group) * (int64_t)sizeof(Tile), 64);
    s->plan.items = (Item *)base;
    base += round_up(attention_max_items(batch, group, pool->num_kv_heads, threads) * (int64_t)sizeof(Item), 64);
    s->attention.partials = (float *)base;
    base += round_up(attention_max_partials(batch, group, pool->num_kv_heads, threads) * attention_partial_floats(pool->head_dim) * 4, 64);
    s->attention.scratch = base;
    return base + attention_scratch_bytes(pool->head_dim, group) * threads;
}

int64_t bt_attention_scratch_bytes(const Batch *batch, const KvPool *pool, int64_t num_heads, int32_t threads) {
    AttentionStep s;
    return layout(&s, NULL, batch, pool, num_heads, threads) - (char *)NULL;
}

static void run_item(void *arg, int64_t stage, int64_t item, int tid) {
    const AttentionStep *s = arg;
    int64_t next = item + s->threads < s->plan.num_items ? item + s->threads : -1;
    if (stage == 0) attention_item(&s->attention, item, next, tid);
    else attention_merge_item(&s->attention, item, tid);
}

/* q, out [T, H, D] bf16, rows ldq and ldo elements apart; the keys and values of the batch are in the pool already. */
void bt_attention(const Batch *batch, const KvPool *pool, int64_t num_heads, int64_t layer, float scale, const bf16 *q,
                  int64_t ldq, bf16 *out, int64_t ldo, char *scratch, int32_t threads) {
    AttentionStep s;
    layout(&s, scratch, batch, pool, num_heads, threads);
    attention_plan(&s.plan, batch, num_heads, pool->num_kv_heads, threads);
    s.attention.plan = &s.plan, s.attention.pool = pool, s.attention.batch = batch;
    s.attention.q = q, s.attention.ldq = ldq, s.attention.out = out, s.attention.ldo = ldo;
    s.attention.layer = layer, s.attention.scale = scale;
    s.threads = threads;
    int32_t items[] = {(int32_t)s.plan.num_items, (int32_t)(s.plan.num_tiles * pool->num_kv_heads)};
    if (batch->num_tokens > 0) pool_run(threads, s.plan.num_partials ? 2 : 1, items, run_item, &s);
}

/* k, v [T, K, D] bf16, rows ldk and ldv elements apart -> their slots in the pool. */
void bt_write_kv(const Batch *batch, const KvPool *pool, int64_t layer, const bf16 *k, int64_t ldk, const bf16 *v, int64_t ldv) {
    for (int64_t b = 0, t = 0; b < batch->num_seqs; b++)
        for (int64_t i = 0; i < batch->query_lens[b]; i++, t++) {
            int64_t position = batch->positions[t], slot = position % pool->page_size;
            int64_t page = batch->page_tables[b * batch->table_width + position / pool->page_size];
            for (int64_t h = 0; h < pool->num_kv_heads; h++) {
                size_t bytes = (size_t)pool->head_dim * sizeof(bf16);
                memcpy(kv_slot(pool, page, layer, 0, h, slot), k + t * ldk + h * pool->head_dim, bytes);
                memcpy(kv_slot(pool, page, layer, 1, h, slot), v + t * ldv + h * pool->head_dim, bytes);
            }
        }
}
