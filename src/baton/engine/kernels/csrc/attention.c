/* The kernel of attention.h: packing a block of keys, scores, weights, output, merging. How work is cut is in plan.c. */
#include <math.h>

#include "attention_block.h"

static const bf16 zero_row[1024] __attribute__((aligned(64)));

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

/* Keys that the sequence does not have read as zero: an unused slot may hold anything, and 0 x NaN is a NaN. */
static void find_keys(KeyRows *s, const Attention *a, const Tile *tile, int64_t head, int64_t block) {
    const KvPool *pool = a->pool;
    const int32_t *table = a->batch->page_tables + tile->seq * a->batch->table_width;
    int64_t first = block * KEY_BLOCK, count = min64(a->batch->context_lens[tile->seq] - first, KEY_BLOCK);
    int64_t value_offset = pool->page_heads * pool->page_size * pool->head_dim;
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

/* A finished row of a block: merged into s->out, or put aside when the tile is split among threads. */
INLINE void keep_row(Scratch *s, const Attention *a, const Tile *tile, int64_t head, int64_t block, int64_t row, const float *out,
                     float max, float sum) {
    int64_t dims = padded_dim(a->pool->head_dim);
    if (tile->partial < 0) {
        merge_row(s->out + row * dims, s->max + row, s->sum + row, out, max, sum, dims);
    } else {
        float *slot = partial_slot(a, tile, head, block, row);
        memcpy(slot, out, (size_t)dims * sizeof(float));
        slot[dims] = max, slot[dims + 1] = sum;
    }
}

/* Keys of the block (first key `first_key`) that query row `row` of the tile sees; may be negative. */
INLINE int64_t visible_keys(const Tile *tile, int64_t row, int64_t group, int64_t first_key) {
    return min64(tile->first_position + row / group + 1 - first_key, KEY_BLOCK);
}

/* One block of a tile for all its rows. */
static void run_block(Scratch *s, const Attention *a, const Tile *tile, int64_t head, int64_t block, const KeyRows *at, const KeyRows *next) {
    int64_t group = a->plan->group, head_dim = a->pool->head_dim, dims = padded_dim(head_dim);
    int64_t rows = tile->num_queries * group, first_key = block * KEY_BLOCK;
    int direct = rows <= ROW_TILE;
    if (!direct) {
        int64_t num_keys = round_up(visible_keys(tile, rows - 1, group, first_key), PANEL);
        pack_keys(s, at, next, head_dim, num_keys);
        pack_values(s, at, next, head_dim, num_keys);
    }
    for (int64_t row = 0; row < rows; row += ROW_TILE) {
        int64_t count = min64(ROW_TILE, rows - row), visible = visible_keys(tile, row + count - 1, group, first_key);
        if (visible <= 0) continue;
        int64_t num_keys = round_up(visible, PANEL);
        float max[ROW_TILE], sum[ROW_TILE];
        if (direct) direct_scores(s, at, next, count, head_dim, num_keys);
        else packed_scores(s, s->q + row * head_dim, count, head_dim, num_keys);
        for (int64_t r = 0; r < count; r++)
            weigh_row(s->scores + r * KEY_BLOCK, s->weights + r * KEY_BLOCK, visible_keys(tile, row + r, group, first_key), num_keys,
                      a->scale * LOG2E, max + r, sum + r);
        if (direct) direct_values(s, at, next, count, head_dim, num_keys);
        else packed_values(s, count, head_dim, num_keys);
        for (int64_t r = 0; r < count; r++)
            if (visible_keys(tile, row + r, group, first_key) > 0)
                keep_row(s, a, tile, head, block, row + r, s->block + r * dims, max[r], sum[r]);
    }
}

static void begin_head(Scratch *s, const Attention *a, const Tile *tile, int64_t head) {
    int64_t group = a->plan->group, width = group * a->pool->head_dim;
    for (int64_t i = 0; i < tile->num_queries; i++)
        memcpy(s->q + i * width, a->q + (tile->first_token + i) * a->ldq + head * width, (size_t)width * sizeof(bf16));
    if (tile->partial < 0) clear_rows(s, tile->num_queries * group, padded_dim(a->pool->head_dim));
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

static void find_scratch(Scratch *s, const Attention *a, int tid) {
    int64_t head_dim = a->pool->head_dim, group = a->plan->group;
    scratch_layout(s, a->scratch + tid * attention_scratch_bytes(head_dim, group), head_dim, group);
}

void attention_item(const Attention *a, int64_t item, int64_t next_item, int tid) {
    const Item *it = a->plan->items + item, *after = next_item < 0 ? NULL : a->plan->items + next_item;
    const Tile *tile = a->plan->tiles + it->tile;
    Scratch s;
    find_scratch(&s, a, tid);
    KeyRows *at = &s.rows[0], *next = &s.rows[1];
    int64_t total = it->num_heads * it->num_blocks;
    find_keys(at, a, tile, it->first_head, it->first_block);
    for (int64_t i = 0; i < total; i++) {
        int64_t head = it->first_head + i / it->num_blocks, block = it->first_block + i % it->num_blocks;
        int has_next = 1;
        if (i + 1 < total) find_keys(next, a, tile, it->first_head + (i + 1) / it->num_blocks, it->first_block + (i + 1) % it->num_blocks);
        else if (after) find_keys(next, a, a->plan->tiles + after->tile, after->first_head, after->first_block);
        else has_next = 0;
        if (block == it->first_block) begin_head(&s, a, tile, head);
        run_block(&s, a, tile, head, block, at, has_next ? next : NULL);
        if (block == it->first_block + it->num_blocks - 1 && tile->partial < 0) write_rows(&s, a, tile, head);
        KeyRows *swap = at;
        at = next, next = swap;
    }
}

void attention_merge_item(const Attention *a, int64_t item, int tid) {
    int64_t heads = a->pool->num_kv_heads;
    Scratch s;
    find_scratch(&s, a, tid);
    merge_tile(&s, a, a->plan->tiles + item / heads, item % heads);
}
