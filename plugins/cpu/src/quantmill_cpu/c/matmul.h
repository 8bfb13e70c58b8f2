/* The matmul part of quantmill-cpu's C ABI: y = x @ W.T + bias with W quantized.
 *
 * The weight lies in "panels" of 16 output rows, so that a vector's lanes are rows: a group's
 * scales are then a vector too, and nothing is summed across lanes. A panel is a row of chunks, a
 * chunk holds 16 rows x 32 columns in 64 * bits bytes, as one plane per power of two in `bits`
 * (3 = 2 + 1, 5 = 4 + 1, 6 = 4 + 2; the lowest bits of the code first). A plane of `b` bits is `b`
 * vectors of 16 words of 32 bits, a word per row. Byte p of a word holds 8 / b codes, the first in
 * the lowest bits: those of columns 4 * j + p, where j counts on from vector to vector. So one
 * shift of a vector gives four columns of 16 rows, in the order in which the machine's dot product
 * of bytes takes them.
 *
 * With act-order the columns are sorted by group first, and `order` says where each one came from.
 * Rows and columns are padded with a code whose value is finite; the activations there are zero.
 *
 * What a code means, with `zero` and `minimum` being the two kinds of offset:
 *     value = scale * gain * (lookup[code] + shift - zero) + minimum + plus
 */
#ifndef QUANTMILL_MATMUL_H
#define QUANTMILL_MATMUL_H

#include <stdint.h>

#define QM_PANEL 16 /* rows */
#define QM_CHUNK_COLUMNS 32
#define QM_UNIT 16 /* columns: half a chunk; groups are whole units */

/* How a scale or an offset is stored. Coded: as codes, whose value is taken from `table`, or is
 * step * code + low where there is no table; times the second level's value, plus a constant. Codes
 * of 16 lanes lie in planes as the weight's do, groups in place of columns, without the vectors that
 * a panel's last groups leave empty where there is one plane; others are a byte each. */
enum { QM_NONE, QM_FLOAT, QM_BFLOAT, QM_HALF, QM_INT8, QM_UINT8, QM_INT32, QM_CODED };
/* The second level's place for row r and group g of G: none; (r * G + g) / size; in [panels, stride,
 * 16] at g / size; or 0. It is of one of the kinds of floats. */
enum { QM_LEVEL_NONE, QM_LEVEL_FLAT, QM_LEVEL_ROW, QM_LEVEL_ONE };
enum { QM_OFFSET_NONE, QM_OFFSET_ZERO, QM_OFFSET_MINIMUM };

/* A weight is one run of memory at a multiple of 64 bytes, so that one address says all: a head of
 * int64, then the parts, each at a multiple of 64 bytes from the beginning. Positions in the head: */
enum {
    QM_SPEC_ROWS,
    QM_SPEC_COLUMNS,
    QM_SPEC_BITS,
    QM_SPEC_GROUP, /* columns, a multiple of QM_UNIT */
    QM_SPEC_OFFSET_KIND, /* QM_OFFSET_NONE, ... */
    QM_SPEC_SCALE, /* QM_VALUES_COUNT numbers for the scale, */
    QM_SPEC_OFFSET = QM_SPEC_SCALE + 7, /* and for the offset */
    QM_SPEC_CONSTANTS = QM_SPEC_OFFSET + 7, /* float[9]: gain, shift, plus; step, low and plus of */
    QM_SPEC_PARTS = QM_SPEC_CONSTANTS + 5, /* the scale, then of the offset */
    /* Two for each part: where it begins, and its bytes. */
};

/* The numbers of a scale or an offset. */
enum {
    QM_VALUES_KIND,
    QM_VALUES_LANES, /* 16: [panels, groups, 16]; 1: [panels, groups]; 0: one for all */
    QM_VALUES_BITS, /* of codes */
    QM_VALUES_LEVEL,
    QM_VALUES_LEVEL_KIND,
    QM_VALUES_SIZE,
    QM_VALUES_STRIDE,
    QM_VALUES_COUNT
};

/* The parts, in their order; of those that a weight lacks both numbers are 0. */
enum {
    QM_PART_FACTS, /* QM_FACTS_BYTES: what qm_weight_finish knows of the lookup */
    QM_PART_LOOKUP, /* float[2**bits] */
    QM_PART_ORDER, /* int32[columns]: act-order */
    QM_PART_SCALE,
    QM_PART_SCALE_TABLE, /* float[256], then all their second bytes, third and fourth ones */
    QM_PART_SCALE_LEVEL,
    QM_PART_OFFSET,
    QM_PART_OFFSET_TABLE,
    QM_PART_OFFSET_LEVEL,
    QM_PART_CODES, /* the panels */
    QM_PART_COUNT
};

#define QM_HEAD_BYTES 384 /* of (QM_SPEC_PARTS + 2 * QM_PART_COUNT) * 8 */
#define QM_FACTS_BYTES 704

/* Fill QM_PART_FACTS, once the head and the lookup are there. */
void qm_weight_finish(void *weight);

/* x, bias and y are of `dtype` (QM_F32, ...); x is [batch, columns] and y [batch, rows],
 * contiguous; they need not be aligned. 0; -1 where memory ran out; -2 where the weight doesn't lie
 * at a multiple of 64 bytes. */
int qm_matmul(const void *weight, const void *x, const void *bias, void *y, int dtype,
              int64_t batch, int threads);

/* `count` weights of one shape and size, `each` bytes from one to the next, and as many rows of x for
 * each as `ends` says, the row after its last one (ascending); `bias` is [count, rows of a weight] or
 * NULL. The rows of y after the last end are zeros. Returns as qm_matmul. */
int qm_matmul_grouped(const void *weights, int64_t each, int64_t count, const int64_t *ends,
                      const void *x, const void *bias, void *y, int dtype, int64_t batch,
                      int threads);

/* The weight as floats of `dtype`, [rows, columns], columns in their own order; computed in float32
 * as above, and rounded once. Returns as qm_matmul. */
int qm_dequantize(const void *weight, void *out, int dtype, int threads);

/* Instruction sets that matmul has code for here, ascending. The best one within the level that
 * qm_use_level chose is used, unless another is asked for: */
const char *qm_matmul_levels(void);
const char *qm_matmul_level(void);
/* Internal: whether that level has dot products of bf16. */
int qm_has_dots(void);
/* 0, or -1 where qm_matmul_levels() does not name it; an empty name: the best again. */
int qm_matmul_use_level(const char *name);

/* Bytes of the panels of a weight; -1 for a width that has no planes (7). */
int64_t qm_panels_size(int64_t rows, int64_t columns, int bits);

/* How codes lie in memory, as the forms' packings: */
enum { QM_BYTES, QM_SIGNED, QM_HIGH_FIRST, QM_LOW_FIRST, QM_DENSE };

/* Packed codes into panels. `order` may be NULL; `pad` is the code of padding. */
void qm_panels_pack(const uint8_t *packed, int packing, int bits, int64_t rows, int64_t columns,
                    const int32_t *order, int pad, uint8_t *panels, int threads);

/* The exact inverse, except for the unused bits of the last byte, which become zero. */
void qm_panels_unpack(const uint8_t *panels, int packing, int bits, int64_t rows, int64_t columns,
                      const int32_t *order, uint8_t *packed, int threads);

/* Codes of a packing to one byte each, and back; signed ones move by 2**(bits - 1). */
void qm_codes_unpack(const uint8_t *packed, int packing, int bits, int64_t start, int64_t count,
                     uint8_t *codes);
void qm_codes_pack(const uint8_t *codes, int packing, int bits, int64_t count, uint8_t *packed);

/* Values of groups, 1, 2 or 4 bytes each, [rows, groups], as [panels, groups, 16], with zeros below
 * the last row. */
void qm_panels_values(const void *values, int bytes, int64_t rows, int64_t groups, void *out,
                      int threads);

/* Ask for large pages where a weight will be. */
void qm_large_pages(void *memory, int64_t bytes);

/* Read memory and do nothing else: what benchmarks compare with. */
int64_t qm_read(const uint8_t *from, int64_t count, int threads);

#endif
