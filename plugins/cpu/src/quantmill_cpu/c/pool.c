/* See pool.h. Workers spin for a while after each job, because the next layer's comes soon, and
 * then sleep. All of a job's state is in `ticket`: its number in the high half and the next piece
 * in the low half, taken with a compare-and-swap. A worker that wakes up too late finds another
 * number or nothing left, and touches nothing.
 */
#define _POSIX_C_SOURCE 200809L /* clock_gettime */
#include "pool.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <time.h>

#define SPINS 4000 /* pauses before sleeping: some 50 to 150 microseconds */

static struct {
    pthread_mutex_t owner; /* held by the caller whose job runs */
    pthread_mutex_t lock;
    pthread_cond_t wake;
    _Atomic(QmWork) work;
    _Atomic(void *) argument;
    atomic_uint count;
    atomic_int width;
    atomic_uint_fast64_t ticket;
    atomic_uint done;
    atomic_int asleep;
    int started; /* workers that exist; written by the owner */
} pool = {.owner = PTHREAD_MUTEX_INITIALIZER,
          .lock = PTHREAD_MUTEX_INITIALIZER,
          .wake = PTHREAD_COND_INITIALIZER};

static inline void relax(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static inline uint32_t job_of(uint64_t ticket) { return (uint32_t)(ticket >> 32); }

/* Take pieces of a job until none is left. The fields are read before the swap that proves that
 * they belong to this job: its caller changes them only after every piece is done. */
static void drain(uint32_t job, int worker) {
    for (;;) {
        uint_fast64_t ticket = atomic_load_explicit(&pool.ticket, memory_order_acquire);
        QmWork work = atomic_load_explicit(&pool.work, memory_order_relaxed);
        void *argument = atomic_load_explicit(&pool.argument, memory_order_relaxed);
        unsigned count = atomic_load_explicit(&pool.count, memory_order_relaxed);
        if (job_of(ticket) != job || (uint32_t)ticket >= count) return;
        if (!atomic_compare_exchange_weak(&pool.ticket, &ticket, ticket + 1)) continue;
        work(argument, (int64_t)(uint32_t)ticket, worker);
        atomic_fetch_add(&pool.done, 1);
    }
}

static void *live(void *number) {
    int worker = (int)(intptr_t)number;
    uint32_t seen = 0;
    for (;;) {
        int spins = 0;
        while (job_of(atomic_load_explicit(&pool.ticket, memory_order_acquire)) == seen) {
            relax();
            if (++spins < SPINS) continue;
            pthread_mutex_lock(&pool.lock);
            atomic_fetch_add(&pool.asleep, 1);
            while (job_of(atomic_load(&pool.ticket)) == seen)
                pthread_cond_wait(&pool.wake, &pool.lock);
            atomic_fetch_sub(&pool.asleep, 1);
            pthread_mutex_unlock(&pool.lock);
        }
        seen = job_of(atomic_load(&pool.ticket));
        if (worker < atomic_load(&pool.width)) drain(seen, worker);
    }
    return NULL;
}

/* ---- Borrowed threads ---------------------------------------------------------------------------
 * OpenMP's threads of another library in the process: they spin between its parallel regions, and
 * would fight with ours for the processors. But where other processes want these too, OpenMP waits
 * for the last of its threads to get one, if only to see that nothing is left to do. After such a
 * wait the pool's own threads are used for a while: nobody waits for those that come late. */

#define LONG_WAIT 500000 /* nanoseconds */
#define OWN_JOBS 50

static _Atomic(QmRunner) borrowed;
static atomic_int own_jobs; /* still to run with the pool's own threads */

typedef struct {
    QmWork work;
    void *argument;
    int64_t count;
    atomic_int_fast64_t next, ended; /* `ended`: when the last piece was done */
    atomic_int workers;
} Shared;

static int64_t now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

static void share(void *data) {
    Shared *s = data;
    int worker = atomic_fetch_add(&s->workers, 1), some = 0;
    for (int64_t i; (i = atomic_fetch_add(&s->next, 1)) < s->count; some = 1)
        s->work(s->argument, i, worker);
    if (!some) return;
    int64_t at = now(), last = atomic_load(&s->ended);
    while (last < at && !atomic_compare_exchange_weak(&s->ended, &last, at)) {}
}

static void run_borrowed(QmRunner runner, QmWork work, void *argument, int64_t count, int threads) {
    Shared shared = {.work = work, .argument = argument, .count = count};
    runner(share, &shared, (unsigned)threads, 0);
    if (now() - atomic_load(&shared.ended) > LONG_WAIT) atomic_store(&own_jobs, OWN_JOBS);
}

__attribute__((visibility("default"))) void qm_borrow_threads(QmRunner runner) {
    atomic_store(&borrowed, runner);
}

/* A forked child has none of the threads, and locks in any state. */
static void forget(void) {
    atomic_store(&borrowed, (QmRunner)0);
    pthread_mutex_init(&pool.owner, NULL);
    pthread_mutex_init(&pool.lock, NULL);
    pthread_cond_init(&pool.wake, NULL);
    atomic_store(&pool.asleep, 0);
    pool.started = 0;
}

static void at_fork(void) { pthread_atfork(NULL, NULL, forget); }

static void start(int threads) {
    while (pool.started < threads - 1) {
        pthread_t thread;
        void *number = (void *)(intptr_t)(pool.started + 1);
        if (pthread_create(&thread, NULL, live, number) != 0) return; /* fewer do as well */
        pthread_detach(thread);
        pool.started++;
    }
}

static int within(int64_t count, int threads) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, at_fork);
    if (threads > QM_POOL_MOST) threads = QM_POOL_MOST;
    if (threads > count) threads = (int)count;
    return threads < 1 ? 1 : threads;
}

void qm_parallel(QmWork work, void *argument, int64_t count, int threads) {
    threads = within(count, threads);
    QmRunner runner = atomic_load_explicit(&borrowed, memory_order_relaxed);
    if (runner && threads > 1) {
        if (atomic_load_explicit(&own_jobs, memory_order_relaxed) <= 0) {
            run_borrowed(runner, work, argument, count, threads);
            return;
        }
        atomic_fetch_sub_explicit(&own_jobs, 1, memory_order_relaxed);
    }
    qm_parallel_own(work, argument, count, threads);
}

void qm_parallel_own(QmWork work, void *argument, int64_t count, int threads) {
    threads = within(count, threads);
    /* Another Python thread's job may be running: then this one needs no helpers. */
    if (threads == 1 || pthread_mutex_trylock(&pool.owner) != 0) {
        for (int64_t i = 0; i < count; i++) work(argument, i, 0);
        return;
    }
    start(threads);
    uint32_t job = job_of(atomic_load(&pool.ticket)) + 1;
    /* Until the new ticket stands, the old one says that nothing is left: see below. */
    atomic_store(&pool.work, work);
    atomic_store(&pool.argument, argument);
    atomic_store(&pool.width, threads);
    atomic_store(&pool.done, 0);
    atomic_store(&pool.count, (unsigned)count);
    atomic_store(&pool.ticket, (uint_fast64_t)job << 32);
    if (atomic_load(&pool.asleep) > 0) {
        pthread_mutex_lock(&pool.lock);
        pthread_cond_broadcast(&pool.wake);
        pthread_mutex_unlock(&pool.lock);
    }
    drain(job, 0);
    for (int spins = 0; atomic_load_explicit(&pool.done, memory_order_acquire) != (unsigned)count;) {
        relax();
        if (++spins > SPINS) sched_yield(); /* a worker lost its processor in a piece */
    }
    /* Nobody may take a piece between two jobs, whatever `count` says by then. */
    atomic_store(&pool.ticket, (uint_fast64_t)job << 32 | UINT32_MAX);
    pthread_mutex_unlock(&pool.owner);
}
