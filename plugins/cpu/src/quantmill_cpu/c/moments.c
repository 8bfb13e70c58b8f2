/* See moments.h. Tokens are taken in runs whose packed columns fit the last-level cache. */
#include "moments.h"

#include <stdlib.h>
#include <string.h>

#include "matmul.h"
#include "pool.h"
#include "tiles.h"

#define QM_API __attribute__((visibility("default")))
#define SIDE QM_MOMENTS_SIDE
#define RUN 2048 /* tokens */
#define TILES_RUN 1024 /* tiles are so quick that they wait for what is farther away */

typedef struct {
    const uint16_t *x;
    int64_t tokens, columns, blocks;
    int64_t pairs; /* of tokens, with the padding */
    uint32_t *packed;
    uint32_t *turned; /* with tiles: the same as rows */
    float *total;
} Work;

#ifdef QM_AVX512BF16
static int64_t width_of(const Work *w, int64_t block) {
    int64_t left = w->columns - block * SIDE;
    return left < SIDE ? left : SIDE;
}

static uint32_t *packed_of(const Work *w, int64_t block) {
    return w->packed + block * w->pairs * SIDE;
}

static int64_t pairs_of(int64_t tokens, int64_t step) {
    return ((tokens + 1) / 2 + step - 1) / step * step;
}

#ifdef QM_AMX
/* Pairs of a few tokens at a time, so that they are split while they are in the nearest cache. */
static void pack_tiles(const Work *w, int64_t block) {
    uint32_t pairs[QM_TILE_PAIRS * SIDE] __attribute__((aligned(64)));
    for (int64_t p = 0; p < w->pairs; p += QM_TILE_PAIRS) {
        const int64_t left = w->tokens - 2 * p, tokens = left < 32 ? left : 32;
        if (tokens < 32) memset(pairs, 0, sizeof pairs);
        qm_moments_pack(w->x + 2 * p * w->columns, tokens, w->columns, block, pairs);
        qm_tiles_split(pairs, p, w->pairs, packed_of(w, block),
                       w->turned + block * w->pairs * SIDE);
    }
}
#endif

static void pack(void *argument, int64_t block, int worker) {
    (void)worker;
    const Work *w = argument;
#ifdef QM_AMX
    if (w->turned) {
        pack_tiles(w, block);
        return;
    }
#endif
    qm_moments_pack(w->x, w->tokens, w->columns, block, packed_of(w, block));
}

#ifdef QM_AMX
static void multiply_tiles(const Work *w, int64_t row, int64_t column) {
    float sums[SIDE * SIDE] __attribute__((aligned(64)));
    qm_tiles_open();
    qm_tiles_square(w->turned + row * w->pairs * SIDE, packed_of(w, column), w->pairs, sums);
    qm_tiles_close();
    float *to = w->total + row * SIDE * w->columns + column * SIDE;
    const int64_t rows = width_of(w, row), columns = width_of(w, column);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < columns; c++) to[r * w->columns + c] += sums[r * SIDE + c];
}
#endif

/* Blocks of the upper triangle are counted row by row. */
static void multiply(void *argument, int64_t index, int worker) {
    (void)worker;
    const Work *w = argument;
    int64_t row = 0;
    while (index >= w->blocks - row) index -= w->blocks - row++;
    const int64_t column = row + index;
#ifdef QM_AMX
    if (w->turned) {
        multiply_tiles(w, row, column);
        return;
    }
#endif
    qm_moments_block(packed_of(w, row), packed_of(w, column), w->pairs,
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
    const int tiles = qm_has_tiles();
    const int64_t most = tiles ? TILES_RUN : RUN, longest = tokens < most ? tokens : most;
    const int64_t step = tiles ? QM_TILE_PAIRS : 1;
    const int64_t size = w.blocks * pairs_of(longest, step) * SIDE;
    w.packed = aligned_alloc(64, (size_t)(tiles ? 2 * size : size) * 4);
    if (!w.packed) return -1;
    w.turned = tiles ? w.packed + size : NULL;
    for (int64_t done = 0; done < tokens; done += most) {
        w.x = x + done * columns;
        w.tokens = tokens - done < most ? tokens - done : most;
        w.pairs = pairs_of(w.tokens, step);
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
