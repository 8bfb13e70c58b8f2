/* See moments.h. Tokens are taken in runs whose packed columns fit the last-level cache. */
#include "moments.h"

#include <stdlib.h>

#include "matmul.h"
#include "pool.h"

#define QM_API __attribute__((visibility("default")))
#define SIDE QM_MOMENTS_SIDE
#define RUN 2048 /* tokens */

typedef struct {
    const uint16_t *x;
    int64_t tokens, columns, blocks;
    uint32_t *packed;
    float *total;
} Work;

#ifdef QM_AVX512BF16
static int64_t width_of(const Work *w, int64_t block) {
    int64_t left = w->columns - block * SIDE;
    return left < SIDE ? left : SIDE;
}

static uint32_t *packed_of(const Work *w, int64_t block) {
    return w->packed + block * ((w->tokens + 1) / 2) * SIDE;
}

static void pack(void *argument, int64_t block, int worker) {
    (void)worker;
    const Work *w = argument;
    qm_moments_pack(w->x, w->tokens, w->columns, block, packed_of(w, block));
}

/* Blocks of the upper triangle are counted row by row. */
static void multiply(void *argument, int64_t index, int worker) {
    (void)worker;
    const Work *w = argument;
    int64_t row = 0;
    while (index >= w->blocks - row) index -= w->blocks - row++;
    const int64_t column = row + index;
    qm_moments_block(packed_of(w, row), packed_of(w, column), (w->tokens + 1) / 2,
                     w->total + row * SIDE * w->columns + column * SIDE, w->columns,
                     width_of(w, row), width_of(w, column));
}
#endif

QM_API int qm_moments(const uint16_t *x, int64_t tokens, int64_t columns, float *total,
                      int threads) {
    if (!qm_has_dots()) return -2;
#ifdef QM_AVX512BF16
    if (tokens <= 0 || columns <= 0) return 0;
    Work w = {.x = x, .columns = columns, .blocks = (columns + SIDE - 1) / SIDE, .total = total};
    const int64_t longest = tokens < RUN ? tokens : RUN;
    w.packed = aligned_alloc(64, (size_t)(w.blocks * ((longest + 1) / 2) * SIDE) * 4);
    if (!w.packed) return -1;
    for (int64_t done = 0; done < tokens; done += RUN) {
        w.x = x + done * columns;
        w.tokens = tokens - done < RUN ? tokens - done : RUN;
        qm_parallel(pack, &w, w.blocks, threads);
        qm_parallel(multiply, &w, w.blocks * (w.blocks + 1) / 2, threads);
    }
    free(w.packed);
    return 0;
#else
    (void)x, (void)tokens, (void)columns, (void)total, (void)threads;
    return -2;
#endif
}
