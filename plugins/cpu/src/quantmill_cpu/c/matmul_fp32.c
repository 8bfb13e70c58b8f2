/* Matmul with float32 arithmetic: codes are decoded to floats, 16 rows side by side, and
 * multiplied by broadcast activations. Compiled once for each instruction set (QM_LEVEL).
 */
#include "matmul_driver.h"
#include "levels.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX2__)
#define LANES 8
#else
#define LANES 4
#endif
#define PARTS (QM_PAIR / LANES) /* vectors of a pair */

typedef float Floats __attribute__((vector_size(LANES * 4)));

QM_INLINE Floats load(const float *from) {
    Floats value;
    memcpy(&value, from, sizeof value);
    return value;
}

QM_INLINE void store(float *to, Floats value) { memcpy(to, &value, sizeof value); }

QM_INLINE Floats all(float value) { return value - (Floats){0}; }

/* ---- Codes to floats --------------------------------------------------------------------------- */

typedef uint32_t Words __attribute__((vector_size(LANES * 4)));
typedef int32_t Numbers __attribute__((vector_size(LANES * 4)));

/* Entries of a table of 2**bits (up to 4 bits: of 16, repeating); higher bits of the index are not
 * zero. */
QM_INLINE Floats look_up(const float *table, Words index, int bits) {
    const Words masked = index & ((1u << bits) - 1);
#if defined(__AVX512F__)
    if (bits <= 4) return _mm512_permutexvar_ps((__m512i)index, _mm512_loadu_ps(table));
    if (bits == 5)
        return _mm512_permutex2var_ps(_mm512_loadu_ps(table), (__m512i)index,
                                      _mm512_loadu_ps(table + 16));
    return _mm512_i32gather_ps((__m512i)masked, table, 4);
#elif defined(__AVX2__)
    if (bits > 4) return _mm256_i32gather_ps(table, (__m256i)masked, 4);
    __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), (__m256i)index);
    if (bits < 4) return low;
    __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), (__m256i)index);
    return _mm256_blendv_ps(low, high, (__m256)(index << 28));
#else
    Floats found;
    for (int i = 0; i < LANES; i++) found[i] = table[masked[i]];
    return found;
#endif
}

/* Columns 4 * j + p (j of 8 in a chunk) of a plane of `width` bits, the codes beginning at bit
 * `to`, of the rows from `row` on; other bits are not cleared. */
QM_INLINE Words plane(const uint8_t *at, int row, int width, int j, int p, int to) {
    const int each = 8 / width, shift = width * (j % each) + 8 * p - to;
    Words words;
    memcpy(&words, at + 64 * (j / each) + 4 * row, sizeof words);
    return shift >= 0 ? words >> shift : words << -shift;
}

/* One column of a chunk: the codes of 16 rows as floats. */
QM_INLINE void column(const float *table, const uint8_t *chunk, int j, int p, int bits, int steps,
                      float *out) {
    const int low = bits == 3 ? 2 : bits > 4 && bits < 8 ? 4 : bits; /* the first plane's width */
#pragma GCC unroll 4
    for (int row = 0; row < QM_PANEL; row += LANES) {
        Words index = plane(chunk, row, low, j, p, 0);
        if (low < bits) {
            const uint32_t mask = (1u << low) - 1;
            const Words more = plane(chunk + 64 * low, row, bits - low, j, p, low);
            index = (index & mask) | (more & ~mask);
        }
        if (steps) index &= (1u << bits) - 1;
        store(out + row, steps ? __builtin_convertvector((Numbers)index, Floats)
                               : look_up(table, index, bits));
    }
}

QM_INLINE void decode(const QmJob *job, const uint8_t *codes, int64_t unit, int64_t count, int bits,
                      int steps, float *out) {
    float repeating[16];
    for (int i = 0; i < 16; i++) repeating[i] = job->lookup[i & ((1 << bits) - 1)];
    const float *table = bits <= 4 ? repeating : job->lookup;
    for (int64_t u = unit; u < unit + count; u++) {
        const uint8_t *chunk = codes + (u / 2) * 64 * bits;
        /* Both halves of a chunk spelt out: shifts by constants are what makes this fast. */
        if (u % 2 == 0) {
#pragma GCC unroll 16
            for (int k = 0; k < 16; k++)
                column(table, chunk, k / 4, k % 4, bits, steps, out + k * QM_PAIR);
        } else {
#pragma GCC unroll 16
            for (int k = 0; k < 16; k++)
                column(table, chunk, 4 + k / 4, k % 4, bits, steps, out + k * QM_PAIR);
        }
        out += QM_UNIT * QM_PAIR;
    }
}

#define CASE(b) \
    case b: \
        if (job->numbers == QM_CODE) decode(job, codes, unit, count, b, 1, to); \
        else decode(job, codes, unit, count, b, 0, to); \
        break;

static void qm_decode_units(const QmJob *job, const uint8_t *codes, int64_t unit, int64_t count,
                            int half, void *out) {
    float *to = (float *)out + half * QM_PANEL;
    switch (job->bits) { CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(8) }
}

/* ---- Products ---------------------------------------------------------------------------------- */

/* `rows` rows of activations against half a pair; `chains` sums run beside each other where one
 * would wait for its own last addition. */
QM_INLINE void product(const QmJob *job, const QmStep *step, int64_t m, int half, int rows,
                       int chains) {
    enum { MOST = 4, HALF = PARTS / 2 };
    const QmWorkspace *w = step->w;
    const float *x = (const float *)job->act + m * job->stride + step->unit * QM_UNIT;
    const float *decoded = (const float *)w->decoded + half * QM_PANEL;
    const int64_t at = step->group * QM_PAIR + half * QM_PANEL, columns = step->count * QM_UNIT;
    float *part = w->part + m * QM_PAIR + half * QM_PANEL;
    float *total = w->total + m * QM_PAIR + half * QM_PANEL;
    Floats sums[MOST][4][HALF];
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int c = 0; c < chains; c++)
#pragma GCC unroll 4
            for (int p = 0; p < HALF; p++) sums[r][c][p] = all(0.0f);
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int p = 0; p < HALF; p++) {
            if (!step->first) sums[r][0][p] = load(part + r * QM_PAIR + p * LANES);
        }
    for (int64_t k = 0; k < columns; k += chains) {
#pragma GCC unroll 4
        for (int c = 0; c < chains; c++) {
            const float *weights = decoded + (k + c) * QM_PAIR;
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++) {
                Floats by = all(x[r * job->stride + k + c]);
#pragma GCC unroll 4
                for (int p = 0; p < HALF; p++) sums[r][c][p] += load(weights + p * LANES) * by;
            }
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int p = 0; p < HALF; p++) {
            Floats sum = sums[r][0][p];
#pragma GCC unroll 4
            for (int c = 1; c < chains; c++) sum += sums[r][c][p];
            if (!step->last) {
                store(part + r * QM_PAIR + p * LANES, sum);
                continue;
            }
            float *to = total + r * QM_PAIR + p * LANES;
            store(to, load(to) + sum * load(w->scale + at + p * LANES));
        }
}

static void qm_block(const QmJob *job, const QmStep *step) {
    for (int half = 0; half < 2; half++) {
        int64_t m = 0;
#if LANES == 16
        for (; m + 4 <= job->act_rows; m += 4) product(job, step, m, half, 4, 2);
#elif LANES == 8
        for (; m + 4 <= job->act_rows; m += 4) product(job, step, m, half, 4, 1);
#endif
        for (; m + 2 <= job->act_rows; m += 2) product(job, step, m, half, 2, LANES / 4);
        for (; m < job->act_rows; m++) product(job, step, m, half, 1, LANES == 4 ? 2 : 4);
    }
}

static void settle(QmJob *job) {
    if (job->numbers == QM_CODE) return;
    job->numbers = QM_LOOKUP;
    job->unit = 1.0f;
    job->base = 0.0f;
}

static int split(int dtype) {
    (void)dtype;
    return 1;
}

static void load_rows(const QmJob *job, int64_t first, int64_t last, char *workspace) {
    (void)workspace;
    for (int64_t m = first; m < last; m++) {
        float *row = (float *)job->act + m * job->stride;
        qm_row(job, m, row);
        if (job->sums_needed) qm_sums(job, row, job->sums + m * job->groups);
    }
}

static void run(const QmJob *job, int64_t pair, char *workspace) {
    QmWorkspace w;
    qm_workspace(job, workspace, &w);
    qm_run_pair(job, pair, &w, 1);
}

/* ---- Weights as floats ------------------------------------------------------------------------- */

/* Decoded columns of half a pair, all of one group, to what they mean. */
static void scale_columns(const QmJob *job, const QmWorkspace *w, int64_t group, int half,
                          int64_t columns) {
    const int64_t at = group * QM_PAIR + half * QM_PANEL;
    float *to = (float *)w->decoded + half * QM_PANEL;
    for (int row = 0; row < QM_PANEL; row += LANES) {
        const Floats zero = load(w->zero + at + row), by = load(w->scale + at + row);
        Floats plus = all(job->plus);
        if (job->offset_kind == QM_OFFSET_MINIMUM) plus += load(w->minimum + at + row);
        for (int64_t k = 0; k < columns; k++) {
            float *lanes = to + k * QM_PAIR + row;
            store(lanes, (load(lanes) + zero) * by + plus);
        }
    }
}

/* 16 decoded columns of one row side by side. */
QM_INLINE void across(const float *from, float *out) {
#if defined(__AVX512F__)
    const __m512i places = _mm512_mullo_epi32(
        _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
        _mm512_set1_epi32(QM_PAIR));
    _mm512_storeu_ps(out, _mm512_i32gather_ps(places, from, 4));
#else
    for (int k = 0; k < QM_UNIT; k++) out[k] = from[k * QM_PAIR];
#endif
}

/* Decoded units of a panel into its rows of the result, at the columns that they came from. Row by
 * row: rows may lie so far apart that the first cache holds few of them at once. */
static void write_units(const QmJob *job, const float *from, int64_t count, int64_t row,
                        int64_t column) {
    const int64_t rows = qm_least(QM_PANEL, job->rows - row);
    const int64_t last = qm_least(column + count * QM_UNIT, job->columns);
    const size_t size = job->dtype == QM_F32 ? 4 : 2;
    float values[QM_UNIT];
    uint8_t narrow[4 * QM_UNIT];
    for (int64_t r = 0; r < rows; r++) {
        uint8_t *to = job->y + (size_t)((row + r) * job->columns) * size;
        const float *unit = from + r;
        for (int64_t k = column; k < last; k += QM_UNIT, unit += QM_UNIT * QM_PAIR) {
            const int64_t some = qm_least(QM_UNIT, last - k);
            across(unit, values);
            if (!job->order) {
                qm_narrow(values, job->dtype, some, to + (size_t)k * size);
                continue;
            }
            qm_narrow(values, job->dtype, some, narrow);
            for (int64_t i = 0; i < some; i++)
                memcpy(to + (size_t)job->order[k + i] * size, narrow + (size_t)i * size, size);
        }
    }
}

static void expand(const QmJob *job, int64_t pair, char *workspace) {
    QmWorkspace w;
    qm_workspace(job, workspace, &w);
    const int64_t units = (job->columns + QM_UNIT - 1) / QM_UNIT;
    for (int half = 0; half < 2 && pair * 2 + half < job->panels; half++) {
        const int64_t panel = pair * 2 + half;
        const uint8_t *codes = job->codes + panel * job->panel_bytes;
        qm_panel_values(job, panel, &w, half * QM_PANEL);
        for (int64_t g = 0; g < job->groups; g++) {
            const int64_t first = g * job->group_units;
            const int64_t last = qm_least(first + job->group_units, units);
            for (int64_t unit = first; unit < last; unit += QM_SEGMENT) {
                const int64_t count = qm_least(QM_SEGMENT, last - unit);
                qm_decode_units(job, codes, unit, count, half, w.decoded);
                scale_columns(job, &w, g, half, count * QM_UNIT);
                write_units(job, (float *)w.decoded + half * QM_PANEL, count, panel * QM_PANEL,
                            unit * QM_UNIT);
            }
        }
    }
}

const QmWay QM_JOIN(qm_fp32_, QM_LEVEL) = {4, settle, split, 1, load_rows, run, expand};
