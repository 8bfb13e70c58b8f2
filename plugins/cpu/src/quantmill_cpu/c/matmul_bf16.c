/* Matmul with AVX-512's bf16 dot products. See matmul_bf16.h. */
#include "matmul_bf16.h"

/* `rows` rows of activations against both panels. */
QM_INLINE void product(const QmJob *job, const QmStep *step, int64_t m, int rows) {
    enum { MOST = 8 };
    const QmWorkspace *w = step->w;
    const uint16_t *x = (const uint16_t *)job->act + m * job->stride + step->unit * QM_UNIT;
    const uint8_t *decoded = w->decoded;
    float *part = w->part + m * QM_PAIR, *total = w->total + m * QM_PAIR;
    __m512 sums[MOST][2];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
        for (int p = 0; p < 2; p++) sums[r][p] = _mm512_setzero_ps();
    if (!step->first) {
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
            for (int p = 0; p < 2; p++) sums[r][p] = _mm512_loadu_ps(part + r * QM_PAIR + 16 * p);
    }
    for (int64_t v = 0; v < step->count * 8; v++) {
        __m512i first = _mm512_loadu_si512(decoded + 128 * v);
        __m512i second = _mm512_loadu_si512(decoded + 128 * v + 64);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            __m512i both = qm_both(x + r * job->stride + 2 * v);
            sums[r][0] = qm_dot(sums[r][0], first, both);
            sums[r][1] = qm_dot(sums[r][1], second, both);
        }
    }
    const float *scale = w->scale + step->group * QM_PAIR;
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
        for (int p = 0; p < 2; p++) {
            const int done = step->last && !job->scaled;
            float *to = (done ? total : part) + r * QM_PAIR + 16 * p;
            if (done)
                sums[r][p] = _mm512_fmadd_ps(sums[r][p], _mm512_loadu_ps(scale + 16 * p),
                                             _mm512_loadu_ps(to));
            _mm512_storeu_ps(to, sums[r][p]);
        }
}

static void qm_block(const QmJob *job, const QmStep *step) {
    int64_t m = 0;
    for (; m + 8 <= job->act_rows; m += 8) product(job, step, m, 8);
    switch (job->act_rows - m) {
    case 7: product(job, step, m, 7); break;
    case 6: product(job, step, m, 6); break;
    case 5: product(job, step, m, 5); break;
    case 4: product(job, step, m, 4); break;
    case 3: product(job, step, m, 3); break;
    case 2: product(job, step, m, 2); break;
    case 1: product(job, step, m, 1); break;
    }
}

#define ROWS(b, kind, n) \
    case n: qm_few(job, panel, w, m, b, kind, n); break;
#define ALL_ROWS(b, kind) \
    switch (qm_least(job->act_rows - m, QM_FEW)) { \
        ROWS(b, kind, 1) ROWS(b, kind, 2) ROWS(b, kind, 3) ROWS(b, kind, 4) \
    }
#define CASE(b) \
    case b: \
        if (b == 8 && job->numbers == QM_MIRROR) ALL_ROWS(b, QM_MIRROR) \
        else ALL_ROWS(b, QM_LOOKUP) \
        break;

/* A pair of panels against few rows: each panel is still in the cache when the next of them come. */
static void few_pair(const QmJob *job, int64_t pair, const QmWorkspace *w) {
    for (int half = 0; half < 2 && pair * 2 + half < job->panels; half++) {
        int64_t panel = pair * 2 + half;
        qm_panel_values(job, panel, w, 0);
        for (int64_t m = 0; m < job->act_rows; m += QM_FEW) QM_EACH_WIDTH(CASE)
        qm_store(job, panel * QM_PANEL, w->total);
    }
}

static void settle(QmJob *job) {
    qm_bf16_settle(job, qm_many(job));
    job->natural = !job->scaled && job->numbers != QM_CODE &&
                   job->batch * qm_bf16_split(job->dtype) <= 2 * QM_FEW;
}

static void run(const QmJob *job, int64_t pair, char *workspace) {
    QmWorkspace w;
    qm_workspace(job, workspace, &w);
    if (job->scaled) qm_run_scaled(job, pair, &w);
    else if (job->natural) few_pair(job, pair, &w);
    else qm_run_pair(job, pair, &w, 1);
}

const QmWay qm_bf16_avx512 = {2, settle, qm_bf16_split, 1, qm_bf16_load, run, NULL};
