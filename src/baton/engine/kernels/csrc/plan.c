/* How one step's attention is cut into work items. Only speed depends on it: any cut gives the same bits. */
#include <stdlib.h>

#include "attention.h"

/* Items per thread below which the tiles are split by blocks, so that one long request still keeps all threads busy. */
enum { MIN_ITEMS_PER_THREAD = 4 };

static int64_t queries_per_tile(int64_t group) { return max64(1, TILE_ROWS / group); }

int64_t attention_max_tiles(const Batch *batch, int64_t group) {
    int64_t tiles = 0;
    for (int64_t b = 0; b < batch->num_seqs; b++) tiles += ceil_div(batch->query_lens[b], queries_per_tile(group));
    return tiles;
}

static int64_t wanted_items(int threads) { return (int64_t)MIN_ITEMS_PER_THREAD * threads; }

/* All kv heads of a tile in one item, when that leaves enough items: their pages lie side by side. */
static int64_t heads_per_item(int64_t num_tiles, int64_t num_kv_heads, int threads) {
    return num_tiles >= 2 * wanted_items(threads) ? num_kv_heads : 1;
}

int64_t attention_max_items(const Batch *batch, int64_t group, int64_t num_kv_heads, int threads) {
    return 2 * attention_max_tiles(batch, group) * num_kv_heads + wanted_items(threads);
}

static int64_t tile_blocks(const Tile *t) { return ceil_div(t->first_position + t->num_queries, KEY_BLOCK); }

static int splits(int64_t num_tiles, int64_t num_kv_heads, int threads) {
    return threads > 1 && num_tiles * num_kv_heads < wanted_items(threads);
}

int64_t attention_max_partials(const Batch *batch, int64_t group, int64_t num_kv_heads, int threads) {
    if (!splits(attention_max_tiles(batch, group), num_kv_heads, threads)) return 0;
    int64_t slots = 0;
    for (int64_t b = 0; b < batch->num_seqs; b++)
        slots += batch->query_lens[b] * ceil_div(batch->context_lens[b], KEY_BLOCK);
    return slots * group * num_kv_heads;
}

static int64_t cut_tiles(Tile *tiles, const Batch *batch, int64_t group) {
    int64_t num_tiles = 0, first_token = 0;
    for (int64_t b = 0; b < batch->num_seqs; b++) {
        int64_t length = batch->query_lens[b], start = batch->context_lens[b] - length;
        for (int64_t q = 0; q < length; q += queries_per_tile(group)) {
            Tile t = {b, first_token + q, start + q, min64(queries_per_tile(group), length - q), 0, -1};
            t.num_blocks = tile_blocks(&t);
            tiles[num_tiles++] = t;
        }
        first_token += length;
    }
    return num_tiles;
}

static int costlier_first(const void *a, const void *b) {
    const Item *x = a, *y = b;
    if (x->cost != y->cost) return x->cost < y->cost ? 1 : -1;
    if (x->tile != y->tile) return x->tile > y->tile ? 1 : -1;
    return (x->first_head > y->first_head) - (x->first_head < y->first_head);
}

void attention_plan(AttentionPlan *plan, const Batch *batch, int64_t num_heads, int64_t num_kv_heads, int threads) {
    plan->group = num_heads / num_kv_heads;
    plan->num_tiles = cut_tiles(plan->tiles, batch, plan->group);
    plan->num_items = plan->num_partials = 0;
    int64_t total_blocks = 0;
    for (int64_t i = 0; i < plan->num_tiles; i++) total_blocks += plan->tiles[i].num_blocks;
    int split = splits(plan->num_tiles, num_kv_heads, threads);
    int64_t run = split ? max64(1, ceil_div(total_blocks * num_kv_heads, wanted_items(threads))) : INT32_MAX;
    int64_t heads = split ? 1 : heads_per_item(plan->num_tiles, num_kv_heads, threads);
    for (int64_t i = 0; i < plan->num_tiles; i++) {
        Tile *t = plan->tiles + i;
        int64_t rows = t->num_queries * plan->group;
        if (split) {
            t->partial = plan->num_partials;
            plan->num_partials += rows * num_kv_heads * t->num_blocks;
        }
        for (int64_t head = 0; head < num_kv_heads; head += heads) {
            for (int64_t b = 0; b < t->num_blocks; b += run) {
                int64_t count = min64(run, t->num_blocks - b), head_count = min64(heads, num_kv_heads - head);
                plan->items[plan->num_items++] = (Item){i, head, head_count, b, count, count * head_count * (rows + ROW_TILE)};
            }
        }
    }
    qsort(plan->items, (size_t)plan->num_items, sizeof(Item), costlier_first);
}
