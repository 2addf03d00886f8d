/* y = x W^T with bf16 inputs and fp32 accumulation, W packed once.
 *
 * Packed layout: panels of PANEL = 32 output columns, each [K/2][32][2]: for a pair of k the 32 columns' two values side by
 * side, which is what vdpbf16ps multiplies. Columns beyond N are zero. Each output is one chain of vdpbf16ps over
 * ascending k, so it does not depend on the number of rows nor on the tile a row falls into.
 */
#ifndef BATON_GEMM_H
#define BATON_GEMM_H

#include "common.h"

typedef enum { OUT_BF16 = 0, OUT_F32 = 1, OUT_SILU_MUL = 2 } Epilogue;

typedef struct {
    const bf16 *w;     /* packed */
    const float *bias; /* [n] in the order of the packed columns' sources, or NULL */
    int64_t n;         /* columns of the output; for OUT_SILU_MUL the weight has 2n rows, gate then up */
    int64_t k;         /* even */
} Linear;

typedef struct {
    const bf16 *x;
    int64_t ldx; /* elements between rows of x */
    void *y;
    int64_t ldy;
    int64_t m;
} Rows;

INLINE int64_t panel_size(int64_t k) { return k * PANEL; }
INLINE int64_t columns_per_panel(Epilogue e) { return e == OUT_SILU_MUL ? PANEL / 2 : PANEL; }

/* One product as independent items: their number, and one of them. */
int64_t gemm_items(const Linear *lin, Epilogue epilogue, int64_t m, int threads);
void gemm_item(const Linear *lin, Epilogue epilogue, const Rows *rows, int threads, int64_t item);

/* acc[r][0..1] = the 32 columns of one panel for `R` rows of x (bf16, ldx apart), a chain over k pairs. */
#define MICRO_KERNEL(R)                                                                                              \
    INLINE void micro_##R(const bf16 *x, int64_t ldx, const bf16 *w, int64_t k_pairs, __m512 acc[][2]) {             \
        __m512 c[R][2];                                                                                              \
        _Pragma("GCC unroll 16") for (int r = 0; r < R; r++) c[r][0] = c[r][1] = _mm512_setzero_ps();                \
        for (int64_t k = 0; k < k_pairs; k++) {                                                                      \
            __m512bh b0 = as_pairs(_mm512_loadu_si512(w + k * 64)), b1 = as_pairs(_mm512_loadu_si512(w + k * 64 + 32)); \
            _mm_prefetch((const char *)(w + k * 64 + 1024), _MM_HINT_T0);                                            \
            _mm_prefetch((const char *)(w + k * 64 + 1024 + 32), _MM_HINT_T0);                                       \
            _Pragma("GCC unroll 16") for (int r = 0; r < R; r++) {                                                   \
                int32_t pair;                                                                                        \
                memcpy(&pair, x + r * ldx + 2 * k, 4);                                                               \
                __m512bh a = as_pairs(_mm512_set1_epi32(pair));                                                      \
                c[r][0] = _mm512_dpbf16_ps(c[r][0], a, b0);                                                          \
                c[r][1] = _mm512_dpbf16_ps(c[r][1], a, b1);                                                          \
            }                                                                                                        \
        }                                                                                                            \
        _Pragma("GCC unroll 16") for (int r = 0; r < R; r++) acc[r][0] = c[r][0], acc[r][1] = c[r][1];               \
    }
MICRO_KERNEL(1)
MICRO_KERNEL(2)
MICRO_KERNEL(3)
MICRO_KERNEL(4)
MICRO_KERNEL(5)
MICRO_KERNEL(6)
MICRO_KERNEL(7)
MICRO_KERNEL(8)
MICRO_KERNEL(9)
MICRO_KERNEL(10)
MICRO_KERNEL(11)
MICRO_KERNEL(12)

/* The micro kernel for 1..ROW_TILE rows; `acc` stays in registers when the caller uses it at once. */
#define FOR_ROWS(rows, BODY) \
    switch (rows) {          \
        case 1: BODY(1) break;   \
        case 2: BODY(2) break;   \
        case 3: BODY(3) break;   \
        case 4: BODY(4) break;   \
        case 5: BODY(5) break;   \
        case 6: BODY(6) break;   \
        case 7: BODY(7) break;   \
        case 8: BODY(8) break;   \
        case 9: BODY(9) break;   \
        case 10: BODY(10) break; \
        case 11: BODY(11) break; \
        default: BODY(12) break; \
    }

#endif
