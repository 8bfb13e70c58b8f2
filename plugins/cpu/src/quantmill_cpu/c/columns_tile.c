/* The loops of columns.h over a tile of rows, whose columns lie in the first-level cache. Plain C
 * that the compiler vectorises; compiled once for each instruction set, with QM_LEVEL as its name. */
#include "columns.h"

#include <math.h>

#include "floats.h"
#include "levels.h"

#define TILE QM_TILE_ROWS
#define EACH(l) for (int l = 0; l < TILE; l++)

typedef float Lanes[TILE];

/* Ranges are tried from the full one down, in steps of 3%. */
#define SHRINKS 24
#define LEAST 0.28

QM_INLINE void load(float *to, const float *from, int64_t count, float pad) {
    EACH(l) to[l] = l < count ? from[l] : pad;
}

QM_INLINE void store(float *to, const float *from, int64_t count) {
    for (int l = 0; l < TILE && l < count; l++) to[l] = from[l];
}

/* Half to even, for what is far below 2^22. */
QM_INLINE float rounded(float value) { return (value + 12582912.0f) - 12582912.0f; }

/* What is not a number becomes the lowest: a code has to come of it. */
QM_INLINE float within(float value, float low, float high) {
    value = value > low ? value : low;
    return value < high ? value : high;
}

/* The nearest positive binary16. */
QM_INLINE float stored(float scale) {
    float half = qm_half((uint16_t)qm_half_bits(qm_as_bits(scale)));
    return half < 5.9604645e-8f ? 5.9604645e-8f : half;
}

static void range(const QmColumns *job, const float *low, const float *high, float share,
                  float *scale, float *zero) {
    const float top = job->top, middle = (top + 1.0f) / 2.0f;
    EACH(l) {
        float down = low[l] * share, up = high[l] * share;
        float half = up > -down ? up : -down;
        float wide = job->symmetric ? 2.0f * half / top : (up - down) / top;
        scale[l] = stored(wide > 0.0f ? wide : 1.0f);
        float offset = within(-down / scale[l], 0.0f, top);
        zero[l] = job->symmetric ? middle : rounded(offset);
    }
}

QM_INLINE float lacking(float value, float scale, float zero, float top) {
    return rounded(within(value / scale, -zero, top - zero)) * scale - value;
}

/* Scale and zero point of `count` columns, by the error of rounding them to nearest. */
static void fit(const QmColumns *job, Lanes *values, int64_t count, float *scale, float *zero) {
    Lanes low = {0}, high = {0}, least, tried, middle, error;
    for (int64_t i = 0; i < count; i++)
        EACH(l) {
            float v = values[i][l];
            low[l] = v < low[l] ? v : low[l];
            high[l] = v > high[l] ? v : high[l];
        }
    range(job, low, high, 1.0f, scale, zero);
    if (job->exponent == 0.0f) return;
    const float top = job->top;
    for (int step = 0; step < SHRINKS; step++) {
        range(job, low, high, (float)(1.0 - step * (1.0 - LEAST) / SHRINKS), tried, middle);
        EACH(l) error[l] = 0.0f;
        for (int64_t i = 0; i < count; i++) {
            Lanes off;
            EACH(l) off[l] = lacking(values[i][l], tried[l], middle[l], top);
            if (job->exponent == 2.0f) EACH(l) error[l] += off[l] * off[l];
            else EACH(l) error[l] += powf(fabsf(off[l]), job->exponent);
        }
        EACH(l) {
            int better = step == 0 || error[l] < least[l];
            least[l] = better ? error[l] : least[l];
            scale[l] = better ? tried[l] : scale[l];
            zero[l] = better ? middle[l] : zero[l];
        }
    }
}

static void compensate(const QmColumns *job, int64_t row) {
    const int64_t n = job->n, rows = job->rows, count = rows - row;
    const float top = job->top;
    Lanes panel[QM_PANEL_COLUMNS], scale, zero;
    for (int64_t i = 0; i < n; i++) load(panel[i], job->panel + i * rows + row, count, 0.0f);
    for (int64_t i = 0; i < n; i++) {
        const int64_t at = job->groups[i] * rows + row;
        if (job->spans[i]) {
            fit(job, panel + i, job->spans[i], scale, zero);
            store(job->scales + at, scale, count);
            store(job->zeros + at, zero, count);
        } else if (i == 0 || job->groups[i] != job->groups[i - 1]) {
            load(scale, job->scales + at, count, 1.0f);
            load(zero, job->zeros + at, count, 0.0f);
        }
        const float *local = job->local + i * n, diagonal = local[i];
        float *column = panel[i];
        uint8_t codes[TILE];
        EACH(l) {
            float code = rounded(within(column[l] / scale[l], -zero[l], top - zero[l]));
            codes[l] = (uint8_t)(int32_t)(code + zero[l]);
            column[l] = (column[l] - code * scale[l]) / diagonal;
        }
        for (int l = 0; l < TILE && l < count; l++) job->codes[i * rows + row + l] = codes[l];
        for (int64_t k = i + 1; k < n; k++) EACH(l) panel[k][l] -= local[k] * column[l];
    }
    for (int64_t i = 0; i < n; i++) store(job->panel + i * rows + row, panel[i], count);
}

/* The scale of the group whose columns are [first, last), for the codes it has. */
static void rescale(const QmColumns *job, int64_t first, int64_t last, Lanes *slope,
                    const Lanes *steps, Lanes *moves, float *scale) {
    Lanes energy = {0}, gain = {0}, move, spread[QM_PANEL_COLUMNS];
    for (int64_t k = first; k < job->n; k++) {
        Lanes sum = {0};
        for (int64_t i = first; i < last; i++) {
            const float weight = job->local[i * job->n + k];
            EACH(l) sum[l] += weight * steps[i][l];
        }
        EACH(l) spread[k][l] = sum[l];
    }
    for (int64_t i = first; i < last; i++)
        EACH(l) {
            energy[l] += spread[i][l] * steps[i][l];
            gain[l] += slope[i][l] * steps[i][l];
        }
    EACH(l) {
        float wanted = scale[l] + gain[l] / (energy[l] > 1e-30f ? energy[l] : 1e-30f);
        /* A group of zeros has no scale to learn, and a scale stays positive. */
        int good = energy[l] > 0.0f && wanted > 0.5f * scale[l];
        move[l] = good ? stored(wanted) - scale[l] : 0.0f;
        scale[l] += move[l];
    }
    for (int64_t i = first; i < last; i++) EACH(l) moves[i][l] += move[l] * steps[i][l];
    for (int64_t k = last; k < job->n; k++) EACH(l) slope[k][l] -= move[l] * spread[k][l];
}

static void descend(const QmColumns *job, int64_t row) {
    const int64_t n = job->n, rows = job->rows, count = rows - row;
    const float top = job->top;
    Lanes slope[QM_PANEL_COLUMNS], steps[QM_PANEL_COLUMNS], moves[QM_PANEL_COLUMNS], scale, zero;
    int64_t first[QM_PANEL_COLUMNS]; /* whose slope a later choice needs */
    for (int64_t i = 0; i < n; i++) {
        load(slope[i], job->panel + i * rows + row, count, 0.0f);
        load(steps[i], job->steps + i * rows + row, count, 0.0f);
        first[i] = i + 1;
    }
    for (int64_t i = 0; i < n; i++)
        for (int64_t k = i + 1 - job->spans[i]; k <= i; k++) first[k] = i + 1 - job->spans[i];
    for (int64_t i = 0; i < n; i++) {
        const int64_t at = job->groups[i] * rows + row;
        if (i == 0 || job->groups[i] != job->groups[i - 1]) {
            load(scale, job->scales + at, count, 1.0f);
            load(zero, job->zeros + at, count, 0.0f);
        }
        const float *local = job->local + i * n, diagonal = local[i];
        EACH(l) {
            float wanted = slope[i][l] / diagonal / scale[l] + steps[i][l];
            float step = rounded(within(wanted, -zero[l], top - zero[l]));
            moves[i][l] = (step - steps[i][l]) * scale[l];
            steps[i][l] = step;
        }
        for (int64_t k = first[i]; k < n; k++) EACH(l) slope[k][l] -= local[k] * moves[i][l];
        if (job->spans[i]) {
            rescale(job, i + 1 - job->spans[i], i + 1, slope, (const Lanes *)steps, moves, scale);
            store(job->scales + at, scale, count);
        }
    }
    for (int64_t i = 0; i < n; i++) {
        store(job->panel + i * rows + row, moves[i], count);
        store(job->steps + i * rows + row, steps[i], count);
    }
}

const QmColumnsLevel QM_JOIN(qm_columns_, QM_LEVEL) = {compensate, descend};
