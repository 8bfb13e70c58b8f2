/* The hot loops, compiled once for each instruction set (kernels.c) and chosen at run time
 * (quantize.c). Internal: no part of the ABI. */
#ifndef QUANTMILL_KERNELS_H
#define QUANTMILL_KERNELS_H

#include <stdint.h>
#include <string.h>

#define QM_CHUNK 4096 /* elements worked on at a time: fits the first-level cache */
#define QM_INFINITE_BITS 0x7f800000u

/* round(value / by - minus) + plus, times `by` unless `divide`, and `low` up to `edge`. */
typedef struct {
    float by, minus, plus, edge, low, high;
    int divide;
} QmCodeRule;

typedef struct {
    const char *name;
    /* Elements [start, start + count) as float32; count is at most QM_CHUNK here and below. */
    void (*load)(const void *source, int dtype, int64_t start, int64_t count, float *out);
    /* The bits of the largest magnitude; QM_INFINITE_BITS or more: not all are finite. */
    uint32_t (*largest)(const float *values, int64_t count);
    /* In place: values * by, or values / by. */
    void (*scale)(float *values, int64_t count, float by, int divide);
    /* Rank among 15 ascending bounds: how many are below the value. */
    void (*ranks15)(const float *values, int64_t count, const float *bounds, uint8_t *out);
    /* Two ranks to a byte, the first one high; then through `codes` (256 bytes) unless NULL. */
    void (*pack)(const uint8_t *ranks, int64_t pairs, const uint8_t *codes, uint8_t *out);
    /* Codes of values * inverse on a grid of 65536 steps over [-1, 1]; NaN is at step 0. */
    void (*codes8)(const float *values, int64_t count, float inverse, const uint8_t *nearest,
                   uint8_t *out);
    /* In place: rounded to binary16 and back. */
    void (*to_half)(float *values, int64_t count);
    /* values * scale, half to even. */
    void (*codes_int8)(const float *values, int64_t count, float scale, int8_t *out);
    /* The least and the largest value; NaN where one of them is. Not for a count of 0. */
    void (*extremes)(const float *values, int64_t count, float *low, float *high);
    /* values / by, or values * by, held within [-top - (kind is QM_TO_INT8), top] and rounded, half to
     * even, to the kind's bytes; QM_TO_E2M1: to its codes, each in a byte. */
    void (*to_bytes)(const float *values, int64_t count, float by, int divide, int kind, float top,
                     uint8_t *out);
    /* Codes: see qm_round_codes. */
    void (*to_codes)(const float *values, int64_t count, const QmCodeRule *rule, uint8_t *out);
    /* Codes of 4 bits, two to a byte, the first one low; an odd last one alone. */
    void (*pairs)(const uint8_t *codes, int64_t count, uint8_t *out);
} QmKernels;

/* The kernels of the instruction set in use. */
const QmKernels *qm_kernels(void);

extern const QmKernels qm_kernels_baseline;
#ifdef QM_X86_LEVELS
extern const QmKernels qm_kernels_avx2, qm_kernels_avx512;
#endif

static inline uint32_t qm_bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

static inline float qm_float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

#endif
