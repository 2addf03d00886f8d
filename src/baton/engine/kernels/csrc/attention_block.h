/* One block of KEY_BLOCK keys for one kv head: the products of attention.h.
 *
 * Two ways, the same chains and so the same bits. Packed: keys and values are laid out like weights (gemm.h) once and serve many
 * rows (prefill). Direct: for at most ROW_TILE rows (decode) they are rearranged in registers and used at once.
 */
#ifndef BATON_ATTENTION_BLOCK_H
#define BATON_ATTENTION_BLOCK_H

#include "attention.h"

/* Where the keys and values of a block lie; those that the sequence does not have point to zeros. */
typedef struct {
    const bf16 *keys[KEY_BLOCK], *values[KEY_BLOCK];
} KeyRows;

/* One thread's buffers. Rows are (query, head of the group), query first. */
typedef struct {
    KeyRows rows[2];  /* of the block at work and of the next one, whose memory is fetched meanwhile */
    bf16 *q;          /* [rows][D] */
    bf16 *k, *v;      /* packed block: panels of 32 keys, panels of 32 dims */
    float *scores;    /* [ROW_TILE][KEY_BLOCK] */
    bf16 *weights;    /* [ROW_TILE][KEY_BLOCK] */
    float *block;     /* [ROW_TILE][Dp] output of one block */
    float *out;       /* [rows][Dp] */
    float *max, *sum; /* [rows] of the blocks so far: maximum in log2 units, sum of weights */
} Scratch;

INLINE int64_t padded_dim(int64_t head_dim) { return round_up(head_dim, PANEL); }

/* All: the first `num_keys` keys (a multiple of PANEL); `next` may be NULL, else its rows are fetched into the cache. */
void pack_keys(Scratch *s, const KeyRows *at, const KeyRows *next, int64_t head_dim, int64_t num_keys);
void pack_values(Scratch *s, const KeyRows *at, const KeyRows *next, int64_t head_dim, int64_t num_keys);
/* s->scores = q [rows, D] x keys */
void packed_scores(Scratch *s, const bf16 *q, int64_t rows, int64_t head_dim, int64_t num_keys);
void direct_scores(Scratch *s, const KeyRows *at, const KeyRows *next, int64_t rows, int64_t head_dim, int64_t num_keys);
/* s->block = s->weights [rows, keys] x values, from zero */
void packed_values(Scratch *s, int64_t rows, int64_t head_dim, int64_t num_keys);
void direct_values(Scratch *s, const KeyRows *at, const KeyRows *next, int64_t rows, int64_t head_dim, int64_t num_keys);

#endif
