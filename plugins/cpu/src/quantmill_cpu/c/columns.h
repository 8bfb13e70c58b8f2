/* Rounding a weight's columns one after the other, for all rows at once: what calibrated methods do
 * in panels of up to QM_PANEL_COLUMNS columns. Between panels a matrix product passes on what a
 * panel's errors mean for other columns; that is the caller's.
 *
 * Columns are rows of memory here: [n, rows], contiguous, float unless said otherwise. Scales and zero
 * points are [groups, rows]; `groups` is each column's. All arithmetic is float32 in the order of the
 * torch reference, without contraction; only sums over columns may differ from it in their order.
 */
#ifndef QUANTMILL_COLUMNS_H
#define QUANTMILL_COLUMNS_H

#include <stdint.h>

#define QM_PANEL_COLUMNS 128

typedef struct {
    int64_t n, rows;
    float top; /* the largest code */
    int symmetric;
    float exponent; /* of the error that ranges are chosen by; 0: the full range */
    const int32_t *groups; /* [n] */
    const int32_t *spans; /* [n]: columns of the group that ends (descend) or begins (compensate) */
    float *scales, *zeros;
    const float *local; /* [n, n] */
    float *panel; /* [n, rows] */
    uint8_t *codes; /* [n, rows] */
    float *steps; /* [n, rows] */
} QmColumns;

/* Part of the ABI: round a panel of weights. `local` is the upper triangular factor of the inverse
 * moments; `spans` says where scale and zero point are fitted first, and 0 elsewhere. `codes` are
 * written, and `panel` becomes each column's error over its diagonal entry. 0, or -1 for a panel that
 * is too wide. */
int qm_compensate(int64_t n, int64_t rows, int top, int symmetric, float exponent,
                  const int32_t *groups, const int32_t *spans, float *scales, float *zeros,
                  const float *local, float *panel, uint8_t *codes, int threads);

/* Part of the ABI: choose a panel's codes again, each for the others as they are. `local` is the
 * panel's square of the damped moments, `panel` the slope (moments times what the rounded weight
 * lacks) and `steps` codes minus zero points, changed in place. Where `spans` is not 0 a group of so
 * many columns ends, and its scale is chosen again. `panel` becomes what was added to each weight. */
int qm_descend(int64_t n, int64_t rows, int top, const int32_t *groups, const int32_t *spans,
               float *scales, const float *zeros, const float *local, float *panel, float *steps,
               int threads);

#define QM_TILE_ROWS 32

/* Internal: one tile of rows from `row` on, for each instruction set. */
typedef struct {
    void (*compensate)(const QmColumns *job, int64_t row);
    void (*descend)(const QmColumns *job, int64_t row);
} QmColumnsLevel;

extern const QmColumnsLevel qm_columns_baseline;
#ifdef QM_X86_LEVELS
extern const QmColumnsLevel qm_columns_avx2, qm_columns_avx512;
#endif

#endif
