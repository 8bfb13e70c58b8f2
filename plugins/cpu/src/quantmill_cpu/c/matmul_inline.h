/* Loops that every level of matmul compiles for itself: activations in, scales decoded, results
 * out. Plain C that the compiler vectorises; loops over 16 lanes have a constant length for that.
 */
#ifndef QUANTMILL_MATMUL_INLINE_H
#define QUANTMILL_MATMUL_INLINE_H

#include "floats.h"
#include "matmul_job.h"

#ifdef __F16C__
#include <immintrin.h>
#endif

QM_INLINE int64_t qm_least(int64_t a, int64_t b) { return a < b ? a : b; }

QM_INLINE void qm_halves(const uint8_t *from, float *out) {
#if defined(__AVX512F__)
    _mm512_storeu_ps(out, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i_u *)from)));
#elif defined(__F16C__)
    _mm256_storeu_ps(out, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i_u *)from)));
    _mm256_storeu_ps(out + 8, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i_u *)(from + 16))));
#else
    uint16_t raw[16];
    memcpy(raw, from, 32);
    for (int i = 0; i < 16; i++) out[i] = qm_half(raw[i]);
#endif
}

/* 16 elements of one of the dtypes as float. */
QM_INLINE void qm_load16(const uint8_t *from, int dtype, float *out) {
    if (dtype == QM_F32) {
        memcpy(out, from, 64);
    } else if (dtype == QM_BF16) {
        uint16_t raw[16];
        memcpy(raw, from, 32);
        for (int i = 0; i < 16; i++) out[i] = qm_bfloat(raw[i]);
    } else {
        qm_halves(from, out);
    }
}

/* ---- Scales and offsets ----------------------------------------------------------------------- */

QM_INLINE int64_t qm_second(const QmValues *v, int64_t row, int64_t group, int64_t groups) {
    if (v->level == QM_LEVEL_FLAT) return (row * groups + group) / v->size;
    return v->level == QM_LEVEL_ROW ? row * v->stride + group / v->size : 0;
}

/* The second level's factors of 16 rows. Rows beyond the last one repeat it: they are padding. */
QM_INLINE void qm_seconds(const QmJob *job, const QmValues *v, int64_t row, int64_t group,
                          float *out) {
    for (int i = 0; i < QM_PANEL; i++) {
        int64_t real = qm_least(row + i, job->rows - 1);
        memcpy(out + i, v->second + qm_second(v, real, group, job->groups), 4);
    }
}

/* The group from which on another second level holds than for group g. */
QM_INLINE int64_t qm_until(const QmValues *v, int64_t g, int64_t groups) {
    if (v->level == QM_LEVEL_ONE) return groups;
    int64_t next = (g / v->size + 1) * v->size;
    if (v->level == QM_LEVEL_ROW || groups % v->size == 0) return next;
    return v->size % groups == 0 ? groups : g + 1; /* flat: rows change at groups of their own */
}

/* 16 values of a group, where each lane has its own. */
QM_INLINE void qm_lanes(const QmValues *v, const uint8_t *from, int kind, float *lanes) {
    if (kind == QM_FLOAT) qm_load16(from, QM_F32, lanes);
    else if (kind == QM_BFLOAT) qm_load16(from, QM_BF16, lanes);
    else if (kind == QM_HALF) qm_load16(from, QM_F16, lanes);
    else if (kind == QM_INT8)
        for (int i = 0; i < 16; i++) lanes[i] = (float)(int8_t)from[i];
    else if (kind == QM_UINT8)
        for (int i = 0; i < 16; i++) lanes[i] = (float)from[i];
    else if (kind == QM_INT32) {
        int32_t whole[16];
        memcpy(whole, from, 64);
        for (int i = 0; i < 16; i++) lanes[i] = (float)whole[i];
    } else
        for (int i = 0; i < 16; i++) memcpy(lanes + i, v->table + from[i], 4);
}

/* Values of a panel's groups, times `by` plus `add`: out[group * 32 + lane]. */
QM_INLINE void qm_values_of(const QmJob *job, const QmValues *v, int64_t panel, int kind, int size,
                            float by, float add, float *out) {
    const int64_t groups = job->groups;
    const uint8_t *from = (const uint8_t *)v->data + panel * groups * 16 * size;
    float second[16];
    int64_t until = 0;
    for (int64_t g = 0; g < groups; g++, from += 16 * size, out += QM_PAIR) {
        float lanes[16];
        qm_lanes(v, from, kind, lanes);
        if (kind == QM_CODED) {
            if (v->level != QM_LEVEL_NONE && g >= until) {
                qm_seconds(job, v, panel * QM_PANEL, g, second);
                until = qm_until(v, g, groups);
            }
            if (v->level != QM_LEVEL_NONE)
                for (int i = 0; i < 16; i++) lanes[i] *= second[i];
            for (int i = 0; i < 16; i++) lanes[i] += v->plus;
        }
        for (int i = 0; i < 16; i++) out[i] = lanes[i] * by + add;
    }
}

/* One value as float; of coded ones that of the table. */
QM_INLINE float qm_one(const QmValues *v, int64_t at) {
    const uint8_t *from = (const uint8_t *)v->data;
    uint16_t half;
    int32_t whole;
    float value;
    switch (v->kind) {
    case QM_FLOAT: memcpy(&value, from + 4 * at, 4); return value;
    case QM_BFLOAT: memcpy(&half, from + 2 * at, 2); return qm_bfloat(half);
    case QM_HALF: memcpy(&half, from + 2 * at, 2); return qm_half(half);
    case QM_INT8: return (float)(int8_t)from[at];
    case QM_UINT8: return (float)from[at];
    case QM_INT32: memcpy(&whole, from + 4 * at, 4); return (float)whole;
    }
    memcpy(&value, v->table + from[at], 4);
    return value;
}

/* The same where all 16 rows, or all of W, have one value. */
static void qm_values_shared(const QmJob *job, const QmValues *v, int64_t panel, float by,
                             float add, float *out) {
    const int coded = v->kind == QM_CODED, second = coded && v->level != QM_LEVEL_NONE;
    for (int64_t g = 0; g < job->groups; g++) {
        const float value = qm_one(v, v->lanes ? panel * job->groups + g : 0);
        float lanes[16];
        for (int i = 0; i < 16; i++) lanes[i] = value;
        if (second) {
            float seconds[16];
            qm_seconds(job, v, panel * QM_PANEL, g, seconds);
            for (int i = 0; i < 16; i++) lanes[i] *= seconds[i];
        }
        const float more = coded ? v->plus : 0.0f;
        for (int i = 0; i < 16; i++) out[g * QM_PAIR + i] = (lanes[i] + more) * by + add;
    }
}

static const uint8_t qm_sizes[] = {0, 4, 2, 2, 1, 1, 4, 1};

/* Where the values of later panels are, for fetching them while this one is worked on: they are
 * read all at once at its beginning. */
typedef struct {
    const char *scale, *offset;
    int64_t scale_step, offset_step; /* from group to group */
} QmAhead;

QM_INLINE QmAhead qm_ahead(const QmJob *job, int64_t panel) {
    const QmValues *s = &job->scale, *o = &job->offset;
    const int64_t first = panel * job->groups;
    QmAhead ahead = {(const char *)job->codes, (const char *)job->codes, 0, 0};
    if (s->lanes == 16) {
        ahead.scale_step = 16 * qm_sizes[s->kind];
        ahead.scale = (const char *)s->data + first * ahead.scale_step;
    }
    if (o->kind != QM_NONE && o->lanes == 16) {
        ahead.offset_step = 16 * qm_sizes[o->kind];
        ahead.offset = (const char *)o->data + first * ahead.offset_step;
    }
    return ahead;
}

QM_INLINE void qm_fetch_ahead(const QmAhead *ahead, int64_t group) {
    __builtin_prefetch(ahead->scale + group * ahead->scale_step);
    __builtin_prefetch(ahead->offset + group * ahead->offset_step);
}

static void qm_values(const QmJob *job, const QmValues *v, int64_t panel, float by, float add,
                      float *out) {
    if (v->lanes != 16) {
        qm_values_shared(job, v, panel, by, add, out);
        return;
    }
    switch (v->kind) {
    case QM_FLOAT: qm_values_of(job, v, panel, QM_FLOAT, 4, by, add, out); break;
    case QM_BFLOAT: qm_values_of(job, v, panel, QM_BFLOAT, 2, by, add, out); break;
    case QM_HALF: qm_values_of(job, v, panel, QM_HALF, 2, by, add, out); break;
    case QM_INT8: qm_values_of(job, v, panel, QM_INT8, 1, by, add, out); break;
    case QM_UINT8: qm_values_of(job, v, panel, QM_UINT8, 1, by, add, out); break;
    case QM_INT32: qm_values_of(job, v, panel, QM_INT32, 4, by, add, out); break;
    case QM_CODED: qm_values_of(job, v, panel, QM_CODED, 1, by, add, out); break;
    }
}

/* Scales, and what is added to the numbers or at the end, for one of the pair's panels. A panel
 * beyond the last one repeats it: its results are not stored. */
static void qm_panel_values(const QmJob *job, int64_t panel, const QmWorkspace *w, int lane) {
    const float zero = job->shift / job->unit + job->base;
    qm_values(job, &job->scale, panel, job->gain * job->unit, 0.0f, w->scale + lane);
    if (job->offset_kind == QM_OFFSET_ZERO) {
        qm_values(job, &job->offset, panel, -1.0f / job->unit, zero, w->zero + lane);
        return;
    }
    for (int64_t g = 0; g < job->groups && job->sums_needed; g++)
        for (int i = 0; i < 16; i++) w->zero[g * QM_PAIR + lane + i] = zero;
    if (job->offset_kind == QM_OFFSET_MINIMUM)
        qm_values(job, &job->offset, panel, 1.0f, 0.0f, w->minimum + lane);
}

/* What the sums of x add to a group: zero points, and minimums. */
static void qm_add_sums(const QmJob *job, const QmWorkspace *w, int64_t group, int with_zero) {
    const float *scale = w->scale + group * QM_PAIR, *zero = w->zero + group * QM_PAIR;
    const float *minimum = w->minimum + group * QM_PAIR;
    if (with_zero && job->sums_needed)
        for (int64_t m = 0; m < job->act_rows; m++) {
            const float sum = job->sums[m * job->groups + group];
            for (int i = 0; i < QM_PAIR; i++) w->total[m * QM_PAIR + i] += scale[i] * zero[i] * sum;
        }
    if (job->offset_kind == QM_OFFSET_MINIMUM)
        for (int64_t m = 0; m < job->act_rows; m++) {
            const float sum = job->sums[m * job->groups + group];
            for (int i = 0; i < QM_PAIR; i++) w->total[m * QM_PAIR + i] += minimum[i] * sum;
        }
}

/* ---- Activations ------------------------------------------------------------------------------ */

/* Row m of x as float, its columns in the weight's order, zero from the last one to `stride`. */
static void qm_row(const QmJob *job, int64_t m, float *row) {
    const int size = job->dtype == QM_F32 ? 4 : 2;
    const uint8_t *x = job->x + m * job->columns * size;
    const int64_t columns = job->columns;
    int64_t k = 0;
    if (job->order) {
        for (; k < columns; k++) {
            const uint8_t *from = x + job->order[k] * size;
            uint16_t raw;
            if (job->dtype == QM_F32) {
                memcpy(row + k, from, 4);
                continue;
            }
            memcpy(&raw, from, 2);
            row[k] = job->dtype == QM_BF16 ? qm_bfloat(raw) : qm_half(raw);
        }
    } else {
        for (; k + 16 <= columns; k += 16) qm_load16(x + k * size, job->dtype, row + k);
        if (k < columns) {
            uint8_t rest[64] = {0};
            memcpy(rest, x + k * size, (size_t)((columns - k) * size));
            qm_load16(rest, job->dtype, row + k);
            k += 16;
        }
    }
    for (; k < job->stride; k++) row[k] = 0.0f;
}

/* The sum of each group of a row. */
static inline void qm_sums(const QmJob *job, const float *row, float *sums) {
    for (int64_t g = 0; g < job->groups; g++) {
        int64_t unit = g * job->group_units, last = qm_least(unit + job->group_units, job->units);
        float lanes[16] = {0}, sum = 0;
        for (; unit < last; unit++)
            for (int i = 0; i < 16; i++) lanes[i] += row[unit * QM_UNIT + i];
        for (int i = 0; i < 16; i++) sum += lanes[i];
        sums[g] = sum;
    }
}

/* ---- Results ---------------------------------------------------------------------------------- */

/* The first `count` of 16 values as elements of a dtype. */
QM_INLINE void qm_narrow(const float *values, int dtype, int64_t count, uint8_t *to) {
    uint32_t bits[16];
    uint16_t narrow[16];
    if (dtype == QM_F32) {
        memcpy(to, values, (size_t)count * 4);
        return;
    }
    memcpy(bits, values, 64);
    if (dtype == QM_BF16)
        for (int i = 0; i < 16; i++) bits[i] = qm_bfloat_bits(bits[i]);
    else
        for (int i = 0; i < 16; i++) bits[i] = qm_half_bits(bits[i]);
    for (int i = 0; i < 16; i++) narrow[i] = (uint16_t)bits[i];
    if (count == 16) memcpy(to, narrow, 32);
    else memcpy(to, narrow, (size_t)count * 2);
}

/* Rows [row, row + 16) of W against all of x: totals[act_row * 32 + lane] to y. */
static void qm_store(const QmJob *job, int64_t row, const float *totals) {
    const int64_t count = qm_least(QM_PANEL, job->rows - row);
    const int size = job->dtype == QM_F32 ? 4 : 2;
    float bias[16] = {0};
    if (count <= 0) return;
    if (job->bias) {
        uint8_t raw[64] = {0};
        memcpy(raw, job->bias + row * size, (size_t)(count * size));
        qm_load16(raw, job->dtype, bias);
    }
    for (int64_t m = 0; m < job->batch; m++) {
        float out[16], extra = 0.0f;
        if (job->plus != 0.0f && !job->scaled) {
            const float *sums = job->sums + m * job->split * job->groups;
            for (int64_t g = 0; g < job->groups; g++) extra += sums[g];
            extra *= job->plus;
        }
        const float *from = totals + m * job->split * QM_PAIR;
        for (int i = 0; i < 16; i++) out[i] = from[i] + extra;
        if (job->split == 2)
            for (int i = 0; i < 16; i++) out[i] += from[QM_PAIR + i];
        for (int i = 0; i < 16; i++) out[i] += bias[i];
        uint8_t *to = job->y + (m * job->rows + row) * size;
        qm_narrow(out, job->dtype, count, to);
    }
}

#endif
