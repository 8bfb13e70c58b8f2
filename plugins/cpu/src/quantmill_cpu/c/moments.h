/* Second moments of bf16 activations: total += x.T @ x, on and above the diagonal. */
#ifndef QUANTMILL_MOMENTS_H
#define QUANTMILL_MOMENTS_H

#include <stdint.h>

/* `x` is bf16 [tokens, columns], `total` float [columns, columns], both contiguous. Only blocks of 64
 * columns on and above the diagonal are added to; what lies below it in those on it has no meaning.
 * Products are exact, sums are float32, in the same order for any number of threads. 0; -1 where
 * memory ran out; -2 where the machine has no dot products of bf16. */
int qm_moments(const uint16_t *x, int64_t tokens, int64_t columns, float *total, int threads);

#define QM_MOMENTS_SIDE 64 /* columns of a block */

/* Internal. A block's columns of a run of tokens as pairs, [(tokens + 1) / 2, 64, 2]; columns that
 * are not there, and the last odd token's partner, are zeros. */
void qm_moments_pack(const uint16_t *x, int64_t tokens, int64_t columns, int64_t block,
                     uint32_t *packed);
/* total's block of rows `first` and columns `second` += that of two packed blocks. */
void qm_moments_block(const uint32_t *first, const uint32_t *second, int64_t pairs, float *total,
                      int64_t stride, int64_t rows, int64_t columns);

#endif
