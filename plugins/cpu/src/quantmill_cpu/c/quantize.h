/* The C ABI of quantmill-cpu. A change of meaning raises QM_ABI_VERSION.
 *
 * Every quantizer returns the flat index of the first non-finite element it met (its outputs are
 * then incomplete), or -1. Sources need not be aligned. `threads` includes the caller's.
 */
#ifndef QUANTMILL_QUANTIZE_H
#define QUANTMILL_QUANTIZE_H

#include <stdint.h>

#define QM_ABI_VERSION 16

enum { QM_F32 = 0, QM_BF16 = 1, QM_F16 = 2 };
enum { QM_TO_INT8 = 0, QM_TO_E4M3 = 1, QM_TO_E5M2 = 2, QM_TO_E2M1 = 3 };

int qm_abi_version(void);

/* Instruction sets that the library has code for and this machine can run, ascending, as words:
 * "baseline avx2 avx512". The last one is used unless another is asked for; results are equal. */
const char *qm_levels(void);

/* The one in use. */
const char *qm_level(void);

/* Use another one from now on, in all threads: 0, or -1 where qm_levels() does not name it. */
int qm_use_level(const char *name);

/* Flat blocks of `block` elements (even). `bounds`: 15 ascending midpoints of the sorted table;
 * `order`: code of each rank. `out`: ceil(count / 2) bytes, first code in the high nibble;
 * `scale`: absmax of each block. Full blocks multiply by 1 / absmax, a ragged last one divides. */
int64_t qm_quantize_codebook4(const void *source, int dtype, int64_t count, int64_t block,
                              const float *bounds, const uint8_t *order, uint8_t *out, float *scale,
                              int threads);

/* 8 bits: a value over its block's absmax goes to the nearest of 65536 steps over [-1, 1], and
 * from there to the code that `nearest` (65536 bytes) gives. A block of zeros has codes of 0, and
 * so has a zero whose block's absmax is too small to have a reciprocal. `out`: count bytes. */
int64_t qm_quantize_codebook8(const float *source, int64_t count, int64_t block,
                              const uint8_t *nearest, uint8_t *out, float *scale, int threads);

/* Row-wise int8: each weight rounded to binary16, times (1 / absmax) * 127 of its row, half to even.
 * Rows without columns have a scale of 0. */
int64_t qm_quantize_rows_int8(const void *source, int dtype, int64_t rows, int64_t columns,
                              int8_t *out, float *scale, int threads);

/* Largest magnitudes, float32 [rows, ceil(columns / group)], of groups of `group` columns. Nothing
 * is refused: where NaN or infinity is inside, so is the result. */
void qm_absmax(const void *source, int dtype, int64_t rows, int64_t columns, int64_t group,
               float *out, int threads);

/* The least and the largest values of such groups, each shaped as above; NaN in one of both where NaN
 * is inside. */
void qm_extremes(const void *source, int dtype, int64_t rows, int64_t columns, int64_t group,
                 float *low, float *high, int threads);

/* Each value over (`divide`), or times, its group's number in `by`, shaped as above; held within
 * [-top, top] (QM_TO_INT8: [-top - 1, top]) and rounded, half to even. `out`: a byte per value;
 * QM_TO_E2M1: ceil(rows * columns / 2) bytes, the first code in the low half. */
void qm_round(const void *source, int dtype, int64_t rows, int64_t columns, int64_t group,
              const float *by, int divide, int kind, float top, uint8_t *out, int threads);

/* Codes of `bits` bits: round(value / by - minus) + plus + middle, times `by` unless `divide`, held
 * within [low, high] of 0 to 2^bits - 1; halves go to even, and what is at most `edge` before it is
 * rounded to `low`. `minus` and `plus` are shaped as `by`, or NULL: 0. `out`: a stream of
 * ceil(rows * columns * bits / 8) bytes, the first code in the lowest bits. */
void qm_round_codes(const void *source, int dtype, int64_t rows, int64_t columns, int64_t group,
                    const float *by, const float *minus, const float *plus, int divide, int bits,
                    float middle, float edge, float low, float high, uint8_t *out, int threads);

#endif
