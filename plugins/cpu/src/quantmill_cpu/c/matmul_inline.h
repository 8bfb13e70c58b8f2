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

/* The second level's factors of 16 rows, in `out`. Returns the group from which on others hold. */
QM_INLINE int64_t qm_seconds(const QmJob *job, const QmValues *v, int64_t panel, int64_t group,
                             float *out) {
    if (v->level == QM_LEVEL_ROW) {
        const int64_t at = (panel * v->stride + group / v->size) * QM_PANEL;
        qm_load16(v->second + at * (v->level_kind == QM_FLOAT ? 4 : 2), v->level_kind - QM_FLOAT, out);
        return qm_least(job->groups, (group / v->size + 1) * v->size);
    }
    int64_t until = job->groups;
    for (int i = 0; i < QM_PANEL; i++) {
        /* Rows beyond the last one repeat it: they are padding. */
        const int64_t first = qm_least(panel * QM_PANEL + i, job->rows - 1) * job->groups;
        const int64_t at = v->level == QM_LEVEL_ONE ? 0 : (first + group) / v->size;
        out[i] = qm_value_at(v->second, v->level_kind - QM_FLOAT, at);
        if (v->level == QM_LEVEL_FLAT) until = qm_least(until, (at + 1) * v->size - first);
    }
    return until;
}

/* Lanes are spelt out as vectors: of loops over arrays the compiler makes scalars where they are in
 * the midst of others. */
typedef float QmFloats __attribute__((vector_size(64)));
typedef int32_t QmInts __attribute__((vector_size(64)));
typedef uint32_t QmWords32 __attribute__((vector_size(64)));
typedef uint16_t QmShorts __attribute__((vector_size(32)));

QM_INLINE QmFloats qm_load_floats(const float *from) {
    QmFloats lanes;
    memcpy(&lanes, from, sizeof lanes);
    return lanes;
}

/* 16 bytes as whole numbers. */
QM_INLINE QmInts qm_bytes(const uint8_t *from, int with_sign) {
#ifdef __AVX512F__
    const __m128i bytes = _mm_loadu_si128((const __m128i_u *)from);
    return (QmInts)(with_sign ? _mm512_cvtepi8_epi32(bytes) : _mm512_cvtepu8_epi32(bytes));
#else
    QmInts whole;
    for (int i = 0; i < 16; i++) whole[i] = with_sign ? (int8_t)from[i] : from[i];
    return whole;
#endif
}

/* 16 values of a group, where each lane has its own. */
QM_INLINE QmFloats qm_lanes(const uint8_t *from, int kind) {
    if (kind == QM_FLOAT || kind == QM_BFLOAT || kind == QM_HALF) {
        float out[16];
        qm_load16(from, kind - QM_FLOAT, out);
        return qm_load_floats(out);
    }
    QmInts whole;
    if (kind == QM_INT32) memcpy(&whole, from, sizeof whole);
    else whole = qm_bytes(from, kind == QM_INT8);
    return __builtin_convertvector(whole, QmFloats);
}

/* Values of a panel's groups, times `by` plus `add`: out[group * 32 + lane]. */
QM_INLINE void qm_values_of(const QmJob *job, const QmValues *v, int64_t panel, int kind, int size,
                            float by, float add, float *out) {
    const uint8_t *from = v->data + panel * v->panel_bytes;
    for (int64_t g = 0; g < job->groups; g++, from += 16 * size, out += QM_PAIR) {
        const QmFloats lanes = qm_lanes(from, kind) * by + add;
        memcpy(out, &lanes, sizeof lanes);
    }
}

/* Codes of groups 4 * j to 4 * j + 3 (of 32 in a chunk) of 16 rows, each a byte of the row's word. */
QM_INLINE QmWords32 qm_code_words(const QmValues *v, const uint8_t *chunk, int j) {
    QmWords32 low, high;
    memcpy(&low, chunk + v->at[j], 64);
    low = low >> v->shift[j] & v->mask;
    if (!v->high_mask) return low;
    memcpy(&high, chunk + v->high_at[j], 64);
    return low | (high >> v->high_shift[j] & v->high_mask) << v->high_to;
}

#ifdef __AVX512VBMI__
/* Each byte of the words through a table of 256 bytes. */
QM_INLINE QmWords32 qm_table_bytes(const uint8_t *table, __m512i codes) {
    const __m512i low = _mm512_permutex2var_epi8(_mm512_loadu_si512(table), codes,
                                                 _mm512_loadu_si512(table + 64));
    const __m512i high = _mm512_permutex2var_epi8(_mm512_loadu_si512(table + 128), codes,
                                                  _mm512_loadu_si512(table + 192));
    return (QmWords32)_mm512_mask_blend_epi8(_mm512_movepi8_mask(codes), low, high);
}
#endif

/* Four groups' codes with what they are looked up in, and the entries of group `p`; those of a table
 * have 16 bits of precision with AVX-512 VBMI. */
typedef struct {
    QmWords32 words, bytes[3];
} QmFour;

QM_INLINE QmFour qm_four_groups(const QmValues *v, const uint8_t *codes, int64_t first, int linear) {
    QmFour four;
    four.words = qm_code_words(v, codes + first / 32 * 64 * v->bits, (int)(first % 32) / 4);
#ifdef __AVX512VBMI__
    for (int k = 0; k < 3 && !linear; k++)
        four.bytes[k] =
            qm_table_bytes((const uint8_t *)(v->table + 256) + 256 * k, (__m512i)four.words);
#else
    (void)linear;
#endif
    return four;
}

QM_INLINE QmFloats qm_entries(const QmValues *v, const QmFour *four, int p, int linear) {
    const QmWords32 codes = four->words >> 8 * p & 255;
    if (linear) return __builtin_convertvector((QmInts)codes, QmFloats) * v->step + v->low;
#ifdef __AVX512VBMI__
    return (QmFloats)(four->bytes[0] >> 8 * p << 24 >> 16 | four->bytes[1] >> 8 * p << 24 >> 8 |
                      four->bytes[2] >> 8 * p << 24);
#else
    QmFloats lanes;
    for (int i = 0; i < 16; i++) lanes[i] = v->table[codes[i]];
    return lanes;
#endif
}

/* The same of coded values. */
QM_INLINE void qm_coded(const QmJob *job, const QmValues *v, int64_t panel, int linear, float by,
                        float add, float *out) {
    const int64_t groups = job->groups;
    const uint8_t *codes = v->data + panel * v->panel_bytes;
    QmFloats second = (QmFloats){0} + by;
    const float more = v->plus * by + add;
    int64_t until = v->level == QM_LEVEL_NONE ? groups : 0;
    for (int64_t first = 0; first < groups; first += 4) {
        const QmFour four = qm_four_groups(v, codes, first, linear);
#pragma GCC unroll 4
        for (int p = 0; p < 4; p++) {
            const int64_t g = first + p;
            if (g >= until) {
                float found[16];
                if (g >= groups) return;
                until = qm_seconds(job, v, panel, g, found);
                second = qm_load_floats(found) * by;
            }
            const QmFloats lanes = qm_entries(v, &four, p, linear) * second + more;
            memcpy(out + g * QM_PAIR, &lanes, sizeof lanes);
        }
    }
}

/* One value as float. */
QM_INLINE float qm_one(const QmValues *v, int64_t at) {
    int32_t whole;
    switch (v->kind) {
    case QM_INT8: return (float)(int8_t)v->data[at];
    case QM_UINT8: return (float)v->data[at];
    case QM_INT32: memcpy(&whole, v->data + 4 * at, 4); return (float)whole;
    case QM_CODED: return v->table[v->data[at]];
    }
    return qm_value_at(v->data, v->kind - QM_FLOAT, at);
}

/* The same where all 16 rows, or all of W, have one value. */
static void qm_values_shared(const QmJob *job, const QmValues *v, int64_t panel, float by,
                             float add, float *out) {
    for (int64_t g = 0; g < job->groups; g++) {
        const float value = qm_one(v, v->lanes ? panel * job->groups + g : 0) * by + add;
        for (int i = 0; i < 16; i++) out[g * QM_PAIR + i] = value;
    }
}

/* Where the values of later panels are, for fetching them while this one is worked on: they are
 * read all at once at its beginning. */
typedef struct {
    const uint8_t *scale, *offset;
    int64_t scale_step, offset_step; /* from group to group */
} QmAhead;

QM_INLINE QmAhead qm_ahead(const QmJob *job, int64_t panel) {
    const QmValues *s = &job->scale, *o = &job->offset;
    QmAhead ahead = {job->codes, job->codes, 0, 0};
    if (s->lanes == 16) {
        ahead.scale_step = s->panel_bytes / job->groups;
        ahead.scale = s->data + panel * s->panel_bytes;
    }
    if (o->kind != QM_NONE && o->lanes == 16) {
        ahead.offset_step = o->panel_bytes / job->groups;
        ahead.offset = o->data + panel * o->panel_bytes;
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
    case QM_CODED:
        if (v->table) qm_coded(job, v, panel, 0, by, add, out);
        else qm_coded(job, v, panel, 1, by, add, out);
        break;
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
    for (int64_t g = 0; g < job->groups && job->zeros_needed; g++)
        for (int i = 0; i < 16; i++) w->zero[g * QM_PAIR + lane + i] = zero;
    if (job->offset_kind == QM_OFFSET_MINIMUM)
        qm_values(job, &job->offset, panel, 1.0f, 0.0f, w->minimum + lane);
}

typedef float QmPairLanes __attribute__((vector_size(QM_PAIR * 4), aligned(4)));

/* For `rows` rows of activations: their totals stay in registers over all groups. */
QM_INLINE void qm_add_rows(const QmJob *job, const QmWorkspace *w, int64_t m, int rows,
                           int with_zero) {
    QmPairLanes totals[4];
    const float *sums = job->sums + m * job->groups;
    memcpy(totals, w->total + m * QM_PAIR, (size_t)rows * sizeof *totals);
    for (int64_t g = 0; g < job->groups; g++) {
        QmPairLanes by = *(const QmPairLanes *)(w->minimum + g * QM_PAIR);
        if (with_zero) {
            const QmPairLanes zero = *(const QmPairLanes *)(w->zero + g * QM_PAIR);
            const QmPairLanes added = *(const QmPairLanes *)(w->scale + g * QM_PAIR) * zero;
            by = job->offset_kind == QM_OFFSET_MINIMUM ? by + added : added;
        }
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) totals[r] += by * sums[r * job->groups + g];
    }
    memcpy(w->total + m * QM_PAIR, totals, (size_t)rows * sizeof *totals);
}

/* What the sums of x add to all groups: zero points, and minimums. */
static void qm_add_sums(const QmJob *job, const QmWorkspace *w, int with_zero) {
    with_zero = with_zero && job->zeros_needed;
    if (!with_zero && job->offset_kind != QM_OFFSET_MINIMUM) return;
    int64_t m = 0;
    for (; m + 4 <= job->act_rows; m += 4) qm_add_rows(job, w, m, 4, with_zero);
    for (; m < job->act_rows; m++) qm_add_rows(job, w, m, 1, with_zero);
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
    if (dtype == QM_BF16) {
        /* qm_bfloat_bits, of vectors. */
        QmWords32 words;
        memcpy(&words, values, 64);
        const QmWords32 rounded = (words + 0x7fffu + (words >> 16 & 1u)) >> 16;
        const QmWords32 nan = (QmWords32)((words & 0x7fffffffu) > 0x7f800000u);
        const QmShorts shorts =
            __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0u), QmShorts);
        memcpy(to, &shorts, count == 16 ? 32 : (size_t)count * 2);
        return;
    }
    memcpy(bits, values, 64);
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
