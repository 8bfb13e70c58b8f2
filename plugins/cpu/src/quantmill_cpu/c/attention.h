/* Attention of bf16 queries, keys and values without a mask, or with a causal one. */
#ifndef QUANTMILL_ATTENTION_H
#define QUANTMILL_ATTENTION_H

#include <stdint.h>

/* Elements from one batch, head and row (token) to the next; those of a row are side by side. */
typedef struct {
    int64_t batch, head, row;
} QmStrides;

/* Sizes and places of one call. Heads of queries share those of keys in runs of heads / kv_heads.
 * Part of the ABI. */
typedef struct {
    int64_t batch, heads, kv_heads, queries, keys, dim, value_dim;
    QmStrides q, k, v, out;
} QmAttention;

/* out = softmax(scale * q @ k.T) @ v per head; with `causal` row i sees keys 0 to i. `dim` is even.
 * Scores and sums are float32, shares are rounded to bf16 before they meet the values; in the same
 * order for any number of threads. 0; -1 where memory ran out; -2 where the machine has no dot
 * products of bf16. */
int qm_attention(const QmAttention *shape, const uint16_t *q, const uint16_t *k, const uint16_t *v,
                 uint16_t *out, float scale, int causal, int threads);

#define QM_ATTENTION_SIDE 64 /* keys, or columns of values, of a block */
#define QM_ATTENTION_ROWS 16 /* queries that are taken together */

/* Internal. Keys [keys, dim] as pairs of a row, [blocks, dim / 2, 64]; what is not there is zero. */
void qm_attention_pack_keys(const uint16_t *k, int64_t stride, int64_t keys, int64_t dim,
                            uint32_t *packed);
/* Values [keys, dim] as pairs of a column, [blocks of dim, keys / 2 up to whole blocks, 64]. */
void qm_attention_pack_values(const uint16_t *v, int64_t stride, int64_t keys, int64_t dim,
                              uint32_t *packed);
/* Queries `first` to first + 15 of one head, as far as they are there, with packed keys and values;
 * `scores` has 16 rows of keys up to whole blocks, `shares` as many. With `tiles` they are open. */
void qm_attention_rows(const QmAttention *shape, const uint16_t *q, const uint32_t *keys,
                       const uint32_t *values, uint16_t *out, int64_t first, float scale,
                       int causal, int tiles, float *scores, uint16_t *shares);

#endif
