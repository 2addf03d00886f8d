/* Routing, grouping and summing of a mixture of experts; the products are those of gemm.c. */
#include "experts.h"

static void *take(char **at, int64_t bytes) {
    char *start = *at;
    *at += round_up(bytes, 64);
    return start;
}

char *pairs_layout(Pairs *p, const Experts *e, int64_t tokens, int64_t hidden, char *at) {
    if (e->num_experts == 0) return at;
    int64_t pairs = tokens * e->per_token, listed = (e->num_experts + 1) * (int64_t)sizeof(int32_t);
    p->scores = take(&at, tokens * e->num_experts * 4);
    p->weights = take(&at, pairs * 4);
    p->chosen = take(&at, pairs * 4);
    p->place = take(&at, pairs * 4);
    p->borders = take(&at, listed);
    p->active = take(&at, listed);
    p->first_gate_up = take(&at, listed);
    p->first_down = take(&at, listed);
    p->counts = take(&at, 2 * (int64_t)sizeof(int32_t));
    p->inputs = take(&at, pairs * hidden * 2);
    p->own = take(&at, pairs * (e->is_dealt ? e->inner : hidden) * 2);
    return at;
}

/* x[i] = exp(x[i] - max); their sum. */
static float exponentials(float *x, int64_t n) {
    __m512 top = _mm512_set1_ps(-__builtin_inff()), sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < n; i += LANES) top = _mm512_mask_max_ps(top, lanes_below(n - i), top, _mm512_maskz_loadu_ps(lanes_below(n - i), x + i));
    __m512 shift = _mm512_set1_ps(_mm512_reduce_max_ps(top));
    for (int64_t i = 0; i < n; i += LANES) {
        __mmask16 m = lanes_below(n - i);
        __m512 y = exp2_ps(_mm512_mul_ps(_mm512_sub_ps(_mm512_maskz_loadu_ps(m, x + i), shift), _mm512_set1_ps(LOG2E)));
        _mm512_mask_storeu_ps(x + i, m, y);
        sum = _mm512_mask_add_ps(sum, m, sum, y);
    }
    return _mm512_reduce_add_ps(sum);
}

/* The largest of x that is not yet TAKEN; always a valid index, even among NaNs. */
#define TAKEN (-1.0f)
static int32_t take_largest(float *x, int64_t n, float *value) {
    int64_t best = -1;
    for (int64_t i = 0; i < n; i++)
        if (x[i] != TAKEN && (best < 0 || x[i] > x[best])) best = i;
    *value = x[best];
    x[best] = TAKEN;
    return (int32_t)best;
}

void route_rows(const Pairs *p, const Experts *e, int64_t first, int64_t last) {
    int64_t k = e->per_token;
    for (int64_t t = first; t < last; t++) {
        float *scores = p->scores + t * e->num_experts, *weights = p->weights + t * k, chosen = 0.0f;
        float all = exponentials(scores, e->num_experts);
        for (int64_t j = 0; j < k; j++) {
            p->chosen[t * k + j] = take_largest(scores, e->num_experts, weights + j);
            chosen += weights[j];
        }
        for (int64_t j = 0; j < k; j++) weights[j] /= e->normalises ? chosen : all;
    }
}

void place_pairs(const Pairs *p, const Experts *e, const ExpertLayer *layer, int64_t tokens, int threads) {
    int64_t pairs = tokens * e->per_token;
    int32_t active = 0, *next = p->active; /* its own content comes after the places */
    memset(p->borders, 0, (size_t)(e->num_experts + 1) * sizeof(int32_t));
    for (int64_t i = 0; i < pairs; i++) p->borders[p->chosen[i] + 1]++;
    for (int64_t x = 0; x < e->num_experts; x++) p->borders[x + 1] += p->borders[x];
    memcpy(next, p->borders, (size_t)e->num_experts * sizeof(int32_t));
    for (int64_t i = 0; i < pairs; i++) p->place[i] = next[p->chosen[i]]++;
    for (int64_t x = e->first; x < e->last; x++)
        if (p->borders[x + 1] > p->borders[x]) p->active[active++] = (int32_t)x;
    int cut = active ? (int)ceil_div(threads, active) : 1;
    p->counts[0] = active, p->counts[1] = cut;
    p->first_gate_up[0] = p->first_down[0] = 0;
    for (int32_t i = 0; i < active; i++) {
        int64_t x = p->active[i], rows = p->borders[x + 1] - p->borders[x];
        p->first_gate_up[i + 1] = p->first_gate_up[i] + (int32_t)gemm_items(layer->gate_up + x - e->first, OUT_SILU_MUL, rows, cut);
        p->first_down[i + 1] = p->first_down[i] + (int32_t)gemm_items(layer->down + x - e->first, OUT_BF16, rows, cut);
    }
}

/* A stage has at least one item; a rank may have no expert that is wanted. */
int32_t gate_up_items(const Pairs *p) { return p->counts[0] ? p->first_gate_up[p->counts[0]] : 1; }
int32_t down_items(const Pairs *p) { return p->counts[0] ? p->first_down[p->counts[0]] : 1; }

void gather_rows(const Pairs *p, const Experts *e, const bf16 *x, int64_t hidden, int64_t first, int64_t last) {
    for (int64_t i = first * e->per_token; i < last * e->per_token; i++) {
        if (p->chosen[i] < e->first || p->chosen[i] >= e->last) continue;
        memcpy(p->inputs + p->place[i] * hidden, x + i / e->per_token * hidden, (size_t)hidden * sizeof(bf16));
    }
}

static void product_item(const Pairs *p, const Experts *e, const Linear *linears, const int32_t *first_item, Epilogue epilogue,
                         const Rows *rows, int64_t item) {
    int32_t low = 0, high = p->counts[0];
    if (high == 0) return;
    while (high - low > 1) {
        int32_t middle = (low + high) / 2;
        if (first_item[middle] <= item) low = middle;
        else high = middle;
    }
    int64_t x = p->active[low], row = p->borders[x];
    Rows own = {rows->x + row * rows->ldx, rows->ldx, (bf16 *)rows->y + row * rows->ldy, rows->ldy, p->borders[x + 1] - row};
    gemm_item(linears + x - e->first, epilogue, &own, p->counts[1], item - first_item[low]);
}

void gate_up_item(const Pairs *p, const Experts *e, const ExpertLayer *layer, const Rows *rows, int64_t item) {
    product_item(p, e, layer->gate_up, p->first_gate_up, OUT_SILU_MUL, rows, item);
}

void down_item(const Pairs *p, const Experts *e, const ExpertLayer *layer, const Rows *rows, int64_t item) {
    product_item(p, e, layer->down, p->first_down, OUT_BF16, rows, item);
}

void combine_rows(const Pairs *p, const Experts *e, const bf16 *outputs, bf16 *y, int64_t n, int64_t ld, int64_t first, int64_t last) {
    for (int64_t t = first; t < last; t++) {
        const int32_t *place = p->place + t * e->per_token;
        const float *weights = p->weights + t * e->per_token;
        for (int64_t i = 0; i < n; i += LANES) {
            __mmask16 m = lanes_below(n - i);
            __m512 sum = _mm512_setzero_ps();
            for (int64_t j = 0; j < e->per_token; j++)
                sum = _mm512_fmadd_ps(_mm512_set1_ps(weights[j]), load_bf16_masked(m, outputs + place[j] * ld + i), sum);
            store_bf16_masked(y + t * ld + i, m, sum);
        }
    }
}
