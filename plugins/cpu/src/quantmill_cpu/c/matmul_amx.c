/* Matmul with AMX tiles, for more than a few rows. Sixteen decoded vectors are a tile as they are:
 * 32 columns of 16 rows of W, in the order of matmul_bf16.h.
 */
#define _GNU_SOURCE /* syscall */
#include "matmul_bf16.h"
#include "tile_amx.h"

#include <sys/syscall.h>
#include <unistd.h>

#define TILE_ROWS 16

/* Linux gives a process the tiles' registers when it asks. */
int qm_amx_allowed(void);
int qm_amx_allowed(void) {
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, TILE_DATA = 18 };
    unsigned a, b, c, d;
    __asm__("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "a"(7), "c"(0));
    if (!(d >> 22 & 1) || !(d >> 24 & 1)) return 0; /* amx-bf16, amx-tile */
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA) == 0;
}

/* Tiles 0 and 1 are the sums of 16 rows of x with two panels, 2 and 3 those of 16 more; 4 and 5
 * activations, 6 and 7 weights. `rows` is 1 to 32. */
static void configure(int64_t rows) {
    QmTileConfig config = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        int64_t second = rows > TILE_ROWS ? rows - TILE_ROWS : 1, first = qm_least(rows, TILE_ROWS);
        config.rows[i] = (uint8_t)(i >= 6 ? TILE_ROWS : i == 5 || (i & 6) == 2 ? second : first);
        config.row_bytes[i] = 64;
    }
    qm_tile_configure(&config);
}

/* Sums of a tile's rows with a panel, from memory to the totals. */
QM_INLINE void finish(const QmJob *job, const QmWorkspace *w, int64_t group, int64_t m, int64_t rows,
                      int half, const float *tile) {
    const int64_t at = group * QM_PAIR + half * QM_PANEL;
    const __m512 scale = _mm512_loadu_ps(w->scale + at), zero = _mm512_loadu_ps(w->zero + at);
    float *total = w->total + m * QM_PAIR + half * QM_PANEL;
    const float *sums = job->sums + m * job->groups + group;
    for (int64_t r = 0; r < rows; r++, total += QM_PAIR, sums += job->groups, tile += 16) {
        __m512 sum = _mm512_loadu_ps(tile);
        if (job->zeros_needed) sum = _mm512_fmadd_ps(zero, _mm512_set1_ps(*sums), sum);
        _mm512_storeu_ps(total, _mm512_fmadd_ps(sum, scale, _mm512_loadu_ps(total)));
    }
}

/* All four sums' tiles of a group. */
QM_INLINE void finish_all(const QmJob *job, const QmWorkspace *w, int64_t group, int64_t m,
                          int64_t rows, int both, const float *tiles) {
    const int64_t first = both ? TILE_ROWS : rows;
    finish(job, w, group, m, first, 0, tiles);
    finish(job, w, group, m, first, 1, tiles + 256);
    if (both) finish(job, w, group, m + TILE_ROWS, rows - TILE_ROWS, 0, tiles + 512);
    if (both) finish(job, w, group, m + TILE_ROWS, rows - TILE_ROWS, 1, tiles + 768);
}

QM_INLINE void zero_tiles(int both) {
    _tile_zero(0);
    _tile_zero(1);
    if (both) _tile_zero(2);
    if (both) _tile_zero(3);
}

QM_INLINE void store_tiles(float *tiles, int both) {
    _tile_stored(0, tiles, 64);
    _tile_stored(1, tiles + 256, 64);
    if (both) _tile_stored(2, tiles + 512, 64);
    if (both) _tile_stored(3, tiles + 768, 64);
}

/* 32 columns: decoded vectors of two panels, alternating, and a tile's activations from `x` on,
 * those of the second one from `x2` on. */
QM_INLINE void multiply(const uint8_t *decoded, const uint16_t *x, const uint16_t *x2,
                        int64_t row_bytes, int both) {
    _tile_loadd(4, x, (int)row_bytes);
    _tile_loadd(6, decoded, 128);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, decoded + 64, 128);
    _tile_dpbf16ps(1, 4, 7);
    if (!both) return;
    _tile_loadd(5, x2, (int)row_bytes);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
}

/* The rows that stand for some of x. */
QM_INLINE int64_t real_rows(const QmJob *job) { return job->batch * job->split; }

/* ---- Up to 32 rows: one chunk is decoded while the one before is multiplied ---------------------- */

QM_INLINE void decode_chunk(const uint8_t *chunk, int bits, int numbers, const QmTable *t,
                            uint8_t *out) {
    qm_prefetch(chunk, bits);
#pragma GCC unroll 8
    for (int j = 0; j < 8; j++) {
        QmPair pair = qm_decode(chunk, j, bits, numbers, t);
        _mm512_storeu_si512(out + 256 * j, pair.even);
        _mm512_storeu_si512(out + 256 * j + 128, pair.odd);
    }
}

/* A pair of panels where groups are whole chunks. The sums' tiles of a group are written to memory,
 * and read again when the next group is through: what was just written is slow to read. */
QM_INLINE void stream(const QmJob *job, int64_t pair, const uint8_t *const codes[2],
                      const QmWorkspace *w, int bits, int numbers, int both) {
    const QmTable t = qm_table(job);
    const uint16_t *x = job->act, *x2 = x + TILE_ROWS * job->stride;
    const int64_t rows = real_rows(job);
    const int64_t chunks = job->units / 2, each = (job->group_units + 1) / 2;
    uint8_t *decoded = w->decoded; /* two chunks of two panels */
    float *tiles[2] = {w->tiles, w->tiles + 1024};
    for (int half = 0; half < 2; half++) decode_chunk(codes[half], bits, numbers, &t, decoded + 64 * half);
    const QmAhead next[2] = {qm_ahead(job, pair * 2 + 2), qm_ahead(job, pair * 2 + 3)};
    for (int64_t g = 0, c = 0; g < job->groups; g++) {
        for (int half = 0; half < 2; half++) qm_fetch_ahead(&next[half], g);
        const int64_t end = qm_least(c + each, chunks);
        zero_tiles(both);
        for (; c < end; c++) {
            if (c + 1 < chunks)
                for (int half = 0; half < 2; half++)
                    decode_chunk(codes[half] + (c + 1) * 64 * bits, bits, numbers, &t,
                                 decoded + ((c + 1) & 1) * 2048 + 64 * half);
            multiply(decoded + (c & 1) * 2048, x + c * 512, x2 + c * 512, 64, both);
        }
        if (g > 0) finish_all(job, w, g - 1, 0, rows, both, tiles[(g - 1) & 1]);
        store_tiles(tiles[g & 1], both);
    }
    finish_all(job, w, job->groups - 1, 0, rows, both, tiles[(job->groups - 1) & 1]);
}

#define KIND(b, numbers) ((b) * 8 + (numbers))
#define STREAM(b, kind) \
    if (real_rows(job) > TILE_ROWS) stream(job, pair, codes, w, b, kind, 1); \
    else stream(job, pair, codes, w, b, kind, 0); \
    break;
#define KINDS(b) \
    case KIND(b, QM_CODE): STREAM(b, QM_CODE) \
    case KIND(b, QM_LOOKUP): STREAM(b, QM_LOOKUP)

static void stream_pair(const QmJob *job, int64_t pair, const QmWorkspace *w) {
    const uint8_t *codes[2];
    for (int half = 0; half < 2; half++) {
        int64_t panel = qm_least(pair * 2 + half, job->panels - 1);
        codes[half] = job->codes + panel * job->panel_bytes;
        qm_panel_values(job, panel, w, half * QM_PANEL);
    }
    memset(w->total, 0, (size_t)job->act_rows * QM_PAIR * 4);
    switch (KIND(job->bits, job->numbers)) {
        KINDS(1) KINDS(2) KINDS(3) KINDS(4) KINDS(5) KINDS(6)
    case KIND(8, QM_LOOKUP): STREAM(8, QM_LOOKUP)
    case KIND(8, QM_MIRROR): STREAM(8, QM_MIRROR)
    }
    qm_add_sums(job, w, 0);
    for (int half = 0; half < 2; half++)
        qm_store(job, (pair * 2 + half) * QM_PANEL, w->total + half * QM_PANEL);
}

/* ---- More rows: a run of columns is decoded for all ---------------------------------------------- */

/* Four sums' tiles as rows of two panels. */
QM_INLINE void untile(float *part, int64_t rows, int both) {
    float tiles[1024];
    memcpy(tiles, part, both ? 4096 : 2048);
    for (int64_t r = 0; r < rows; r++)
        for (int half = 0; half < 2; half++)
            memcpy(part + r * QM_PAIR + half * QM_PANEL,
                   tiles + r / 16 * 512 + half * 256 + r % 16 * 16, 64);
}

/* Up to 32 rows. Within a group the sums wait in `part` between runs of columns. */
QM_INLINE void block(const QmJob *job, const QmStep *step, int64_t m, int64_t rows, int both) {
    const QmWorkspace *w = step->w;
    const uint16_t *x = qm_bf16_at(job, m, step->unit * QM_UNIT);
    const int64_t row = job->tiled ? 32 : job->stride, next = job->tiled ? 512 : 32;
    float *part = w->part + m * QM_PAIR;
    if (step->first) {
        zero_tiles(both);
    } else {
        _tile_loadd(0, part, 64);
        _tile_loadd(1, part + 256, 64);
        if (both) _tile_loadd(2, part + 512, 64);
        if (both) _tile_loadd(3, part + 768, 64);
    }
    for (int64_t c = 0; c < (step->count + 1) / 2; c++)
        multiply((const uint8_t *)w->decoded + c * 2048, x + c * next,
                 x + TILE_ROWS * job->stride + c * next, row * 2, both);
    store_tiles(part, both);
    if (step->last && job->scaled) untile(part, rows, both);
    else if (step->last)
        finish_all(job, w, step->group, m, rows, both, part);
}

static void qm_block(const QmJob *job, const QmStep *step) {
    /* A tile takes 32 columns: half of the last one may lie beyond the group. */
    if (step->count % 2) memset((char *)step->w->decoded + step->count * 1024, 0, 1024);
    /* Beyond 32 rows one configuration, of full tiles, does for all. */
    const int64_t all = job->act_rows > 2 * TILE_ROWS ? job->act_rows : real_rows(job);
    for (int64_t m = 0; m < all; m += 2 * TILE_ROWS) {
        int64_t rows = qm_least(all - m, 2 * TILE_ROWS);
        if (rows > TILE_ROWS) block(job, step, m, rows, 1);
        else block(job, step, m, rows, 0);
    }
}

static void settle(QmJob *job) {
    /* Small groups' sums are many; those of few rows are still quicker than scaling. */
    qm_bf16_settle(job, job->group_units == 1 ? QM_FEW - 1 : job->group_units == 2 ? 16 : QM_MANY);
    job->tiled = job->scaled || job->group_units % 2 == 0 || job->groups == 1;
}

static void run(const QmJob *job, int64_t pair, char *workspace) {
    QmWorkspace w;
    qm_workspace(job, workspace, &w);
    configure(qm_least(job->act_rows > 2 * TILE_ROWS ? job->act_rows : real_rows(job),
                       2 * TILE_ROWS));
    if (job->scaled) qm_run_scaled(job, pair, &w);
    else if (job->act_rows <= 2 * TILE_ROWS && job->tiled) stream_pair(job, pair, &w);
    else qm_run_pair(job, pair, &w, 0);
    _tile_release();
}

const QmWay qm_bf16_amx = {2, settle, qm_bf16_split, TILE_ROWS, qm_bf16_load, run, NULL};
