/* Runs a range of half layers of the decoder in one job, and the head.
 *
 * Half 2l is the attention of layer l, half 2l + 1 its feed-forward part. Each half begins by adding the previous half's `delta` to
 * the residual and ends with its own `delta`. With one rank a whole step is one call; with several, the caller runs half
 * by half and reduces `delta` over the ranks between.
 */
#include "decoder.h"

/* What a stage does. Between two stages of a step every item of the first is finished. */
typedef enum { EMBED, ATTENTION_NORM, QKV, ROTATE, ATTEND, MERGE, OUT, MLP_NORM, GATE_UP, DOWN } Kind;

typedef struct {
    Kind kind;
    int64_t layer;
} Stage;

typedef struct {
    const Model *model;
    const Batch *batch;
    const KvPool *pool;
    Buffers buffers;
    int threads;
    int32_t *seq_of_token; /* [T] */
    Stage *stages;
    int32_t *items; /* of each stage */
    int64_t num_stages;
    /* for the head */
    const int64_t *head_rows;
    Rows head;
} Step;

enum { STAGES_PER_LAYER = DOWN }; /* all kinds but EMBED */

static char *take(char **at, int64_t bytes) {
    char *start = *at;
    *at += round_up(bytes, 64);
    return start;
}

static char *layout(Step *s, char *base) {
    const Model *m = s->model;
    const Batch *b = s->batch;
    Buffers *f = &s->buffers;
    int64_t tokens = b->num_tokens, group = m->num_heads / m->num_kv_heads, max_stages = 1 + STAGES_PER_LAYER * m->num_layers;
    f->delta = (bf16 *)take(&base, tokens * m->hidden * 2);
    f->residual = (float *)take(&base, tokens * m->hidden * 4);
    f->normed = (bf16 *)take(&base, tokens * m->hidden * 2);
    f->qkv = (bf16 *)take(&base, tokens * (m->num_heads + 2 * m->num_kv_heads) * m->head_dim * 2);
    f->attended = (bf16 *)take(&base, tokens * m->num_heads * m->head_dim * 2);
    f->activated = (bf16 *)take(&base, tokens * m->intermediate * 2);
    s->seq_of_token = (int32_t *)take(&base, tokens * 4);
    s->stages = (Stage *)take(&base, max_stages * (int64_t)sizeof(Stage));
    s->items = (int32_t *)take(&base, max_stages * 4);
    f->plan.tiles = (Tile *)take(&base, attention_max_tiles(b, group) * (int64_t)sizeof(Tile));
    f->plan.items = (Item *)take(&base, attention_max_items(b, group, m->num_kv_heads, s->threads) * (int64_t)sizeof(Item));
    int64_t partials = attention_max_partials(b, group, m->num_kv_heads, s->threads);
    f->partials = (float *)take(&base, partials * attention_partial_floats(m->head_dim) * 4);
    f->attention_scratch = take(&base, attention_scratch_bytes(m->head_dim, group) * s->threads);
    return base;
}

/* Bytes of scratch a step of this shape needs; 64-byte aligned. It starts with `delta` [T, E] in bf16. */
int64_t bt_decoder_scratch_bytes(const Model *model, const Batch *batch, int32_t threads) {
    Step s = {.model = model, .batch = batch, .threads = threads};
    return layout(&s, NULL) - (char *)NULL;
}

/* Rows (tokens) of one item of a stage that works on single rows. */
static int64_t rows_per_item(int64_t total, int threads) { return max64(1, min64(32, total / (4 * threads))); }

static void add_stage(Step *s, Kind kind, int64_t layer, int64_t items) {
    s->stages[s->num_stages] = (Stage){kind, layer};
    s->items[s->num_stages++] = (int32_t)items;
}

static void add_product(Step *s, Kind kind, int64_t layer, const Linear *lin, Epilogue epilogue) {
    add_stage(s, kind, layer, gemm_items(lin, epilogue, s->batch->num_tokens, s->threads));
}

static void add_stages(Step *s, int64_t first_half, int64_t last_half) {
    int64_t row_items = ceil_div(s->batch->num_tokens, rows_per_item(s->batch->num_tokens, s->threads));
    const AttentionPlan *plan = &s->buffers.plan;
    s->num_stages = 0;
    if (first_half == 0) add_stage(s, EMBED, 0, row_items);
    for (int64_t half = first_half; half < last_half; half++) {
        int64_t layer = half / 2;
        const Layer *l = s->model->layers + layer;
        if (half % 2 == 0) {
            add_stage(s, ATTENTION_NORM, layer, row_items);
            add_product(s, QKV, layer, &l->qkv, OUT_BF16);
            add_stage(s, ROTATE, layer, row_items);
            add_stage(s, ATTEND, layer, plan->num_items);
            if (plan->num_partials) add_stage(s, MERGE, layer, plan->num_tiles * s->model->num_kv_heads);
            add_product(s, OUT, layer, &l->out, OUT_BF16);
        } else {
            add_stage(s, MLP_NORM, layer, row_items);
            add_product(s, GATE_UP, layer, &l->gate_up, OUT_SILU_MUL);
            add_product(s, DOWN, layer, &l->down, OUT_BF16);
        }
    }
}

static void norm_rows(const Step *s, const float *weight, int has_delta, int64_t first, int64_t last) {
    const Buffers *f = &s->buffers;
    int64_t hidden = s->model->hidden;
    for (int64_t t = first; t < last; t++) {
        float *residual = f->residual + t * hidden;
        norm_row(residual, has_delta ? f->delta + t * hidden : NULL, residual, weight, s->model->eps, hidden, f->normed + t * hidden);
    }
}

static void product_item(const Step *s, const Linear *lin, Epilogue epilogue, const bf16 *x, bf16 *y, int64_t item) {
    Rows rows = {x, lin->k, y, lin->n, s->batch->num_tokens};
    gemm_item(lin, epilogue, &rows, s->threads, item);
}

static void run_item(void *arg, int64_t stage, int64_t item, int tid) {
    const Step *s = arg;
    const Model *m = s->model;
    const Buffers *f = &s->buffers;
    int64_t layer = s->stages[stage].layer, tokens = s->batch->num_tokens, run = rows_per_item(tokens, s->threads);
    int64_t first = item * run, last = min64(first + run, tokens);
    const Layer *l = m->layers + layer;
    Attention a = {&f->plan, s->pool, s->batch, f->qkv, l->qkv.n, f->attended, l->out.k, layer, m->scale, f->partials, f->attention_scratch};
    switch (s->stages[stage].kind) {
        case EMBED: embed_rows(m, s->batch, f->residual, first, last); break;
        case ATTENTION_NORM: norm_rows(s, l->attention_norm, layer > 0, first, last); break;
        case QKV: product_item(s, &l->qkv, OUT_BF16, f->normed, f->qkv, item); break;
        case ROTATE: rotate_and_store_rows(m, l, s->batch, s->pool, layer, f->qkv, s->seq_of_token, first, last); break;
        case ATTEND: attention_item(&a, item, item + s->threads < f->plan.num_items ? item + s->threads : -1, tid); break;
        case MERGE: attention_merge_item(&a, item, tid); break;
        case OUT: product_item(s, &l->out, OUT_BF16, f->attended, f->delta, item); break;
        case MLP_NORM: norm_rows(s, l->mlp_norm, 1, first, last); break;
        case GATE_UP: product_item(s, &l->gate_up, OUT_SILU_MUL, f->normed, f->activated, item); break;
        case DOWN: product_item(s, &l->down, OUT_BF16, f->activated, f->delta, item); break;
    }
}

/* Halves [first_half, last_half) of the step; half 0 begins with the embedding. */
void bt_decoder_run(const Model *model, const Batch *batch, const KvPool *pool, char *scratch, int64_t first_half,
                    int64_t last_half, int32_t threads) {
    Step s = {.model = model, .batch = batch, .pool = pool, .threads = threads};
    if (batch->num_tokens == 0) return;
    layout(&s, scratch);
    attention_plan(&s.buffers.plan, batch, model->num_heads, model->num_kv_heads, threads);
    for (int64_t b = 0, t = 0; b < batch->num_seqs; b++)
        for (int64_t i = 0; i < batch->query_lens[b]; i++) s.seq_of_token[t++] = (int32_t)b;
    add_stages(&s, first_half, last_half);
    pool_run(threads, s.num_stages, s.items, run_item, &s);
}

static void run_head_item(void *arg, int64_t stage, int64_t item, int tid) {
    (void)tid;
    const Step *s = arg;
    const Buffers *f = &s->buffers;
    int64_t hidden = s->model->hidden;
    if (stage == 1) {
        gemm_item(&s->model->head, OUT_F32, &s->head, s->threads, item);
        return;
    }
    int64_t t = s->head_rows[item];
    norm_row(f->residual + t * hidden, f->delta + t * hidden, NULL, s->model->final_norm, s->model->eps, hidden, f->normed + item * hidden);
}

/* Logits [num_rows, V] fp32 of some tokens (rows of the batch) of the step that last ran all halves in `scratch`;
 * num_rows <= T. May be called again for other rows. */
void bt_decoder_head(const Model *model, const Batch *batch, char *scratch, const int64_t *rows, int64_t num_rows,
                     float *logits, int64_t ld_logits, int32_t threads) {
    Step s = {.model = model, .batch = batch, .threads = threads, .head_rows = rows};
    if (num_rows == 0) return;
    layout(&s, scratch);
    s.head = (Rows){s.buffers.normed, model->hidden, logits, ld_logits, num_rows};
    int32_t items[] = {(int32_t)num_rows, (int32_t)gemm_items(&model->head, OUT_F32, num_rows, threads)};
    pool_run(threads, 2, items, run_head_item, &s);
}
