/* The threads of product.h; the loops are in product_tile.c. */
#include "product.h"

#include <stdlib.h>
#include <string.h>

#include "levels.h"
#include "pool.h"

#define QM_API __attribute__((visibility("default")))

static void strip(void *argument, int64_t index, int worker) {
    const QmProduct *job = argument;
    job->level->strip(job, index, worker);
}

QM_API int qm_product(int64_t k, int64_t m, int64_t n, const float *a, int64_t apart,
                      int64_t beside, const float *b, float *c, int threads) {
    if (m == 0 || n == 0) return 0;
    if (k == 0) {
        memset(c, 0, sizeof(float) * (size_t)(m * n));
        return 0;
    }
    if (threads < 1) threads = 1;
    if (threads > QM_POOL_MOST) threads = QM_POOL_MOST;
    const int64_t strips = (n + QM_PRODUCT_STRIP - 1) / QM_PRODUCT_STRIP;
    if (threads > strips) threads = (int)strips;
    /* The same one to the end: the space is for its tiles. */
    const QmProductLevel *level = QM_IN_USE(qm_product);
    const int64_t padded = (m + level->rows - 1) / level->rows * level->rows;
    /* Whole lines of the cache for each thread. */
    const int64_t size = (QM_PRODUCT_DEPTH * (padded + QM_PRODUCT_STRIP) + 15) / 16 * 16;
    float *space = aligned_alloc(64, sizeof(float) * (size_t)(size * threads));
    if (!space) return -1;
    QmProduct job = {.level = level, .k = k, .m = m, .n = n, .apart = apart, .beside = beside,
                     .a = a, .b = b, .c = c, .space = space, .space_size = size};
    qm_parallel(strip, &job, strips, threads);
    free(space);
    return 0;
}
