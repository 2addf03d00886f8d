/* The transformer decoder (Llama, Qwen2, Qwen3, Qwen3-MoE) as a list of stages run by all threads of one job.
 *
 * Shape letters as in attention.h, and E hidden size, F feed-forward size. Weights are packed (gemm.h), norms and biases
 * fp32, the residual stream fp32, everything between bf16.
 *
 * With several ranks each computes some columns of every product's output, over the product's whole input: no sum is ever cut, so
 * the ranks together give the bits of one rank. Heads and columns in `Model` are this rank's; the residual is everyone's.
 */
#ifndef BATON_DECODER_H
#define BATON_DECODER_H

#include "attention.h"
#include "exchange.h"
#include "experts.h"
#include "gemm.h"

typedef struct {
    Linear qkv;     /* [(H + 2K) D, E] query, key, value heads of this rank */
    Linear out;     /* [own columns of E, all H D] */
    Linear gate_up; /* [2 own columns of F, E]; a layer has these two or experts */
    Linear down;    /* [own columns of E, all F] */
    ExpertLayer experts;
    const float *attention_norm, *mlp_norm; /* [E] */
    const float *q_norm, *k_norm;           /* [D] or NULL */
} Layer;

/* This rank's first column of a tensor that all ranks share. */
typedef struct {
    int64_t delta, attended, activated, expert_inner, logits;
} FirstColumns;

typedef struct {
    int64_t num_layers, hidden, num_heads, num_kv_heads, head_dim;
    int64_t embedding_columns; /* own columns of E */
    float eps, scale;
    const bf16 *embedding; /* [V, embedding_columns] row-major */
    const float *rotary;   /* [positions, D]: D/2 cosines, D/2 sines */
    const float *final_norm;
    Linear head; /* [own columns of V, E] */
    const Layer *layers;
    FirstColumns first;
    Experts experts;
} Model;

/* What all ranks see whole, each writing its own columns. The caller provides it. */
typedef struct {
    bf16 *delta;     /* [T, E] what the last part adds to the residual */
    bf16 *attended;  /* [T, all H D] */
    bf16 *activated; /* [T, F]; of a layer with experts [T k, F of one], or when they are dealt [T k, E]: their outputs */
} Shared;

/* The step's own tensors, all in one block of memory that the caller provides. */
typedef struct {
    float *residual; /* [T, E] */
    bf16 *normed;    /* [T, E] */
    bf16 *qkv;       /* [T, (H + 2K) D] */
    AttentionPlan plan;
    float *partials;
    char *attention_scratch;
    Pairs pairs;
} Buffers;

/* rows.c */
/* delta = own columns of the tokens' embeddings, residual = 0. */
void embed_rows(const Model *m, const Batch *b, bf16 *delta, float *residual, int64_t first, int64_t last);
/* residual += delta (kept when `residual_out` is given), out = norm(residual) * weight. */
void norm_row(const float *residual, const bf16 *delta, float *residual_out, const float *weight, float eps, int64_t n, bf16 *out);
/* Query and key heads of tokens [first, last) normalised and rotated; keys and values written to their slots. */
void rotate_and_store_rows(const Model *m, const Layer *l, const Batch *b, const KvPool *pool, int64_t layer, bf16 *qkv,
                           const int32_t *seq_of_token, int64_t first, int64_t last);

#endif
