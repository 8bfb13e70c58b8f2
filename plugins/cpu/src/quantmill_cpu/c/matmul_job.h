/* What the parts of matmul share. Internal: no part of the ABI. */
#ifndef QUANTMILL_MATMUL_JOB_H
#define QUANTMILL_MATMUL_JOB_H

#include <stddef.h>
#include <stdint.h>

#include "matmul.h"
#include "quantize.h"

#define QM_PAIR 32 /* rows worked on together: two panels */
#define QM_SEGMENT 16 /* most units in a run: what is decoded at a time stays in the first cache */
#define QM_BATCH 128 /* rows of x worked on together */
#define QM_FEW 4 /* rows for which decoding into memory doesn't pay */
#define QM_MANY 64 /* rows beyond which weights are scaled before they are multiplied, */
#define QM_MANY_SMALL 8 /* and at least so many where groups are small: scaling sums takes long */

typedef struct {
    int kind, lanes, bits, level, level_kind;
    int64_t size, stride;
    int64_t panel_bytes; /* of 16 lanes */
    const uint8_t *data, *second;
    const float *table;
    float step, low, plus;
    /* Where the codes of groups 4 * j to 4 * j + 3 are in a chunk, in both planes. */
    uint32_t mask, high_mask; /* 0: there is one plane */
    uint16_t at[8], high_at[8];
    uint8_t shift[8], high_shift[8], high_to;
} QmValues;

/* What a code is in arithmetic: value = scale * gain * unit * (number + zero), where `zero` is
 * (shift - zero point) / unit + base. */
enum {
    QM_LOOKUP, /* lookup[code] */
    QM_MIRROR, /* the same for 8 bits, where the highest bit only turns the sign */
    QM_CODE, /* the code itself, for the lookup ascends by one */
    QM_BYTE, /* a byte from `bytes`: the lookup has whole numbers */
    QM_TWO_BYTES /* 256 * a byte from `bytes` + one from `bytes + 64`: rounded to 16 bits */
};

/* What a weight's lookup is, worked out once: QM_PART_FACTS. */
typedef struct {
    int32_t numbers;
    int32_t bf16_fits; /* rounding the lookup to bf16 loses less than a kernel may, */
    int32_t bf16_twice; /* and also when the scaled weight is rounded once more */
    float unit, base; /* of these numbers */
    int32_t unused[11];
    /* The lookup in bf16. Up to 6 bits: the low bytes of 64 words, repeating, then the high bytes;
     * 8 bits: the same of 256 words. */
    uint8_t table[512];
    uint8_t bytes[128]; /* repeating */
} QmFacts;

_Static_assert(sizeof(QmFacts) == QM_FACTS_BYTES, "the layout knows its size");

typedef struct QmJob {
    int64_t rows, columns, units, groups, group_units, panels, panel_bytes;
    int64_t runs; /* in a group: pieces of at most QM_SEGMENT units */
    int bits, offset_kind;
    int numbers, bf16_fits, bf16_twice; /* as in QmFacts */
    int scaled; /* weights are scaled before they are multiplied */
    int zeros_needed; /* zero points are multiplied by a group's sum of x, */
    int sums_needed; /* or something else is */
    int zero_folded; /* sums begin with `zero_number` times those of x: it is the same everywhere */
    int zero_number;
    const uint8_t *codes;
    const float *lookup;
    const int32_t *order;
    QmValues scale, offset;
    float gain, shift, plus;
    float unit, base; /* of the numbers */
    const uint8_t *table, *bytes; /* as in QmFacts */

    const uint8_t *x, *bias; /* as they are, of `dtype` */
    uint8_t *y;
    int dtype;
    int64_t batch;

    /* Activations as the way wants them: `split` rows for each row of x, `stride` elements. */
    int split;
    int64_t act_rows, stride;
    int natural; /* the columns of activations are in their own order */
    int tiled; /* 16 rows by 32 columns of them lie together */
    void *act;
    float *sums; /* [act_rows, groups] */
    float *steps; /* [act_rows, groups * runs]: what 1 is worth in whole activations */
    int32_t *starts; /* [act_rows, groups * runs, 2]: what sums begin with, of upper and lower bytes */
} QmJob;

/* Fill in what the job has of a weight. */
void qm_weight_of(QmJob *job, const void *weight);

/* Rows beyond which weights are scaled, where there are no tiles: that takes longer for codes of 8
 * bits, and sums are scaled and shifted for each group. */
static inline int64_t qm_many(const QmJob *job) {
    const int64_t units = job->group_units, rows = units * (job->bits == 8 ? 8 : 4);
    if (job->numbers != QM_CODE) return units <= 2 ? QM_MANY_SMALL : QM_MANY;
    return rows < QM_MANY_SMALL ? QM_MANY_SMALL : rows > QM_MANY / 2 ? QM_MANY / 2 : rows;
}

/* A way of computing, for one instruction set. */
typedef struct {
    int element; /* bytes of an activation */
    /* Say which of the numbers it uses: `numbers`, `unit` and `base` of the job. */
    void (*settle)(QmJob *job);
    /* Rows of activations for one of x in this dtype. Their number is a multiple of `multiple`;
     * what is in those that stand for none is of no matter. */
    int (*split)(int dtype);
    int multiple;
    /* Fill the activations and sums of x's rows [first, last). */
    void (*load)(const QmJob *job, int64_t first, int64_t last, char *workspace);
    /* Rows 32 * pair to 32 * pair + 31 of W against all activations. */
    void (*run)(const QmJob *job, int64_t pair, char *workspace);
    /* The same rows of W as floats of `dtype`, into y [rows, columns]. NULL where only others can. */
    void (*expand)(const QmJob *job, int64_t pair, char *workspace);
} QmWay;

extern const QmWay qm_fp32_baseline;
#ifdef QM_X86_LEVELS
extern const QmWay qm_fp32_avx2, qm_fp32_avx512;
#endif
extern const QmWay qm_int8_avx512; /* needs VNNI and VBMI */
extern const QmWay qm_bf16_avx512; /* needs BF16 and VBMI */
extern const QmWay qm_bf16_amx;

/* A worker's workspace; every part is a multiple of 64 bytes. */
typedef struct {
    float *row; /* a row of x, or anything else of that size */
    float *scale, *zero, *minimum; /* [groups, 32] */
    float *total, *part; /* [act_rows, 32], the rows of `part` filled up to 32 */
    void *decoded; /* [QM_SEGMENT * 16 columns, 32], of up to four bytes */
    float *tiles; /* [2, 4, 16, 16] */
} QmWorkspace;

static inline size_t qm_part(size_t bytes) { return (bytes + 63) / 64 * 64; }

/* The layout of a workspace, and its size; `at` may be NULL to learn the size. */
static inline size_t qm_workspace(const QmJob *job, char *at, QmWorkspace *out) {
    size_t values = qm_part((size_t)job->groups * QM_PAIR * 4);
    size_t rows = qm_part((size_t)job->act_rows * QM_PAIR * 4), used = 0;
#define QM_TAKE(field, bytes) \
    out->field = (void *)(at ? at + used : NULL); \
    used += (bytes);
    QM_TAKE(row, qm_part((size_t)job->stride * 4))
    QM_TAKE(scale, values)
    QM_TAKE(zero, values)
    QM_TAKE(minimum, values)
    QM_TAKE(total, rows)
    QM_TAKE(part, qm_part((size_t)(job->act_rows + 31) / 32 * 32 * QM_PAIR * 4))
    QM_TAKE(decoded, (size_t)(QM_SEGMENT * QM_UNIT * QM_PAIR * 4))
    QM_TAKE(tiles, 2 * 4 * 16 * 16 * 4)
#undef QM_TAKE
    return used;
}

#endif
