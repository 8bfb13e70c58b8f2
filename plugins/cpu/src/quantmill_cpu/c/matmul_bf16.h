/* What the two ways with bf16 arithmetic share: codes decoded to bf16, activations as bf16, and the
 * products of few rows, which need no decoded copy. Needs AVX-512 F, BW, DQ, VL, VBMI and BF16.
 *
 * A lookup's values are exact in bf16 for 8-bit floats; a codebook's are rounded, after a common
 * factor that makes them round well (`gain` undoes it). Codes of up to 6 bits that are numbers
 * themselves become 2^bits + code by setting bits. Activations in float32 or float16 become the sum of
 * two bf16, as two rows whose results are added.
 *
 * A decoded vector of bytes is two of bf16: columns 4 * j and 4 * j + 2 of 16 rows, then 4 * j + 1
 * and 4 * j + 3. Activations are put in that order too, except for few rows.
 */
#ifndef QUANTMILL_MATMUL_BF16_H
#define QUANTMILL_MATMUL_BF16_H

#include "matmul_planes.h"

/* The job's table, in registers: up to 6 bits two vectors, 8 bits all. */
typedef struct {
    __m512i part[8];
} QmTable;

QM_INLINE QmTable qm_table(const QmJob *job) {
    QmTable table;
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) table.part[i] = _mm512_loadu_si512(job->table + 64 * i);
    return table;
}

typedef struct {
    __m512i even, odd; /* columns, or lower and upper bytes */
} QmPair;

/* Lower and upper bytes of vector `j` (of 8 in a chunk) in bf16, by lookup. These ignore the bits
 * above a code's, or find the same entry again. */
QM_INLINE QmPair qm_look_up(const uint8_t *chunk, int j, int bits, int numbers, const QmTable *t) {
    const __m512i codes = qm_codes(chunk, j, bits, 0);
    if (bits == 8 && numbers == QM_MIRROR) {
        const __m512i sign = _mm512_set1_epi8((char)0x80);
        const __m512i high = _mm512_permutex2var_epi8(t->part[4], codes, t->part[5]);
        return (QmPair){_mm512_permutex2var_epi8(t->part[0], codes, t->part[1]),
                        _mm512_ternarylogic_epi64(high, codes, sign, 0xf8)}; /* high | (codes & sign) */
    }
    if (bits == 8) {
        const __mmask64 upper = _mm512_movepi8_mask(codes);
        return (QmPair){
            _mm512_mask_blend_epi8(upper, _mm512_permutex2var_epi8(t->part[0], codes, t->part[1]),
                                   _mm512_permutex2var_epi8(t->part[2], codes, t->part[3])),
            _mm512_mask_blend_epi8(upper, _mm512_permutex2var_epi8(t->part[4], codes, t->part[5]),
                                   _mm512_permutex2var_epi8(t->part[6], codes, t->part[7]))};
    }
    return (QmPair){_mm512_permutexvar_epi8(codes, t->part[0]),
                    _mm512_permutexvar_epi8(codes, t->part[1])};
}

/* Vector `j` of a chunk as bf16. */
QM_INLINE QmPair qm_decode(const uint8_t *chunk, int j, int bits, int numbers, const QmTable *t) {
    if (numbers == QM_CODE) {
        const int to = 7 - bits; /* 2^bits + code: the code is the upper bits of the mantissa */
        const __m512i codes = qm_codes(chunk, j, bits, to);
        const __m512i mask = _mm512_set1_epi16((short)(((1 << bits) - 1) << to));
        const __m512i base = _mm512_set1_epi16((short)((127 + bits) << 7));
        return (QmPair){_mm512_ternarylogic_epi64(codes, mask, base, 0xea),
                        _mm512_ternarylogic_epi64(qm_shift(codes, 8), mask, base, 0xea)};
    }
    const QmPair bytes = qm_look_up(chunk, j, bits, numbers, t); /* lower, upper */
    return (QmPair){qm_choose(0x00ff, bytes.even, qm_shift(bytes.odd, -8)),
                    qm_choose(0x00ff, qm_shift(bytes.even, 8), bytes.odd)};
}

/* Two neighbouring activations in every lane. */
QM_INLINE __m512i qm_both(const uint16_t *x) {
    int32_t pair;
    memcpy(&pair, x, 4);
    return _mm512_set1_epi32(pair);
}

QM_INLINE __m512 qm_dot(__m512 sum, __m512i a, __m512i b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}

/* ---- Activations -------------------------------------------------------------------------------- */

static void qm_bf16_settle(QmJob *job, int64_t many) {
    job->scaled = job->batch > many && job->bf16_twice;
    if (job->numbers != QM_MIRROR && (job->numbers != QM_CODE || job->bits == 8))
        job->numbers = QM_LOOKUP;
    job->unit = 1.0f;
    job->base = job->numbers == QM_CODE ? job->lookup[0] - (float)(1 << job->bits) : 0.0f;
}

static int qm_bf16_split(int dtype) { return dtype == QM_BF16 ? 1 : 2; }

/* 16 activations as bf16, in the order of the decoded weights. */
QM_INLINE void qm_bf16_store(uint16_t *to, __m256i values, int natural) {
    if (!natural) values = _mm256_shufflehi_epi16(_mm256_shufflelo_epi16(values, 0xd8), 0xd8);
    _mm256_storeu_si256((__m256i_u *)to, values);
}

/* Where an activation is: row by row, or, for tiles, 16 rows by 32 columns after each other. */
QM_INLINE uint16_t *qm_bf16_at(const QmJob *job, int64_t row, int64_t column) {
    uint16_t *act = job->act;
    if (!job->tiled) return act + row * job->stride + column;
    return act + (row / 16 * 16 * job->stride + column / 32 * 512 + row % 16 * 32 + column % 32);
}

static void qm_bf16_load(const QmJob *job, int64_t first, int64_t last, char *workspace) {
    QmWorkspace w;
    qm_workspace(job, workspace, &w);
    for (int64_t m = first; m < last; m++) {
        const int64_t at = m * job->split;
        float *sums = job->sums + at * job->groups;
        qm_row(job, m, w.row);
        for (int64_t k = 0; k < job->stride; k += 16) {
            uint16_t *high = qm_bf16_at(job, at, k), *low = qm_bf16_at(job, at + 1, k);
            __m512 value = _mm512_loadu_ps(w.row + k);
            __m256i rounded = (__m256i)_mm512_cvtneps_pbh(value);
            qm_bf16_store(high, rounded, job->natural);
            if (job->split == 1) continue;
            __m512i wide = _mm512_slli_epi32(_mm512_cvtepu16_epi32(rounded), 16);
            __m512 rest = _mm512_sub_ps(value, _mm512_castsi512_ps(wide));
            /* Infinity leaves a rest of NaN: it has none. 0x18: infinities; 0x81: NaN. */
            __mmask16 odd = _mm512_fpclass_ps_mask(_mm512_castsi512_ps(wide), 0x99);
            rest = _mm512_mask_mov_ps(rest, odd, _mm512_setzero_ps());
            rounded = (__m256i)_mm512_cvtneps_pbh(rest);
            qm_bf16_store(low, rounded, job->natural);
            /* The sums must be those of what is multiplied: they are taken away from it again. */
            rest = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(rounded), 16));
            _mm512_storeu_ps(w.row + k, _mm512_add_ps(_mm512_castsi512_ps(wide), rest));
        }
        if (!job->sums_needed) continue;
        qm_sums(job, w.row, sums); /* both parts', beside the upper one */
        if (job->split == 2) memset(sums + job->groups, 0, (size_t)job->groups * 4);
    }
}

/* ---- Few rows: decoded in registers and used at once --------------------------------------------- */

/* Four neighbouring activations in every pair of lanes. */
QM_INLINE __m512i qm_four(const uint16_t *x) {
    int64_t four;
    memcpy(&four, x, 8);
    return _mm512_set1_epi64(four);
}

/* Vectors [from, to) of a chunk against `rows` rows; `chains` sums run beside each other. Bytes are
 * put together within 128 bits, that is four rows of W: the first two of them, each in two lanes,
 * go into even sums and the others into odd ones (qm_rows undoes that). */
QM_INLINE void qm_steps(const uint8_t *chunk, const uint16_t *x, int64_t stride, int from, int to,
                        int bits, int numbers, int rows, int chains, const QmTable *t,
                        __m512 sums[QM_FEW][4]) {
#pragma GCC unroll 8
    for (int j = from; j < to; j++) {
        const QmPair bytes = qm_look_up(chunk, j, bits, numbers, t);
        const __m512i first = _mm512_unpacklo_epi8(bytes.even, bytes.odd);
        const __m512i second = _mm512_unpackhi_epi8(bytes.even, bytes.odd);
        const int chain = 2 * j % chains;
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
            const __m512i four = qm_four(x + r * stride + 4 * (j - from));
            sums[r][chain] = qm_dot(sums[r][chain], first, four);
            sums[r][chain + 1] = qm_dot(sums[r][chain + 1], second, four);
        }
    }
}

/* A sum of each of 16 rows, from those that qm_steps made. */
QM_INLINE __m512 qm_rows(__m512 first, __m512 second) {
    return _mm512_add_ps(_mm512_shuffle_ps(first, second, 0x88),
                         _mm512_shuffle_ps(first, second, 0xdd));
}

/* One panel, all groups, against rows m to m + rows - 1. */
QM_INLINE void qm_few(const QmJob *job, int64_t panel, const QmWorkspace *w, int64_t m, int bits,
                      int numbers, int rows) {
    const QmTable t = qm_table(job);
    const QmAhead next = qm_ahead(job, panel + 1);
    const uint8_t *codes = job->codes + panel * job->panel_bytes;
    const int chains = rows <= 2 ? 4 : 2;
    const uint16_t *x = (const uint16_t *)job->act + m * job->stride;
    const float *sums_of_x = job->sums + m * job->groups;
    const float *scale = w->scale, *zero = w->zero, *minimum = w->minimum;
    __m512 totals[QM_FEW];
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) totals[r] = _mm512_setzero_ps();
    for (int64_t g = 0; g < job->groups; g++) {
        int64_t unit = g * job->group_units, last = qm_least(unit + job->group_units, job->units);
        qm_fetch_ahead(&next, g);
        __m512 sums[QM_FEW][4];
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
            for (int c = 0; c < chains; c++) sums[r][c] = _mm512_setzero_ps();
        const uint8_t *chunk = codes + (unit / 2) * 64 * bits;
        if (unit % 2 && unit < last) {
            qm_steps(chunk, x + unit * QM_UNIT, job->stride, 4, 8, bits, numbers, rows, chains, &t,
                     sums);
            unit++;
            chunk += 64 * bits;
        }
        for (; unit + 2 <= last; unit += 2, chunk += 64 * bits) {
            qm_prefetch(chunk, bits);
            qm_steps(chunk, x + unit * QM_UNIT, job->stride, 0, 8, bits, numbers, rows, chains, &t,
                     sums);
        }
        if (unit < last)
            qm_steps(chunk, x + unit * QM_UNIT, job->stride, 0, 4, bits, numbers, rows, chains, &t,
                     sums);
        __m512 by = _mm512_loadu_ps(scale + g * QM_PAIR);
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
            if (chains == 4) {
                sums[r][0] = _mm512_add_ps(sums[r][0], sums[r][2]);
                sums[r][1] = _mm512_add_ps(sums[r][1], sums[r][3]);
            }
            __m512 sum = qm_rows(sums[r][0], sums[r][1]);
            if (job->zeros_needed)
                sum = _mm512_fmadd_ps(_mm512_loadu_ps(zero + g * QM_PAIR),
                                      _mm512_set1_ps(sums_of_x[r * job->groups + g]), sum);
            totals[r] = _mm512_fmadd_ps(sum, by, totals[r]);
        }
        if (job->offset_kind == QM_OFFSET_MINIMUM) {
            by = _mm512_loadu_ps(minimum + g * QM_PAIR);
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++)
                totals[r] = _mm512_fmadd_ps(
                    by, _mm512_set1_ps(sums_of_x[r * job->groups + g]), totals[r]);
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
        _mm512_storeu_ps(w->total + (m + r) * QM_PAIR, totals[r]);
}

/* ---- Many rows: decoded once for all -------------------------------------------------------------- */

/* Units as vectors of bf16, those of the two panels alternating. */
QM_INLINE void qm_decode_all(const QmJob *job, const uint8_t *codes, int64_t unit, int64_t count,
                             int bits, int numbers, uint8_t *out) {
    const QmTable t = qm_table(job);
    for (int64_t u = unit; u < unit + count; u++, out += 8 * 128) {
        const uint8_t *chunk = codes + (u / 2) * 64 * bits;
        if (u % 2 == 0) qm_prefetch(chunk, bits);
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            QmPair pair = u % 2 == 0 ? qm_decode(chunk, j, bits, numbers, &t)
                                     : qm_decode(chunk, j + 4, bits, numbers, &t);
            _mm512_storeu_si512(out + 256 * j, pair.even);
            _mm512_storeu_si512(out + 256 * j + 128, pair.odd);
        }
    }
}

#define QM_EACH_WIDTH(CASE) \
    switch (job->bits) { CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(8) }

static void qm_decode_units(const QmJob *job, const uint8_t *codes, int64_t unit, int64_t count,
                            int half, void *out) {
    uint8_t *to = (uint8_t *)out + half * 64;
#define CASE(b) \
    case b: \
        if (job->numbers == QM_CODE && b < 8) \
            qm_decode_all(job, codes, unit, count, b, QM_CODE, to); \
        else if (job->numbers == QM_MIRROR && b == 8) \
            qm_decode_all(job, codes, unit, count, b, QM_MIRROR, to); \
        else qm_decode_all(job, codes, unit, count, b, QM_LOOKUP, to); \
        break;
    QM_EACH_WIDTH(CASE)
#undef CASE
}

/* ---- Very many rows: scaled first ----------------------------------------------------------------
 * Sums over all columns then need no scaling of each group's. The weight is rounded to bf16 once
 * more, as it is wherever it is dequantized for bf16 activations. */

/* Two bf16 of each row times its scale plus `added`. */
QM_INLINE __m512i qm_scale(__m512i pair, __m512 scale, __m512 added) {
    const __m512i upper = _mm512_set1_epi32((int)0xffff0000u), half = _mm512_set1_epi32(0x8000);
    __m512 first = _mm512_castsi512_ps(_mm512_slli_epi32(pair, 16));
    __m512 second = _mm512_castsi512_ps(_mm512_and_si512(pair, upper));
    __m512i low = _mm512_castps_si512(_mm512_fmadd_ps(first, scale, added));
    __m512i high = _mm512_castps_si512(_mm512_fmadd_ps(second, scale, added));
    low = _mm512_srli_epi32(_mm512_add_epi32(low, half), 16);
    return _mm512_ternarylogic_epi64(upper, _mm512_add_epi32(high, half), low, 0xca);
}

QM_INLINE void qm_decode_scaled(const QmJob *job, const uint8_t *codes, const QmWorkspace *w,
                                int64_t unit, int64_t count, int half, int bits, int numbers) {
    const QmTable t = qm_table(job);
    uint8_t *out = (uint8_t *)w->decoded + half * 64;
    for (int64_t u = unit; u < unit + count; u++, out += 8 * 128) {
        const int64_t group = qm_least(u / job->group_units, job->groups - 1);
        const __m512 scale = _mm512_loadu_ps(w->scale + group * QM_PAIR + half * QM_PANEL);
        const __m512 added = _mm512_loadu_ps(w->zero + group * QM_PAIR + half * QM_PANEL);
        const uint8_t *chunk = codes + (u / 2) * 64 * bits;
        if (u % 2 == 0) qm_prefetch(chunk, bits);
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            QmPair pair = u % 2 == 0 ? qm_decode(chunk, j, bits, numbers, &t)
                                     : qm_decode(chunk, j + 4, bits, numbers, &t);
            _mm512_storeu_si512(out + 256 * j, qm_scale(pair.even, scale, added));
            _mm512_storeu_si512(out + 256 * j + 128, qm_scale(pair.odd, scale, added));
        }
    }
}

/* What a scaled weight is beside its code's part: a pair's zero points and minimums. */
QM_INLINE void qm_added(const QmJob *job, int64_t panel, const QmWorkspace *w, int lane) {
    const float zero = job->shift / job->unit + job->base;
    qm_panel_values(job, panel, w, lane);
    for (int64_t g = 0; g < job->groups; g++)
        for (int64_t i = g * QM_PAIR + lane; i < g * QM_PAIR + lane + QM_PANEL; i++) {
            const float by = job->offset_kind == QM_OFFSET_ZERO ? w->zero[i] : zero;
            const float low = job->offset_kind == QM_OFFSET_MINIMUM ? w->minimum[i] : 0.0f;
            w->zero[i] = w->scale[i] * by + (low + job->plus);
        }
}

QM_INLINE void qm_run_scaled(const QmJob *job, int64_t pair, const QmWorkspace *w) {
    const uint8_t *codes[2];
    for (int half = 0; half < 2; half++) {
        int64_t panel = qm_least(pair * 2 + half, job->panels - 1);
        codes[half] = job->codes + panel * job->panel_bytes;
        qm_added(job, panel, w, half * QM_PANEL);
    }
    for (int64_t unit = 0; unit < job->units; unit += QM_SEGMENT) {
        const int64_t count = qm_least(QM_SEGMENT, job->units - unit);
        for (int half = 0; half < 2; half++) {
#define CASE(b) \
    case b: \
        if (job->numbers == QM_CODE && b < 8) \
            qm_decode_scaled(job, codes[half], w, unit, count, half, b, QM_CODE); \
        else if (job->numbers == QM_MIRROR && b == 8) \
            qm_decode_scaled(job, codes[half], w, unit, count, half, b, QM_MIRROR); \
        else qm_decode_scaled(job, codes[half], w, unit, count, half, b, QM_LOOKUP); \
        break;
            QM_EACH_WIDTH(CASE)
#undef CASE
        }
        const QmStep step = {unit, count, 0, 0, unit == 0, unit + count == job->units, w};
        qm_block(job, &step);
    }
    for (int half = 0; half < 2; half++)
        qm_store(job, (pair * 2 + half) * QM_PANEL, w->part + half * QM_PANEL);
}

#endif
