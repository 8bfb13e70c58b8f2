/* A pair of panels against all activations, in the steps that all levels share. A level defines
 * after it includes this file:
 *
 *     qm_decode_units(job, codes, unit, count, pair, out)   a panel's units into out, as one half
 *     qm_block(job, step)                                   decoded units times all activations
 */
#ifndef QUANTMILL_MATMUL_DRIVER_H
#define QUANTMILL_MATMUL_DRIVER_H

#include "matmul_inline.h"

/* One decoded run of columns within one group. */
typedef struct {
    int64_t unit, count; /* units of 16 columns */
    int64_t group, run; /* the run counts over all groups */
    int first, last; /* of its group */
    const QmWorkspace *w;
} QmStep;

static void qm_decode_units(const QmJob *job, const uint8_t *codes, int64_t unit, int64_t count,
                            int lane, void *out);
static void qm_block(const QmJob *job, const QmStep *step);

/* `with_zero`: qm_block leaves out what zero points add. */
QM_INLINE void qm_run_pair(const QmJob *job, int64_t pair, const QmWorkspace *w, int with_zero) {
    const uint8_t *codes[2];
    for (int half = 0; half < 2; half++) {
        int64_t panel = qm_least(pair * 2 + half, job->panels - 1);
        codes[half] = job->codes + panel * job->panel_bytes;
        qm_panel_values(job, panel, w, half * QM_PANEL);
    }
    memset(w->total, 0, (size_t)job->act_rows * QM_PAIR * 4);
    const QmAhead next[2] = {qm_ahead(job, pair * 2 + 2), qm_ahead(job, pair * 2 + 3)};
    for (int64_t g = 0; g < job->groups; g++) {
        for (int half = 0; half < 2; half++) qm_fetch_ahead(&next[half], g);
        int64_t first = g * job->group_units;
        int64_t last = qm_least(first + job->group_units, job->units);
        for (int64_t unit = first; unit < last; unit += QM_SEGMENT) {
            int64_t count = qm_least(QM_SEGMENT, last - unit);
            for (int half = 0; half < 2; half++)
                qm_decode_units(job, codes[half], unit, count, half, w->decoded);
            QmStep step = {unit, count, g, g * job->runs + (unit - first) / QM_SEGMENT,
                           unit == first, unit + count == last, w};
            qm_block(job, &step);
        }
    }
    qm_add_sums(job, w, with_zero);
    for (int half = 0; half < 2; half++)
        qm_store(job, (pair * 2 + half) * QM_PANEL, w->total + half * QM_PANEL);
}

#endif
