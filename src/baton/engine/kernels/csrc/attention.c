/* The kernel of attention.h: packing a block of keys, scores, weights, output, merging. How work is cut is in plan.c. */
#include <math.h>

#include "attention.h"
#include "gemm.h"

static const bf16 zero_row[1024] __attribute__((aligned(64)));

/* One thread's buffers for one item. Rows are (query, head of the group), query first. */
typedef struct {
    const bf16 *keys[KEY_BLOCK], *values[KEY_BLOCK];
    bf16 *q;         /* [rows][D] */
    bf16 *k, *v;     /* packed block: panels of 32 keys, panels of 32 dims */
    float *scores;   /* [ROW_TILE][KEY_BLOCK] */
    bf16 *weights;   /* [ROW_TILE][KEY_BLOCK] */
    float *block;    /* [ROW_TILE][Dp] output of one block */
    float *out;      /* [rows][Dp] */
    float *max, *sum; /* [rows] of the blocks so far: maximum in log2 units, sum of weights */
} Scratch;

INLINE int64_t padded_dim(int64_t head_dim) { return round_up(head_dim, PANEL); }

static int64_t max_rows(int64_t group) { return round_up(max64(TILE_ROWS, group), LANES); }

static char *scratch_layout(Scratch *s, char *base, int64_t head_dim, int64_t group) {
    int64_t rows = max_rows(group), dim = padded_dim(head_dim);
#define TAKE(field, type, count) s->field = (type *)base, base += round_up((count) * (int64_t)sizeof(type), 64)
    TAKE(q, bf16, rows * head_dim);
    TAKE(k, bf16, KEY_BLOCK * head_dim);
    TAKE(v, bf16, KEY_BLOCK * dim);
    TAKE(scores, float, ROW_TILE * KEY_BLOCK);
    TAKE(weights, bf16, ROW_TILE * KEY_BLOCK);
    TAKE(block, float, ROW_TILE * dim);
    TAKE(out, float, rows * dim);
    TAKE(max, float, rows);
    TAKE(sum, float, rows);
#undef TAKE
    return base;
}

int64_t attention_scratch_bytes(int64_t head_dim, int64_t group) {
    Scratch s;
    return scratch_layout(&s, NULL, head_dim, group) - (char *)NULL;
}

int64_t attention_partial_floats(int64_t head_dim) { return padded_dim(head_dim) + LANES; }

/* Where the block's keys lie; keys that the sequence does not have read as zero. */
static void find_keys(Scratch *s, const Attention *a, const Tile *tile, int64_t head, int64_t block) {
    const KvPool *pool = a->pool;
    const int32_t *table = a->batch->page_tables + tile->seq * a->batch->table_width;
    int64_t first = block * KEY_BLOCK, count = min64(a->batch->context_lens[tile->seq] - first, KEY_BLOCK);
    int64_t value_offset = pool->num_kv_heads * pool->page_size * pool->head_dim;
    int64_t page_idx = first / pool->page_size, slot = first % pool->page_size;
    for (int64_t i = 0; i < count; page_idx++, slot = 0) {
        const bf16 *key = kv_slot(pool, table[page_idx], a->layer, 0, head, slot);
        for (; slot < pool->page_size && i < count; slot++, i++, key += pool->head_dim) {
            s->keys[i] = key;
            s->values[i] = key + value_offset;
        }
    }
    for (int64_t i = count; i < KEY_BLOCK; i++) s->keys[i] = s->values[i] = zero_row;
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

/* Keys become the columns of a packed weight [32-key panel][D/2][32][2]: the scores are then a product like any other. */
static void pack_keys(Scratch *s, int64_t head_dim, int64_t num_keys) {
    int64_t words = head_dim / 2;
    for (int64_t key = 0; key < num_keys; key += LANES) {
        bf16 *dst = s->k + key / PANEL * panel_size(head_dim) + key % PANEL * 2;
        for (int64_t word = 0; word < words; word += LANES) {
            __mmask16 m = lanes_below(words - word);
            __m512i r[16];
            _Pragma("GCC unroll 16") for (int i = 0; i < 16; i++) r[i] = _mm512_maskz_loadu_epi32(m, s->keys[key + i] + 2 * word);
            transpose_16x16(r);
            if (m == 0xffff) {
                _Pragma("GCC unroll 16") for (int i = 0; i < 16; i++) _mm512_store_si512(dst + (word + i) * 64, r[i]);
            } else {
                _Pragma("GCC unroll 16") for (int i = 0; i < 16; i++)
                    if (word + i < words) _mm512_store_si512(dst + (word + i) * 64, r[i]);
            }
        }
    }
}

/* Values become [32-dim panel][pair of keys][32][2]. */
static void pack_values(Scratch *s, int64_t head_dim, int64_t num_keys) {
    static const uint16_t low_order[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                           8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    __m512i low = _mm512_loadu_si512(low_order), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    for (int64_t key = 0; key < num_keys; key += 2) {
        for (int64_t dim = 0; dim < head_dim; dim += PANEL) {
            __mmask32 m = head_dim - dim >= PANEL ? ~(__mmask32)0 : ((__mmask32)1 << (head_dim - dim)) - 1;
            __m512i a = _mm512_maskz_loadu_epi16(m, s->values[key] + dim);
            __m512i b = _mm512_maskz_loadu_epi16(m, s->values[key + 1] + dim);
            bf16 *dst = s->v + dim * KEY_BLOCK + key * PANEL;
            _mm512_store_si512(dst, _mm512_permutex2var_epi16(a, low, b));
            _mm512_store_si512(dst + 32, _mm512_permutex2var_epi16(a, high, b));
        }
    }
}

/* Scores of `rows` rows against the first `num_keys` keys (rounded up to a panel). */
static void score_rows(Scratch *s, const bf16 *q, int64_t rows, int64_t head_dim, int64_t num_keys) {
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

/* One row's weights over its `valid` keys, zero up to `num_keys`. Gives the maximum (log2 units) and the sum. */
static void weigh_row(const float *scores, bf16 *weights, int64_t valid, int64_t num_keys, float scale_log2, float *max, float *sum) {
    __m512 top = _mm512_set1_ps(-INFINITY), total = _mm512_setzero_ps(), scale = _mm512_set1_ps(scale_log2);
    for (int64_t i = 0; i < valid; i += LANES)
        top = _mm512_mask_max_ps(top, lanes_below(valid - i), top, _mm512_load_ps(scores + i));
    *max = _mm512_reduce_max_ps(top) * scale_log2;
    __m512 shift = _mm512_set1_ps(*max);
    for (int64_t i = 0; i < num_keys; i += LANES) {
        __mmask16 m = lanes_below(valid - i);
        __m512 p = m ? _mm512_maskz_mov_ps(m, exp2_ps(_mm512_fmsub_ps(_mm512_load_ps(scores + i), scale, shift))) : _mm512_setzero_ps();
        total = _mm512_add_ps(total, p);
        store_bf16(weights + i, p);
    }
    *sum = _mm512_reduce_add_ps(total);
}

/* block[r] = weights[r] x values, from zero. */
static void weighted_values(Scratch *s, int64_t rows, int64_t head_dim, int64_t num_keys) {
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

/* Add a block (block, block_max, block_sum) to what came before it (out, max, sum). The only place where blocks meet. */
static void merge_row(float *out, float *max, float *sum, const float *block, float block_max, float block_sum, int64_t dims) {
    float top = *max > block_max ? *max : block_max;
    __m512 old_factor = exp2_ps(_mm512_set1_ps(*max - top)), new_factor = exp2_ps(_mm512_set1_ps(block_max - top));
    for (int64_t i = 0; i < dims; i += LANES) {
        __m512 kept = _mm512_mul_ps(_mm512_load_ps(out + i), old_factor);
        _mm512_store_ps(out + i, _mm512_fmadd_ps(_mm512_load_ps(block + i), new_factor, kept));
    }
    *sum = fmaf(block_sum, _mm512_cvtss_f32(new_factor), *sum * _mm512_cvtss_f32(old_factor));
    *max = top;
}

static void clear_rows(Scratch *s, int64_t rows, int64_t dims) {
    memset(s->out, 0, (size_t)(rows * dims) * sizeof(float));
    for (int64_t r = 0; r < rows; r++) s->max[r] = -INFINITY, s->sum[r] = 0.0f;
}

static void write_rows(const Scratch *s, const Attention *a, const Tile *tile, int64_t head) {
    int64_t group = a->plan->group, head_dim = a->pool->head_dim, dims = padded_dim(head_dim);
    for (int64_t r = 0; r < tile->num_queries * group; r++) {
        bf16 *dst = a->out + (tile->first_token + r / group) * a->ldo + (head * group + r % group) * head_dim;
        __m512 factor = _mm512_set1_ps(1.0f / s->sum[r]);
        for (int64_t i = 0; i < head_dim; i += LANES)
            store_bf16_masked(dst + i, lanes_below(head_dim - i), _mm512_mul_ps(_mm512_load_ps(s->out + r * dims + i), factor));
    }
}

INLINE float *partial_slot(const Attention *a, const Tile *tile, int64_t head, int64_t block, int64_t row) {
    int64_t rows = tile->num_queries * a->plan->group;
    return a->partials + (tile->partial + (head * tile->num_blocks + block) * rows + row) * attention_partial_floats(a->pool->head_dim);
}

/* One block of a tile for all its rows: merged into s->out, or put aside when the tile is split among threads. */
static void run_block(Scratch *s, const Attention *a, const Tile *tile, int64_t head, int64_t block) {
    int64_t group = a->plan->group, head_dim = a->pool->head_dim, dims = padded_dim(head_dim);
    int64_t rows = tile->num_queries * group, first_key = block * KEY_BLOCK;
    int64_t last_key = tile->first_position + tile->num_queries; /* one behind the last visible */
    int64_t block_keys = round_up(min64(last_key - first_key, KEY_BLOCK), PANEL);
    find_keys(s, a, tile, head, block);
    pack_keys(s, head_dim, block_keys);
    pack_values(s, head_dim, block_keys);
    for (int64_t row = 0; row < rows; row += ROW_TILE) {
        int64_t count = min64(ROW_TILE, rows - row), last_query = (row + count - 1) / group;
        int64_t visible = min64(tile->first_position + last_query + 1 - first_key, KEY_BLOCK);
        if (visible <= 0) continue;
        int64_t num_keys = round_up(visible, PANEL);
        float max[ROW_TILE], sum[ROW_TILE];
        int64_t valid[ROW_TILE];
        score_rows(s, s->q + row * head_dim, count, head_dim, num_keys);
        for (int64_t r = 0; r < count; r++) {
            valid[r] = min64(tile->first_position + (row + r) / group + 1 - first_key, KEY_BLOCK);
            weigh_row(s->scores + r * KEY_BLOCK, s->weights + r * KEY_BLOCK, valid[r], num_keys, a->scale * LOG2E, max + r, sum + r);
        }
        weighted_values(s, count, head_dim, num_keys);
        for (int64_t r = 0; r < count; r++) {
            if (valid[r] <= 0) continue;
            if (tile->partial < 0) {
                merge_row(s->out + (row + r) * dims, s->max + row + r, s->sum + row + r, s->block + r * dims, max[r], sum[r], dims);
            } else {
                float *slot = partial_slot(a, tile, head, block, row + r);
                memcpy(slot, s->block + r * dims, (size_t)dims * sizeof(float));
                slot[dims] = max[r], slot[dims + 1] = sum[r];
            }
        }
    }
}

static void run_item(Scratch *s, const Attention *a, const Item *item, int64_t head) {
    const Tile *tile = a->plan->tiles + item->tile;
    int64_t group = a->plan->group, head_dim = a->pool->head_dim;
    for (int64_t i = 0; i < tile->num_queries; i++)
        memcpy(s->q + i * group * head_dim, a->q + (tile->first_token + i) * a->ldq + head * group * head_dim,
               (size_t)(group * head_dim) * sizeof(bf16));
    if (tile->partial < 0) clear_rows(s, tile->num_queries * group, padded_dim(head_dim));
    for (int64_t b = item->first_block; b < item->first_block + item->num_blocks; b++) run_block(s, a, tile, head, b);
    if (tile->partial < 0) write_rows(s, a, tile, head);
}

/* The blocks of a split tile, in ascending order as one thread would have merged them. */
static void merge_tile(Scratch *s, const Attention *a, const Tile *tile, int64_t head) {
    int64_t group = a->plan->group, dims = padded_dim(a->pool->head_dim), rows = tile->num_queries * group;
    clear_rows(s, rows, dims);
    for (int64_t r = 0; r < rows; r++) {
        int64_t blocks = ceil_div(tile->first_position + r / group + 1, KEY_BLOCK);
        for (int64_t b = 0; b < blocks; b++) {
            const float *slot = partial_slot(a, tile, head, b, r);
            merge_row(s->out + r * dims, s->max + r, s->sum + r, slot, slot[dims], slot[dims + 1], dims);
        }
    }
    write_rows(s, a, tile, head);
}

void attention_stage(Worker *w, const Attention *a) {
    const AttentionPlan *plan = a->plan;
    int64_t heads = a->pool->num_kv_heads;
    Scratch s;
    scratch_layout(&s, a->scratch + w->tid * attention_scratch_bytes(a->pool->head_dim, plan->group), a->pool->head_dim, plan->group);
    for (int64_t i; (i = pool_claim()) < plan->num_items * heads;) run_item(&s, a, plan->items + i / heads, i % heads);
    if (plan->num_split_tiles == 0) return;
    pool_barrier(w);
    for (int64_t i; (i = pool_claim()) < plan->num_split_tiles * heads;) merge_tile(&s, a, plan->tiles + i / heads, i % heads);
}
