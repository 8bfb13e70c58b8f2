/* See kernels.h. Plain loops that the compiler vectorises; hatch_build.py compiles this file once
 * for each instruction set, with QM_LEVEL as its name. All arithmetic is float32 without
 * contraction, in the order stated by the forms' reference, so every level gives the same bytes.
 */
#include "kernels.h"

#include "quantize.h"

#define QM_JOIN_(a, b) a##b
#define QM_JOIN(a, b) QM_JOIN_(a, b)
#define QM_TEXT_(a) #a
#define QM_TEXT(a) QM_TEXT_(a)

/* binary16 to binary32, exact; branch-free so that it vectorises. */
static inline float half_to_float(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000u) << 16;
    uint32_t rest = (uint32_t)(half & 0x7fffu) << 13;
    /* Scaling by 2^112 moves the exponent's bias and makes subnormals normal. */
    float scaled = qm_float_of(rest) * 5.192296858534828e33f;
    uint32_t value = qm_bits_of(scaled);
    value = (half & 0x7c00u) == 0x7c00u ? (rest | QM_INFINITE_BITS) : value;
    return qm_float_of(sign | value);
}

/* binary32 rounded to binary16 (nearest, ties to even) and back. */
static inline float round_to_half(float value) {
    uint32_t bits = qm_bits_of(value), sign = bits & 0x80000000u, magnitude = bits & 0x7fffffffu;
    /* Normal range: round the 13 bits that binary16 lacks. */
    uint32_t normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u)) & ~0x1fffu;
    normal = normal >= 0x47800000u ? QM_INFINITE_BITS : normal; /* 65536 and beyond */
    normal = magnitude > QM_INFINITE_BITS ? 0x7fc00000u : normal;
    /* Below 2^-14 binary16 has steps of 2^-24: adding 0.5 lets the addition round there. */
    float small = (qm_float_of(magnitude) + 0.5f) - 0.5f;
    uint32_t result = magnitude < 0x38800000u ? qm_bits_of(small) : normal;
    return qm_float_of(sign | result);
}

static void load(const void *source, int dtype, int64_t start, int64_t count, float *out) {
    if (dtype == QM_F32) {
        memcpy(out, (const char *)source + start * 4, (size_t)count * 4);
        return;
    }
    uint16_t raw[QM_CHUNK];
    memcpy(raw, (const char *)source + start * 2, (size_t)count * 2); /* it may be unaligned */
    if (dtype == QM_BF16) {
        for (int64_t i = 0; i < count; i++) out[i] = qm_float_of((uint32_t)raw[i] << 16);
    } else {
        for (int64_t i = 0; i < count; i++) out[i] = half_to_float(raw[i]);
    }
}

static uint32_t largest(const float *values, int64_t count) {
    /* Compared as integers: NaN is then above infinity. Signed ones, for baseline x86 has only
     * those, and without the sign bit the order is the same. */
    int32_t top = 0;
    for (int64_t i = 0; i < count; i++) {
        int32_t magnitude = (int32_t)(qm_bits_of(values[i]) & 0x7fffffffu);
        top = magnitude > top ? magnitude : top;
    }
    return (uint32_t)top;
}

static void scale(float *values, int64_t count, float by, int divide) {
    if (divide) {
        for (int64_t i = 0; i < count; i++) values[i] = values[i] / by;
    } else {
        for (int64_t i = 0; i < count; i++) values[i] = values[i] * by;
    }
}

static void ranks15(const float *values, int64_t count, const float *bounds, uint8_t *out) {
    const float b0 = bounds[0], b1 = bounds[1], b2 = bounds[2], b3 = bounds[3], b4 = bounds[4],
                b5 = bounds[5], b6 = bounds[6], b7 = bounds[7], b8 = bounds[8], b9 = bounds[9],
                b10 = bounds[10], b11 = bounds[11], b12 = bounds[12], b13 = bounds[13],
                b14 = bounds[14];
    for (int64_t i = 0; i < count; i++) {
        float v = values[i];
        /* A binary search whose branches are selections. */
        int r8 = v > b7;
        float m4 = r8 ? b11 : b3;
        int r4 = v > m4;
        float low2 = r4 ? b5 : b1, high2 = r4 ? b13 : b9;
        float m2 = r8 ? high2 : low2;
        int r2 = v > m2;
        float m00 = r2 ? b2 : b0, m01 = r2 ? b6 : b4, m10 = r2 ? b10 : b8, m11 = r2 ? b14 : b12;
        float low1 = r4 ? m01 : m00, high1 = r4 ? m11 : m10;
        int r1 = v > (r8 ? high1 : low1);
        out[i] = (uint8_t)(r8 * 8 + r4 * 4 + r2 * 2 + r1);
    }
}

static void pack(const uint8_t *ranks, int64_t pairs, const uint8_t *codes, uint8_t *out) {
    for (int64_t i = 0; i < pairs; i++)
        out[i] = (uint8_t)(ranks[2 * i] << 4 | ranks[2 * i + 1]);
    if (codes)
        for (int64_t i = 0; i < pairs; i++) out[i] = codes[out[i]];
}

static void codes8(const float *values, int64_t count, float inverse, const uint8_t *nearest,
                   uint8_t *out) {
    int32_t steps[QM_CHUNK];
    for (int64_t i = 0; i < count; i++) {
        float at = (values[i] * inverse + 1.0f) * 32767.5f + 0.5f;
        at = at > 0.0f ? at : 0.0f; /* NaN (0 * infinity) goes here too, as with the peer */
        at = at < 65535.0f ? at : 65535.0f;
        steps[i] = (int32_t)at;
    }
    for (int64_t i = 0; i < count; i++) out[i] = nearest[steps[i]];
}

static void to_half(float *values, int64_t count) {
    for (int64_t i = 0; i < count; i++) values[i] = round_to_half(values[i]);
}

static void codes_int8(const float *values, int64_t count, float scale, int8_t *out) {
    for (int64_t i = 0; i < count; i++) {
        /* Adding and taking away 1.5 * 2^23 rounds to an integer, ties to even. */
        float rounded = (values[i] * scale + 12582912.0f) - 12582912.0f;
        out[i] = (int8_t)(int32_t)rounded;
    }
}

/* |value| of at most the format's largest as bits of a float with `mantissa` bits of it. `small` is
 * the number whose unit in the last place is the least step of the format. */
static inline uint8_t narrow(float value, int mantissa, uint32_t bias, float least, float small) {
    uint32_t bits = qm_bits_of(value), size = bits & 0x7fffffffu;
    int lost = 23 - mantissa;
    uint32_t half = (1u << (lost - 1)) - 1u;
    uint32_t normal = ((size + half + ((size >> lost) & 1u)) >> lost) - (bias << mantissa);
    uint32_t below = qm_bits_of(qm_float_of(size) + small) - qm_bits_of(small);
    uint32_t result = size < qm_bits_of(least) ? below : normal;
    return (uint8_t)(((bits >> 24) & 0x80u) | result);
}

static inline float held(float value, float low, float high) {
    value = value < low ? low : value;
    return value > high ? high : value;
}

static void to_bytes(const float *values, int64_t count, float by, int divide, int kind, float top,
                     uint8_t *out) {
    float scaled[QM_CHUNK];
    float low = kind == QM_TO_INT8 ? -top - 1.0f : -top;
    if (divide) {
        for (int64_t i = 0; i < count; i++) scaled[i] = held(values[i] / by, low, top);
    } else {
        for (int64_t i = 0; i < count; i++) scaled[i] = held(values[i] * by, low, top);
    }
    if (kind == QM_TO_INT8) {
        for (int64_t i = 0; i < count; i++)
            out[i] = (uint8_t)(int8_t)(int32_t)((scaled[i] + 12582912.0f) - 12582912.0f);
    } else if (kind == QM_TO_E4M3) {
        for (int64_t i = 0; i < count; i++)
            out[i] = narrow(scaled[i], 3, 120u, 0.015625f, 16384.0f);
    } else if (kind == QM_TO_E5M2) {
        for (int64_t i = 0; i < count; i++)
            out[i] = narrow(scaled[i], 2, 112u, 6.103515625e-05f, 128.0f);
    } else {
        for (int64_t i = 0; i < count; i++) {
            const uint8_t wide = narrow(scaled[i], 1, 126u, 1.0f, 4194304.0f);
            out[i] = (uint8_t)((wide >> 4 & 8) | (wide & 7));
        }
    }
}

/* Bits as integers in the order of the numbers: NaN lies beyond infinity, on either side. */
static inline int32_t ordered(int32_t bits) { return bits ^ ((bits >> 31) & 0x7fffffff); }

static void extremes(const float *values, int64_t count, float *low, float *high) {
    int32_t least = INT32_MAX, most = INT32_MIN;
    for (int64_t i = 0; i < count; i++) {
        int32_t at = ordered((int32_t)qm_bits_of(values[i]));
        least = at < least ? at : least;
        most = at > most ? at : most;
    }
    *low = qm_float_of((uint32_t)ordered(least));
    *high = qm_float_of((uint32_t)ordered(most));
}

static void to_codes(const float *values, int64_t count, const QmCodeRule *rule, uint8_t *out) {
    const float by = rule->by, minus = rule->minus, plus = rule->plus, edge = rule->edge;
    const float low = rule->low, high = rule->high, far = 4194303.0f;
    float scaled[QM_CHUNK];
    if (rule->divide) {
        for (int64_t i = 0; i < count; i++) scaled[i] = values[i] / by - minus;
    } else {
        for (int64_t i = 0; i < count; i++) scaled[i] = values[i] * by - minus;
    }
    /* In a loop of its own: what follows is minima and maxima only. */
    if (edge > -far)
        for (int64_t i = 0; i < count; i++) scaled[i] = scaled[i] > edge ? scaled[i] : -far;
    for (int64_t i = 0; i < count; i++) {
        float at = scaled[i] > -far ? scaled[i] : -far; /* NaN too; the sum rounds within 2^22 */
        at = at < far ? at : far;
        at = ((at + 12582912.0f) - 12582912.0f) + plus;
        at = at > low ? at : low;
        at = at < high ? at : high;
        out[i] = (uint8_t)(int32_t)at;
    }
}

static void pairs(const uint8_t *restrict codes, int64_t count, uint8_t *restrict out) {
    for (int64_t i = 0; i < count / 2; i++)
        out[i] = (uint8_t)(codes[2 * i] | codes[2 * i + 1] << 4);
    if (count % 2) out[count / 2] = codes[count - 1];
}

const QmKernels QM_JOIN(qm_kernels_, QM_LEVEL) = {
    QM_TEXT(QM_LEVEL), load, largest, scale, ranks15, pack, codes8, to_half, codes_int8,
    extremes, to_bytes, to_codes, pairs,
};
