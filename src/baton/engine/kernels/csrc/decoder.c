/* Runs a range of the decoder's parts in one job, and the head.
 *
 * Part 0 is the embedding; layer l has parts 4l + 1 (attention), 4l + 2 (its output product), 4l + 3 (gate and up), 4l + 4 (down).
 * With experts part 4l + 3 also routes and ends with what the ranks have to see of every pair (experts.h), and 4l + 4 sums. Parts
 * 0, 4l + 2 and 4l + 4 end with a `delta`, which the part behind them adds to the residual. Behind every part the ranks exchange what they wrote:
 * through an `Exchange` within the one call, or by the caller, who then runs part by part.
 */
#include "decoder.h"

/* What a stage does. Between two stages of a step every item of the first is finished. */
typedef enum {
    EMBED, ATTENTION_NORM, QKV, ROTATE, ATTEND, MERGE, OUT, MLP_NORM, GATE_UP, DOWN,
    ROUTER, ROUTE, PLACE, GATHER, EXPERT_GATE_UP, EXPERT_DOWN, COMBINE, MEET
} Kind;

enum { PARTS_PER_LAYER = 4, MAX_STAGES_PER_LAYER = COMBINE + PARTS_PER_LAYER };

typedef struct {
    Kind kind;
    int64_t layer;
} Stage;

typedef struct {
    const Model *model;
    const Batch *batch;
    const KvPool *pool;
    const Shared *shared;
    Exchange *exchange; /* or NULL */
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

static char *take(char **at, int64_t bytes) {
    char *start = *at;
    *at += round_up(bytes, 64);
    return start;
}

static char *layout(Step *s, char *base) {
    const Model *m = s->model;
    const Batch *b = s->batch;
    Buffers *f = &s->buffers;
    int64_t tokens = b->num_tokens, group = m->num_heads / m->num_kv_heads, max_stages = 2 + MAX_STAGES_PER_LAYER * m->num_layers;
    f->residual = (float *)take(&base, tokens * m->hidden * 4);
    f->normed = (bf16 *)take(&base, tokens * m->hidden * 2);
    f->qkv = (bf16 *)take(&base, tokens * (m->num_heads + 2 * m->num_kv_heads) * m->head_dim * 2);
    s->seq_of_token = (int32_t *)take(&base, tokens * 4);
    s->stages = (Stage *)take(&base, max_stages * (int64_t)sizeof(Stage));
    s->items = (int32_t *)take(&base, max_stages * 4);
    f->plan.tiles = (Tile *)take(&base, attention_max_tiles(b, group) * (int64_t)sizeof(Tile));
    f->plan.items = (Item *)take(&base, attention_max_items(b, group, m->num_kv_heads, s->threads) * (int64_t)sizeof(Item));
    int64_t partials = attention_max_partials(b, group, m->num_kv_heads, s->threads);
    f->partials = (float *)take(&base, partials * attention_partial_floats(m->head_dim) * 4);
    f->attention_scratch = take(&base, attention_scratch_bytes(m->head_dim, group) * s->threads);
    return pairs_layout(&f->pairs, &m->experts, tokens, m->hidden, base);
}

/* Bytes of scratch a step of this shape needs; 64-byte aligned. */
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

/* The numbers of items of the experts' products are known when the pairs have their places: PLACE fills them in. */
static void add_routing(Step *s, int64_t layer, int64_t row_items) {
    add_product(s, ROUTER, layer, &s->model->layers[layer].experts.router, OUT_F32);
    add_stage(s, ROUTE, layer, row_items);
    add_stage(s, PLACE, layer, 1);
    add_stage(s, GATHER, layer, row_items);
    add_stage(s, EXPERT_GATE_UP, layer, 1);
    if (s->model->experts.is_dealt) add_stage(s, EXPERT_DOWN, layer, 1);
}

static void add_part(Step *s, int64_t part, int64_t row_items) {
    const AttentionPlan *plan = &s->buffers.plan;
    int64_t layer = (part - 1) / PARTS_PER_LAYER;
    const Layer *l = s->model->layers + layer;
    if (part == 0) {
        add_stage(s, EMBED, 0, row_items);
        return;
    }
    switch ((part - 1) % PARTS_PER_LAYER) {
        case 0:
            add_stage(s, ATTENTION_NORM, layer, row_items);
            add_product(s, QKV, layer, &l->qkv, OUT_BF16);
            add_stage(s, ROTATE, layer, row_items);
            add_stage(s, ATTEND, layer, plan->num_items);
            if (plan->num_partials) add_stage(s, MERGE, layer, plan->num_tiles * s->model->num_kv_heads);
            break;
        case 1: add_product(s, OUT, layer, &l->out, OUT_BF16); break;
        case 2:
            add_stage(s, MLP_NORM, layer, row_items);
            if (l->experts.gate_up) add_routing(s, layer, row_items);
            else add_product(s, GATE_UP, layer, &l->gate_up, OUT_SILU_MUL);
            break;
        default:
            if (!l->experts.gate_up) {
                add_product(s, DOWN, layer, &l->down, OUT_BF16);
                break;
            }
            /* Where the step runs part by part, an earlier call has placed the pairs. */
            if (!s->model->experts.is_dealt) add_stage(s, EXPERT_DOWN, layer, s->num_stages ? 1 : down_items(&s->buffers.pairs));
            add_stage(s, COMBINE, layer, row_items);
            break;
    }
}

static void add_parts(Step *s, int64_t first_part, int64_t last_part) {
    int64_t row_items = ceil_div(s->batch->num_tokens, rows_per_item(s->batch->num_tokens, s->threads));
    s->num_stages = 0;
    for (int64_t part = first_part; part < last_part; part++) {
        add_part(s, part, row_items);
        if (s->exchange) add_stage(s, MEET, 0, 1);
    }
}

static void norm_rows(const Step *s, const float *weight, int64_t first, int64_t last) {
    const Buffers *f = &s->buffers;
    int64_t hidden = s->model->hidden;
    for (int64_t t = first; t < last; t++) {
        float *residual = f->residual + t * hidden;
        norm_row(residual, s->shared->delta + t * hidden, residual, weight, s->model->eps, hidden, f->normed + t * hidden);
    }
}

/* `y`: this rank's first column of the output, rows `ldy` apart. */
static void product_item(const Step *s, const Linear *lin, Epilogue epilogue, const bf16 *x, bf16 *y, int64_t ldy, int64_t item) {
    Rows rows = {x, lin->k, y, ldy, s->batch->num_tokens};
    gemm_item(lin, epilogue, &rows, s->threads, item);
}

static void place_stage(const Step *s, int64_t stage) {
    const Pairs *p = &s->buffers.pairs;
    int64_t layer = s->stages[stage].layer;
    place_pairs(p, &s->model->experts, &s->model->layers[layer].experts, s->batch->num_tokens, s->threads);
    for (int64_t i = stage + 1; i < s->num_stages && s->stages[i].layer <= layer; i++) {
        if (s->stages[i].kind == EXPERT_GATE_UP) s->items[i] = gate_up_items(p);
        if (s->stages[i].kind == EXPERT_DOWN) s->items[i] = down_items(p);
    }
}

/* Stages of a layer's experts on tokens [first, last), or an item of their products. */
static void run_expert_item(const Step *s, int64_t stage, int64_t item, int64_t first, int64_t last) {
    const Model *m = s->model;
    const Experts *e = &m->experts;
    const Buffers *f = &s->buffers;
    const Pairs *p = &f->pairs;
    const ExpertLayer *layer = &m->layers[s->stages[stage].layer].experts;
    bf16 *shared = s->shared->activated, *activated = e->is_dealt ? p->own : shared, *outputs = e->is_dealt ? shared : p->own;
    int64_t tokens = s->batch->num_tokens, hidden = m->hidden, delta = m->first.delta;
    Rows router = {f->normed, hidden, p->scores, e->num_experts, tokens};
    Rows gate_up = {p->inputs, hidden, activated + m->first.expert_inner, e->inner, 0};
    Rows down = {activated, e->inner, outputs + (e->is_dealt ? 0 : delta), hidden, 0};
    switch (s->stages[stage].kind) {
        case ROUTER: gemm_item(&layer->router, OUT_F32, &router, s->threads, item); break;
        case ROUTE: route_rows(p, e, first, last); break;
        case PLACE: place_stage(s, stage); break;
        case GATHER: gather_rows(p, e, f->normed, hidden, first, last); break;
        case EXPERT_GATE_UP: gate_up_item(p, e, layer, &gate_up, item); break;
        case EXPERT_DOWN: down_item(p, e, layer, &down, item); break;
        default: combine_rows(p, e, outputs + delta, s->shared->delta + delta, m->layers[s->stages[stage].layer].out.n, hidden, first, last); break;
    }
}

static void run_item(void *arg, int64_t stage, int64_t item, int tid) {
    const Step *s = arg;
    const Model *m = s->model;
    const Buffers *f = &s->buffers;
    const Shared *x = s->shared;
    const FirstColumns *own = &m->first;
    int64_t layer = s->stages[stage].layer, tokens = s->batch->num_tokens, run = rows_per_item(tokens, s->threads);
    int64_t first = item * run, last = min64(first + run, tokens);
    const Layer *l = m->layers + layer;
    Attention a = {&f->plan, s->pool, s->batch, f->qkv, l->qkv.n, x->attended + own->attended, l->out.k, layer, m->scale, f->partials, f->attention_scratch};
    switch (s->stages[stage].kind) {
        case EMBED: embed_rows(m, s->batch, x->delta, f->residual, first, last); break;
        case ATTENTION_NORM: norm_rows(s, l->attention_norm, first, last); break;
        case QKV: product_item(s, &l->qkv, OUT_BF16, f->normed, f->qkv, l->qkv.n, item); break;
        case ROTATE: rotate_and_store_rows(m, l, s->batch, s->pool, layer, f->qkv, s->seq_of_token, first, last); break;
        case ATTEND: attention_item(&a, item, item + s->threads < f->plan.num_items ? item + s->threads : -1, tid); break;
        case MERGE: attention_merge_item(&a, item, tid); break;
        case OUT: product_item(s, &l->out, OUT_BF16, x->attended, x->delta + own->delta, m->hidden, item); break;
        case MLP_NORM: norm_rows(s, l->mlp_norm, first, last); break;
        case GATE_UP: product_item(s, &l->gate_up, OUT_SILU_MUL, f->normed, x->activated + own->activated, l->down.k, item); break;
        case DOWN: product_item(s, &l->down, OUT_BF16, x->activated, x->delta + own->delta, m->hidden, item); break;
        case MEET: exchange_meet(s->exchange); break;
        default: run_expert_item(s, stage, item, first, last); break;
    }
}

/* Parts [first_part, last_part) of the step. */
void bt_decoder_run(const Model *model, const Batch *batch, const KvPool *pool, const Shared *shared, char *scratch,
                    int64_t first_part, int64_t last_part, Exchange *exchange, int32_t threads) {
    Step s = {.model = model, .batch = batch, .pool = pool, .shared = shared, .exchange = exchange, .threads = threads};
    if (batch->num_tokens == 0) return;
    layout(&s, scratch);
    attention_plan(&s.buffers.plan, batch, model->num_heads, model->num_kv_heads, threads);
    for (int64_t b = 0, t = 0; b < batch->num_seqs; b++)
        for (int64_t i = 0; i < batch->query_lens[b]; i++) s.seq_of_token[t++] = (int32_t)b;
    add_parts(&s, first_part, last_part);
    pool_run(threads, s.num_stages, s.items, run_item, &s);
}

enum { HEAD_NORM, HEAD_BEFORE, HEAD_PRODUCT, HEAD_AFTER };

static void run_head_item(void *arg, int64_t stage, int64_t item, int tid) {
    (void)tid;
    const Step *s = arg;
    const Buffers *f = &s->buffers;
    int64_t hidden = s->model->hidden, kind = s->exchange || stage == 0 ? stage : HEAD_PRODUCT;
    if (kind == HEAD_NORM) {
        int64_t t = s->head_rows[item];
        norm_row(f->residual + t * hidden, s->shared->delta + t * hidden, NULL, s->model->final_norm, s->model->eps, hidden, f->normed + item * hidden);
    } else if (kind == HEAD_PRODUCT) {
        gemm_item(&s->model->head, OUT_F32, &s->head, s->threads, item);
    } else {
        exchange_meet(s->exchange); /* before: the logits of the last call were read; after: these ones are there */
    }
}

/* This rank's columns of the logits [num_rows, V] fp32 of some tokens (rows of the batch) of the step that last ran all parts in
 * `scratch`; num_rows <= T. With an `exchange` all columns are there on return. May be called again for other rows. */
void bt_decoder_head(const Model *model, const Batch *batch, const Shared *shared, char *scratch, const int64_t *rows,
                     int64_t num_rows, float *logits, int64_t ld_logits, Exchange *exchange, int32_t threads) {
    Step s = {.model = model, .batch = batch, .shared = shared, .exchange = exchange, .threads = threads, .head_rows = rows};
    if (num_rows == 0) return;
    layout(&s, scratch);
    s.head = (Rows){s.buffers.normed, model->hidden, logits + model->first.logits, ld_logits, num_rows};
    int32_t product = (int32_t)gemm_items(&model->head, OUT_F32, num_rows, threads);
    int32_t alone[] = {(int32_t)num_rows, product}, together[] = {(int32_t)num_rows, 1, product, 1};
    pool_run(threads, exchange ? 4 : 2, exchange ? together : alone, run_head_item, &s);
}

/* [X + 1] int32: the first pair (row) of each expert, after part 4l + 3 of a layer with experts of the step in `scratch`. */
const int32_t *bt_decoder_expert_borders(const Model *model, const Batch *batch, char *scratch, int32_t threads) {
    Step s = {.model = model, .batch = batch, .threads = threads};
    layout(&s, scratch);
    return s.buffers.pairs.borders;
}
