/* A few decoded rows against all activations. Internal: no part of the ABI. */
#ifndef QUANTMILL_GGML_ROWS_H
#define QUANTMILL_GGML_ROWS_H

#include <stdint.h>

#define QM_ROWS_TILE 4 /* rows and tokens whose sums are held in registers */

typedef struct {
    const float *values; /* [rows, columns]; columns is a multiple of 32 */
    int64_t rows, columns;
    const float *x; /* [tokens, columns] */
    int64_t tokens;
    const float *bias; /* [rows] or NULL */
    float *out;        /* of the first row: [tokens, stride] */
    int64_t stride;
} QmRows;

void qm_ggml_rows_baseline(const QmRows *job);
#ifdef QM_X86_LEVELS
void qm_ggml_rows_avx2(const QmRows *job);
void qm_ggml_rows_avx512(const QmRows *job);
#endif

#endif
