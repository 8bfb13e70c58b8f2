/* See attention.h. Keys and values are packed once per head of theirs, then runs of queries are
 * worked on in any order: all scores of a run are there at once, so softmax needs no correction. */
#include "attention.h"

#include <stdlib.h>
#include <string.h>

#include "matmul.h"
#include "pool.h"
#include "tiles.h"

#define QM_API __attribute__((visibility("default")))
#define SIDE QM_ATTENTION_SIDE
#define ROWS QM_ATTENTION_ROWS

#ifdef QM_AVX512BF16
typedef struct {
    const QmAttention *shape;
    const uint16_t *q, *k, *v;
    uint16_t *out;
    float scale;
    int causal, tiles;
    int64_t whole;                /* keys up to whole blocks */
    int64_t key_size, value_size; /* packed, of one head */
    uint32_t *keys, *values;
    float *scores;    /* per worker */
    uint16_t *shares; /* per worker */
} Work;

static void pack(void *argument, int64_t index, int worker) {
    (void)worker;
    const Work *w = argument;
    const QmAttention *s = w->shape;
    const int64_t batch = index / s->kv_heads, head = index % s->kv_heads;
    qm_attention_pack_keys(w->k + batch * s->k.batch + head * s->k.head, s->k.row, s->keys, s->dim,
                           w->keys + index * w->key_size);
    qm_attention_pack_values(w->v + batch * s->v.batch + head * s->v.head, s->v.row, s->keys,
                             s->value_dim, w->values + index * w->value_size);
}

static void attend(void *argument, int64_t index, int worker) {
    const Work *w = argument;
    const QmAttention *s = w->shape;
    const int64_t runs = (s->queries + ROWS - 1) / ROWS;
    const int64_t head = index / runs % s->heads, batch = index / runs / s->heads;
    const int64_t packed = batch * s->kv_heads + head / (s->heads / s->kv_heads);
    const int64_t first = index % runs * ROWS;
    const int tiles = w->tiles && first + ROWS <= s->queries; /* They take whole runs. */
#ifdef QM_AMX
    if (tiles) qm_tiles_open();
#endif
    qm_attention_rows(s, w->q + batch * s->q.batch + head * s->q.head,
                      w->keys + packed * w->key_size, w->values + packed * w->value_size,
                      w->out + batch * s->out.batch + head * s->out.head, first, w->scale,
                      w->causal, tiles, w->scores + worker * ROWS * w->whole,
                      w->shares + worker * ROWS * w->whole);
#ifdef QM_AMX
    if (tiles) qm_tiles_close();
#endif
}

static int64_t blocks(int64_t count) { return (count + SIDE - 1) / SIDE; }

static int run(Work *w, int threads) {
    const QmAttention *s = w->shape;
    const int64_t heads = s->batch * s->kv_heads;
    if (threads < 1) threads = 1;
    if (threads > QM_POOL_MOST) threads = QM_POOL_MOST;
    w->whole = blocks(s->keys) * SIDE;
    w->tiles = qm_has_tiles() && s->dim % (2 * QM_TILE_PAIRS) == 0;
    w->key_size = w->whole * (s->dim / 2);
    w->value_size = blocks(s->value_dim) * SIDE * (w->whole / 2);
    w->keys = aligned_alloc(64, (size_t)(heads * w->key_size) * 4);
    w->values = aligned_alloc(64, (size_t)(heads * w->value_size) * 4);
    w->scores = aligned_alloc(64, (size_t)(threads * ROWS * w->whole) * 4);
    w->shares = aligned_alloc(64, (size_t)(threads * ROWS * w->whole) * 2);
    const int there = w->keys && w->values && w->scores && w->shares;
    if (there) {
        qm_parallel(pack, w, heads, threads);
        const int64_t runs = (s->queries + ROWS - 1) / ROWS;
        qm_parallel(attend, w, s->batch * s->heads * runs, threads);
    }
    free(w->keys), free(w->values), free(w->scores), free(w->shares);
    return there ? 0 : -1;
}
#endif

QM_API int qm_attention(const QmAttention *shape, const uint16_t *q, const uint16_t *k,
                        const uint16_t *v, uint16_t *out, float scale, int causal, int threads) {
    if (!qm_has_dots()) return -2;
#ifdef QM_AVX512BF16
    if (shape->batch <= 0 || shape->heads <= 0 || shape->queries <= 0 || shape->keys <= 0) return 0;
    Work w = {.shape = shape, .q = q, .k = k, .v = v, .out = out, .scale = scale, .causal = causal};
    return run(&w, threads);
#else
    (void)shape, (void)q, (void)k, (void)v, (void)out, (void)scale, (void)causal, (void)threads;
    return -2;
#endif
}
