/* Decoded rows times activations, in float32. Compiled once for each instruction set (QM_LEVEL). */
#include "ggml_lanes.h"
#include "ggml_rows.h"
#include "levels.h"

QM_INLINE V load(const float *from) {
    V value;
    memcpy(&value, from, sizeof value);
    return value;
}

/* The lanes pairwise, so that the sum of many columns stays as exact as they are. */
QM_INLINE float across(V value) {
    float lanes[QM_LANES];
    memcpy(lanes, &value, sizeof value);
    for (int width = QM_LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++) lanes[i] += lanes[i + width];
    return lanes[0];
}

/* `rows` x `tokens` sums at a time; both are constants where this is inlined. */
QM_INLINE void tile(const QmRows *job, int64_t row, int64_t token, int rows, int tokens) {
    const int64_t columns = job->columns;
    const float *w = job->values + row * columns, *x = job->x + token * columns;
    V sums[QM_ROWS_TILE * QM_ROWS_TILE] = {{0}};
    for (int64_t c = 0; c < columns; c += QM_LANES) {
        V own[QM_ROWS_TILE];
        for (int r = 0; r < rows; r++) own[r] = load(w + r * columns + c);
        for (int t = 0; t < tokens; t++) {
            V input = load(x + t * columns + c);
            for (int r = 0; r < rows; r++) sums[t * rows + r] += own[r] * input;
        }
    }
    for (int t = 0; t < tokens; t++)
        for (int r = 0; r < rows; r++) {
            float more = job->bias ? job->bias[row + r] : 0.0f;
            job->out[(token + t) * job->stride + row + r] = across(sums[t * rows + r]) + more;
        }
}

/* One row and one token, with sums enough to keep the units busy. */
QM_INLINE void single(const QmRows *job, int64_t row, int64_t token) {
    const float *w = job->values + row * job->columns, *x = job->x + token * job->columns;
    V sums[4] = {{0}};
    int64_t c = 0;
    for (; c + 4 * QM_LANES <= job->columns; c += 4 * QM_LANES)
        for (int i = 0; i < 4; i++)
            sums[i] += load(w + c + i * QM_LANES) * load(x + c + i * QM_LANES);
    for (; c < job->columns; c += QM_LANES) sums[0] += load(w + c) * load(x + c);
    float more = job->bias ? job->bias[row] : 0.0f;
    job->out[token * job->stride + row] =
        across((sums[0] + sums[1]) + (sums[2] + sums[3])) + more;
}

void QM_JOIN(qm_ggml_rows_, QM_LEVEL)(const QmRows *job) {
    int64_t token = 0;
    for (; token + QM_ROWS_TILE <= job->tokens; token += QM_ROWS_TILE) {
        int64_t row = 0;
        for (; row + QM_ROWS_TILE <= job->rows; row += QM_ROWS_TILE)
            tile(job, row, token, QM_ROWS_TILE, QM_ROWS_TILE);
        for (; row < job->rows; row++) tile(job, row, token, 1, QM_ROWS_TILE);
    }
    for (; token < job->tokens; token++)
        for (int64_t row = 0; row < job->rows; row++) single(job, row, token);
}
