/* Groups of columns of float rows: their range, and their values as bytes or as packed codes
 * (quantize.h). Loops are those of kernels.h; a piece of the work is some rows. */
#include <string.h>

#include "kernels.h"
#include "matmul.h"
#include "pool.h"
#include "quantize.h"

#define QM_API __attribute__((visibility("default")))
#define PIECE (1 << 16) /* weights, about: half a second-level cache with what is made of them */

typedef struct {
    const QmKernels *kernels;
    const void *source;
    int dtype, divide, kind, bits;
    int64_t rows, columns, group, groups, together; /* rows of a piece */
    float *low, *high; /* of each group; one of them NULL: the largest magnitude only */
    const float *by, *minus, *plus;
    float top, middle, edge, least, most;
    uint8_t *out;
} Job;

/* Values of one group, or of a part of it, which are at `start` of the source. */
typedef void (*Visit)(const Job *job, const float *values, int64_t count, int64_t start, int64_t g,
                      int begins, void *state);

static inline int64_t least_of(int64_t a, int64_t b) { return a < b ? a : b; }

/* All groups of row `r`, loaded by whole groups as far as these fit. */
static void visit_row(const Job *job, int64_t r, Visit visit, void *state) {
    float values[QM_CHUNK];
    const int64_t row = r * job->columns, first = r * job->groups;
    const int64_t step = job->group < QM_CHUNK ? QM_CHUNK / job->group * job->group : QM_CHUNK;
    for (int64_t at = 0; at < job->columns;) {
        /* A group longer than a chunk ends one early: the next begins one. */
        const int64_t whole = job->group < QM_CHUNK ? job->columns : (at / job->group + 1) * job->group;
        const int64_t n = least_of(step, least_of(whole, job->columns) - at);
        job->kernels->load(job->source, job->dtype, row + at, n, values);
        int64_t g = first + at / job->group, inside = at % job->group;
        for (int64_t i = 0; i < n;) {
            const int64_t count = least_of(n - i, job->group - inside);
            visit(job, values + i, count, row + at + i, g, inside == 0, state);
            i += count;
            inside += count;
            if (inside == job->group) inside = 0, g++;
        }
        at += n;
    }
}

static void look(const Job *job, const float *values, int64_t count, int64_t start, int64_t g,
                 int begins, void *state) {
    (void)start, (void)state;
    if (!job->low) {
        const float top = qm_float_of(job->kernels->largest(values, count));
        /* As numbers of bits, for NaN is the largest of them. */
        if (begins || qm_bits_of(top) > qm_bits_of(job->high[g])) job->high[g] = top;
        return;
    }
    float found[4] = {job->low[g], job->high[g]};
    job->kernels->extremes(values, count, &found[2], &found[3]);
    const int seen = begins ? 2 : 0;
    job->kernels->extremes(found + seen, 4 - seen, &job->low[g], &job->high[g]);
}

static void to_bytes(const Job *job, const float *values, int64_t count, int64_t start, int64_t g,
                     int begins, void *state) {
    (void)begins, (void)state;
    job->kernels->to_bytes(values, count, job->by[g], job->divide, job->kind, job->top,
                           job->out + start);
}

/* Codes that do not fill bytes yet. */
typedef struct {
    uint8_t codes[QM_CHUNK + 8];
    int64_t count;
    uint8_t *to;
} Stream;

static void flush(const Job *job, Stream *stream, int64_t count) {
    if (job->bits == 4) job->kernels->pairs(stream->codes, count, stream->to);
    else qm_codes_pack(stream->codes, QM_DENSE, job->bits, count, stream->to);
    stream->to += count * job->bits / 8;
    stream->count -= count;
    memmove(stream->codes, stream->codes + count, (size_t)stream->count);
}

/* Room for `count` codes more. */
static uint8_t *room(const Job *job, Stream *stream, int64_t count) {
    if (stream->count + count > QM_CHUNK) flush(job, stream, stream->count / 8 * 8);
    stream->count += count;
    return stream->codes + stream->count - count;
}

/* To 4-bit floats. */
static void to_pairs(const Job *job, const float *values, int64_t count, int64_t start, int64_t g,
                     int begins, void *state) {
    (void)start, (void)begins;
    uint8_t *codes = room(job, state, count);
    job->kernels->to_bytes(values, count, job->by[g], job->divide, job->kind, job->top, codes);
}

static void to_codes(const Job *job, const float *values, int64_t count, int64_t start, int64_t g,
                     int begins, void *state) {
    (void)start, (void)begins;
    const QmCodeRule rule = {
        job->by[g], job->minus ? job->minus[g] : 0.0f,
        (job->plus ? job->plus[g] : 0.0f) + job->middle, job->edge, job->least, job->most,
        job->divide,
    };
    job->kernels->to_codes(values, count, &rule, room(job, state, count));
}

static void piece(void *argument, int64_t index, int worker) {
    const Job *job = argument;
    const int64_t first = index * job->together;
    const int64_t last = least_of(first + job->together, job->rows);
    Stream stream = {.count = 0};
    (void)worker;
    if (job->bits) stream.to = job->out + first * job->columns * job->bits / 8;
    const Visit coded = job->kind == QM_TO_E2M1 ? to_pairs : to_codes;
    const Visit visit = job->bits ? coded : job->by ? to_bytes : look;
    for (int64_t r = first; r < last; r++) visit_row(job, r, visit, &stream);
    if (job->bits) flush(job, &stream, stream.count);
}

static void run(Job job, int threads) {
    if (job.rows <= 0 || job.columns <= 0) return;
    job.kernels = qm_kernels();
    job.groups = (job.columns + job.group - 1) / job.group;
    /* Eight rows of any width end with a whole byte: no two threads write the same. */
    job.together = (PIECE / job.columns + 7) / 8 * 8 + 8 * (job.columns >= PIECE);
    qm_parallel_own(piece, &job, (job.rows + job.together - 1) / job.together, threads);
}

QM_API void qm_absmax(const void *source, int dtype, int64_t rows, int64_t columns, int64_t group,
                      float *out, int threads) {
    run((Job){.source = source, .dtype = dtype, .rows = rows, .columns = columns, .group = group,
              .high = out}, threads);
}

QM_API void qm_extremes(const void *source, int dtype, int64_t rows, int64_t columns, int64_t group,
                        float *low, float *high, int threads) {
    run((Job){.source = source, .dtype = dtype, .rows = rows, .columns = columns, .group = group,
              .low = low, .high = high}, threads);
}

QM_API void qm_round(const void *source, int dtype, int64_t rows, int64_t columns, int64_t group,
                     const float *by, int divide, int kind, float top, uint8_t *out, int threads) {
    run((Job){.source = source, .dtype = dtype, .rows = rows, .columns = columns, .group = group,
              .by = by, .divide = divide, .kind = kind, .bits = kind == QM_TO_E2M1 ? 4 : 0,
              .top = top, .out = out}, threads);
}

QM_API void qm_round_codes(const void *source, int dtype, int64_t rows, int64_t columns,
                           int64_t group, const float *by, const float *minus, const float *plus,
                           int divide, int bits, float middle, float edge, float low, float high,
                           uint8_t *out, int threads) {
    run((Job){.source = source, .dtype = dtype, .rows = rows, .columns = columns, .group = group,
              .by = by, .minus = minus, .plus = plus, .divide = divide, .bits = bits,
              .middle = middle, .edge = edge, .least = low, .most = high, .out = out}, threads);
}
