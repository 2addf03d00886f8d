/* A mixture of experts: which experts a token goes to, their products over just those tokens, and the weighted sum.
 *
 * Shape letters as in decoder.h, and X experts, k experts of a token, F feed-forward size of one expert. A pair is a token and one of its
 * experts; pairs are computed expert after expert, so that each expert's are consecutive rows. A token's sum is formed in
 * fp32 in the order of its experts' weights: like everything here it does not depend on the other tokens.
 *
 * Several ranks either have some columns of every expert, or (`is_dealt`) some experts whole. Neither cuts a sum.
 */
#ifndef BATON_EXPERTS_H
#define BATON_EXPERTS_H

#include "gemm.h"

/* What the layers with experts have in common. */
typedef struct {
    int64_t num_experts; /* 0: the model has none */
    int64_t per_token;
    int64_t inner;       /* F, of all ranks */
    int64_t first, last; /* the experts of which this rank computes something */
    int64_t normalises;  /* the weights of a token are scaled to a sum of 1 */
    int64_t is_dealt;
} Experts;

typedef struct {
    Linear router;         /* [X, E] */
    const Linear *gate_up; /* of the experts from `first` on; NULL: the layer has no experts */
    const Linear *down;
} ExpertLayer;

/* Where the pairs of one layer lie. Behind the last part of a layer nobody reads it. */
typedef struct {
    float *scores;    /* [T, X] logits, then weights before normalisation */
    float *weights;   /* [T, k] */
    int32_t *chosen;  /* [T, k] experts */
    int32_t *place;   /* [T, k] row of the pair */
    int32_t *borders; /* [X + 1] first row of each expert */
    int32_t *active;  /* own experts that have rows; `counts[0]` of them */
    int32_t *first_gate_up, *first_down; /* [active + 1] first item of each one's product */
    int32_t *counts;  /* number of active experts; threads for which one product is cut */
    bf16 *inputs;     /* [T k, E] */
    bf16 *own;        /* what other ranks need not see: [T k, E] outputs; [T k, F] activations when experts are dealt */
} Pairs;

/* Take a step's tensors from `at`; the place behind them. */
char *pairs_layout(Pairs *p, const Experts *e, int64_t tokens, int64_t hidden, char *at);
/* Scores of tokens [first, last) to their experts and weights. Equal scores: the expert with the lower number. */
void route_rows(const Pairs *p, const Experts *e, int64_t first, int64_t last);
/* All pairs to rows; items of the two products. */
void place_pairs(const Pairs *p, const Experts *e, const ExpertLayer *layer, int64_t tokens, int threads);
int32_t gate_up_items(const Pairs *p);
int32_t down_items(const Pairs *p);
/* Rows x [T, E] of tokens [first, last) to the inputs of own experts. */
void gather_rows(const Pairs *p, const Experts *e, const bf16 *x, int64_t hidden, int64_t first, int64_t last);
/* One item of a product of all active experts; x and y from row 0 on. */
void gate_up_item(const Pairs *p, const Experts *e, const ExpertLayer *layer, const Rows *rows, int64_t item);
void down_item(const Pairs *p, const Experts *e, const ExpertLayer *layer, const Rows *rows, int64_t item);
/* y[t] = sum of the weighted rows of token t; `n` columns of both, rows of both `ld` apart. */
void combine_rows(const Pairs *p, const Experts *e, const bf16 *outputs, bf16 *y, int64_t n, int64_t ld, int64_t first, int64_t last);

#endif
