/* The loops of moments.c with AVX-512's bf16 dot products. */
#include "moments.h"

#include <immintrin.h>
#include <string.h>

#include "tile_bf16.h"

#define SIDE QM_MOMENTS_SIDE

void qm_moments_pack(const uint16_t *x, int64_t tokens, int64_t columns, int64_t block,
                     uint32_t *packed) {
    const int64_t start = block * SIDE;
    const int64_t width = columns - start < SIDE ? columns - start : SIDE;
    for (int64_t t = 0; t < tokens; t += 2, packed += SIDE) {
        uint16_t rows[2][SIDE] = {{0}};
        memcpy(rows[0], x + t * columns + start, (size_t)width * 2);
        if (t + 1 < tokens) memcpy(rows[1], x + (t + 1) * columns + start, (size_t)width * 2);
        for (int i = 0; i < SIDE; i++) packed[i] = rows[0][i] | (uint32_t)rows[1][i] << 16;
    }
}

void qm_moments_block(const uint32_t *first, const uint32_t *second, int64_t pairs, float *total,
                      int64_t stride, int64_t rows, int64_t columns) {
    for (int64_t row = 0; row < rows; row += 4) {
        __m512 sums[4][4];
        const void *at[4];
        for (int r = 0; r < 4; r++) at[r] = first + row + r;
        qm_tile_rows(at, 4 * SIDE, second, pairs, sums);
        for (int64_t r = 0; r < 4 && row + r < rows; r++)
            for (int64_t c = 0; c < 4 && 16 * c < columns; c++) {
                float *to = total + (row + r) * stride + 16 * c;
                const int64_t left = columns - 16 * c;
                const __mmask16 there = left >= 16 ? 0xffff : (__mmask16)((1u << left) - 1);
                __m512 sum = _mm512_add_ps(_mm512_maskz_loadu_ps(there, to), sums[r][c]);
                _mm512_mask_storeu_ps(to, there, sum);
            }
    }
}
