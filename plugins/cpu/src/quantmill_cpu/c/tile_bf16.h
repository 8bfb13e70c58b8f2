/* Products of four rows with 64 columns, bf16 in pairs: what moments and attention are made of. */
#ifndef QUANTMILL_TILE_BF16_H
#define QUANTMILL_TILE_BF16_H

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

/* sums[r][c] = the four rows' pairs, `step` bytes apart, times columns packed as [pairs, 64]. Sixteen
 * sums hide a product's latency. */
static inline __attribute__((always_inline)) void qm_tile_rows(const void *const rows[4],
                                                               int64_t step,
                                                               const uint32_t *columns,
                                                               int64_t pairs, __m512 sums[4][4]) {
    for (int r = 0; r < 4; r++)
        for (int c = 0; c < 4; c++) sums[r][c] = _mm512_setzero_ps();
    for (int64_t p = 0; p < pairs; p++, columns += 64) {
        __m512bh right[4];
#pragma GCC unroll 4
        for (int c = 0; c < 4; c++) right[c] = (__m512bh)_mm512_loadu_si512(columns + 16 * c);
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++) {
            int pair;
            memcpy(&pair, (const char *)rows[r] + step * p, 4);
            const __m512bh left = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
            for (int c = 0; c < 4; c++) sums[r][c] = _mm512_dpbf16_ps(sums[r][c], left, right[c]);
        }
    }
}

#endif
