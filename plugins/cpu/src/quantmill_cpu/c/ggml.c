/* The ABI of ggml.h: instruction sets and threads. The loops are in ggml_types.c. */
#include "ggml.h"

#include <stdlib.h>
#include <string.h>

#include "floats.h"
#include "ggml_rows.h"
#include "kernels.h"
#include "pool.h"
#include "quantize.h"

#define QM_API __attribute__((visibility("default")))
#define PIECE 64 /* blocks that a thread encodes at a time: a multiple of all numbers of lanes */

static const QmGgmlType *type_of(int number, int *lanes) {
    const QmGgmlType *table = qm_ggml_baseline;
    *lanes = qm_ggml_lanes_baseline;
    if (number < 0 || number >= QM_TYPES) return NULL;
#ifdef QM_X86_LEVELS
    const char *level = qm_level();
    if (strcmp(level, "avx2") == 0) {
        table = qm_ggml_avx2;
        *lanes = qm_ggml_lanes_avx2;
    } else if (strcmp(level, "avx512") == 0) {
        table = qm_ggml_avx512;
        *lanes = qm_ggml_lanes_avx512;
    }
#endif
    return table[number].values ? &table[number] : NULL;
}

typedef struct {
    const QmGgmlType *type;
    QmGgmlSource source;
    int lanes;
    uint32_t largest; /* bits of the largest magnitude so far */
} Encoding;

/* The bits of the largest magnitude, as those of a float32: they are in the order of the values,
 * and beyond all of them are infinity and NaN. */
static uint32_t largest_of(const void *source, int dtype, int64_t first, int64_t count) {
    if (dtype == QM_F32) {
        const char *from = (const char *)source + first * 4;
        int32_t top = 0;
        for (int64_t i = 0; i < count; i++) {
            int32_t bits;
            memcpy(&bits, from + i * 4, 4);
            bits &= 0x7fffffff;
            top = bits > top ? bits : top;
        }
        return (uint32_t)top;
    }
    const char *from = (const char *)source + first * 2;
    int16_t top = 0;
    for (int64_t i = 0; i < count; i++) {
        int16_t bits;
        memcpy(&bits, from + i * 2, 2);
        bits &= 0x7fff;
        top = bits > top ? bits : top;
    }
    return dtype == QM_BF16 ? (uint32_t)top << 16 : qm_as_bits(qm_half((uint16_t)top));
}

static void encode_piece(void *argument, int64_t index, int worker) {
    (void)worker;
    Encoding *e = argument;
    const QmGgmlSource *s = &e->source;
    int64_t first = index * PIECE, last = first + PIECE < s->blocks ? first + PIECE : s->blocks;
    const int values = e->type->values;
    uint32_t here = largest_of(s->source, s->dtype, first * values, (last - first) * values);
    uint32_t there = __atomic_load_n(&e->largest, __ATOMIC_RELAXED);
    while (here > there && !__atomic_compare_exchange_n(&e->largest, &there, here, 1,
                                                        __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
    if (here >= QM_INFINITE_BITS) return;
    for (; first < last; first += e->lanes) e->type->encode(s, first);
}

/* The mean square of each row, added one by one. */
static void row_energy(const QmGgmlSource *s, int64_t rows, float *energy) {
    for (int64_t row = 0; row < rows; row++) {
        float total = 0.0f;
        for (int64_t i = row * s->columns; i < (row + 1) * s->columns; i++) {
            float value = qm_value_at(s->source, s->dtype, i);
            total += value * value;
        }
        energy[row] = total / (float)s->columns;
    }
}

QM_API int qm_ggml_encode(int number, const void *values, int dtype, int64_t rows, int64_t columns,
                          const float *importance, uint8_t *out, float *largest, int threads) {
    int lanes;
    const QmGgmlType *type = type_of(number, &lanes);
    *largest = 0.0f;
    if (!type || !type->encode || columns % type->values) return -1;
    if (rows <= 0 || columns <= 0) return 0;
    Encoding e = {type,
                  {values, dtype, columns, importance, NULL, out, rows * (columns / type->values)},
                  lanes, 0};
    float *energy = NULL;
    if (importance && number <= QM_Q5_1) {
        energy = malloc(sizeof(float) * (size_t)rows);
        if (!energy) return -2;
        row_energy(&e.source, rows, energy);
        e.source.energy = energy;
    }
    qm_parallel(encode_piece, &e, (e.source.blocks + PIECE - 1) / PIECE, threads);
    free(energy);
    *largest = qm_as_float(e.largest);
    return 0;
}

typedef struct {
    const QmGgmlType *type;
    const uint8_t *raw;
    const int8_t *points;
    int64_t blocks, piece;
    float *out;
} Decoding;

static void decode_piece(void *argument, int64_t index, int worker) {
    (void)worker;
    Decoding *d = argument;
    int64_t first = index * d->piece;
    int64_t count = d->blocks - first < d->piece ? d->blocks - first : d->piece;
    d->type->decode(d->raw + first * d->type->size, count, d->points,
                    d->out + first * d->type->values);
}

QM_API int qm_ggml_decode(int number, const uint8_t *raw, int64_t blocks, const int8_t *points,
                          float *out, int threads) {
    int lanes;
    const QmGgmlType *type = type_of(number, &lanes);
    if (!type) return -1;
    if (blocks <= 0) return 0;
    Decoding d = {type, raw, points, blocks, 65536 / type->values, out};
    qm_parallel(decode_piece, &d, (blocks + d.piece - 1) / d.piece, threads);
    return 0;
}

#define DECODED (1 << 15) /* values that a thread decodes at a time: they stay in its cache */

typedef struct {
    const QmGgmlType *type;
    const uint8_t *raw;
    const int8_t *points;
    QmRows all;    /* of the whole matrix */
    int64_t piece; /* rows */
    float *values; /* of each worker, piece x columns */
    void (*multiply)(const QmRows *job);
} Product;

static void multiply_piece(void *argument, int64_t index, int worker) {
    const Product *p = argument;
    QmRows job = p->all;
    const int64_t first = index * p->piece, blocks = job.columns / p->type->values;
    float *values = p->values + worker * p->piece * job.columns;
    job.rows = job.rows - first < p->piece ? job.rows - first : p->piece;
    p->type->decode(p->raw + first * blocks * p->type->size, job.rows * blocks, p->points, values);
    job.values = values;
    job.out += first;
    if (job.bias) job.bias += first;
    p->multiply(&job);
}

QM_API int qm_ggml_matmul(int number, const uint8_t *raw, int64_t rows, int64_t columns,
                          const int8_t *points, const float *x, int64_t tokens, const float *bias,
                          float *out, int threads) {
    int lanes;
    const QmGgmlType *type = type_of(number, &lanes);
    if (!type) return -1;
    if (rows <= 0 || tokens <= 0) return 0;
    if (threads < 1) threads = 1;
    if (threads > QM_POOL_MOST) threads = QM_POOL_MOST;
    int64_t piece = DECODED / columns / QM_ROWS_TILE * QM_ROWS_TILE;
    if (piece < QM_ROWS_TILE) piece = QM_ROWS_TILE;
    Product p = {type, raw, points, {NULL, rows, columns, x, tokens, bias, out, rows}, piece, NULL,
                 qm_ggml_rows_baseline};
#ifdef QM_X86_LEVELS
    if (lanes == qm_ggml_lanes_avx2) p.multiply = qm_ggml_rows_avx2;
    if (lanes == qm_ggml_lanes_avx512) p.multiply = qm_ggml_rows_avx512;
#endif
    p.values = aligned_alloc(64, (size_t)(threads * piece * columns + 16) * 4 / 64 * 64 + 64);
    if (!p.values) return -2;
    qm_parallel(multiply_piece, &p, (rows + piece - 1) / piece, threads);
    free(p.values);
    return 0;
}
