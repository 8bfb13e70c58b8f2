/* Quantizers behind quantmill-cpu's C ABI. See quantize.h for what each function promises.
 *
 * Plain loops that the compiler vectorises; QM_CLONES makes it compile each hot function several
 * times and the loader pick one for the machine. All arithmetic is float32 without contraction, in
 * the order stated by the forms' reference, so every clone gives the same bytes.
 */
#include "quantize.h"

#include <math.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__)
#define QM_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define QM_CLONES
#endif
#define QM_API __attribute__((visibility("default")))
#define CHUNK 4096 /* elements converted at a time: fits the first-level cache */
#define MAX_THREADS 64
#define INFINITE_BITS 0x7f800000u

QM_API int qm_abi_version(void) { return QM_ABI_VERSION; }

static inline uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

static inline float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

/* binary16 to binary32, exact; branch-free so that it vectorises. */
static inline float half_to_float(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000u) << 16;
    uint32_t rest = (uint32_t)(half & 0x7fffu) << 13;
    /* Scaling by 2^112 moves the exponent's bias and makes subnormals normal. */
    float scaled = float_of(rest) * 5.192296858534828e33f;
    uint32_t value = bits_of(scaled);
    value = (half & 0x7c00u) == 0x7c00u ? (rest | INFINITE_BITS) : value;
    return float_of(sign | value);
}

/* binary32 rounded to binary16 (nearest, ties to even) and back. */
static inline float round_to_half(float value) {
    uint32_t bits = bits_of(value), sign = bits & 0x80000000u, magnitude = bits & 0x7fffffffu;
    /* Normal range: round the 13 bits that binary16 lacks. */
    uint32_t normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u)) & ~0x1fffu;
    normal = normal >= 0x47800000u ? INFINITE_BITS : normal; /* 65536 and beyond */
    normal = magnitude > INFINITE_BITS ? 0x7fc00000u : normal;
    /* Below 2^-14 binary16 has steps of 2^-24: adding 0.5 lets the addition round there. */
    float small = (float_of(magnitude) + 0.5f) - 0.5f;
    uint32_t result = magnitude < 0x38800000u ? bits_of(small) : normal;
    return float_of(sign | result);
}

QM_CLONES static void load(const void *source, int dtype, int64_t start, int64_t count, float *out) {
    if (dtype == QM_F32) {
        memcpy(out, (const char *)source + start * 4, (size_t)count * 4);
        return;
    }
    const char *from = (const char *)source + start * 2;
    uint16_t raw[CHUNK];
    memcpy(raw, from, (size_t)count * 2); /* the source may be unaligned */
    if (dtype == QM_BF16) {
        for (int64_t i = 0; i < count; i++) out[i] = float_of((uint32_t)raw[i] << 16);
    } else {
        for (int64_t i = 0; i < count; i++) out[i] = half_to_float(raw[i]);
    }
}

QM_CLONES static uint32_t largest_magnitude(const float *values, int64_t count) {
    uint32_t top = 0;
    for (int64_t i = 0; i < count; i++) {
        uint32_t magnitude = bits_of(values[i]) & 0x7fffffffu;
        top = magnitude > top ? magnitude : top;
    }
    return top;
}

static int64_t first_infinite(const float *values, int64_t count) {
    for (int64_t i = 0; i < count; i++)
        if ((bits_of(values[i]) & 0x7fffffffu) >= INFINITE_BITS) return i;
    return -1;
}

/* Rank among 15 ascending bounds: how many are below the value. */
QM_CLONES static void ranks15(const float *values, int64_t count, float scale, int divide,
                              const float *bounds, uint8_t *out) {
    float scaled[CHUNK];
    if (divide) {
        for (int64_t i = 0; i < count; i++) scaled[i] = values[i] / scale;
    } else {
        for (int64_t i = 0; i < count; i++) scaled[i] = values[i] * scale;
    }
    const float b0 = bounds[0], b1 = bounds[1], b2 = bounds[2], b3 = bounds[3], b4 = bounds[4],
                b5 = bounds[5], b6 = bounds[6], b7 = bounds[7], b8 = bounds[8], b9 = bounds[9],
                b10 = bounds[10], b11 = bounds[11], b12 = bounds[12], b13 = bounds[13],
                b14 = bounds[14];
    for (int64_t i = 0; i < count; i++) {
        float v = scaled[i];
        int rank = (v > b0) + (v > b1) + (v > b2) + (v > b3) + (v > b4) + (v > b5) + (v > b6) +
                   (v > b7) + (v > b8) + (v > b9) + (v > b10) + (v > b11) + (v > b12) + (v > b13) +
                   (v > b14);
        out[i] = (uint8_t)rank;
    }
}

QM_CLONES static void pack_pairs(const uint8_t *ranks, const uint8_t *order, int64_t count,
                                 uint8_t *out) {
    for (int64_t i = 0; i < count / 2; i++)
        out[i] = (uint8_t)(order[ranks[2 * i]] << 4 | order[ranks[2 * i + 1]]);
}

typedef struct {
    const void *source;
    int dtype;
    int64_t count, block, first, last; /* this thread's blocks: [first, last) */
    const float *bounds;
    const uint8_t *order;
    uint8_t *out;
    float *scale;
    int64_t bad; /* index of the first non-finite element, or -1 */
    int64_t columns;
    int8_t *rows_out;
} Task;

/* A block longer than CHUNK is worked through in pieces, twice: absmax, then codes. */
static void *work_4bit(void *argument) {
    Task *t = argument;
    float values[CHUNK];
    uint8_t ranks[CHUNK];
    for (int64_t b = t->first; b < t->last; b++) {
        int64_t start = b * t->block;
        int64_t size = t->count - start < t->block ? t->count - start : t->block;
        uint32_t top = 0;
        for (int64_t at = 0; at < size; at += CHUNK) {
            int64_t n = size - at < CHUNK ? size - at : CHUNK;
            load(t->source, t->dtype, start + at, n, values);
            uint32_t here = largest_magnitude(values, n);
            if (here >= INFINITE_BITS && t->bad < 0) t->bad = start + at + first_infinite(values, n);
            top = here > top ? here : top;
        }
        if (t->bad >= 0) return NULL;
        float absmax = float_of(top);
        float floor = absmax < 1e-38f ? 1e-38f : absmax;
        int ragged = size < t->block;
        t->scale[b] = ragged ? floor : absmax;
        for (int64_t at = 0; at < size; at += CHUNK) {
            int64_t n = size - at < CHUNK ? size - at : CHUNK;
            if (size > CHUNK) load(t->source, t->dtype, start + at, n, values);
            ranks15(values, n, ragged ? floor : 1.0f / floor, ragged, t->bounds, ranks);
            uint8_t *out = t->out + (start + at) / 2;
            pack_pairs(ranks, t->order, n, out);
            if (n & 1) { /* the very last element: its byte's low nibble is the code of zero */
                uint8_t zero_rank;
                float zero = 0.0f;
                ranks15(&zero, 1, 1.0f, 0, t->bounds, &zero_rank);
                out[n / 2] = (uint8_t)(t->order[ranks[n - 1]] << 4 | t->order[zero_rank]);
            }
        }
    }
    return NULL;
}

/* Index on a grid of 65536 steps over [-1, 1]. */
static inline int grid_index(float value) {
    float at = (value + 1.0f) * 32767.5f + 0.5f;
    return at < 0.0f ? 0 : at >= 65535.0f ? 65535 : (int)at;
}

static void *work_8bit(void *argument) {
    Task *t = argument;
    const float *source = t->source;
    for (int64_t b = t->first; b < t->last; b++) {
        int64_t start = b * t->block;
        int64_t size = t->count - start < t->block ? t->count - start : t->block;
        uint32_t top = largest_magnitude(source + start, size);
        if (top >= INFINITE_BITS) {
            t->bad = start + first_infinite(source + start, size);
            return NULL;
        }
        float absmax = float_of(top);
        t->scale[b] = absmax;
        float inverse = absmax > 0.0f ? 1.0f / absmax : 0.0f;
        for (int64_t i = 0; i < size; i++)
            t->out[start + i] = t->order[grid_index(source[start + i] * inverse)];
    }
    return NULL;
}

QM_CLONES static void half_row(float *values, int64_t count) {
    for (int64_t i = 0; i < count; i++) values[i] = round_to_half(values[i]);
}

QM_CLONES static void codes_int8(const float *values, int64_t count, float scale, int8_t *out) {
    for (int64_t i = 0; i < count; i++) {
        /* Adding and taking away 1.5 * 2^23 rounds to an integer, ties to even. */
        float rounded = (values[i] * scale + 12582912.0f) - 12582912.0f;
        out[i] = (int8_t)(int32_t)rounded;
    }
}

static void *work_rows(void *argument) {
    Task *t = argument;
    float values[CHUNK];
    for (int64_t r = t->first; r < t->last; r++) {
        uint32_t top = 0;
        int64_t start = r * t->columns;
        for (int64_t at = 0; at < t->columns; at += CHUNK) {
            int64_t n = t->columns - at < CHUNK ? t->columns - at : CHUNK;
            load(t->source, t->dtype, start + at, n, values);
            half_row(values, n);
            uint32_t here = largest_magnitude(values, n);
            if (here >= INFINITE_BITS) {
                t->bad = start + at + first_infinite(values, n);
                return NULL;
            }
            top = here > top ? here : top;
        }
        float absmax = float_of(top);
        t->scale[r] = absmax;
        float scale = absmax > 0.0f ? (1.0f / absmax) * 127.0f : 0.0f;
        for (int64_t at = 0; at < t->columns; at += CHUNK) {
            int64_t n = t->columns - at < CHUNK ? t->columns - at : CHUNK;
            if (t->columns > CHUNK) {
                load(t->source, t->dtype, start + at, n, values);
                half_row(values, n);
            }
            codes_int8(values, n, scale, t->rows_out + start + at);
        }
    }
    return NULL;
}

/* Split [0, blocks) over threads; the caller is one of them. */
static int64_t run(Task whole, int64_t blocks, int threads, void *(*work)(void *)) {
    Task tasks[MAX_THREADS];
    pthread_t handles[MAX_THREADS];
    int started[MAX_THREADS] = {0};
    if (threads > MAX_THREADS) threads = MAX_THREADS;
    if (threads > blocks) threads = (int)blocks;
    if (threads < 1) threads = 1;
    for (int i = 0; i < threads; i++) {
        tasks[i] = whole;
        tasks[i].first = blocks * i / threads;
        tasks[i].last = blocks * (i + 1) / threads;
        tasks[i].bad = -1;
    }
    for (int i = 1; i < threads; i++)
        started[i] = pthread_create(&handles[i], NULL, work, &tasks[i]) == 0;
    work(&tasks[0]);
    for (int i = 1; i < threads; i++) {
        if (started[i]) pthread_join(handles[i], NULL);
        else work(&tasks[i]); /* no thread to be had: do it here */
    }
    for (int i = 0; i < threads; i++)
        if (tasks[i].bad >= 0) return tasks[i].bad;
    return -1;
}

QM_API int64_t qm_quantize_codebook4(const void *source, int dtype, int64_t count, int64_t block,
                                     const float *bounds, const uint8_t *order, uint8_t *out,
                                     float *scale, int threads) {
    Task t = {.source = source, .dtype = dtype, .count = count, .block = block, .bounds = bounds,
              .order = order, .out = out, .scale = scale, .bad = -1};
    return count <= 0 ? -1 : run(t, (count + block - 1) / block, threads, work_4bit);
}

QM_API int64_t qm_quantize_codebook8(const float *source, int64_t count, int64_t block,
                                     const uint8_t *nearest, uint8_t *out, float *scale,
                                     int threads) {
    Task t = {.source = source, .dtype = QM_F32, .count = count, .block = block, .order = nearest,
              .out = out, .scale = scale, .bad = -1};
    return count <= 0 ? -1 : run(t, (count + block - 1) / block, threads, work_8bit);
}

QM_API int64_t qm_quantize_rows_int8(const void *source, int dtype, int64_t rows, int64_t columns,
                                     int8_t *out, float *scale, int threads) {
    Task t = {.source = source, .dtype = dtype, .count = rows * columns, .block = columns,
              .scale = scale, .bad = -1, .columns = columns, .rows_out = out};
    return rows <= 0 || columns <= 0 ? -1 : run(t, rows, threads, work_rows);
}
