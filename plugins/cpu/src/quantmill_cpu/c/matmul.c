/* Matmul behind the C ABI: the job, its threads, and the choice of an instruction set.
 * See matmul.h for what is computed.
 */
#include "matmul.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "matmul_job.h"
#include "pool.h"
#include "tiles.h"

#define QM_API __attribute__((visibility("default")))
#define SMALL 65536 /* products: below, waking another thread costs more than it saves */
#define PIECE 32768 /* bytes of codes in the smallest pieces: memory is read best in order */
#define HALVINGS 4

/* ---- Levels ------------------------------------------------------------------------------------ */

/* Each level needs those before. */
enum { BASELINE, AVX2, AVX512, VNNI, BF16, AMX };
static const char *const NAMES[] = {"baseline", "avx2", "avx512", "avx512vnni", "avx512bf16", "amx"};

int qm_amx_allowed(void); /* matmul_amx.c */

static int best_level(void) {
#ifdef QM_X86_LEVELS
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return BASELINE;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl"))
        return AVX2;
#ifdef QM_AVX512VNNI
    if (!__builtin_cpu_supports("avx512vnni") || !__builtin_cpu_supports("avx512vbmi"))
        return AVX512;
#ifdef QM_AVX512BF16
    if (!__builtin_cpu_supports("avx512bf16")) return VNNI;
#ifdef QM_AMX
    if (qm_amx_allowed()) return AMX;
#endif
    return BF16;
#endif
    return VNNI;
#endif
    return AVX512;
#endif
    return BASELINE;
}

static int level_here(void) {
    static atomic_int known; /* one more than the level */
    int level = atomic_load_explicit(&known, memory_order_relaxed);
    if (level == 0) atomic_store(&known, level = best_level() + 1);
    return level - 1;
}

static atomic_int asked_for; /* one more than the level, or 0 */

static int level_used(void) {
    int asked = atomic_load_explicit(&asked_for, memory_order_relaxed), here = level_here();
    if (asked) return asked - 1;
    const char *most = qm_level();
    if (strcmp(most, "baseline") == 0) return BASELINE;
    return strcmp(most, "avx2") == 0 && here > AVX2 ? AVX2 : here;
}

QM_API const char *qm_matmul_levels(void) {
    static const char *const ALL[] = {"baseline",
                                      "baseline avx2",
                                      "baseline avx2 avx512",
                                      "baseline avx2 avx512 avx512vnni",
                                      "baseline avx2 avx512 avx512vnni avx512bf16",
                                      "baseline avx2 avx512 avx512vnni avx512bf16 amx"};
    return ALL[level_here()];
}

QM_API const char *qm_matmul_level(void) { return NAMES[level_used()]; }

int qm_has_dots(void) { return level_used() >= BF16; }

int qm_has_tiles(void) { return level_used() >= AMX; }

QM_API int qm_matmul_use_level(const char *name) {
    int found = -1;
    for (int i = 0; i <= level_here() && *name; i++)
        if (strcmp(NAMES[i], name) == 0) found = i;
    if (*name && found < 0) return -1;
    atomic_store(&asked_for, found + 1);
    return 0;
}

/* The one that computes in float32. */
static const QmWay *float_way(int level) {
#ifdef QM_X86_LEVELS
    if (level >= AVX512) return &qm_fp32_avx512;
    if (level == AVX2) return &qm_fp32_avx2;
#endif
    (void)level;
    return &qm_fp32_baseline;
}

/* Whole numbers of one byte are the fastest for few rows, where the machine has dot products of
 * bytes; tiles for many rows. In bf16 a weight of one byte or two is one product, as fast as the two
 * of bytes or faster, and exact in activations of bf16; those of another dtype become two rows. */
static const QmWay *choose_way(const QmJob *job, int64_t batch) {
    const int best = level_used();
    /* Who computes in float32 wants its precision, which products of 16 bits don't have. */
    const int level = job->dtype == QM_F32 && best > AVX512 ? AVX512 : best;
    const int whole = job->numbers != QM_LOOKUP && job->numbers != QM_MIRROR;
    (void)whole; /* where only the baseline is compiled */
    (void)batch;
    switch (level) {
#ifdef QM_AMX
    case AMX:
        /* Codes of 8 bits are used as they are, or cost most to decode to bf16. */
        if (batch > (whole && job->bits == 8 ? QM_FEW : 2) && job->bf16_fits) return &qm_bf16_amx;
        if (!whole && job->bf16_fits) return &qm_bf16_avx512;
        return whole ? &qm_int8_avx512 : float_way(level);
#endif
#ifdef QM_AVX512BF16
    case BF16:
        if (whole && job->numbers != QM_TWO_BYTES &&
            !(job->bf16_fits && batch > 2 * QM_FEW && job->dtype == QM_BF16))
            return &qm_int8_avx512;
        if (job->bf16_fits) return &qm_bf16_avx512;
        return whole ? &qm_int8_avx512 : float_way(level);
#endif
#ifdef QM_AVX512VNNI
    case VNNI: return whole ? &qm_int8_avx512 : float_way(level);
#endif
    default: return float_way(level);
    }
}

/* ---- Memory ------------------------------------------------------------------------------------
 * A call's scratch memory is kept for the thread's next call, for giving it back and getting it
 * again would mean a page fault for every 4 KiB. */

#define KEEP (16 << 20)

typedef struct {
    char *memory;
    size_t bytes;
} Scratch;

static pthread_key_t scratch_key;
static int scratch_kept;

static void scratch_free(void *kept) {
    free(((Scratch *)kept)->memory);
    free(kept);
}

static void scratch_make_key(void) {
    scratch_kept = pthread_key_create(&scratch_key, scratch_free) == 0;
}

static char *scratch_take(size_t bytes) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, scratch_make_key);
    size_t whole = (bytes + 4095) / 4096 * 4096;
    if (bytes > KEEP || !scratch_kept) return aligned_alloc(4096, whole);
    Scratch *kept = pthread_getspecific(scratch_key);
    if (!kept) {
        kept = calloc(1, sizeof *kept);
        if (!kept || pthread_setspecific(scratch_key, kept) != 0) {
            free(kept);
            return NULL;
        }
    }
    if (kept->bytes < bytes) {
        free(kept->memory);
        kept->memory = aligned_alloc(4096, whole);
        kept->bytes = kept->memory ? whole : 0;
    }
    return kept->memory;
}

static void scratch_give(char *memory, size_t bytes) {
    if (bytes > KEEP || !scratch_kept) free(memory);
}

/* ---- Jobs --------------------------------------------------------------------------------------
 * Up to QM_BATCH rows of x against one weight are a job. Those of many weights run beside each
 * other: threads wait for each other once for all, and not at the end of each. */

#define JOBS 64
#define TOGETHER (8 << 20) /* bytes of activations beyond which no more jobs are taken in */

typedef struct {
    QmJob job;
    const QmWay *way;
    char *act;
    size_t act_bytes, sum_bytes, step_bytes; /* of all rows */
} Work;

typedef struct {
    Work *works;
    int64_t count, pairs, loads; /* pairs of panels in a job; pieces of its rows */
    int64_t rows_each;
    int threads, halvings;
    char *workspace;
    size_t workspace_bytes; /* of each worker, for any of the jobs */
} All;

static void load_piece(void *argument, int64_t index, int worker) {
    const All *all = argument;
    const Work *w = &all->works[index / all->loads];
    const int64_t first = index % all->loads * all->rows_each;
    int64_t last = first + all->rows_each;
    if (last > w->job.batch) last = w->job.batch;
    if (first < last)
        w->way->load(&w->job, first, last, all->workspace + (size_t)worker * all->workspace_bytes);
}

/* Pairs are taken in pieces that get smaller: for each thread one of half its share, one of a
 * quarter, and so on. Long pieces are read fast, and short ones let all threads end together. */
static int64_t first_pair(const All *all, int64_t piece) {
    const int64_t pairs = all->pairs * all->count;
    int64_t halved = piece / all->threads, turn = piece % all->threads;
    if (halved > all->halvings) return pairs;
    int64_t left = pairs >> halved;
    int64_t level = halved == all->halvings ? left : left - (pairs >> (halved + 1));
    return pairs - left + level * turn / all->threads;
}

static void run_piece(void *argument, int64_t index, int worker) {
    const All *all = argument;
    const int64_t end = first_pair(all, index + 1);
    for (int64_t p = first_pair(all, index); p < end; p++) {
        const Work *w = &all->works[p / all->pairs];
        w->way->run(&w->job, p % all->pairs,
                    all->workspace + (size_t)worker * all->workspace_bytes);
    }
}

/* A job of at most QM_BATCH rows of a weight. Where its activations will be is not known yet. */
static void prepare(Work *work, const void *weight, const void *x, const void *bias, void *y,
                    int dtype, int64_t rows, int64_t batch) {
    QmJob *job = &work->job;
    *work = (Work){0};
    qm_weight_of(job, weight);
    job->dtype = dtype;
    job->x = x;
    job->bias = bias;
    job->y = y;
    /* How it is computed depends on all rows of the call, not only on its own. */
    work->way = choose_way(job, rows);
    job->batch = rows;
    work->way->settle(job);
    job->batch = batch;
    const int constant = job->shift / job->unit + job->base != 0.0f && !job->zero_folded;
    job->zeros_needed = !job->scaled && (constant || job->offset_kind == QM_OFFSET_ZERO);
    job->sums_needed = job->zeros_needed || (!job->scaled && (job->plus != 0.0f ||
                                             job->offset_kind == QM_OFFSET_MINIMUM));
    job->split = work->way->split(dtype);
    const int64_t multiple = work->way->multiple, real = batch * job->split;
    job->act_rows = (real + multiple - 1) / multiple * multiple;
    job->stride = (job->units + 2) * QM_UNIT; /* a tile may begin in the last unit */
    const size_t each = (size_t)job->act_rows;
    work->act_bytes = qm_part(each * (size_t)(job->stride * work->way->element));
    work->sum_bytes = qm_part(each * (size_t)job->groups * 4);
    work->step_bytes = qm_part(each * (size_t)(job->groups * job->runs) * 4);
}

static size_t bytes_of(const Work *w) { return w->act_bytes + w->sum_bytes + 3 * w->step_bytes; }

/* Of so many threads at most, those that are worth waking for so many products. */
static int threads_for(int64_t products, int most) {
    if (most < 1 || products < SMALL) return 1;
    return most > QM_POOL_MOST ? QM_POOL_MOST : most;
}

/* Jobs with weights of one shape. */
static int run_all(Work *works, int64_t count, int threads) {
    const QmJob *first = &works[0].job;
    All all = {.works = works, .count = count, .threads = threads};
    size_t bytes = 0;
    int64_t most = 0, rows = 0;
    for (int64_t i = 0; i < count; i++) {
        QmWorkspace unused;
        const size_t own = qm_workspace(&works[i].job, NULL, &unused);
        if (own > all.workspace_bytes) all.workspace_bytes = own;
        if (works[i].job.batch > most) most = works[i].job.batch;
        rows += works[i].job.batch;
        bytes += bytes_of(&works[i]);
    }
    all.threads = threads = threads_for(first->rows * first->columns * rows, threads);
    bytes += (size_t)threads * all.workspace_bytes;
    char *memory = scratch_take(bytes), *at = memory;
    if (!memory) return -1;
    for (int64_t i = 0; i < count; i++) {
        Work *w = &works[i];
        w->job.act = at;
        w->job.sums = (float *)(void *)(at + w->act_bytes);
        w->job.steps = (float *)(void *)(at + w->act_bytes + w->sum_bytes);
        w->job.starts = (int32_t *)(void *)(at + w->act_bytes + w->sum_bytes + w->step_bytes);
        at += bytes_of(w);
    }
    all.workspace = at;
    all.rows_each = 65536 / (first->columns + 1) + 1;
    all.loads = (most + all.rows_each - 1) / all.rows_each;
    qm_parallel(load_piece, &all, count * all.loads, threads);
    all.pairs = (first->panels + 1) / 2;
    int64_t smallest = count * all.pairs * first->panel_bytes * 2 / threads;
    for (; all.halvings < HALVINGS && smallest > 2 * PIECE; smallest /= 2) all.halvings++;
    qm_parallel(run_piece, &all, (int64_t)threads * (all.halvings + 1), threads);
    scratch_give(memory, bytes);
    return 0;
}

QM_API int qm_matmul(const void *weight, const void *x, const void *bias, void *y, int dtype,
                     int64_t batch, int threads) {
    const int64_t end = batch;
    const int64_t *spec = weight;
    if ((uintptr_t)weight % 64) return -2;
    if (batch == 0 || spec[QM_SPEC_ROWS] == 0) return 0;
    return qm_matmul_grouped(weight, 0, 1, &end, x, bias, y, dtype, batch, threads);
}

QM_API int qm_matmul_grouped(const void *weights, int64_t each, int64_t count, const int64_t *ends,
                             const void *x, const void *bias, void *y, int dtype, int64_t batch,
                             int threads) {
    if ((uintptr_t)weights % 64 || each % 64) return -2;
    if (count == 0 || batch == 0) return 0;
    const int64_t *spec = weights;
    const int64_t size = dtype == QM_F32 ? 4 : 2;
    const int64_t in = spec[QM_SPEC_COLUMNS] * size, out = spec[QM_SPEC_ROWS] * size;
    Work works[JOBS];
    int64_t start = 0, made = 0;
    size_t bytes = 0;
    for (int64_t i = 0; i < count; i++) {
        const int64_t end = ends[i] < batch ? ends[i] : batch, rows = end - start;
        for (; start < end; ) {
            const int64_t some = end - start < QM_BATCH ? end - start : QM_BATCH;
            prepare(&works[made], (const char *)weights + i * each, (const char *)x + start * in,
                    bias ? (const char *)bias + i * out : NULL, (char *)y + start * out, dtype,
                    rows, some);
            start += some;
            bytes += bytes_of(&works[made++]);
            if (made < JOBS && bytes < TOGETHER) continue;
            if (run_all(works, made, threads) != 0) return -1;
            made = 0;
            bytes = 0;
        }
    }
    if (made && run_all(works, made, threads) != 0) return -1;
    memset((char *)y + start * out, 0, (size_t)((batch - start) * out));
    return 0;
}

/* ---- Weights as floats ------------------------------------------------------------------------- */

static void expand_pair(void *argument, int64_t pair, int worker) {
    const All *all = argument;
    all->works->way->expand(&all->works->job, pair,
                            all->workspace + (size_t)worker * all->workspace_bytes);
}

QM_API int qm_dequantize(const void *weight, void *out, int dtype, int threads) {
    if ((uintptr_t)weight % 64) return -2;
    Work work = {.way = float_way(level_used())};
    QmJob *job = &work.job;
    qm_weight_of(job, weight);
    job->dtype = dtype;
    job->y = out;
    work.way->settle(job);
    job->zeros_needed = 1;
    QmWorkspace unused;
    All all = {.works = &work, .workspace_bytes = qm_workspace(job, NULL, &unused)};
    threads = threads_for(job->rows * job->columns, threads);
    const size_t bytes = (size_t)threads * all.workspace_bytes;
    all.workspace = scratch_take(bytes);
    if (!all.workspace) return -1;
    qm_parallel(expand_pair, &all, (job->panels + 1) / 2, threads);
    scratch_give(all.workspace, bytes);
    return 0;
}
