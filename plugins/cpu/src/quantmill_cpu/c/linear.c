/* See linear.h. What takes the time is reading the weight: each thread reads long runs of it. */
#include "linear.h"

#include "matmul.h"
#include "pool.h"

#define QM_API __attribute__((visibility("default")))
#define RUN (128 << 10) /* elements of the weight that a thread takes at a time */

#ifdef QM_AVX512BF16
typedef struct {
    QmLinear job;
    int64_t each; /* rows of the weight in a run */
} Work;

static void run(void *argument, int64_t index, int worker) {
    (void)worker;
    const Work *w = argument;
    const int64_t first = index * w->each, last = first + w->each;
    qm_linear_rows(&w->job, first, last < w->job.rows ? last : w->job.rows);
}
#endif

QM_API int qm_linear(const uint16_t *weight, const uint16_t *x, const uint16_t *bias, uint16_t *y,
                     int64_t rows, int64_t columns, int64_t count, int threads) {
    if (!qm_has_dots()) return -2;
#ifdef QM_AVX512BF16
    if (count > QM_LINEAR_ROWS) return -1;
    if (rows <= 0 || count <= 0) return 0;
    Work w = {{weight, x, bias, y, rows, columns, count}, 1};
    if (threads < 1) threads = 1;
    const int64_t share = (rows + threads - 1) / threads;
    if (columns > 0 && columns < RUN) w.each = RUN / columns;
    if (w.each > share) w.each = share;
    qm_parallel(run, &w, (rows + w.each - 1) / w.each, threads);
    return 0;
#else
    (void)weight, (void)x, (void)bias, (void)y, (void)rows, (void)columns, (void)count;
    (void)threads;
    return -2;
#endif
}
