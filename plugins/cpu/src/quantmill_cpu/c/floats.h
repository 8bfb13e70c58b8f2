/* Narrow floats to and from float32, without branches so that loops over them vectorise.
 * Internal: no part of the ABI. */
#ifndef QUANTMILL_FLOATS_H
#define QUANTMILL_FLOATS_H

#include <stdint.h>
#include <string.h>

#define QM_INLINE static inline __attribute__((always_inline))

QM_INLINE float qm_as_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

QM_INLINE uint32_t qm_as_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

QM_INLINE float qm_bfloat(uint16_t value) { return qm_as_float((uint32_t)value << 16); }

QM_INLINE float qm_half(uint16_t half) {
    uint32_t rest = (uint32_t)(half & 0x7fffu) << 13;
    /* Scaling by 2^112 moves the exponent's bias and makes subnormals normal. */
    uint32_t value = qm_as_bits(qm_as_float(rest) * 5.192296858534828e33f);
    value = (half & 0x7c00u) == 0x7c00u ? (rest | 0x7f800000u) : value;
    return qm_as_float((uint32_t)(half & 0x8000u) << 16 | value);
}

/* One value of a source that need not be aligned: float32 (dtype 0), bfloat16 (1), float16 (2). */
QM_INLINE float qm_value_at(const void *source, int dtype, int64_t at) {
    if (dtype == 0) {
        float value;
        memcpy(&value, (const char *)source + at * 4, 4);
        return value;
    }
    uint16_t raw;
    memcpy(&raw, (const char *)source + at * 2, 2);
    return dtype == 1 ? qm_bfloat(raw) : qm_half(raw);
}

/* Rounded to nearest, ties to even; of bits, so that loops over them vectorise. */
QM_INLINE uint32_t qm_half_bits(uint32_t bits) {
    uint32_t sign = bits >> 16 & 0x8000u, size = bits & 0x7fffffffu;
    uint32_t normal = ((size + 0xfffu + (size >> 13 & 1u)) >> 13) - (112u << 10);
    normal = normal >= 0x7c00u ? 0x7c00u : normal;
    /* Below 2^-14 halves have steps of 2^-24: adding 0.5 lets the addition round there. */
    uint32_t small = qm_as_bits(qm_as_float(size) + 0.5f) - 0x3f000000u;
    uint32_t result = size < 0x38800000u ? small : normal;
    result = size > 0x7f800000u ? 0x7e00u : result;
    return sign | result;
}

QM_INLINE uint32_t qm_bfloat_bits(uint32_t bits) {
    uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    return (bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded;
}

QM_INLINE uint16_t qm_to_bfloat(float value) {
    return (uint16_t)qm_bfloat_bits(qm_as_bits(value));
}

#endif
