/* Decoders of ggml's types: blocks to float32, in the order of operations that the reference has.
 * Plain loops that the compiler vectorises; included by ggml_types.c, once for each instruction
 * set.
 */
#include "floats.h"

#define DECODER(name)                                                                             \
    static void decode_##name(const uint8_t *restrict raw, int64_t blocks,                        \
                              const int8_t *restrict points, float *restrict out)

QM_INLINE float half_at(const uint8_t *at) {
    uint16_t bits;
    memcpy(&bits, at, 2);
    return qm_half(bits);
}

/* ---- Blocks of 32 and few bits --------------------------------------------------------------- */

DECODER(q4_0) {
    (void)points;
    for (int64_t b = 0; b < blocks; b++, raw += 18, out += 32) {
        float d = half_at(raw);
        const uint8_t *q = raw + 2;
        for (int i = 0; i < 16; i++) out[i] = (float)((q[i] & 15) - 8) * d;
        for (int i = 0; i < 16; i++) out[i + 16] = (float)((q[i] >> 4) - 8) * d;
    }
}

DECODER(q4_1) {
    (void)points;
    for (int64_t b = 0; b < blocks; b++, raw += 20, out += 32) {
        float d = half_at(raw), m = half_at(raw + 2);
        const uint8_t *q = raw + 4;
        for (int i = 0; i < 16; i++) out[i] = (float)(q[i] & 15) * d + m;
        for (int i = 0; i < 16; i++) out[i + 16] = (float)(q[i] >> 4) * d + m;
    }
}

DECODER(q5_0) {
    (void)points;
    for (int64_t b = 0; b < blocks; b++, raw += 22, out += 32) {
        float d = half_at(raw);
        uint32_t fifth;
        memcpy(&fifth, raw + 2, 4);
        const uint8_t *q = raw + 6;
        for (int i = 0; i < 16; i++)
            out[i] = (float)((int)((q[i] & 15u) | ((fifth >> i & 1u) << 4)) - 16) * d;
        for (int i = 0; i < 16; i++)
            out[i + 16] = (float)((int)((q[i] >> 4) | ((fifth >> (i + 16) & 1u) << 4)) - 16) * d;
    }
}

DECODER(q5_1) {
    (void)points;
    for (int64_t b = 0; b < blocks; b++, raw += 24, out += 32) {
        float d = half_at(raw), m = half_at(raw + 2);
        uint32_t fifth;
        memcpy(&fifth, raw + 4, 4);
        const uint8_t *q = raw + 8;
        for (int i = 0; i < 16; i++)
            out[i] = (float)(int)((q[i] & 15u) | ((fifth >> i & 1u) << 4)) * d + m;
        for (int i = 0; i < 16; i++)
            out[i + 16] = (float)(int)((q[i] >> 4) | ((fifth >> (i + 16) & 1u) << 4)) * d + m;
    }
}

DECODER(q8_0) {
    (void)points;
    for (int64_t b = 0; b < blocks; b++, raw += 34, out += 32) {
        float d = half_at(raw);
        const int8_t *q = (const int8_t *)raw + 2;
        for (int i = 0; i < 32; i++) out[i] = (float)q[i] * d;
    }
}

DECODER(tq2_0) {
    (void)points;
    for (int64_t b = 0; b < blocks; b++, raw += 66) {
        float d = half_at(raw + 64);
        for (int run = 0; run < 64; run += 32)
            for (int shift = 0; shift < 8; shift += 2, out += 32)
                for (int i = 0; i < 32; i++) out[i] = (float)((raw[run + i] >> shift & 3) - 1) * d;
    }
}

/* A byte holds digits of base 3 as a fraction: times three, what runs over is the next one. */
QM_INLINE void base_three(const uint8_t *raw, int width, int count, float d, float *out) {
    static const uint8_t POWERS[5] = {1, 3, 9, 27, 81};
    for (int digit = 0; digit < count; digit++)
        for (int i = 0; i < width; i++) {
            int rest = (uint8_t)(raw[i] * POWERS[digit]);
            out[digit * width + i] = (float)((rest * 3 >> 8) - 1) * d;
        }
}

DECODER(tq1_0) {
    (void)points;
    for (int64_t b = 0; b < blocks; b++, raw += 54, out += 256) {
        float d = half_at(raw + 52);
        base_three(raw, 32, 5, d, out);
        base_three(raw + 32, 16, 5, d, out + 160);
        base_three(raw + 48, 4, 4, d, out + 240);
    }
}

DECODER(q2_0) {
    (void)points;
    for (int64_t b = 0; b < blocks; b++, raw += 18, out += 64) {
        float d = half_at(raw);
        const uint8_t *q = raw + 2;
        for (int i = 0; i < 64; i++) out[i] = (float)((q[i / 4] >> (2 * (i % 4)) & 3) - 1) * d;
    }
}

DECODER(q1_0) {
    (void)points;
    for (int64_t b = 0; b < blocks; b++, raw += 18, out += 128) {
        float d = half_at(raw);
        for (int w = 0; w < 4; w++) {
            uint32_t bits;
            memcpy(&bits, raw + 2 + 4 * w, 4);
            for (int i = 0; i < 32; i++)
                out[32 * w + i] = qm_as_float(qm_as_bits(d) ^ ((~bits >> i & 1u) << 31));
        }
    }
}

/* ---- Tables ---------------------------------------------------------------------------------- */

static const int8_t IQ4_VALUES[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                      1,    13,   25,  38,  53,  69,  89,  113};
static const int8_t E2M1_TWICE[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

/* `width` bytes of pairs through a table of 16: first the low halves, then the high ones. */
QM_INLINE void through(const int8_t *table, const uint8_t *q, int width, float d, float *out) {
    int8_t low[16], high[16];
#if defined(__SSSE3__)
    if (width == 16) {
        typedef int8_t Q __attribute__((vector_size(16)));
        Q entries, codes;
        memcpy(&entries, table, 16);
        memcpy(&codes, q, 16);
        Q first = (Q)__builtin_ia32_pshufb128((__attribute__((vector_size(16))) char)entries,
                                              (__attribute__((vector_size(16))) char)(codes & 15));
        Q second = (Q)__builtin_ia32_pshufb128(
            (__attribute__((vector_size(16))) char)entries,
            (__attribute__((vector_size(16))) char)((codes >> 4) & 15));
        memcpy(low, &first, 16);
        memcpy(high, &second, 16);
    } else
#endif
        for (int i = 0; i < width; i++) {
            low[i] = table[q[i] & 15];
            high[i] = table[q[i] >> 4];
        }
    for (int i = 0; i < width; i++) out[i] = (float)low[i] * d;
    for (int i = 0; i < width; i++) out[width + i] = (float)high[i] * d;
}

DECODER(iq4_nl) {
    (void)points;
    for (int64_t b = 0; b < blocks; b++, raw += 18, out += 32)
        through(IQ4_VALUES, raw + 2, 16, half_at(raw), out);
}

DECODER(iq4_xs) {
    (void)points;
    for (int64_t b = 0; b < blocks; b++, raw += 136) {
        float d = half_at(raw);
        int high = raw[2] | raw[3] << 8;
        for (int g = 0; g < 8; g++, out += 32) {
            int step = (raw[4 + g / 2] >> (4 * (g % 2)) & 15) | (high >> (2 * g) & 3) << 4;
            through(IQ4_VALUES, raw + 8 + 16 * g, 16, d * (float)(step - 32), out);
        }
    }
}

DECODER(mxfp4) {
    (void)points;
    for (int64_t b = 0; b < blocks; b++, raw += 17, out += 32) {
        uint32_t e = raw[0]; /* half of 2 ^ (e - 127) */
        float d = qm_as_float(e < 2 ? 0x00200000u << e : (e - 1) << 23);
        through(E2M1_TWICE, raw + 1, 16, d, out);
    }
}

DECODER(nvfp4) {
    (void)points;
    for (int64_t b = 0; b < blocks; b++, raw += 36)
        for (int g = 0; g < 4; g++, out += 16) {
            int code = raw[g], exponent = code >> 3 & 15, mantissa = code & 7;
            float d = exponent ? qm_as_float((uint32_t)(exponent + 119) << 23 |
                                             (uint32_t)mantissa << 20)
                               : (float)mantissa * 0.0009765625f;
            if (code == 0x7f) d = 0.0f;
            through(E2M1_TWICE, raw + 4 + 8 * g, 8, d, out);
        }
}

/* ---- K-quants -------------------------------------------------------------------------------- */

DECODER(q2_k) {
    (void)points;
    for (int64_t b = 0; b < blocks; b++, raw += 84) {
        float d = half_at(raw + 80), m = half_at(raw + 82);
        const uint8_t *scale = raw;
        for (int run = 16; run < 80; run += 32)
            for (int shift = 0; shift < 8; shift += 2)
                for (int part = 0; part < 32; part += 16, scale++, out += 16) {
                    float by = d * (float)(*scale & 15), less = m * (float)(*scale >> 4);
                    for (int i = 0; i < 16; i++)
                        out[i] = by * (float)(raw[run + part + i] >> shift & 3) - less;
                }
    }
}

DECODER(q3_k) {
    (void)points;
    for (int64_t b = 0; b < blocks; b++, raw += 110) {
        float d = half_at(raw + 108);
        for (int g = 0; g < 16; g++, out += 16) {
            int low = raw[96 + g % 8] >> (4 * (g / 8)) & 15;
            int step = (low | (raw[104 + g % 4] >> (2 * (g / 4)) & 3) << 4) - 32;
            float by = d * (float)step;
            const uint8_t *q = raw + 32 + 32 * (g / 8) + 16 * (g % 2);
            const uint8_t *third = raw + 16 * (g % 2);
            int shift = g / 2 % 4 * 2, bit = g / 2;
            for (int i = 0; i < 16; i++) {
                int code = (q[i] >> shift & 3) | (third[i] >> bit & 1) << 2;
                out[i] = by * (float)(code - 4);
            }
        }
    }
}

QM_INLINE void six(const uint8_t *packed, int g, int *scale, int *minimum) {
    if (g < 4) {
        *scale = packed[g] & 63;
        *minimum = packed[g + 4] & 63;
    } else {
        *scale = (packed[g + 4] & 15) | (packed[g - 4] >> 6) << 4;
        *minimum = packed[g + 4] >> 4 | (packed[g] >> 6) << 4;
    }
}

DECODER(q4_k) {
    (void)points;
    for (int64_t b = 0; b < blocks; b++, raw += 144) {
        float d = half_at(raw), m = half_at(raw + 2);
        for (int g = 0; g < 8; g += 2) {
            const uint8_t *q = raw + 16 + 16 * g;
            for (int part = 0; part < 2; part++, out += 32) {
                int scale, minimum;
                six(raw + 4, g + part, &scale, &minimum);
                float by = d * (float)scale, less = m * (float)minimum;
                int shift = 4 * part;
                for (int i = 0; i < 32; i++) out[i] = by * (float)(q[i] >> shift & 15) - less;
            }
        }
    }
}

DECODER(q5_k) {
    (void)points;
    for (int64_t b = 0; b < blocks; b++, raw += 176) {
        float d = half_at(raw), m = half_at(raw + 2);
        const uint8_t *fifth = raw + 16;
        for (int g = 0; g < 8; g++, out += 32) {
            const uint8_t *q = raw + 48 + 32 * (g / 2);
            int scale, minimum, shift = 4 * (g % 2);
            six(raw + 4, g, &scale, &minimum);
            float by = d * (float)scale, less = m * (float)minimum;
            for (int i = 0; i < 32; i++) {
                int code = (q[i] >> shift & 15) | (fifth[i] >> g & 1) << 4;
                out[i] = by * (float)code - less;
            }
        }
    }
}

DECODER(q6_k) {
    (void)points;
    for (int64_t b = 0; b < blocks; b++, raw += 210) {
        float d = half_at(raw + 208);
        const int8_t *steps = (const int8_t *)raw + 192;
        for (int g = 0; g < 16; g++, out += 16) {
            /* Of 128 values, the low halves of the first 64 are in the low nibbles. */
            int within = g % 8, shift = 4 * (within / 4), top = 2 * (within / 2);
            const uint8_t *low = raw + 64 * (g / 8) + 16 * (within % 4);
            const uint8_t *high = raw + 128 + 32 * (g / 8) + 16 * (within % 2);
            float by = d * (float)steps[g];
            for (int i = 0; i < 16; i++) {
                int code = (low[i] >> shift & 15) | (high[i] >> top & 3) << 4;
                out[i] = by * (float)(code - 32);
            }
        }
    }
}

DECODER(q8_k) {
    (void)points;
    for (int64_t b = 0; b < blocks; b++, raw += 292, out += 256) {
        float d;
        memcpy(&d, raw, 4);
        const int8_t *q = (const int8_t *)raw + 4;
        for (int i = 0; i < 256; i++) out[i] = d * (float)q[i];
    }
}

/* ---- Lattices -------------------------------------------------------------------------------- */

/* Eight values of a point (or two points of four) with their signs. */
QM_INLINE void signed_point(float d, const int8_t *first, const int8_t *second, uint32_t signs,
                            float *out) {
    int8_t point[8];
    memcpy(point, first, 4);
    memcpy(point + 4, second, 4);
    for (uint32_t i = 0; i < 8; i++)
        out[i] = qm_as_float(qm_as_bits(d * (float)point[i]) ^ ((signs >> i & 1u) << 31));
}

/* Eight sign bits of seven: the last makes the number of ones even. */
QM_INLINE uint32_t seven(uint32_t signs) {
    return signs | (uint32_t)__builtin_parity(signs) << 7;
}

QM_INLINE uint32_t word_at(const uint8_t *at) {
    uint32_t word;
    memcpy(&word, at, 4);
    return word;
}

QM_INLINE uint32_t short_at(const uint8_t *at) { return (uint32_t)at[0] | (uint32_t)at[1] << 8; }

DECODER(iq2_xxs) {
    for (int64_t b = 0; b < blocks; b++, raw += 66) {
        float d = half_at(raw);
        for (int g = 0; g < 8; g++) {
            const uint8_t *q = raw + 2 + 8 * g;
            uint32_t word = word_at(q + 4);
            float by = d * (0.5f + (float)(word >> 28)) * 0.25f;
            for (int i = 0; i < 4; i++, out += 8) {
                const int8_t *point = points + 8 * q[i];
                signed_point(by, point, point + 4, seven(word >> (7 * i) & 127), out);
            }
        }
    }
}

DECODER(iq2_xs) {
    for (int64_t b = 0; b < blocks; b++, raw += 74) {
        float d = half_at(raw);
        for (int i = 0; i < 32; i++, out += 8) {
            uint32_t word = short_at(raw + 2 + 2 * i);
            int step = raw[66 + i / 4] >> (i / 2 % 2 * 4) & 15;
            const int8_t *point = points + 8 * (word & 511);
            signed_point(d * (0.5f + (float)step) * 0.25f, point, point + 4, seven(word >> 9),
                         out);
        }
    }
}

DECODER(iq2_s) {
    for (int64_t b = 0; b < blocks; b++, raw += 82) {
        float d = half_at(raw);
        for (int i = 0; i < 32; i++, out += 8) {
            int index = raw[2 + i] | (raw[66 + i / 4] >> (i % 4 * 2) & 3) << 8;
            int step = raw[74 + i / 4] >> (i / 2 % 2 * 4) & 15;
            const int8_t *point = points + 8 * index;
            signed_point(d * (0.5f + (float)step) * 0.25f, point, point + 4, raw[34 + i], out);
        }
    }
}

DECODER(iq3_xxs) {
    for (int64_t b = 0; b < blocks; b++, raw += 98) {
        float d = half_at(raw);
        for (int g = 0; g < 8; g++) {
            const uint8_t *q = raw + 2 + 8 * g;
            uint32_t word = word_at(raw + 66 + 4 * g);
            float by = d * (0.5f + (float)(word >> 28)) * 0.5f;
            for (int i = 0; i < 4; i++, out += 8)
                signed_point(by, points + 4 * q[2 * i], points + 4 * q[2 * i + 1],
                             seven(word >> (7 * i) & 127), out);
        }
    }
}

DECODER(iq3_s) {
    for (int64_t b = 0; b < blocks; b++, raw += 110) {
        float d = half_at(raw);
        for (int i = 0; i < 32; i++, out += 8) {
            int ninth = raw[66 + i / 4] >> (i % 4 * 2);
            int step = raw[106 + i / 8] >> (i / 4 % 2 * 4) & 15;
            const int8_t *first = points + 4 * (raw[2 + 2 * i] | (ninth & 1) << 8);
            const int8_t *second = points + 4 * (raw[3 + 2 * i] | (ninth >> 1 & 1) << 8);
            signed_point(d * (float)(1 + 2 * step), first, second, raw[74 + i], out);
        }
    }
}

/* Eight values of a point, all moved by an eighth up or down. */
QM_INLINE void shifted_point(float d, const int8_t *point, int down, float *out) {
    float shift = down ? -0.125f : 0.125f;
    for (int i = 0; i < 8; i++) out[i] = d * ((float)point[i] + shift);
}

DECODER(iq1_s) {
    for (int64_t b = 0; b < blocks; b++, raw += 50) {
        float d = half_at(raw);
        for (int g = 0; g < 8; g++) {
            uint32_t word = short_at(raw + 34 + 2 * g);
            float by = d * (float)(2 * (word >> 12 & 7) + 1);
            for (int i = 0; i < 4; i++, out += 8) {
                uint32_t index = raw[2 + 4 * g + i] | (word >> (3 * i) & 7) << 8;
                shifted_point(by, points + 8 * index, (int)(word >> 15), out);
            }
        }
    }
}

DECODER(iq1_m) {
    for (int64_t b = 0; b < blocks; b++, raw += 56) {
        uint32_t words[4], whole = 0;
        for (int i = 0; i < 4; i++) {
            words[i] = short_at(raw + 48 + 2 * i);
            whole |= words[i] >> 12 << (4 * i);
        }
        float d = qm_half((uint16_t)whole);
        for (int i = 0; i < 32; i++, out += 8) {
            int nibble = raw[32 + i / 2] >> (i % 2 * 4) & 15, g = i / 2;
            uint32_t step = words[g / 4] >> (3 * (g % 4)) & 7;
            uint32_t index = raw[i] | (uint32_t)(nibble & 7) << 8;
            shifted_point(d * (float)(2 * step + 1), points + 8 * index, nibble >> 3, out);
        }
    }
}
