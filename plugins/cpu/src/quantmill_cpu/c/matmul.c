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

QM_API int qm_matmul_use_level(const char *name) {
    int found = -1;
    for (int i = 0; i <= level_here() && *name; i++)
        if (strcmp(NAMES[i], name) == 0) found = i;
    if (*name && found < 0) return -1;
    atomic_store(&asked_for, found + 1);
    return 0;
}

/* Whole numbers of one byte are the fastest where the machine has dot products of bytes; tiles for
 * many rows. Of bf16 a weight of two bytes is one product less, and small groups scaled before they
 * are multiplied need no sums of their own; but activations of another dtype become two rows. */
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
        return whole ? &qm_int8_avx512 : &qm_fp32_avx512;
#endif
#ifdef QM_AVX512BF16
    case BF16:
        if (whole && job->numbers != QM_TWO_BYTES &&
            !(job->bf16_twice && batch > qm_many(job) && job->dtype == QM_BF16))
            return &qm_int8_avx512;
        if (job->bf16_fits) return &qm_bf16_avx512;
        return whole ? &qm_int8_avx512 : &qm_fp32_avx512;
#endif
#ifdef QM_AVX512VNNI
    case VNNI: return whole ? &qm_int8_avx512 : &qm_fp32_avx512;
#endif
#ifdef QM_X86_LEVELS
    case AVX512: return &qm_fp32_avx512;
    case AVX2: return &qm_fp32_avx2;
#endif
    default: return &qm_fp32_baseline;
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

/* ---- The job ----------------------------------------------------------------------------------- */

typedef struct {
    QmJob job;
    const QmWay *way;
    int64_t pairs, rows_each;
    int threads, halvings;
} Work;

static void load_piece(void *argument, int64_t index, int worker) {
    const Work *w = argument;
    int64_t first = index * w->rows_each, last = first + w->rows_each;
    if (last > w->job.batch) last = w->job.batch;
    w->way->load(&w->job, first, last, w->job.workspace + (size_t)worker * w->job.workspace_bytes);
}

/* Pairs are taken in pieces that get smaller: for each thread one of half its share, one of a
 * quarter, and so on. Long pieces are read fast, and short ones let all threads end together. */
static int64_t first_pair(const Work *w, int64_t piece) {
    int64_t halved = piece / w->threads, turn = piece % w->threads;
    if (halved > w->halvings) return w->pairs;
    int64_t left = w->pairs >> halved;
    int64_t level = halved == w->halvings ? left : left - (w->pairs >> (halved + 1));
    return w->pairs - left + level * turn / w->threads;
}

static void run_piece(void *argument, int64_t index, int worker) {
    const Work *w = argument;
    const int64_t end = first_pair(w, index + 1);
    for (int64_t p = first_pair(w, index); p < end; p++)
        w->way->run(&w->job, p, w->job.workspace + (size_t)worker * w->job.workspace_bytes);
}

static int run_batch(Work *work, int threads) {
    QmJob *job = &work->job;
    const QmWay *way = work->way;
    job->split = way->split(job->dtype);
    const int64_t multiple = way->multiple, real = job->batch * job->split;
    job->act_rows = (real + multiple - 1) / multiple * multiple;
    job->stride = (job->units + 2) * QM_UNIT; /* a tile may begin in the last unit */
    QmWorkspace unused;
    job->workspace_bytes = qm_workspace(job, NULL, &unused);
    const size_t rows = (size_t)job->act_rows;
    size_t row = (size_t)(job->stride * way->element), sum = (size_t)job->groups * 4;
    size_t step = (size_t)(job->groups * job->runs) * 4;
    size_t act = qm_part(rows * row), sums = qm_part(rows * sum), steps = qm_part(rows * step);
    size_t bytes = act + sums + 3 * steps + (size_t)threads * job->workspace_bytes;
    char *memory = scratch_take(bytes);
    if (!memory) return -1;
    job->act = memory;
    job->sums = (float *)(void *)(memory + act);
    job->steps = (float *)(void *)(memory + act + sums);
    job->starts = (int32_t *)(void *)(memory + act + sums + steps);
    job->workspace = memory + act + sums + 3 * steps;
    work->rows_each = 65536 / (job->columns + 1) + 1;
    qm_parallel(load_piece, work, (job->batch + work->rows_each - 1) / work->rows_each, threads);
    work->pairs = (job->panels + 1) / 2;
    work->threads = threads;
    work->halvings = 0;
    int64_t smallest = work->pairs * job->panel_bytes * 2 / threads;
    for (; work->halvings < HALVINGS && smallest > 2 * PIECE; smallest /= 2) work->halvings++;
    qm_parallel(run_piece, work, (int64_t)threads * (work->halvings + 1), threads);
    scratch_give(memory, bytes);
    return 0;
}

QM_API int qm_matmul(const void *weight, const void *x, const void *bias, void *y, int dtype,
                     int64_t batch, int threads) {
    if ((uintptr_t)weight % 64) return -2;
    Work work = {0};
    QmJob *job = &work.job;
    const int size = dtype == QM_F32 ? 4 : 2;
    qm_weight_of(job, weight);
    if (job->rows == 0 || batch == 0) return 0;
    if (threads > QM_POOL_MOST) threads = QM_POOL_MOST;
    if (threads < 1 || job->rows * job->columns * batch < SMALL) threads = 1;
    job->dtype = dtype;
    job->bias = bias;
    work.way = choose_way(job, batch);
    job->batch = batch;
    work.way->settle(job);
    const int constant = job->shift / job->unit + job->base != 0.0f && !job->zero_folded;
    job->zeros_needed = !job->scaled && (constant || job->offset_kind == QM_OFFSET_ZERO);
    job->sums_needed = job->zeros_needed || (!job->scaled && (job->plus != 0.0f ||
                                             job->offset_kind == QM_OFFSET_MINIMUM));
    for (int64_t done = 0; done < batch; done += QM_BATCH) {
        job->batch = batch - done < QM_BATCH ? batch - done : QM_BATCH;
        job->x = (const uint8_t *)x + done * job->columns * size;
        job->y = (uint8_t *)y + done * job->rows * size;
        if (run_batch(&work, threads) != 0) return -1;
    }
    return 0;
}

QM_API int qm_matmul_grouped(const void *weights, int64_t each, int64_t count, const int64_t *ends,
                             const void *x, const void *bias, void *y, int dtype, int64_t batch,
                             int threads) {
    if ((uintptr_t)weights % 64 || each % 64) return -2;
    if (count == 0 || batch == 0) return 0;
    const int64_t *spec = weights;
    const int64_t size = dtype == QM_F32 ? 4 : 2;
    const int64_t in = spec[QM_SPEC_COLUMNS] * size, out = spec[QM_SPEC_ROWS] * size;
    int64_t start = 0;
    for (int64_t i = 0; i < count; i++) {
        int64_t end = ends[i] < batch ? ends[i] : batch;
        if (end <= start) continue;
        int failed = qm_matmul((const char *)weights + i * each, (const char *)x + start * in,
                               bias ? (const char *)bias + i * out : NULL, (char *)y + start * out,
                               dtype, end - start, threads);
        if (failed) return failed;
        start = end;
    }
    memset((char *)y + start * out, 0, (size_t)((batch - start) * out));
    return 0;
}
