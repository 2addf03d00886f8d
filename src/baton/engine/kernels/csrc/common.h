/* What every kernel shares: vector maths, bf16 conversion, the thread pool's interface.
 *
 * The rule of all kernels here: the result of a row is a fixed sequence of operations on that row's own inputs. It never
 * depends on how many rows or sequences are computed beside it, on the thread count, or on which thread computes it.
 */
#ifndef BATON_COMMON_H
#define BATON_COMMON_H

#include <immintrin.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

typedef uint16_t bf16;

enum { LANES = 16, PANEL = 32, ROW_TILE = 12, KEY_BLOCK = 128, TILE_ROWS = 192 };

INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

/* Mask of the first `n` lanes; n <= 0 gives none, n >= 16 all. */
INLINE __mmask16 lanes_below(int64_t n) {
    return n >= LANES ? (__mmask16)0xffff : n <= 0 ? 0 : (__mmask16)((1u << n) - 1);
}

INLINE __m512 widen(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
INLINE __m512 load_bf16(const bf16 *p) { return widen(_mm256_loadu_si256((const __m256i *)p)); }
INLINE __m512 load_bf16_masked(__mmask16 m, const bf16 *p) { return widen(_mm256_maskz_loadu_epi16(m, p)); }
INLINE void store_bf16(bf16 *p, __m512 x) { _mm256_storeu_si256((__m256i *)p, (__m256i)_mm512_cvtneps_pbh(x)); }
INLINE void store_bf16_masked(bf16 *p, __mmask16 m, __m512 x) {
    _mm256_mask_storeu_epi16(p, m, (__m256i)_mm512_cvtneps_pbh(x));
}
INLINE __m512bh as_pairs(__m512i x) { return (__m512bh)x; }

/* 2^x. Exactly 1 at 0, exactly 0 below -150 and at -inf; relative error below 3e-7 elsewhere. The polynomial is the
 * Taylor series of 2^r for |r| <= 1/2, coefficients ln(2)^n / n!. */
INLINE __m512 exp2_ps(__m512 x) {
    x = _mm512_max_ps(x, _mm512_set1_ps(-200.0f));
    __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 r = _mm512_sub_ps(x, n);
    __m512 p = _mm512_set1_ps(1.5403530e-4f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3333558e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(9.6181291e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.5504109e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.4022651e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.9314718e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, n);
}

#define LOG2E 1.44269504088896341f

/* x * sigmoid(x) */
INLINE __m512 silu_ps(__m512 x) {
    __m512 e = exp2_ps(_mm512_min_ps(_mm512_mul_ps(x, _mm512_set1_ps(-LOG2E)), _mm512_set1_ps(126.0f)));
    return _mm512_div_ps(x, _mm512_add_ps(_mm512_set1_ps(1.0f), e));
}

/* pool.c: runs items 0..items[stage]-1 of each stage on up to `threads` threads, stage after stage. Every count is at least 1.
 * Items of a stage are claimed in ascending order. `tid` is below `threads`. */
typedef void (*RunItem)(void *arg, int64_t stage, int64_t item, int tid);
void pool_run(int threads, int64_t num_stages, const int32_t *items, RunItem run, void *arg);

#endif
