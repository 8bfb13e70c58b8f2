/* Matmul in whole numbers: codes are bytes, or become one or two by a lookup; activations become
 * 16-bit numbers, two signed bytes, with a step of their own for each run of columns (at most 256,
 * within a group). Products and sums are then exact, by dot products of four bytes; only the
 * activations were rounded, to 1/32512 of the largest in their run. That is a relative error of at
 * most 2^-16 * sqrt(256 / 3) = 1.4e-4 of the run, where all but one are zero, and far less usually.
 *
 * Activations with a NaN or an infinity make all results of their row NaN.
 */
#include "matmul_planes.h"

#define MOST 32512.0f /* 127 * 256: the upper byte, rounded, is at most 127 */

QM_INLINE __m512i byte_mask(int bits) { return _mm512_set1_epi8((char)((1 << bits) - 1)); }

/* Vector `j` of a chunk: bytes, and lower bytes for two of them. */
typedef struct {
    __m512i first, second;
} Weights;

QM_INLINE Weights decode(const uint8_t *chunk, int j, int bits, int numbers, __m512i first,
                         __m512i second) {
    __m512i codes = qm_codes(chunk, j, bits, 0);
    Weights w = {codes, codes};
    /* Lookups take the lowest six bits of each byte, and tables of fewer entries repeat. */
    if (numbers != QM_CODE) w.first = _mm512_permutexvar_epi8(codes, first);
    else if (bits < 8) w.first = _mm512_and_si512(codes, byte_mask(bits));
    if (numbers == QM_TWO_BYTES) w.second = _mm512_permutexvar_epi8(codes, second);
    return w;
}

/* Four neighbouring activations in every lane. */
QM_INLINE __m512i four(const int8_t *x) {
    int32_t word;
    memcpy(&word, x, 4);
    return _mm512_set1_epi32(word);
}

/* Sums by weight: [0] of upper bytes; [1] of x's lower ones; with two bytes a weight, [2] of its
 * lower ones with x's upper ones. Products of lower bytes are left out: these are a hundredth of x
 * and of the weight, of random sign, and together less than 1e-4 of the result. */
typedef struct {
    __m512i of[3];
} Sums;

/* What the zero point adds, where it is the same for all weights. */
QM_INLINE Sums start_of(const int32_t *starts) {
    return (Sums){{_mm512_set1_epi32(starts[0]), _mm512_set1_epi32(starts[1]),
                   _mm512_setzero_si512()}};
}

QM_INLINE void add_products(Sums *sums, Weights w, const int8_t *upper, int64_t stride, int two) {
    __m512i high = four(upper), low = four(upper + stride);
    sums->of[0] = _mm512_dpbusd_epi32(sums->of[0], w.first, high);
    sums->of[1] = _mm512_dpbusd_epi32(sums->of[1], w.first, low);
    if (!two) return;
    sums->of[2] = _mm512_dpbusd_epi32(sums->of[2], w.second, high);
}

QM_INLINE __m512 value_of(const Sums *sums, int two) {
    const __m512 by = _mm512_set1_ps(two ? 65536.0f : 256.0f), lower = _mm512_set1_ps(256.0f);
    const __m512i rest = two ? _mm512_add_epi32(sums->of[1], sums->of[2]) : sums->of[1];
    __m512 value = _mm512_cvtepi32_ps(rest);
    if (two) value = _mm512_mul_ps(value, lower);
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums->of[0]), by, value);
}

/* ---- Few rows: decoded in registers and used at once --------------------------------------------- */

/* Vectors [from, to) of a chunk against `rows` rows; `chains` sums run beside each other, for one
 * would wait for its own last addition. */
QM_INLINE void steps(const uint8_t *chunk, const int8_t *x, int64_t stride, int from, int to,
                     int bits, int numbers, int rows, int chains, __m512i first, __m512i second,
                     Sums sums[QM_FEW][4]) {
#pragma GCC unroll 8
    for (int j = from; j < to; j++) {
        Weights w = decode(chunk, j, bits, numbers, first, second);
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++)
            add_products(&sums[r][j % chains], w, x + r * 2 * stride + 4 * (j - from), stride,
                         numbers == QM_TWO_BYTES);
    }
}

/* One panel against rows m to m + rows - 1. */
QM_INLINE void few(const QmJob *job, int64_t panel, const QmWorkspace *w, int64_t m, int bits,
                   int numbers, int rows) {
    const int two = numbers == QM_TWO_BYTES, chains = rows == 1 ? (two ? 2 : 4) : rows == 2 ? 2 : 1;
    const __m512i first = _mm512_loadu_si512(job->bytes);
    const __m512i second = _mm512_loadu_si512(job->bytes + 64);
    const int64_t stride = job->stride, groups = job->groups, runs = groups * job->runs;
    const uint8_t *codes = job->codes + panel * job->panel_bytes;
    const QmAhead next = qm_ahead(job, panel + 1);
    const int8_t *x = (const int8_t *)job->act + m * 2 * stride;
    const float *step = job->steps + m * runs, *sums_of_x = job->sums + m * groups;
    const int32_t *starts = job->starts + 2 * m * runs;
    const float *scale = w->scale, *zero = w->zero, *minimum = w->minimum;
    __m512 totals[QM_FEW];
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) totals[r] = _mm512_setzero_ps();
    for (int64_t g = 0; g < groups; g++) {
        int64_t unit = g * job->group_units, end = qm_least(unit + job->group_units, job->units);
        qm_fetch_ahead(&next, g);
        const __m512 by = _mm512_loadu_ps(scale + g * QM_PAIR);
        if (job->zeros_needed) {
            const __m512 added = _mm512_mul_ps(by, _mm512_loadu_ps(zero + g * QM_PAIR));
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++)
                totals[r] = _mm512_fmadd_ps(added, _mm512_set1_ps(sums_of_x[r * groups + g]),
                                            totals[r]);
        }
        for (int64_t run = g * job->runs; unit < end; run++) {
            int64_t last = qm_least(unit + QM_SEGMENT, end);
            Sums sums[QM_FEW][4] = {0};
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++) sums[r][0] = start_of(starts + 2 * (r * runs + run));
            const uint8_t *chunk = codes + (unit / 2) * 64 * bits;
            if (unit % 2) {
                steps(chunk, x + unit * QM_UNIT, stride, 4, 8, bits, numbers, rows, chains, first,
                      second, sums);
                unit++;
                chunk += 64 * bits;
            }
            for (; unit + 2 <= last; unit += 2, chunk += 64 * bits) {
                qm_prefetch(chunk, bits);
                steps(chunk, x + unit * QM_UNIT, stride, 0, 8, bits, numbers, rows, chains, first,
                      second, sums);
            }
            if (unit < last) {
                steps(chunk, x + unit * QM_UNIT, stride, 0, 4, bits, numbers, rows, chains, first,
                      second, sums);
                unit++;
            }
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++) {
#pragma GCC unroll 4
                for (int c = 1; c < chains; c++)
#pragma GCC unroll 3
                    for (int i = 0; i < 2 + two; i++)
                        sums[r][0].of[i] =
                            _mm512_add_epi32(sums[r][0].of[i], sums[r][c].of[i]);
                const __m512 worth = _mm512_mul_ps(by, _mm512_set1_ps(step[r * runs + run]));
                totals[r] = _mm512_fmadd_ps(value_of(&sums[r][0], two), worth, totals[r]);
            }
        }
        if (job->offset_kind == QM_OFFSET_MINIMUM) {
            const __m512 added = _mm512_loadu_ps(minimum + g * QM_PAIR);
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++)
                totals[r] = _mm512_fmadd_ps(added, _mm512_set1_ps(sums_of_x[r * groups + g]),
                                            totals[r]);
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
        _mm512_storeu_ps(w->total + (m + r) * QM_PAIR, totals[r]);
}

/* One panel against one row where a group is a chunk (`each` is 1) or half of one (2): no group is
 * long enough to divide its sums, and nothing has to be asked in it. */
QM_INLINE void few_small(const QmJob *job, int64_t panel, const QmWorkspace *w, int bits,
                         int numbers, int each) {
    const int two = numbers == QM_TWO_BYTES;
    const __m512i first = _mm512_loadu_si512(job->bytes);
    const __m512i second = _mm512_loadu_si512(job->bytes + 64);
    const int64_t stride = job->stride, groups = job->groups;
    const uint8_t *chunk = job->codes + panel * job->panel_bytes;
    const QmAhead next = qm_ahead(job, panel + 1);
    const int8_t *x = job->act;
    const float *step = job->steps, *sums_of_x = job->sums;
    const int32_t *starts = job->starts;
    const float *scale = w->scale, *zero = w->zero, *minimum = w->minimum;
    __m512 total = _mm512_setzero_ps(), added = _mm512_setzero_ps();
    for (int64_t g = 0; g < groups; g += each, chunk += 64 * bits, x += QM_CHUNK_COLUMNS) {
        qm_prefetch(chunk, bits);
        qm_fetch_ahead(&next, g);
#pragma GCC unroll 2
        for (int part = 0; part < each; part++) {
            const int64_t at = g + part;
            if (part && at == groups) break;
            Sums sums[QM_FEW][4];
            sums[0][0] = start_of(starts + 2 * at);
            if (each == 1)
                steps(chunk, x, stride, 0, 8, bits, numbers, 1, 1, first, second, sums);
            else if (part == 0)
                steps(chunk, x, stride, 0, 4, bits, numbers, 1, 1, first, second, sums);
            else
                steps(chunk, x + QM_UNIT, stride, 4, 8, bits, numbers, 1, 1, first, second, sums);
            const __m512 by = _mm512_loadu_ps(scale + at * QM_PAIR);
            __m512 value = _mm512_mul_ps(value_of(&sums[0][0], two), _mm512_set1_ps(step[at]));
            const __m512 sum_of_x = _mm512_set1_ps(sums_of_x[at]);
            if (job->zeros_needed)
                value = _mm512_fmadd_ps(_mm512_loadu_ps(zero + at * QM_PAIR), sum_of_x, value);
            total = _mm512_fmadd_ps(value, by, total);
            if (job->offset_kind == QM_OFFSET_MINIMUM)
                added = _mm512_fmadd_ps(_mm512_loadu_ps(minimum + at * QM_PAIR), sum_of_x, added);
        }
    }
    _mm512_storeu_ps(w->total, _mm512_add_ps(total, added));
}

/* Compiled for each width and kind of numbers. */
#define FEW(b, kind) \
    { \
        int64_t m = 0; \
        if (job->batch == 1 && job->group_units <= 2) { \
            if (job->group_units == 1) few_small(job, panel, w, b, kind, 2); \
            else few_small(job, panel, w, b, kind, 1); \
            break; \
        } \
        for (; m + 4 <= job->batch; m += 4) few(job, panel, w, m, b, kind, 4); \
        if (m + 2 <= job->batch) few(job, panel, w, m, b, kind, 2), m += 2; \
        if (m < job->batch) few(job, panel, w, m, b, kind, 1); \
        break; \
    }
#define KINDS(b) \
    case b * 8 + QM_CODE: FEW(b, QM_CODE) \
    case b * 8 + QM_BYTE: FEW(b, QM_BYTE) \
    case b * 8 + QM_TWO_BYTES: FEW(b, QM_TWO_BYTES)

static void few_panel(const QmJob *job, int64_t panel, const QmWorkspace *w) {
    switch (job->bits * 8 + job->numbers) {
        KINDS(1) KINDS(2) KINDS(3) KINDS(4) KINDS(5) KINDS(6)
    case 8 * 8 + QM_CODE: FEW(8, QM_CODE)
    }
}

/* ---- Many rows: decoded once for all ------------------------------------------------------------- */

#define STEP 256 /* bytes from one decoded vector of a panel to its next: two panels, two bytes */

QM_INLINE void decode_all(const QmJob *job, const uint8_t *codes, int64_t unit, int64_t count,
                          int bits, int numbers, uint8_t *out) {
    const __m512i first = _mm512_loadu_si512(job->bytes);
    const __m512i second = _mm512_loadu_si512(job->bytes + 64);
    for (int64_t u = unit; u < unit + count; u++, out += 4 * STEP) {
        const uint8_t *chunk = codes + (u / 2) * 64 * bits;
        if (u % 2 == 0) qm_prefetch(chunk, bits);
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            Weights w = u % 2 == 0 ? decode(chunk, j, bits, numbers, first, second)
                                   : decode(chunk, j + 4, bits, numbers, first, second);
            _mm512_storeu_si512(out + STEP * j, w.first);
            if (numbers == QM_TWO_BYTES) _mm512_storeu_si512(out + STEP * j + 64, w.second);
        }
    }
}

#define ALL_KINDS(b) \
    case b * 8 + QM_CODE: decode_all(job, codes, unit, count, b, QM_CODE, to); break; \
    case b * 8 + QM_BYTE: decode_all(job, codes, unit, count, b, QM_BYTE, to); break; \
    case b * 8 + QM_TWO_BYTES: decode_all(job, codes, unit, count, b, QM_TWO_BYTES, to); break;

static void qm_decode_units(const QmJob *job, const uint8_t *codes, int64_t unit, int64_t count,
                            int half, void *out) {
    uint8_t *to = (uint8_t *)out + half * 128;
    switch (job->bits * 8 + job->numbers) {
        ALL_KINDS(1) ALL_KINDS(2) ALL_KINDS(3) ALL_KINDS(4) ALL_KINDS(5) ALL_KINDS(6)
    case 8 * 8 + QM_CODE: decode_all(job, codes, unit, count, 8, QM_CODE, to); break;
    }
}

/* `rows` rows of activations against both panels. */
QM_INLINE void product(const QmJob *job, const QmStep *step, int64_t m, int rows, int two) {
    enum { MOST_ROWS = 4 };
    const QmWorkspace *w = step->w;
    const int64_t stride = job->stride, runs = job->groups * job->runs;
    const int8_t *x = (const int8_t *)job->act + m * 2 * stride + step->unit * QM_UNIT;
    const uint8_t *decoded = w->decoded;
    float *total = w->total + m * QM_PAIR;
    Sums sums[MOST_ROWS][2];
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
        sums[r][0] = sums[r][1] = start_of(job->starts + 2 * ((m + r) * runs + step->run));
    for (int64_t v = 0; v < step->count * 4; v++, decoded += STEP) {
        const Weights upper = {_mm512_loadu_si512(decoded), _mm512_loadu_si512(decoded + 64)};
        const Weights lower = {_mm512_loadu_si512(decoded + 128),
                               _mm512_loadu_si512(decoded + 192)};
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
            add_products(&sums[r][0], upper, x + r * 2 * stride + 4 * v, stride, two);
            add_products(&sums[r][1], lower, x + r * 2 * stride + 4 * v, stride, two);
        }
    }
    const float *scale = w->scale + step->group * QM_PAIR;
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) {
        const __m512 one = _mm512_set1_ps(job->steps[(m + r) * runs + step->run]);
#pragma GCC unroll 2
        for (int p = 0; p < 2; p++) {
            const __m512 worth = _mm512_mul_ps(_mm512_loadu_ps(scale + 16 * p), one);
            float *to = total + r * QM_PAIR + 16 * p;
            _mm512_storeu_ps(
                to, _mm512_fmadd_ps(value_of(&sums[r][p], two), worth, _mm512_loadu_ps(to)));
        }
    }
}

static void qm_block(const QmJob *job, const QmStep *step) {
    int64_t m = 0;
    if (job->numbers == QM_TWO_BYTES) {
        for (; m + 4 <= job->batch; m += 4) product(job, step, m, 4, 1);
        for (; m < job->batch; m++) product(job, step, m, 1, 1);
        return;
    }
    for (; m + 4 <= job->batch; m += 4) product(job, step, m, 4, 0);
    if (m + 2 <= job->batch) product(job, step, m, 2, 0), m += 2;
    if (m < job->batch) product(job, step, m, 1, 0);
}

/* ---- Activations --------------------------------------------------------------------------------- */

/* A run of a row as whole numbers, upper and lower bytes, and `zero` times the sums of both kinds.
 * Returns what one number is worth and adds what all of them are to `sum`. */
static float load_run(const float *row, int64_t count, int8_t *upper, int8_t *lower, int zero,
                      int32_t *starts, float *sum) {
    __m512 most = _mm512_setzero_ps();
    for (int64_t k = 0; k < count; k += 16)
        most = _mm512_max_ps(most, _mm512_abs_ps(_mm512_loadu_ps(row + k)));
    /* The maximum drops NaN; a sum keeps it. */
    __m512 all = _mm512_setzero_ps();
    for (int64_t k = 0; k < count; k += 16)
        all = _mm512_add_ps(all, _mm512_mul_ps(_mm512_loadu_ps(row + k), _mm512_setzero_ps()));
    float largest = _mm512_reduce_max_ps(most), odd = _mm512_reduce_add_ps(all);
    float step = largest > 1e-30f ? largest / MOST : 0.0f;
    const __m512 by = _mm512_set1_ps(odd == 0.0f && step > 0.0f ? MOST / largest : 0.0f);
    __m512i numbers = _mm512_setzero_si512(), uppers = numbers;
    for (int64_t k = 0; k < count; k += 16) {
        __m512i number = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(row + k), by));
        __m512i high = _mm512_srai_epi32(_mm512_add_epi32(number, _mm512_set1_epi32(128)), 8);
        numbers = _mm512_add_epi32(numbers, number);
        uppers = _mm512_add_epi32(uppers, high);
        _mm_storeu_si128((__m128i_u *)(upper + k), _mm512_cvtepi32_epi8(high));
        _mm_storeu_si128((__m128i_u *)(lower + k), _mm512_cvtepi32_epi8(number));
    }
    if (odd != 0.0f) step = odd; /* NaN: zero times NaN or infinity */
    const int total = _mm512_reduce_add_epi32(numbers), above = _mm512_reduce_add_epi32(uppers);
    starts[0] = zero * above;
    starts[1] = zero * (total - 256 * above);
    *sum += step * (float)total;
    return step;
}

static void load_rows(const QmJob *job, int64_t first, int64_t last, char *workspace) {
    QmWorkspace w;
    qm_workspace(job, workspace, &w);
    for (int64_t m = first; m < last; m++) {
        int8_t *upper = (int8_t *)job->act + m * 2 * job->stride, *lower = upper + job->stride;
        float *step = job->steps + m * job->groups * job->runs;
        int32_t *starts = job->starts + 2 * m * job->groups * job->runs;
        qm_row(job, m, w.row);
        for (int64_t g = 0; g < job->groups; g++) {
            int64_t unit = g * job->group_units, end = qm_least(unit + job->group_units, job->units);
            float *sum = job->sums + m * job->groups + g;
            *sum = 0.0f;
            for (int64_t run = g * job->runs; unit < end; run++, unit += QM_SEGMENT) {
                int64_t at = unit * QM_UNIT, count = qm_least(QM_SEGMENT, end - unit) * QM_UNIT;
                step[run] = load_run(w.row + at, count, upper + at, lower + at, job->zero_number,
                                     starts + 2 * run, sum);
            }
        }
    }
}

/* A zero point that is a small whole number, in units of the upper byte where there are two. */
static void settle(QmJob *job) {
    const float zero = job->shift / job->unit + job->base;
    const float number = job->numbers == QM_TWO_BYTES ? zero / 256.0f : zero;
    if (job->offset_kind == QM_OFFSET_ZERO || !(number >= -255.0f && number <= 255.0f)) return;
    if (number != (float)(int)number) return;
    job->zero_folded = 1;
    job->zero_number = (int)number;
}

static int split(int dtype) {
    (void)dtype;
    return 1;
}

static void run(const QmJob *job, int64_t pair, char *workspace) {
    QmWorkspace w;
    qm_workspace(job, workspace, &w);
    /* A panel is still in the cache when its next rows of x come. */
    if (job->batch > 2 * QM_FEW) {
        qm_run_pair(job, pair, &w, 1);
        return;
    }
    for (int half = 0; half < 2 && pair * 2 + half < job->panels; half++) {
        int64_t panel = pair * 2 + half;
        /* Both panels in the same lanes: what was just read stays in the first cache. */
        qm_panel_values(job, panel, &w, 0);
        few_panel(job, panel, &w);
        qm_store(job, panel * QM_PANEL, w.total);
    }
}

const QmWay qm_int8_avx512 = {2, settle, split, 1, load_rows, run, NULL};
