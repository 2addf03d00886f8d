/* Attention over KV pages in place, the same arithmetic for a prefill chunk, a decode step and anything between.
 *
 * The arithmetic of one query row is fixed by its position alone: keys are taken in blocks of KEY_BLOCK = 128 at absolute positions.
 * Within a block: scores by a vdpbf16ps chain over the head dimension, their maximum, weights exp2(score - maximum) rounded to
 * bf16, output by a vdpbf16ps chain over pairs of keys starting from zero. Blocks are then merged in ascending order by
 * `merge_row`. Keys behind the query have weight 0 and so add exactly nothing.
 *
 * Shape letters: T tokens of the batch, B sequences, H query heads, K kv heads, D head dim, S page size, G = H / K.
 */
#ifndef BATON_ATTENTION_H
#define BATON_ATTENTION_H

#include "common.h"

typedef struct {
    bf16 *base; /* (pages, page_layers, 2, page_heads, S, D), at the first of this rank's layers and K heads */
    int64_t page_layers, num_kv_heads, page_size, head_dim; /* page_layers: of a page; those of this rank, or more */
    int64_t page_heads; /* kv heads of a page: K, or more where ranks share the pool */
} KvPool;

typedef struct {
    int64_t num_seqs, num_tokens;
    int64_t table_width;         /* entries of page_tables per sequence */
    const int64_t *token_ids;    /* [T] */
    const int64_t *positions;    /* [T] */
    const int32_t *query_lens;   /* [B] */
    const int32_t *context_lens; /* [B] */
    const int32_t *page_tables;  /* [B, table_width] */
} Batch;

/* Some consecutive queries of one sequence: what one thread computes for one kv head. */
typedef struct {
    int64_t seq, first_token; /* first_token: row in the batch */
    int64_t first_position, num_queries;
    int64_t num_blocks;
    int64_t partial; /* first slot of its partial results, or -1 when its blocks are computed by one thread */
} Tile;

/* What one thread does at a time: a run of blocks of a tile, for a run of kv heads. */
typedef struct {
    int64_t tile, first_head, num_heads, first_block, num_blocks, cost;
} Item;

typedef struct {
    Tile *tiles;
    Item *items;
    int64_t num_tiles, num_items;
    int64_t num_partials; /* slots; 0 unless all tiles are split among threads */
    int64_t group;        /* G */
} AttentionPlan;

typedef struct {
    const AttentionPlan *plan;
    const KvPool *pool;
    const Batch *batch;
    const bf16 *q; /* [T] rows ldq apart, H heads of D side by side */
    int64_t ldq;
    bf16 *out; /* [T] rows ldo apart */
    int64_t ldo;
    int64_t layer;
    float scale;
    float *partials;
    char *scratch; /* attention_scratch_bytes for each thread */
} Attention;

/* Upper bounds for what the plan of a batch needs. */
int64_t attention_max_tiles(const Batch *batch, int64_t group);
int64_t attention_max_items(const Batch *batch, int64_t group, int64_t num_kv_heads, int threads);
int64_t attention_max_partials(const Batch *batch, int64_t group, int64_t num_kv_heads, int threads);
int64_t attention_partial_floats(int64_t head_dim);
int64_t attention_scratch_bytes(int64_t head_dim, int64_t group);

void attention_plan(AttentionPlan *plan, const Batch *batch, int64_t num_heads, int64_t num_kv_heads, int threads);

/* Item `item` of the plan; `next_item` (or -1) is the one that this thread will probably do next. */
void attention_item(const Attention *a, int64_t item, int64_t next_item, int tid);

/* When the tiles are split, a second stage merges their blocks: items 0..num_tiles * K - 1. */
void attention_merge_item(const Attention *a, int64_t item, int tid);

INLINE bf16 *kv_slot(const KvPool *p, int64_t page, int64_t layer, int64_t is_v, int64_t head, int64_t slot) {
    return p->base + (((((page * p->page_layers + layer) * 2 + is_v) * p->page_heads + head) * p->page_size) + slot) * p->head_dim;
}

#endif
