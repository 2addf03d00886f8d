/* Work on single rows (tokens): embedding, RMS norm, rotary embedding and writing of KV. */
#include <math.h>

#include "decoder.h"

void embed_rows(const Model *m, const Batch *b, bf16 *delta, float *residual, int64_t first, int64_t last) {
    size_t bytes = (size_t)m->embedding_columns * sizeof(bf16);
    for (int64_t t = first; t < last; t++) {
        memcpy(delta + t * m->hidden + m->first.delta, m->embedding + b->token_ids[t] * m->embedding_columns, bytes);
        memset(residual + t * m->hidden, 0, (size_t)m->hidden * sizeof(float));
    }
}

void norm_row(const float *residual, const bf16 *delta, float *residual_out, const float *weight, float eps, int64_t n, bf16 *out) {
    __m512 squares = _mm512_setzero_ps();
    for (int64_t i = 0; i < n; i += LANES) {
        __mmask16 k = lanes_below(n - i);
        __m512 x = _mm512_maskz_loadu_ps(k, residual + i);
        if (delta) x = _mm512_add_ps(x, load_bf16_masked(k, delta + i));
        if (residual_out) _mm512_mask_storeu_ps(residual_out + i, k, x);
        squares = _mm512_fmadd_ps(x, x, squares);
    }
    __m512 factor = _mm512_set1_ps(1.0f / sqrtf(_mm512_reduce_add_ps(squares) / (float)n + eps));
    for (int64_t i = 0; i < n; i += LANES) {
        __mmask16 k = lanes_below(n - i);
        __m512 x = _mm512_maskz_loadu_ps(k, residual + i);
        /* With residual_out the sum was stored there, else it is formed again. */
        if (delta && residual_out) x = _mm512_maskz_loadu_ps(k, residual_out + i);
        else if (delta) x = _mm512_add_ps(x, load_bf16_masked(k, delta + i));
        store_bf16_masked(out + i, k, _mm512_mul_ps(_mm512_mul_ps(x, factor), _mm512_maskz_loadu_ps(k, weight + i)));
    }
}

/* RMS norm of one head in fp32; 1 when the model has none. */
static float head_factor(const bf16 *x, const float *weight, float eps, int64_t n) {
    if (!weight) return 1.0f;
    __m512 squares = _mm512_setzero_ps();
    for (int64_t i = 0; i < n; i += LANES) {
        __m512 v = load_bf16_masked(lanes_below(n - i), x + i);
        squares = _mm512_fmadd_ps(v, v, squares);
    }
    return 1.0f / sqrtf(_mm512_reduce_add_ps(squares) / (float)n + eps);
}

/* dst may be x. The two halves of a head are the rotated pairs (x[i], x[i + n/2]). */
static void rotate_head(const bf16 *x, bf16 *dst, const float *weight, float eps, const float *rotary, int64_t n) {
    int64_t half = n / 2;
    __m512 factor = _mm512_set1_ps(head_factor(x, weight, eps, n));
    for (int64_t i = 0; i < half; i += LANES) {
        __mmask16 k = lanes_below(half - i);
        __m512 a = load_bf16_masked(k, x + i), b = load_bf16_masked(k, x + half + i);
        if (weight) {
            a = _mm512_mul_ps(_mm512_mul_ps(a, factor), _mm512_maskz_loadu_ps(k, weight + i));
            b = _mm512_mul_ps(_mm512_mul_ps(b, factor), _mm512_maskz_loadu_ps(k, weight + half + i));
        }
        __m512 cosine = _mm512_maskz_loadu_ps(k, rotary + i), sine = _mm512_maskz_loadu_ps(k, rotary + half + i);
        store_bf16_masked(dst + i, k, _mm512_fmsub_ps(a, cosine, _mm512_mul_ps(b, sine)));
        store_bf16_masked(dst + half + i, k, _mm512_fmadd_ps(b, cosine, _mm512_mul_ps(a, sine)));
    }
}

void rotate_and_store_rows(const Model *m, const Layer *l, const Batch *b, const KvPool *pool, int64_t layer, bf16 *qkv,
                           const int32_t *seq_of_token, int64_t first, int64_t last) {
    int64_t dim = m->head_dim, width = (m->num_heads + 2 * m->num_kv_heads) * dim;
    for (int64_t t = first; t < last; t++) {
        bf16 *row = qkv + t * width;
        int64_t position = b->positions[t];
        const float *rotary = m->rotary + position * dim;
        int64_t page = b->page_tables[seq_of_token[t] * b->table_width + position / pool->page_size];
        for (int64_t h = 0; h < m->num_heads; h++) rotate_head(row + h * dim, row + h * dim, l->q_norm, m->eps, rotary, dim);
        const bf16 *keys = row + m->num_heads * dim, *values = keys + m->num_kv_heads * dim;
        for (int64_t h = 0; h < m->num_kv_heads; h++) {
            int64_t slot = position % pool->page_size;
            rotate_head(keys + h * dim, kv_slot(pool, page, layer, 0, h, slot), l->k_norm, m->eps, rotary, dim);
            memcpy(kv_slot(pool, page, layer, 1, h, slot), values + h * dim, (size_t)dim * sizeof(bf16));
        }
    }
}
