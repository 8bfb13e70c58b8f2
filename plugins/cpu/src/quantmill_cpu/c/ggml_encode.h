/* Encoders of ggml's types in lanes; included by ggml_types.c, once for each instruction set.
 *
 * A unit is a block in each lane. What a type makes of one is a row of bytes for each place in a block,
 * and these are dealt out to the blocks at the end.
 */
#include <math.h>

#include "ggml_fit.h"

typedef struct {
    V x[256];      /* value by value */
    V cost[256];   /* what an error of it costs: importance, or made of it */
    V energy;      /* of the row, for types of 32 */
    int weighed;
    B out[256];
} Unit;

/* Blocks side by side; lanes beyond the last block are zero. */
QM_INLINE void take(Unit *u, const QmGgmlSource *s, int64_t first, int values, int weighs) {
    int here = s->blocks - first < QM_LANES ? (int)(s->blocks - first) : QM_LANES;
    if (here < QM_LANES) memset(u->x, 0, sizeof(V) * (size_t)values);
    for (int l = 0; l < here; l++) {
        float *to = (float *)u->x + l;
        int64_t from = (first + l) * values;
        if (s->dtype == 0) {
            for (int i = 0; i < values; i++) to[i * QM_LANES] = qm_value_at(s->source, 0, from + i);
        } else {
            for (int i = 0; i < values; i++)
                to[i * QM_LANES] = qm_value_at(s->source, s->dtype, from + i);
        }
    }
    u->weighed = weighs && s->importance;
    if (!u->weighed) return;
    if (here < QM_LANES) memset(u->cost, 0, sizeof(V) * (size_t)values);
    float energy[QM_LANES] = {0};
    int64_t row = s->columns / values; /* blocks of a row */
    for (int l = 0; l < here; l++) {
        float *to = (float *)u->cost + l;
        const float *source = s->importance + (first + l) % row * values;
        for (int i = 0; i < values; i++) to[i * QM_LANES] = source[i];
        if (s->energy) energy[l] = s->energy[(first + l) / row];
    }
    memcpy(&u->energy, energy, sizeof(V));
}

QM_INLINE void deal(const Unit *u, const QmGgmlSource *s, int64_t first, int size) {
    int here = s->blocks - first < QM_LANES ? (int)(s->blocks - first) : QM_LANES;
    const uint8_t *from = (const uint8_t *)u->out;
    for (int l = 0; l < here; l++) {
        uint8_t *to = s->out + (first + l) * size;
        for (int i = 0; i < size; i++) to[i] = from[i * QM_LANES + l];
    }
}

/* Importance becomes importance * sqrt(energy + value ^ 2). */
QM_INLINE void spread(Unit *u, V energy, int values) {
    for (int i = 0; i < values; i++) u->cost[i] = u->cost[i] * vsqrt(energy + u->x[i] * u->x[i]);
}

QM_INLINE void squares(Unit *u, int values) {
    for (int i = 0; i < values; i++) u->cost[i] = u->x[i] * u->x[i];
}

/* Codes of 4 bits and more as bytes: pairs `width` apart, as ggml's planes lie. */
QM_INLINE void nibbles(const B *codes, int values, int width, B *out) {
    for (int run = 0; run < values; run += 2 * width)
        for (int i = 0; i < width; i++)
            *out++ = (codes[run + i] & 15) | (codes[run + width + i] << 4);
}

QM_INLINE void plane2(const B *codes, int values, int width, int shift, B *out) {
    for (int run = 0; run < values; run += 4 * width)
        for (int i = 0; i < width; i++) {
            const B *c = codes + run + i;
            *out++ = (c[0] >> shift & 3) | (c[width] >> shift & 3) << 2 |
                     (c[2 * width] >> shift & 3) << 4 | (c[3 * width] >> shift & 3) << 6;
        }
}

QM_INLINE void plane1(const B *codes, int values, int width, int shift, B *out) {
    for (int run = 0; run < values; run += 8 * width)
        for (int i = 0; i < width; i++) {
            B byte = {0};
            for (int bit = 0; bit < 8; bit++)
                byte |= (codes[run + bit * width + i] >> shift & 1) << bit;
            *out++ = byte;
        }
}

/* ---- Blocks of 32 ---------------------------------------------------------------------------- */

/* What a scale too small to invert makes infinite or NaN is 0, as a byte of it is in C on x86. */
QM_INLINE V finite(V value) { return sel(vabs(value) < 2147483648.0f, value, (V){0}); }

/* Truncated and clipped. */
QM_INLINE B code_of(V value, float top) { return bytes(clamp(finite(value), 0.0f, top)); }

/* To the nearest integer, halves away from zero, clipped. */
QM_INLINE V round_away(V value, float low, float high) {
    value = finite(value);
    V size = vmin(vabs(value), SPLAT(1024.0f));
    V whole = __builtin_convertvector(__builtin_convertvector(size, I), V);
    V up = __builtin_convertvector(__builtin_convertvector(2.0f * (size - whole), I), V);
    V rounded = whole + up;
    return clamp((V)((I)rounded | ((I)value & INT32_MIN)), low, high);
}

QM_INLINE void centred(Unit *u, int half, B *codes) {
    if (u->weighed) {
        V found[32];
        spread(u, u->energy, 32);
        half_of(fit_symmetric(u->x, u->cost, 32, half, found), &u->out[0], &u->out[1]);
        for (int i = 0; i < 32; i++) codes[i] = bytes(found[i]);
        return;
    }
    V scale = farthest(u->x, 32) / -(float)half, back = inverse(scale);
    for (int i = 0; i < 32; i++)
        codes[i] = code_of(u->x[i] * back + ((float)half + 0.5f), (float)(2 * half - 1));
    half_of(scale, &u->out[0], &u->out[1]);
}

QM_INLINE void ranged(Unit *u, int top, B *codes) {
    if (u->weighed) {
        V found[32], low;
        spread(u, u->energy, 32);
        V scale = fit_range(u->x, u->cost, 32, top, -0.9f, 0.05f, 36, 0, &low, found);
        half_of(scale, &u->out[0], &u->out[1]);
        half_of(-low, &u->out[2], &u->out[3]);
        for (int i = 0; i < 32; i++) codes[i] = bytes(found[i]);
        return;
    }
    V low = u->x[0], high = u->x[0];
    for (int i = 1; i < 32; i++) {
        low = vmin(u->x[i], low);
        high = vmax(u->x[i], high);
    }
    V scale = (high - low) / (float)top, back = inverse(scale);
    for (int i = 0; i < 32; i++) codes[i] = code_of((u->x[i] - low) * back + 0.5f, (float)top);
    half_of(scale, &u->out[0], &u->out[1]);
    half_of(low, &u->out[2], &u->out[3]);
}

static void encode_q4_0(Unit *u) {
    B codes[32];
    centred(u, 8, codes);
    nibbles(codes, 32, 16, u->out + 2);
}

static void encode_q4_1(Unit *u) {
    B codes[32];
    ranged(u, 15, codes);
    nibbles(codes, 32, 16, u->out + 4);
}

static void encode_q5_0(Unit *u) {
    B codes[32];
    centred(u, 16, codes);
    plane1(codes, 32, 1, 4, u->out + 2);
    nibbles(codes, 32, 16, u->out + 6);
}

static void encode_q5_1(Unit *u) {
    B codes[32];
    ranged(u, 31, codes);
    plane1(codes, 32, 1, 4, u->out + 4);
    nibbles(codes, 32, 16, u->out + 8);
}

static void encode_q8_0(Unit *u) {
    V scale = vabs(farthest(u->x, 32)) / 127.0f, back = inverse(scale);
    half_of(scale, &u->out[0], &u->out[1]);
    for (int i = 0; i < 32; i++) {
        V code = round_away(u->x[i] * back, -128.0f, 127.0f);
        u->out[2 + i] = __builtin_convertvector(__builtin_convertvector(code, I) & 255, B);
    }
}

/* ---- Few bits -------------------------------------------------------------------------------- */

QM_INLINE V digits(const V *x, int n, float top, B *codes) {
    V scale = vabs(farthest(x, n)), back = inverse(scale);
    for (int i = 0; i < n; i++) codes[i] = bytes(round_away(x[i] * back, -1.0f, top) + 1.0f);
    return scale;
}

static void encode_tq2_0(Unit *u) {
    B codes[256];
    half_of(digits(u->x, 256, 1.0f, codes), &u->out[64], &u->out[65]);
    plane2(codes, 256, 32, 0, u->out);
}

/* Five digits of base 3 as a fraction of 256, rounded up. */
QM_INLINE B fraction(const B *codes, int width, int count) {
    I number = {0};
    for (int i = 0; i < 5; i++) {
        number = number * 3;
        if (i < count) number += __builtin_convertvector(codes[i * width], I);
    }
    return __builtin_convertvector((number * 256 + 242) / 243, B);
}

static void encode_tq1_0(Unit *u) {
    B codes[256];
    half_of(digits(u->x, 256, 1.0f, codes), &u->out[52], &u->out[53]);
    for (int i = 0; i < 32; i++) u->out[i] = fraction(codes + i, 32, 5);
    for (int i = 0; i < 16; i++) u->out[32 + i] = fraction(codes + 160 + i, 16, 5);
    for (int i = 0; i < 4; i++) u->out[48 + i] = fraction(codes + 240 + i, 4, 4);
}

static void encode_q2_0(Unit *u) {
    B codes[64];
    half_of(digits(u->x, 64, 2.0f, codes), &u->out[0], &u->out[1]);
    plane2(codes, 64, 1, 0, u->out + 2);
}

static void encode_q1_0(Unit *u) {
    B codes[128];
    V total = {0};
    for (int i = 0; i < 128; i++) {
        total += vabs(u->x[i]);
        codes[i] = bytes((V)((I)SPLAT(1.0f) & (u->x[i] >= 0.0f)));
    }
    half_of(total / 128.0f, &u->out[0], &u->out[1]);
    plane1(codes, 128, 1, 0, u->out + 2);
}

/* ---- Tables ---------------------------------------------------------------------------------- */

static const float IQ4[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                              1,    13,   25,  38,  53,  69,  89,  113};

/* Index of the nearest entry, of two as near the upper one; and the entry. */
QM_INLINE V nearest_entry(V value, V *entry) {
    V index = {0}, found = SPLAT(IQ4[0]);
    for (int i = 1; i < 16; i++) {
        /* The same comparison as ggml's, rounded as it is there: true for all entries below. */
        I above = ~(value - IQ4[i - 1] < IQ4[i] - value);
        index += (V)((I)SPLAT(1.0f) & above);
        found += (V)((I)SPLAT(IQ4[i] - IQ4[i - 1]) & above);
    }
    *entry = found;
    return index;
}

QM_INLINE V grid_scale(const V *x, const V *w) {
    V top = farthest(x, 32), scale = {0}, best = {0}, entry;
    V first = 1.0f / (-top / IQ4[0]), product, square;
    for (int step = -8; step <= 7; step++) {
        V by = step == -8 ? first : ((float)step + IQ4[0]) / top;
        product = square = (V){0};
        for (int i = 0; i < 32; i++) {
            nearest_entry(by * x[i], &entry);
            product += w[i] * entry * x[i];
            square += w[i] * entry * entry;
        }
        if (step == -8) {
            scale = sel(square > 0.0f, product / square, (V){0});
            best = scale * product;
            continue;
        }
        I better = (square > 0.0f) & (product * product > best * square);
        V candidate = product / square;
        scale = sel(better, candidate, scale);
        best = sel(better, candidate * product, best);
    }
    return zero_where(vabs(top) < QM_TINY, scale);
}

static void encode_iq4_nl(Unit *u) {
    B codes[32];
    V entry;
    if (u->weighed) spread(u, 2.0f * square_sum(u->x, 32) / 32.0f, 32);
    else squares(u, 32);
    V scale = grid_scale(u->x, u->cost), back = inverse(scale);
    for (int i = 0; i < 32; i++) codes[i] = bytes(nearest_entry(back * u->x[i], &entry));
    half_of(scale, &u->out[0], &u->out[1]);
    nibbles(codes, 32, 16, u->out + 2);
}

static void encode_iq4_xs(Unit *u) {
    B codes[256], steps[8];
    V scale[8], entry;
    if (u->weighed) spread(u, 2.0f * square_sum(u->x, 256) / 256.0f, 256);
    else squares(u, 256);
    for (int g = 0; g < 8; g++) scale[g] = grid_scale(u->x + 32 * g, u->cost + 32 * g);
    V whole = -farthest(scale, 8) / 32.0f, back = inverse(whole);
    for (int g = 0; g < 8; g++) {
        V step = clamp(nearest(back * scale[g]), -32.0f, 31.0f), by = inverse(whole * step);
        steps[g] = bytes(step + 32.0f);
        for (int i = 32 * g; i < 32 * g + 32; i++)
            codes[i] = bytes(nearest_entry(by * u->x[i], &entry));
    }
    half_of(whole, &u->out[0], &u->out[1]);
    plane2(steps, 8, 1, 4, u->out + 2);
    nibbles(steps, 8, 1, u->out + 4);
    nibbles(codes, 256, 16, u->out + 8);
}

static void encode_mxfp4(Unit *u) {
    static const float E2M1[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
    V top = vabs(farthest(u->x, 32)), scale;
    B codes[32];
    float most[QM_LANES], scales[QM_LANES];
    uint8_t exponents[QM_LANES];
    memcpy(most, &top, sizeof(V));
    for (int l = 0; l < QM_LANES; l++) {
        /* The logarithm rounded to float32: one that becomes a whole number counts as that. */
        float power = most[l] > 0.0f ? floorf((float)log2((double)most[l])) + 125.0f : 0.0f;
        power = power < 0.0f ? 0.0f : power;
        exponents[l] = (uint8_t)power;
        scales[l] = ldexpf(1.0f, (int)power - 128);
    }
    memcpy(&scale, scales, sizeof(V));
    memcpy(&u->out[0], exponents, QM_LANES);
    for (int i = 0; i < 32; i++) {
        V best = vabs(u->x[i]), index = {0};
        for (int entry = 1; entry < 16; entry++) {
            V away = vabs(E2M1[entry] * scale - u->x[i]);
            I nearer = away < best;
            best = sel(nearer, away, best);
            index = sel(nearer, SPLAT((float)entry), index);
        }
        codes[i] = bytes(index);
    }
    nibbles(codes, 32, 16, u->out + 1);
}

/* ---- K-quants -------------------------------------------------------------------------------- */

/* Scales as steps of the largest. */
QM_INLINE V levels(const V *values, int groups, int top, B *steps, B *low, B *high) {
    V most = {0};
    for (int g = 0; g < groups; g++) most = vmax(values[g], most);
    V back = zero_where(~(most > 0.0f), (float)top / most);
    for (int g = 0; g < groups; g++) {
        V step = nearest(back * values[g]);
        /* As a byte would hold it: a negative scale, which no fit gives, is a large one. */
        I whole = __builtin_convertvector(step, I) & 255;
        steps[g] = bytes(vmin(__builtin_convertvector(whole, V), SPLAT((float)top)));
    }
    return half_of(most / (float)top, low, high);
}

QM_INLINE V fitted(const V *values, const V *weights, int groups, int top, B *steps, B *low,
                   B *high) {
    V codes[16];
    V scale = fit_positive(values, weights, groups, top, codes);
    for (int g = 0; g < groups; g++) steps[g] = bytes(codes[g]);
    return half_of(scale, low, high);
}

typedef struct {
    int bits, groups, levels, absolute, steps;
    float first, energy;
} Ranged;

/* Types with a scale and a minimum for each group. `at`: where the two halves of each lie. */
QM_INLINE void k_ranged(Unit *u, Ranged r, int at, B *codes, B *scales, B *minima) {
    const int width = 256 / r.groups, top = (1 << r.bits) - 1;
    V scale[16], low[16], sums[16], found[256], d, m;
    V energy = u->weighed ? r.energy * square_sum(u->x, 256) / 256.0f : (V){0};
    for (int g = 0; g < r.groups; g++) {
        const V *x = u->x + g * width;
        V cost[QM_MOST_CODES];
        if (u->weighed) {
            for (int i = 0; i < width; i++)
                cost[i] = u->cost[g * width + i] * vsqrt(energy + x[i] * x[i]);
            sums[g] = sum(cost, width);
            scale[g] = fit_range(x, cost, width, top, -0.9f, 0.05f, 36, 0, &low[g],
                                 found + g * width);
            continue;
        }
        V level = r.absolute ? (V){0} : vsqrt(square_sum(x, width) / (float)width);
        for (int i = 0; i < width; i++) cost[i] = level + vabs(x[i]);
        scale[g] = fit_range(x, cost, width, top, r.first, 0.1f, r.steps, r.absolute, &low[g],
                             found + g * width);
    }
    if (u->weighed) {
        d = fitted(scale, sums, r.groups, r.levels, scales, &u->out[at], &u->out[at + 1]);
        m = fitted(low, sums, r.groups, r.levels, minima, &u->out[at + 2], &u->out[at + 3]);
    } else {
        d = levels(scale, r.groups, r.levels, scales, &u->out[at], &u->out[at + 1]);
        m = levels(low, r.groups, r.levels, minima, &u->out[at + 2], &u->out[at + 3]);
    }
    for (int g = 0; g < r.groups; g++) {
        V by = d * floats(scales[g]), less = m * floats(minima[g]);
        for (int i = g * width; i < (g + 1) * width; i++) {
            V code = clamp(nearest((u->x[i] + less) / by), 0.0f, (float)top);
            codes[i] = bytes(sel(by == 0.0f, found[i], code));
        }
    }
}

static void encode_q2_k(Unit *u) {
    const Ranged r = {2, 16, 15, 1, 15, -0.5f, 1.0f};
    B codes[256], scales[16], minima[16];
    k_ranged(u, r, 80, codes, scales, minima);
    for (int g = 0; g < 16; g++) u->out[g] = scales[g] | minima[g] << 4;
    plane2(codes, 256, 32, 0, u->out + 16);
}

QM_INLINE void join_six(const B *scales, const B *minima, B *out) {
    for (int g = 0; g < 4; g++) {
        out[g] = scales[g] | (scales[g + 4] & 48) << 2;
        out[g + 4] = minima[g] | (minima[g + 4] & 48) << 2;
        out[g + 8] = (scales[g + 4] & 15) | (minima[g + 4] & 15) << 4;
    }
}

static void encode_q4_k(Unit *u) {
    const Ranged r = {4, 8, 63, 0, 20, -1.0f, 2.0f};
    B codes[256], scales[8], minima[8];
    k_ranged(u, r, 0, codes, scales, minima);
    join_six(scales, minima, u->out + 4);
    nibbles(codes, 256, 32, u->out + 16);
}

static void encode_q5_k(Unit *u) {
    const Ranged r = {5, 8, 63, 0, 15, -0.5f, 2.0f};
    B codes[256], scales[8], minima[8];
    k_ranged(u, r, 0, codes, scales, minima);
    join_six(scales, minima, u->out + 4);
    plane1(codes, 256, 32, 4, u->out + 16);
    nibbles(codes, 256, 32, u->out + 48);
}

/* Codes for rounded signed scales; where those are 0, what was found. */
QM_INLINE void signed_codes(const V *x, V by, const V *found, int n, int half, B *codes) {
    for (int i = 0; i < n; i++) {
        V code = clamp(nearest(x[i] / by), -(float)half, (float)(half - 1)) + (float)half;
        codes[i] = bytes(sel(by == 0.0f, found[i], code));
    }
}

static void encode_q3_k(Unit *u) {
    V scale[16], sums[16], step[16], found[256], d;
    B codes[256], steps[16];
    if (u->weighed) {
        spread(u, 2.0f * square_sum(u->x, 256) / 256.0f, 256);
        for (int g = 0; g < 16; g++) {
            const V *cost = u->cost + 16 * g;
            sums[g] = sum(cost, 16);
            scale[g] = fit_symmetric(u->x + 16 * g, cost, 16, 4, found + 16 * g);
        }
        d = fit_symmetric(scale, sums, 16, 32, step);
    } else {
        for (int g = 0; g < 16; g++)
            scale[g] = fit_third_bit(u->x + 16 * g, 16, 4, found + 16 * g);
        V top = farthest(scale, 16), back = -32.0f / top;
        I none = top == 0.0f;
        for (int g = 0; g < 16; g++)
            step[g] = zero_where(none, clamp(nearest(back * scale[g]), -32.0f, 31.0f) + 32.0f);
        d = zero_where(none, 1.0f / back);
    }
    d = half_of(d, &u->out[108], &u->out[109]);
    for (int g = 0; g < 16; g++) {
        steps[g] = bytes(step[g]);
        V by = d * (step[g] - 32.0f);
        signed_codes(u->x + 16 * g, by, found + 16 * g, 16, 4, codes + 16 * g);
    }
    plane1(codes, 256, 32, 2, u->out);
    plane2(codes, 256, 32, 0, u->out + 32);
    nibbles(steps, 16, 8, u->out + 96);
    plane2(steps, 16, 4, 4, u->out + 104);
}

static void encode_q6_k(Unit *u) {
    V scale[16], found[256];
    B codes[256];
    if (!u->weighed) squares(u, 256);
    for (int g = 0; g < 16; g++)
        scale[g] = fit_symmetric(u->x + 16 * g, u->cost + 16 * g, 16, 32, found + 16 * g);
    V top = farthest(scale, 16), back = -128.0f / top;
    I none = vabs(top) < QM_TINY;
    V d = half_of(zero_where(none, 1.0f / back), &u->out[208], &u->out[209]);
    for (int g = 0; g < 16; g++) {
        V step = zero_where(none, vmin(nearest(back * scale[g]), SPLAT(127.0f)));
        u->out[192 + g] = __builtin_convertvector(__builtin_convertvector(step, I) & 255, B);
        signed_codes(u->x + 16 * g, d * step, found + 16 * g, 16, 32, codes + 16 * g);
        for (int i = 16 * g; i < 16 * g + 16; i++)
            codes[i] &= __builtin_convertvector(~none & 255, B);
    }
    nibbles(codes, 256, 64, u->out);
    plane2(codes, 256, 32, 4, u->out + 128);
}

/* ---- The table ------------------------------------------------------------------------------- */

#define UNIT(name, values, size, weighs)                                    \
    static void unit_##name(const QmGgmlSource *source, int64_t first) {    \
        Unit u;                                                             \
        take(&u, source, first, values, weighs);                            \
        encode_##name(&u);                                                  \
        deal(&u, source, first, size);                                      \
    }

UNIT(q4_0, 32, 18, 1)
UNIT(q4_1, 32, 20, 1)
UNIT(q5_0, 32, 22, 1)
UNIT(q5_1, 32, 24, 1)
UNIT(q8_0, 32, 34, 0)
UNIT(q2_k, 256, 84, 1)
UNIT(q3_k, 256, 110, 1)
UNIT(q4_k, 256, 144, 1)
UNIT(q5_k, 256, 176, 1)
UNIT(q6_k, 256, 210, 1)
UNIT(iq4_nl, 32, 18, 1)
UNIT(iq4_xs, 256, 136, 1)
UNIT(mxfp4, 32, 17, 0)
UNIT(tq1_0, 256, 54, 0)
UNIT(tq2_0, 256, 66, 0)
UNIT(q1_0, 128, 18, 0)
UNIT(q2_0, 64, 18, 0)
