/* The threads of columns.h; the loops are in columns_tile.c. */
#include "columns.h"

#include "levels.h"
#include "pool.h"

#define QM_API __attribute__((visibility("default")))

static const QmColumnsLevel *level(void) { return QM_IN_USE(qm_columns); }

static void compensate_tile(void *job, int64_t index, int worker) {
    (void)worker;
    level()->compensate(job, index * QM_TILE_ROWS);
}

static void descend_tile(void *job, int64_t index, int worker) {
    (void)worker;
    level()->descend(job, index * QM_TILE_ROWS);
}

static int run(QmWork work, QmColumns *job, int threads) {
    if (job->n > QM_PANEL_COLUMNS) return -1;
    qm_parallel(work, job, (job->rows + QM_TILE_ROWS - 1) / QM_TILE_ROWS, threads);
    return 0;
}

QM_API int qm_compensate(int64_t n, int64_t rows, int top, int symmetric, float exponent,
                         const int32_t *groups, const int32_t *spans, float *scales, float *zeros,
                         const float *local, float *panel, uint8_t *codes, int threads) {
    QmColumns job = {.n = n, .rows = rows, .top = (float)top, .symmetric = symmetric,
                     .exponent = exponent, .groups = groups, .spans = spans, .scales = scales,
                     .zeros = zeros, .local = local, .panel = panel, .codes = codes};
    return run(compensate_tile, &job, threads);
}

QM_API int qm_descend(int64_t n, int64_t rows, int top, const int32_t *groups,
                      const int32_t *spans, float *scales, const float *zeros, const float *local,
                      float *panel, float *steps, int threads) {
    QmColumns job = {.n = n, .rows = rows, .top = (float)top, .groups = groups, .spans = spans,
                     .scales = scales, .zeros = (float *)zeros, .local = local, .panel = panel,
                     .steps = steps};
    return run(descend_tile, &job, threads);
}
