/* Linear layers: packing of the weights and the tiled product with its epilogues (bias, silu(gate) * up, fp32 output). */
#include "gemm.h"

enum { ITEMS_PER_THREAD = 24 };

/* Row of the source weight that column `lane` of `panel` holds, or -1 for padding. With `pair_offset` > 0 a panel holds 16
 * gate columns and the 16 up columns that belong to them (row + pair_offset in the source). */
static int64_t source_row(int64_t panel, int64_t lane, int64_t n, int64_t pair_offset) {
    int64_t column = pair_offset ? panel * LANES + lane % LANES : panel * PANEL + lane;
    if (column >= n) return -1;
    return lane >= LANES && pair_offset ? column + pair_offset : column;
}

/* Size in elements of the packed weight: n as in `Linear`. */
int64_t bt_packed_size(int64_t n, int64_t k, int32_t paired) {
    return ceil_div(n, paired ? PANEL / 2 : PANEL) * panel_size(k);
}

/* src [n or 2n][k] row-major bf16 -> dst, bt_packed_size elements, 64-byte aligned. */
void bt_pack(const bf16 *src, bf16 *dst, int64_t n, int64_t k, int32_t paired) {
    int64_t panels = ceil_div(n, paired ? PANEL / 2 : PANEL);
    for (int64_t p = 0; p < panels; p++) {
        for (int64_t lane = 0; lane < PANEL; lane++) {
            int64_t row = source_row(p, lane, n, paired ? n : 0);
            bf16 *out = dst + p * panel_size(k) + lane * 2;
            for (int64_t i = 0; i < k / 2; i++) {
                if (row < 0) memset(out + i * 64, 0, 4);
                else memcpy(out + i * 64, src + row * k + 2 * i, 4);
            }
        }
    }
}

INLINE void store_row(Epilogue epilogue, const Linear *lin, int64_t column, __m512 c0, __m512 c1, void *y) {
    __mmask16 m0 = lanes_below(lin->n - column), m1 = lanes_below(lin->n - column - LANES);
    if (epilogue == OUT_SILU_MUL) {
        if (lin->bias) {
            c0 = _mm512_add_ps(c0, _mm512_maskz_loadu_ps(m0, lin->bias + column));
            c1 = _mm512_add_ps(c1, _mm512_maskz_loadu_ps(m0, lin->bias + lin->n + column));
        }
        store_bf16_masked((bf16 *)y + column, m0, _mm512_mul_ps(silu_ps(c0), c1));
        return;
    }
    if (lin->bias) {
        c0 = _mm512_add_ps(c0, _mm512_maskz_loadu_ps(m0, lin->bias + column));
        c1 = _mm512_add_ps(c1, _mm512_maskz_loadu_ps(m1, lin->bias + column + LANES));
    }
    if (epilogue == OUT_F32) {
        _mm512_mask_storeu_ps((float *)y + column, m0, c0);
        _mm512_mask_storeu_ps((float *)y + column + LANES, m1, c1);
    } else {
        store_bf16_masked((bf16 *)y + column, m0, c0);
        store_bf16_masked((bf16 *)y + column + LANES, m1, c1);
    }
}

/* Rows [first, last) of one panel. */
static void panel_rows(const Linear *lin, Epilogue epilogue, const Rows *rows, int64_t panel, int64_t first, int64_t last) {
    const bf16 *w = lin->w + panel * panel_size(lin->k);
    int64_t column = panel * columns_per_panel(epilogue);
    int64_t element = epilogue == OUT_F32 ? 4 : 2;
    while (first < last) {
        /* Even tiles: 13 rows as 7 + 6, since a tile of one row costs nearly as much as one of six. */
        int64_t tiles = ceil_div(last - first, ROW_TILE), count = ceil_div(last - first, tiles);
        const bf16 *x = rows->x + first * rows->ldx;
        char *y = (char *)rows->y + first * rows->ldy * element;
#define TILE(R)                                                                                              \
    {                                                                                                        \
        __m512 acc[R][2];                                                                                    \
        micro_##R(x, rows->ldx, w, lin->k / 2, acc);                                                         \
        _Pragma("GCC unroll 16") for (int r = 0; r < R; r++)                                                 \
            store_row(epilogue, lin, column, acc[r][0], acc[r][1], y + r * rows->ldy * element);             \
    }
        FOR_ROWS(count, TILE)
#undef TILE
        first += count;
    }
}

/* Rows in one block of tiles: with their x they should stay in the second-level cache while the panels stream by. */
static int64_t block_rows(int64_t k) {
    int64_t fit = (512 * 1024) / (2 * k) / ROW_TILE * ROW_TILE;
    return fit < 8 * ROW_TILE ? 8 * ROW_TILE : fit;
}

typedef struct {
    int64_t panels, blocks, rows_per_block;
    int64_t run; /* tiles in one item: an item of a few microseconds would be mostly claiming */
} Cut;

static Cut cut_product(const Linear *lin, Epilogue epilogue, int64_t m, int threads) {
    Cut c = {.panels = ceil_div(lin->n, columns_per_panel(epilogue)), .blocks = ceil_div(m, block_rows(lin->k))};
    c.rows_per_block = round_up(ceil_div(m, c.blocks), ROW_TILE);
    c.run = max64(1, c.panels * c.blocks / (ITEMS_PER_THREAD * threads));
    return c;
}

int64_t gemm_items(const Linear *lin, Epilogue epilogue, int64_t m, int threads) {
    Cut c = cut_product(lin, epilogue, m, threads);
    return ceil_div(c.panels * c.blocks, c.run);
}

void gemm_item(const Linear *lin, Epilogue epilogue, const Rows *rows, int threads, int64_t item) {
    Cut c = cut_product(lin, epilogue, rows->m, threads);
    int64_t end = min64((item + 1) * c.run, c.panels * c.blocks);
    for (int64_t tile = item * c.run; tile < end; tile++) {
        int64_t first = tile / c.panels * c.rows_per_block;
        panel_rows(lin, epilogue, rows, tile % c.panels, first, min64(first + c.rows_per_block, rows->m));
    }
}

typedef struct {
    const Linear *lin;
    Epilogue epilogue;
    const Rows *rows;
    int threads;
} Product;

static void run_product_item(void *arg, int64_t stage, int64_t item, int tid) {
    (void)stage, (void)tid;
    const Product *p = arg;
    gemm_item(p->lin, p->epilogue, p->rows, p->threads, item);
}

/* One product on its own, for tests and benchmarks. */
void bt_linear(const Linear *lin, int32_t epilogue, const Rows *rows, int32_t threads) {
    if (rows->m == 0) return;
    Product p = {lin, (Epilogue)epilogue, rows, threads};
    int32_t items = (int32_t)gemm_items(lin, p.epilogue, rows->m, threads);
    pool_run(threads, 1, &items, run_product_item, &p);
}
