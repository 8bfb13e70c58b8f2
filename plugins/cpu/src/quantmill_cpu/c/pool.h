/* Threads that wait for small work: a matrix-vector product takes a quarter of a millisecond, so
 * starting threads for each one would cost a good part of it. Internal: no part of the ABI. */
#ifndef QUANTMILL_POOL_H
#define QUANTMILL_POOL_H

#include <stdint.h>

#define QM_POOL_MOST 64 /* threads, the caller's included */

/* One piece of the work; `worker` is 0 (the caller) to threads - 1 and runs one piece at a time. */
typedef void (*QmWork)(void *argument, int64_t index, int worker);

/* Run pieces 0 to count - 1 (count < 2^32) on up to `threads` threads and return when all are
 * done. Pieces are taken one by one, so a thread that comes late or is held up costs little. */
void qm_parallel(QmWork work, void *argument, int64_t count, int threads);

/* The same, never with borrowed threads: those would spin for milliseconds after a job that is
 * followed by reading and allocating, not by another one. */
void qm_parallel_own(QmWork work, void *argument, int64_t count, int threads);

/* Run `work(data)` on so many threads at once and wait for all; `flags` is 0: GOMP_parallel. */
typedef void (*QmRunner)(void (*work)(void *), void *data, unsigned threads, unsigned flags);

/* Use another library's threads from now on, or the pool's own again (NULL). Part of the ABI. */
void qm_borrow_threads(QmRunner runner);

#endif
