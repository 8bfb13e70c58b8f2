/* The loops of linear.c with AVX-512's bf16 dot products. */
#include "linear.h"

#include <immintrin.h>

#include "floats.h"

/* Bytes: one row after the other is read, which the hardware looks ahead in up to a page's end. */
#define AHEAD 4096
#define CHAINS 4 /* vectors of a row that are worked on beside each other */

QM_INLINE __m512 dot(__m512 sum, __m512i a, __m512i b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}

/* A row of the weight with all `count` rows of x. */
QM_INLINE void row_by_few(const QmLinear *job, int64_t row, int count) {
    const int64_t columns = job->columns;
    const uint16_t *weight = job->weight + row * columns, *x = job->x;
    __m512 sums[QM_LINEAR_ROWS][CHAINS];
    int64_t k = 0;
#pragma GCC unroll 4
    for (int r = 0; r < count; r++)
#pragma GCC unroll 4
        for (int c = 0; c < CHAINS; c++) sums[r][c] = _mm512_setzero_ps();
    for (; k + 32 * CHAINS <= columns; k += 32 * CHAINS) {
#pragma GCC unroll 4
        for (int c = 0; c < CHAINS; c++) {
            const __m512i left = _mm512_loadu_si512(weight + k + 32 * c);
            _mm_prefetch((const char *)(weight + k + 32 * c) + AHEAD, _MM_HINT_T0);
#pragma GCC unroll 4
            for (int r = 0; r < count; r++)
                sums[r][c] =
                    dot(sums[r][c], left, _mm512_loadu_si512(x + r * columns + k + 32 * c));
        }
    }
    for (; k < columns; k += 32) {
        const int64_t rest = columns - k;
        const __mmask32 there = rest >= 32 ? 0xffffffffu : (1u << rest) - 1;
        const __m512i left = _mm512_maskz_loadu_epi16(there, weight + k);
#pragma GCC unroll 4
        for (int r = 0; r < count; r++)
            sums[r][0] =
                dot(sums[r][0], left, _mm512_maskz_loadu_epi16(there, x + r * columns + k));
    }
    const float bias = job->bias ? qm_bfloat(job->bias[row]) : 0.0f;
#pragma GCC unroll 4
    for (int r = 0; r < count; r++) {
#pragma GCC unroll 3
        for (int c = 1; c < CHAINS; c++) sums[r][0] = _mm512_add_ps(sums[r][0], sums[r][c]);
        job->y[r * job->rows + row] = qm_to_bfloat(_mm512_reduce_add_ps(sums[r][0]) + bias);
    }
}

void qm_linear_rows(const QmLinear *job, int64_t first, int64_t last) {
#define CASE(n) \
    case n: \
        for (int64_t row = first; row < last; row++) row_by_few(job, row, n); \
        break;
    switch (job->count) { CASE(1) CASE(2) CASE(3) CASE(4) }
}
