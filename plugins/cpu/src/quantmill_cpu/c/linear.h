/* Products of a few rows with a bf16 weight that lies as it came, row after row. */
#ifndef QUANTMILL_LINEAR_H
#define QUANTMILL_LINEAR_H

#include <stdint.h>

#define QM_LINEAR_ROWS 4 /* most rows of x: more of them don't stay in the first cache */

/* y [count, rows] = x [count, columns] @ weight [rows, columns].T + bias [rows] (or NULL), all bf16
 * and contiguous, at any address of whole elements. Sums are float32, in the same order for any
 * number of threads and rows of x. 0; -1 where there are more than QM_LINEAR_ROWS; -2 where the
 * machine has no dot products of bf16. */
int qm_linear(const uint16_t *weight, const uint16_t *x, const uint16_t *bias, uint16_t *y,
              int64_t rows, int64_t columns, int64_t count, int threads);

/* Internal. Rows [first, last) of the weight. */
typedef struct {
    const uint16_t *weight, *x, *bias;
    uint16_t *y;
    int64_t rows, columns, count;
} QmLinear;

void qm_linear_rows(const QmLinear *job, int64_t first, int64_t last);

#endif
