/* Quantizers behind quantmill-cpu's C ABI: blocks, threads and the choice of an instruction set.
 * See quantize.h for what each function promises, and kernels.h for the loops themselves.
 */
#include "quantize.h"

#include <pthread.h>
#include <stdatomic.h>
#include <string.h>

#include "kernels.h"

#define QM_API __attribute__((visibility("default")))
#define MAX_THREADS 64

/* ---- Levels ---------------------------------------------------------------------------------- */

static const QmKernels *const LEVELS[] = {
    &qm_kernels_baseline,
#ifdef QM_X86_LEVELS
    &qm_kernels_avx2,
    &qm_kernels_avx512,
#endif
};

/* How many of LEVELS this machine runs: each one is a superset of the one before. */
static int levels_here(void) {
#ifdef QM_X86_LEVELS
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2")) return 1;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl"))
        return 2;
    return 3;
#else
    return 1;
#endif
}

static _Atomic(const QmKernels *) in_use;

const QmKernels *qm_kernels(void) {
    const QmKernels *found = atomic_load_explicit(&in_use, memory_order_relaxed);
    if (!found) {
        found = LEVELS[levels_here() - 1];
        atomic_store_explicit(&in_use, found, memory_order_relaxed);
    }
    return found;
}

QM_API int qm_abi_version(void) { return QM_ABI_VERSION; }

QM_API const char *qm_levels(void) {
    static const char *const NAMES[] = {"baseline", "baseline avx2", "baseline avx2 avx512"};
    return NAMES[levels_here() - 1];
}

QM_API const char *qm_level(void) { return qm_kernels()->name; }

QM_API int qm_use_level(const char *name) {
    for (int i = 0; i < levels_here(); i++)
        if (strcmp(LEVELS[i]->name, name) == 0) {
            atomic_store_explicit(&in_use, LEVELS[i], memory_order_relaxed);
            return 0;
        }
    return -1;
}

/* ---- Work of one thread ---------------------------------------------------------------------- */

typedef struct {
    const QmKernels *kernels;
    const void *source;
    int dtype;
    int64_t count, block, first, last; /* this thread's blocks: [first, last) */
    const float *bounds;
    const uint8_t *pair_codes; /* byte of two codes for a byte of two ranks, or NULL: the same */
    uint8_t zero_rank;
    const uint8_t *nearest;
    uint8_t *out;
    int8_t *rows_out;
    float *scale;
    int64_t bad; /* index of the first non-finite element, or -1 */
} Task;

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

static int64_t first_infinite(const float *values, int64_t count) {
    for (int64_t i = 0; i < count; i++)
        if ((qm_bits_of(values[i]) & 0x7fffffffu) >= QM_INFINITE_BITS) return i;
    return -1;
}

/* Scale a block's values and note its absmax. */
static void scale_block(Task *t, int64_t b, float *values, int64_t n, int ragged, uint32_t top) {
    float absmax = qm_float_of(top);
    float floor = absmax < 1e-38f ? 1e-38f : absmax;
    t->scale[b] = ragged ? floor : absmax;
    t->kernels->scale(values, n, ragged ? floor : 1.0f / floor, ragged);
}

/* Write the codes of scaled values; an odd count ends the tensor. */
static void emit(const Task *t, const float *values, int64_t start, int64_t n) {
    uint8_t ranks[QM_CHUNK + 1];
    t->kernels->ranks15(values, n, t->bounds, ranks);
    if (n & 1) ranks[n] = t->zero_rank; /* the last byte's low nibble is the code of zero */
    t->kernels->pack(ranks, (n + 1) / 2, t->pair_codes, t->out + start / 2);
}

/* A block longer than QM_CHUNK is worked through in pieces, twice: absmax, then codes. */
static void long_block(Task *t, int64_t b) {
    float values[QM_CHUNK];
    int64_t start = b * t->block, size = least(t->block, t->count - start);
    uint32_t top = 0;
    for (int64_t at = 0; at < size; at += QM_CHUNK) {
        int64_t n = least(QM_CHUNK, size - at);
        t->kernels->load(t->source, t->dtype, start + at, n, values);
        uint32_t here = t->kernels->largest(values, n);
        if (here >= QM_INFINITE_BITS) {
            t->bad = start + at + first_infinite(values, n);
            return;
        }
        top = here > top ? here : top;
    }
    for (int64_t at = 0; at < size; at += QM_CHUNK) {
        int64_t n = least(QM_CHUNK, size - at);
        t->kernels->load(t->source, t->dtype, start + at, n, values);
        scale_block(t, b, values, n, size < t->block, top);
        emit(t, values, start + at, n);
    }
}

static void *work_4bit(void *argument) {
    Task *t = argument;
    float values[QM_CHUNK];
    int64_t together = QM_CHUNK / t->block; /* blocks in a chunk */
    if (together == 0) {
        for (int64_t b = t->first; b < t->last && t->bad < 0; b++) long_block(t, b);
        return NULL;
    }
    for (int64_t b = t->first; b < t->last; b += together) {
        int64_t start = b * t->block;
        int64_t size = least(least(together, t->last - b) * t->block, t->count - start);
        t->kernels->load(t->source, t->dtype, start, size, values);
        for (int64_t at = 0; at < size; at += t->block) {
            int64_t n = least(t->block, size - at);
            uint32_t top = t->kernels->largest(values + at, n);
            if (top >= QM_INFINITE_BITS) {
                t->bad = start + at + first_infinite(values + at, n);
                return NULL;
            }
            scale_block(t, b + at / t->block, values + at, n, n < t->block, top);
        }
        emit(t, values, start, size);
    }
    return NULL;
}

static void *work_8bit(void *argument) {
    Task *t = argument;
    float values[QM_CHUNK];
    for (int64_t b = t->first; b < t->last; b++) {
        int64_t start = b * t->block, size = least(t->block, t->count - start);
        uint32_t top = 0;
        for (int64_t at = 0; at < size; at += QM_CHUNK) {
            int64_t n = least(QM_CHUNK, size - at);
            t->kernels->load(t->source, QM_F32, start + at, n, values);
            uint32_t here = t->kernels->largest(values, n);
            if (here >= QM_INFINITE_BITS) {
                t->bad = start + at + first_infinite(values, n);
                return NULL;
            }
            top = here > top ? here : top;
        }
        float absmax = qm_float_of(top);
        t->scale[b] = absmax;
        if (top == 0) {
            memset(t->out + start, 0, (size_t)size);
            continue;
        }
        for (int64_t at = 0; at < size; at += QM_CHUNK) {
            int64_t n = least(QM_CHUNK, size - at);
            if (size > QM_CHUNK) t->kernels->load(t->source, QM_F32, start + at, n, values);
            t->kernels->codes8(values, n, 1.0f / absmax, t->nearest, t->out + start + at);
        }
    }
    return NULL;
}

/* A block is a row. */
static void *work_rows(void *argument) {
    Task *t = argument;
    float values[QM_CHUNK];
    for (int64_t r = t->first; r < t->last; r++) {
        uint32_t top = 0;
        int64_t start = r * t->block;
        for (int64_t at = 0; at < t->block; at += QM_CHUNK) {
            int64_t n = least(QM_CHUNK, t->block - at);
            t->kernels->load(t->source, t->dtype, start + at, n, values);
            t->kernels->to_half(values, n);
            uint32_t here = t->kernels->largest(values, n);
            if (here >= QM_INFINITE_BITS) {
                t->bad = start + at + first_infinite(values, n);
                return NULL;
            }
            top = here > top ? here : top;
        }
        float absmax = qm_float_of(top);
        t->scale[r] = absmax;
        float scale = absmax > 0.0f ? (1.0f / absmax) * 127.0f : 0.0f;
        for (int64_t at = 0; at < t->block; at += QM_CHUNK) {
            int64_t n = least(QM_CHUNK, t->block - at);
            if (t->block > QM_CHUNK) {
                t->kernels->load(t->source, t->dtype, start + at, n, values);
                t->kernels->to_half(values, n);
            }
            t->kernels->codes_int8(values, n, scale, t->rows_out + start + at);
        }
    }
    return NULL;
}

/* ---- The ABI --------------------------------------------------------------------------------- */

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
    if (count <= 0) return -1;
    Task t = {.kernels = qm_kernels(), .source = source, .dtype = dtype, .count = count,
              .block = block, .bounds = bounds, .out = out, .scale = scale};
    uint8_t pair_codes[256];
    for (int i = 0; i < 256; i++) {
        pair_codes[i] = (uint8_t)(order[i >> 4] << 4 | order[i & 15]);
        if (pair_codes[i] != i) t.pair_codes = pair_codes;
    }
    float zero = 0.0f;
    t.kernels->ranks15(&zero, 1, bounds, &t.zero_rank);
    return run(t, (count + block - 1) / block, threads, work_4bit);
}

QM_API int64_t qm_quantize_codebook8(const float *source, int64_t count, int64_t block,
                                     const uint8_t *nearest, uint8_t *out, float *scale,
                                     int threads) {
    if (count <= 0) return -1;
    Task t = {.kernels = qm_kernels(), .source = source, .count = count, .block = block,
              .nearest = nearest, .out = out, .scale = scale};
    return run(t, (count + block - 1) / block, threads, work_8bit);
}

QM_API int64_t qm_quantize_rows_int8(const void *source, int dtype, int64_t rows, int64_t columns,
                                     int8_t *out, float *scale, int threads) {
    if (rows <= 0) return -1;
    Task t = {.kernels = qm_kernels(), .source = source, .dtype = dtype, .count = rows * columns,
              .block = columns, .scale = scale, .rows_out = out};
    return run(t, rows, threads, work_rows);
}
