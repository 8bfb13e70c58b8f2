/* Blocks side by side, one in each lane of a vector: sums over a block then run in the order that
 * the format's reference has, and still as many at a time as a register holds. Internal: no part
 * of the ABI.
 */
#ifndef QUANTMILL_GGML_LANES_H
#define QUANTMILL_GGML_LANES_H

#include <stdint.h>
#include <string.h>

#include "floats.h"

#if defined(__AVX512F__)
#define QM_LANES 16
#elif defined(__AVX2__)
#define QM_LANES 8
#else
#define QM_LANES 4
#endif
#pragma GCC diagnostic ignored "-Wpsabi" /* all functions with vectors are inlined */

typedef float V __attribute__((vector_size(4 * QM_LANES)));
typedef int32_t I __attribute__((vector_size(4 * QM_LANES)));
typedef uint8_t B __attribute__((vector_size(QM_LANES)));

#define SPLAT(value) ((V){0} + (value))

/* Lanes of `a` where the mask is set (all bits), of `b` elsewhere. */
QM_INLINE V sel(I mask, V a, V b) { return (V)(((I)a & mask) | ((I)b & ~mask)); }
QM_INLINE V zero_where(I mask, V a) { return (V)((I)a & ~mask); }
QM_INLINE V vabs(V a) { return (V)((I)a & 0x7fffffff); }
QM_INLINE V vmax(V a, V b) { return sel(a > b, a, b); }
QM_INLINE V vmin(V a, V b) { return sel(a < b, a, b); }
QM_INLINE V clamp(V a, float low, float high) { return vmin(vmax(a, SPLAT(low)), SPLAT(high)); }
QM_INLINE int any(I mask) {
    int64_t wide[QM_LANES / 2], all = 0;
    memcpy(wide, &mask, sizeof mask);
    for (int i = 0; i < QM_LANES / 2; i++) all |= wide[i];
    return all != 0;
}

/* To the nearest integer, ties to even, as ggml finds it: what is beyond 2^22 wraps around. */
QM_INLINE V nearest(V a) {
    I bits = (I)(a + 12582912.0f) & 0x7fffff;
    return __builtin_convertvector(bits - 0x400000, V);
}

QM_INLINE V vsqrt(V a) {
    float lanes[QM_LANES];
    memcpy(lanes, &a, sizeof(V));
    for (int i = 0; i < QM_LANES; i++) lanes[i] = __builtin_sqrtf(lanes[i]);
    memcpy(&a, lanes, sizeof(V));
    return a;
}

/* 1 / a, and 0 of 0. */
QM_INLINE V inverse(V a) { return zero_where(a == 0.0f, 1.0f / a); }

/* Whole numbers of 0 to 255 as bytes. */
QM_INLINE B bytes(V a) { return __builtin_convertvector(__builtin_convertvector(a, I), B); }
QM_INLINE V floats(B a) { return __builtin_convertvector(__builtin_convertvector(a, I), V); }

/* Rounded to binary16: two bytes of each lane, and what they stand for. */
QM_INLINE V half_of(V a, B *low, B *high) {
    uint32_t bits[QM_LANES];
    uint8_t first[QM_LANES], second[QM_LANES];
    float wide[QM_LANES];
    memcpy(bits, &a, sizeof(V));
    for (int i = 0; i < QM_LANES; i++) {
        uint32_t half = qm_half_bits(bits[i]);
        first[i] = (uint8_t)half;
        second[i] = (uint8_t)(half >> 8);
        wide[i] = qm_half((uint16_t)half);
    }
    memcpy(low, first, QM_LANES);
    memcpy(high, second, QM_LANES);
    memcpy(&a, wide, sizeof(V));
    return a;
}

/* The first value of the largest magnitude. */
QM_INLINE V farthest(const V *x, int n) {
    V most = {0}, top = {0};
    for (int i = 0; i < n; i++) {
        V size = vabs(x[i]);
        I more = size > most;
        most = sel(more, size, most);
        top = sel(more, x[i], top);
    }
    return top;
}

QM_INLINE V square_sum(const V *x, int n) {
    V total = {0};
    for (int i = 0; i < n; i++) total += x[i] * x[i];
    return total;
}

QM_INLINE V sum(const V *x, int n) {
    V total = {0};
    for (int i = 0; i < n; i++) total += x[i];
    return total;
}

#endif
