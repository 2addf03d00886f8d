/* See attention_block.h. */
#include "attention_block.h"

#include "gemm.h"

/* A row of D bf16 values into the second-level cache, where it waits for a block's time without pushing out the current one. */
INLINE void fetch_row(const bf16 *row, int64_t head_dim) {
    for (int64_t i = 0; i < head_dim; i += 32) _mm_prefetch((const char *)(row + i), _MM_HINT_T1);
}

/* 16 rows of 16 32-bit words -> 16 columns. */
INLINE void transpose_16x16(__m512i r[16]) {
    __m512i t[16];
    _Pragma("GCC unroll 8") for (int i = 0; i < 8; i++) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    _Pragma("GCC unroll 4") for (int i = 0; i < 4; i++) {
        r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
    _Pragma("GCC unroll 4") for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    _Pragma("GCC unroll 4") for (int i = 0; i < 4; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}

/* Words [word, word + 16) of 16 keys, transposed: r[i] holds word + i of each key. */
INLINE void load_transposed(const bf16 *const *keys, int64_t word, int64_t words, __m512i r[16]) {
    if (words - word >= LANES) {
        _Pragma("GCC unroll 16") for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_si512(keys[i] + 2 * word);
    } else {
        __mmask16 m = lanes_below(words - word);
        _Pragma("GCC unroll 16") for (int i = 0; i < 16; i++) r[i] = _mm512_maskz_loadu_epi32(m, keys[i] + 2 * word);
    }
    transpose_16x16(r);
}

/* Keys become the columns of a packed weight [32-key panel][D/2][32][2]: the scores are then a product like any other. */
void pack_keys(Scratch *s, const KeyRows *at, const KeyRows *next, int64_t head_dim, int64_t num_keys) {
    int64_t words = head_dim / 2;
    for (int64_t key = 0; key < num_keys; key += LANES) {
        bf16 *dst = s->k + key / PANEL * panel_size(head_dim) + key % PANEL * 2;
        for (int64_t word = 0; word < words; word += LANES) {
            __m512i r[16];
            load_transposed(at->keys + key, word, words, r);
            if (words - word >= LANES) {
                _Pragma("GCC unroll 16") for (int i = 0; i < 16; i++) _mm512_store_si512(dst + (word + i) * 64, r[i]);
            } else {
                _Pragma("GCC unroll 16") for (int i = 0; i < 16; i++)
                    if (word + i < words) _mm512_store_si512(dst + (word + i) * 64, r[i]);
            }
        }
        if (next)
            for (int64_t i = key; i < key + LANES; i++) fetch_row(next->keys[i], head_dim);
    }
}

/* Dimensions [dim, dim + 32) of two keys' values, interleaved. */
INLINE void load_pair(const KeyRows *at, int64_t key, int64_t dim, int64_t head_dim, __m512i *low, __m512i *high) {
    static const uint16_t order[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                       8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    __m512i low_order = _mm512_loadu_si512(order), high_order = _mm512_add_epi16(low_order, _mm512_set1_epi16(16)), a, b;
    if (head_dim - dim >= PANEL) {
        a = _mm512_loadu_si512(at->values[key] + dim);
        b = _mm512_loadu_si512(at->values[key + 1] + dim);
    } else {
        __mmask32 m = ((__mmask32)1 << (head_dim - dim)) - 1;
        a = _mm512_maskz_loadu_epi16(m, at->values[key] + dim);
        b = _mm512_maskz_loadu_epi16(m, at->values[key + 1] + dim);
    }
    *low = _mm512_permutex2var_epi16(a, low_order, b);
    *high = _mm512_permutex2var_epi16(a, high_order, b);
}

/* Values become [32-dim panel][pair of keys][32][2]. */
void pack_values(Scratch *s, const KeyRows *at, const KeyRows *next, int64_t head_dim, int64_t num_keys) {
    for (int64_t key = 0; key < num_keys; key += 2) {
        for (int64_t dim = 0; dim < head_dim; dim += PANEL) {
            __m512i low, high;
            load_pair(at, key, dim, head_dim, &low, &high);
            bf16 *dst = s->v + dim * KEY_BLOCK + key * PANEL;
            _mm512_store_si512(dst, low);
            _mm512_store_si512(dst + 32, high);
        }
        if (next) fetch_row(next->values[key], head_dim), fetch_row(next->values[key + 1], head_dim);
    }
}

void packed_scores(Scratch *s, const bf16 *q, int64_t rows, int64_t head_dim, int64_t num_keys) {
    for (int64_t key = 0; key < num_keys; key += PANEL) {
        const bf16 *k = s->k + key / PANEL * panel_size(head_dim);
        float *dst = s->scores + key;
#define SCORE(R)                                                                     \
    {                                                                                \
        __m512 acc[R][2];                                                            \
        micro_##R(q, head_dim, k, head_dim / 2, acc);                                \
        _Pragma("GCC unroll 16") for (int r = 0; r < R; r++) {                       \
            _mm512_store_ps(dst + r * KEY_BLOCK, acc[r][0]);                         \
            _mm512_store_ps(dst + r * KEY_BLOCK + LANES, acc[r][1]);                 \
        }                                                                            \
    }
        FOR_ROWS(rows, SCORE)
#undef SCORE
    }
}

void packed_values(Scratch *s, int64_t rows, int64_t head_dim, int64_t num_keys) {
    int64_t dims = padded_dim(head_dim);
    for (int64_t dim = 0; dim < head_dim; dim += PANEL) {
        const bf16 *v = s->v + dim * KEY_BLOCK;
        float *dst = s->block + dim;
#define VALUES(R)                                                                    \
    {                                                                                \
        __m512 acc[R][2];                                                            \
        micro_##R(s->weights, KEY_BLOCK, v, num_keys / 2, acc);                      \
        _Pragma("GCC unroll 16") for (int r = 0; r < R; r++) {                       \
            _mm512_store_ps(dst + r * dims, acc[r][0]);                              \
            _mm512_store_ps(dst + r * dims + LANES, acc[r][1]);                      \
        }                                                                            \
    }
        FOR_ROWS(rows, VALUES)
#undef VALUES
    }
}

INLINE __m512bh broadcast_pair(const bf16 *p) {
    int32_t pair;
    memcpy(&pair, p, 4);
    return as_pairs(_mm512_set1_epi32(pair));
}

/* The chain of a score over the head dimension is that of `micro_R`: from zero, ascending. */
#define DIRECT_SCORES(R)                                                                                                    \
    static void direct_scores_##R(Scratch *s, const KeyRows *at, const KeyRows *next, int64_t head_dim, int64_t num_keys) { \
        int64_t words = head_dim / 2;                                                                                       \
        for (int64_t key = 0; key < num_keys; key += LANES) {                                                               \
            __m512 acc[R];                                                                                                  \
            _Pragma("GCC unroll 16") for (int r = 0; r < R; r++) acc[r] = _mm512_setzero_ps();                              \
            if (next)                                                                                                       \
                for (int64_t i = key; i < key + LANES; i++) fetch_row(next->keys[i], head_dim);                             \
            for (int64_t word = 0; word < words; word += LANES) {                                                           \
                __m512i t[16];                                                                                              \
                load_transposed(at->keys + key, word, words, t);                                                            \
                _Pragma("GCC unroll 16") for (int i = 0; i < 16; i++) {                                                     \
                    if (word + i >= words) break;                                                                           \
                    _Pragma("GCC unroll 16") for (int r = 0; r < R; r++)                                                    \
                        acc[r] = _mm512_dpbf16_ps(acc[r], broadcast_pair(s->q + r * head_dim + 2 * (word + i)), as_pairs(t[i])); \
                }                                                                                                           \
            }                                                                                                               \
            _Pragma("GCC unroll 16") for (int r = 0; r < R; r++) _mm512_store_ps(s->scores + r * KEY_BLOCK + key, acc[r]);  \
        }                                                                                                                   \
    }

#define DIRECT_VALUES(R)                                                                                                    \
    static void direct_values_##R(Scratch *s, const KeyRows *at, const KeyRows *next, int64_t head_dim, int64_t num_keys) { \
        int64_t dims = padded_dim(head_dim);                                                                                \
        for (int64_t dim = 0; dim < head_dim; dim += PANEL) {                                                               \
            __m512 acc[R][2];                                                                                               \
            _Pragma("GCC unroll 16") for (int r = 0; r < R; r++) acc[r][0] = acc[r][1] = _mm512_setzero_ps();               \
            for (int64_t key = 0; key < num_keys; key += 2) {                                                               \
                __m512i low, high;                                                                                          \
                load_pair(at, key, dim, head_dim, &low, &high);                                                             \
                if (next) {                                                                                                 \
                    _mm_prefetch((const char *)(next->values[key] + dim), _MM_HINT_T1);                                     \
                    _mm_prefetch((const char *)(next->values[key + 1] + dim), _MM_HINT_T1);                                 \
                }                                                                                                           \
                _Pragma("GCC unroll 16") for (int r = 0; r < R; r++) {                                                      \
                    __m512bh p = broadcast_pair(s->weights + r * KEY_BLOCK + key);                                          \
                    acc[r][0] = _mm512_dpbf16_ps(acc[r][0], p, as_pairs(low));                                              \
                    acc[r][1] = _mm512_dpbf16_ps(acc[r][1], p, as_pairs(high));                                             \
                }                                                                                                           \
            }                                                                                                               \
            _Pragma("GCC unroll 16") for (int r = 0; r < R; r++) {                                                          \
                _mm512_store_ps(s->block + r * dims + dim, acc[r][0]);                                                      \
                _mm512_store_ps(s->block + r * dims + dim + LANES, acc[r][1]);                                              \
            }                                                                                                               \
        }                                                                                                                   \
    }

#define DIRECT(R) DIRECT_SCORES(R) DIRECT_VALUES(R)
DIRECT(1)
DIRECT(2)
DIRECT(3)
DIRECT(4)
DIRECT(5)
DIRECT(6)
DIRECT(7)
DIRECT(8)
DIRECT(9)
DIRECT(10)
DIRECT(11)
DIRECT(12)

void direct_scores(Scratch *s, const KeyRows *at, const KeyRows *next, int64_t rows, int64_t head_dim, int64_t num_keys) {
#define CALL(R) direct_scores_##R(s, at, next, head_dim, num_keys);
    FOR_ROWS(rows, CALL)
#undef CALL
}

void direct_values(Scratch *s, const KeyRows *at, const KeyRows *next, int64_t rows, int64_t head_dim, int64_t num_keys) {
#define CALL(R) direct_values_##R(s, at, next, head_dim, num_keys);
    FOR_ROWS(rows, CALL)
#undef CALL
}
