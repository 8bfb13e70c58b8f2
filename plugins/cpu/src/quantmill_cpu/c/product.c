/* The threads of product.h; the loops are in product_tile.c. */
#include "product.h"

#include <stdlib.h>
#include <string.h>

#include "pool.h"
#include "quantize.h"

#define QM_API __attribute__((visibility("default")))

static const QmProductLevel *level(void) {
#ifdef QM_X86_LEVELS
    const char *name = qm_level();
    if (strcmp(name, "avx512") == 0) return &qm_product_avx512;
    if (strcmp(name, "avx2") == 0) return &qm_product_avx2;
#endif
    return &qm_product_baseline;
}

static void strip(void *job, int64_t index, int worker) { level()->strip(job, index, worker); }

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
    const int rows = level()->rows;
    const int64_t padded = (m + rows - 1) / rows * rows;
    /* Whole lines of the cache for each thread. */
    const int64_t size = (QM_PRODUCT_DEPTH * (padded + QM_PRODUCT_STRIP) + 15) / 16 * 16;
    float *space = aligned_alloc(64, sizeof(float) * (size_t)(size * threads));
    if (!space) return -1;
    QmProduct job = {.k = k, .m = m, .n = n, .apart = apart, .beside = beside, .a = a, .b = b,
                     .c = c, .space = space, .space_size = size};
    qm_parallel(strip, &job, strips, threads);
    free(space);
    return 0;
}
