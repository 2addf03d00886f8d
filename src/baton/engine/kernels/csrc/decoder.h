/* The transformer decoder (Llama, Qwen2, Qwen3) as a list of stages run by all threads of one job.
 *
 * Shape letters as in attention.h, and E hidden size, F feed-forward size. Weights are packed (gemm.h), norms and biases
 * fp32, the residual stream fp32, everything between bf16.
 */
#ifndef BATON_DECODER_H
#define BATON_DECODER_H

#include "attention.h"
#include "gemm.h"

typedef struct {
    Linear qkv;     /* [(H + 2K) D, E] query, key, value heads */
    Linear out;     /* [E, H D] */
    Linear gate_up; /* [2 F, E] */
    Linear down;    /* [E, F] */
    const float *attention_norm, *mlp_norm; /* [E] */
    const float *q_norm, *k_norm;           /* [D] or NULL */
} Layer;

typedef struct {
    int64_t num_layers, hidden, intermediate, num_heads, num_kv_heads, head_dim;
    float eps, scale;
    const bf16 *embedding; /* [V, E] row-major */
    const float *rotary;   /* [positions, D]: D/2 cosines, D/2 sines */
    const float *final_norm;
    Linear head;
    const Layer *layers;
} Model;

/* The step's tensors, all in one block of memory that the caller provides. */
typedef struct {
    bf16 *delta;     /* [T, E] what the last half layer adds to the residual; first, so that the caller finds it */
    float *residual; /* [T, E] */
    bf16 *normed;    /* [T, E] */
    bf16 *qkv;       /* [T, (H + 2K) D] */
    bf16 *attended;  /* [T, H D] */
    bf16 *activated; /* [T, F] */
    AttentionPlan plan;
    float *partials;
    char *attention_scratch;
} Buffers;

/* rows.c */
void embed_rows(const Model *m, const Batch *b, float *residual, int64_t first, int64_t last);
/* residual += delta (kept when `residual_out` is given), out = norm(residual) * weight. */
void norm_row(const float *residual, const bf16 *delta, float *residual_out, const float *weight, float eps, int64_t n, bf16 *out);
/* Query and key heads of tokens [first, last) normalised and rotated; keys and values written to their slots. */
void rotate_and_store_rows(const Model *m, const Layer *l, const Batch *b, const KvPool *pool, int64_t layer, bf16 *qkv,
                           const int32_t *seq_of_token, int64_t first, int64_t last);

#endif
