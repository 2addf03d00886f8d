/* Runs a range of half layers of the decoder in one job, and the head.
 *
 * Half 2l is the attention of layer l, half 2l + 1 its feed-forward part. Each half begins by adding the previous half's `delta` to
 * the residual and ends with its own `delta`. With one rank a whole step is one call; with several, the caller runs half
 * by half and reduces `delta` over the ranks between.
 */
#include "decoder.h"

typedef struct {
    const Model *model;
    const Batch *batch;
    const KvPool *pool;
    Buffers buffers;
    int32_t *seq_of_token; /* [T] */
    int64_t first_half, last_half;
    /* for the head */
    const int64_t *head_rows;
    int64_t num_head_rows;
    float *logits;
    int64_t ld_logits;
} Step;

static char *take(char **at, int64_t bytes) {
    char *start = *at;
    *at += round_up(bytes, 64);
    return start;
}

static char *layout(Step *s, char *base, int threads) {
    const Model *m = s->model;
    const Batch *b = s->batch;
    Buffers *f = &s->buffers;
    int64_t tokens = b->num_tokens, group = m->num_heads / m->num_kv_heads;
    f->delta = (bf16 *)take(&base, tokens * m->hidden * 2);
    f->residual = (float *)take(&base, tokens * m->hidden * 4);
    f->normed = (bf16 *)take(&base, tokens * m->hidden * 2);
    f->qkv = (bf16 *)take(&base, tokens * (m->num_heads + 2 * m->num_kv_heads) * m->head_dim * 2);
    f->attended = (bf16 *)take(&base, tokens * m->num_heads * m->head_dim * 2);
    f->activated = (bf16 *)take(&base, tokens * m->intermediate * 2);
    s->seq_of_token = (int32_t *)take(&base, tokens * 4);
    f->plan.tiles = (Tile *)take(&base, attention_max_tiles(b, group) * (int64_t)sizeof(Tile));
    f->plan.items = (Item *)take(&base, attention_max_items(b, group, threads) * (int64_t)sizeof(Item));
    int64_t partials = attention_max_partials(b, group, m->num_kv_heads, threads);
    f->partials = (float *)take(&base, partials * attention_partial_floats(m->head_dim) * 4);
    f->attention_scratch = take(&base, attention_scratch_bytes(m->head_dim, group) * threads);
    return base;
}

/* Bytes of scratch a step of this shape needs; 64-byte aligned. It starts with `delta` [T, E] in bf16. */
int64_t bt_decoder_scratch_bytes(const Model *model, const Batch *batch, int32_t threads) {
    Step s = {.model = model, .batch = batch};
    return layout(&s, NULL, threads) - (char *)NULL;
}

/* Claim runs of rows [*first, *last) until none is left. */
static int claim_rows(const Worker *w, int64_t total, int64_t *first, int64_t *last) {
    int64_t run = max64(1, min64(32, total / (4 * w->threads)));
    *first = pool_claim() * run;
    *last = min64(*first + run, total);
    return *first < total;
}

static void norm_stage(Worker *w, const Step *s, const float *weight, int has_delta) {
    const Buffers *f = &s->buffers;
    int64_t hidden = s->model->hidden;
    for (int64_t first, last; claim_rows(w, s->batch->num_tokens, &first, &last);)
        for (int64_t t = first; t < last; t++) {
            float *residual = f->residual + t * hidden;
            const bf16 *delta = has_delta ? f->delta + t * hidden : NULL;
            norm_row(residual, delta, residual, weight, s->model->eps, hidden, f->normed + t * hidden);
        }
    pool_barrier(w);
}

static void linear_stage(Worker *w, const Step *s, const Linear *lin, Epilogue epilogue, const bf16 *x, bf16 *y) {
    Rows rows = {x, lin->k, y, lin->n, s->batch->num_tokens};
    gemm_stage(lin, epilogue, &rows);
    pool_barrier(w);
}

static void attention_half(Worker *w, const Step *s, int64_t layer) {
    const Model *m = s->model;
    const Layer *l = m->layers + layer;
    const Buffers *f = &s->buffers;
    norm_stage(w, s, l->attention_norm, layer > 0);
    linear_stage(w, s, &l->qkv, OUT_BF16, f->normed, f->qkv);
    for (int64_t first, last; claim_rows(w, s->batch->num_tokens, &first, &last);)
        rotate_and_store_rows(m, l, s->batch, s->pool, layer, f->qkv, s->seq_of_token, first, last);
    pool_barrier(w);
    Attention a = {&f->plan, s->pool, s->batch, f->qkv, l->qkv.n, f->attended, l->out.k, layer, m->scale, f->partials, f->attention_scratch};
    attention_stage(w, &a);
    pool_barrier(w);
    linear_stage(w, s, &l->out, OUT_BF16, f->attended, f->delta);
}

static void mlp_half(Worker *w, const Step *s, int64_t layer) {
    const Layer *l = s->model->layers + layer;
    const Buffers *f = &s->buffers;
    norm_stage(w, s, l->mlp_norm, 1);
    linear_stage(w, s, &l->gate_up, OUT_SILU_MUL, f->normed, f->activated);
    linear_stage(w, s, &l->down, OUT_BF16, f->activated, f->delta);
}

static void decoder_job(Worker *w, void *arg) {
    const Step *s = arg;
    if (s->first_half == 0) {
        for (int64_t first, last; claim_rows(w, s->batch->num_tokens, &first, &last);)
            embed_rows(s->model, s->batch, s->buffers.residual, first, last);
        pool_barrier(w);
    }
    for (int64_t half = s->first_half; half < s->last_half; half++) {
        if (half % 2 == 0) attention_half(w, s, half / 2);
        else mlp_half(w, s, half / 2);
    }
}

/* Halves [first_half, last_half) of the step; half 0 begins with the embedding. */
void bt_decoder_run(const Model *model, const Batch *batch, const KvPool *pool, char *scratch, int64_t first_half,
                    int64_t last_half, int32_t threads) {
    Step s = {.model = model, .batch = batch, .pool = pool, .first_half = first_half, .last_half = last_half};
    if (batch->num_tokens == 0) return;
    layout(&s, scratch, threads);
    attention_plan(&s.buffers.plan, batch, model->num_heads, model->num_kv_heads, threads);
    for (int64_t b = 0, t = 0; b < batch->num_seqs; b++)
        for (int64_t i = 0; i < batch->query_lens[b]; i++) s.seq_of_token[t++] = (int32_t)b;
    pool_run(threads, decoder_job, &s);
}

static void head_job(Worker *w, void *arg) {
    const Step *s = arg;
    const Buffers *f = &s->buffers;
    int64_t hidden = s->model->hidden;
    for (int64_t i; (i = pool_claim()) < s->num_head_rows;) {
        int64_t t = s->head_rows[i];
        norm_row(f->residual + t * hidden, f->delta + t * hidden, NULL, s->model->final_norm, s->model->eps, hidden, f->normed + i * hidden);
    }
    pool_barrier(w);
    Rows rows = {f->normed, hidden, s->logits, s->ld_logits, s->num_head_rows};
    gemm_stage(&s->model->head, OUT_F32, &rows);
}

/* Logits [num_rows, V] fp32 of some tokens (rows of the batch) of the step that last ran all halves in `scratch`;
 * num_rows <= T. May be called again for other rows. */
void bt_decoder_head(const Model *model, const Batch *batch, char *scratch, const int64_t *rows, int64_t num_rows,
                     float *logits, int64_t ld_logits, int32_t threads) {
    Step s = {.model = model, .batch = batch, .head_rows = rows, .num_head_rows = num_rows, .logits = logits, .ld_logits = ld_logits};
    if (num_rows == 0) return;
    layout(&s, scratch, threads);
    pool_run(threads, head_job, &s);
}
