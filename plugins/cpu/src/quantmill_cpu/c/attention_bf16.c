/* The loops of attention.c with AVX-512's bf16 dot products. */
#include "attention.h"

#include <immintrin.h>
#include <string.h>

#include "tile_bf16.h"
#include "tiles.h"

#define SIDE QM_ATTENTION_SIDE
#define ROWS QM_ATTENTION_ROWS

void qm_attention_pack_keys(const uint16_t *k, int64_t stride, int64_t keys, int64_t dim,
                            uint32_t *packed) {
    const int64_t pairs = dim / 2;
    for (int64_t start = 0; start < keys; start += SIDE, packed += pairs * SIDE) {
        const int64_t count = keys - start < SIDE ? keys - start : SIDE;
        if (count < SIDE) memset(packed, 0, (size_t)(pairs * SIDE) * 4);
        for (int64_t i = 0; i < count; i++) {
            const uint16_t *row = k + (start + i) * stride;
            for (int64_t p = 0; p < pairs; p++) memcpy(packed + p * SIDE + i, row + 2 * p, 4);
        }
    }
}

void qm_attention_pack_values(const uint16_t *v, int64_t stride, int64_t keys, int64_t dim,
                              uint32_t *packed) {
    const int64_t pairs = (keys + SIDE - 1) / SIDE * (SIDE / 2);
    for (int64_t start = 0; start < dim; start += SIDE) {
        const size_t bytes = (size_t)(dim - start < SIDE ? dim - start : SIDE) * 2;
        for (int64_t p = 0; p < pairs; p++, packed += SIDE) {
            uint16_t rows[2][SIDE] = {{0}};
            if (2 * p < keys) memcpy(rows[0], v + 2 * p * stride + start, bytes);
            if (2 * p + 1 < keys) memcpy(rows[1], v + (2 * p + 1) * stride + start, bytes);
            for (int i = 0; i < SIDE; i++) packed[i] = rows[0][i] | (uint32_t)rows[1][i] << 16;
        }
    }
}

/* 2^x for x <= 0, to about 2e-7 of it: the power of the nearest whole number, times a Taylor series. */
static inline __m512 power_of_two(__m512 x) {
    const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 rest = _mm512_sub_ps(x, whole);
    __m512 sum = _mm512_set1_ps(1.5403530e-4f);
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(1.3333558e-3f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(9.6181291e-3f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(5.5504109e-2f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(2.4022651e-1f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(6.9314718e-1f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(sum, whole);
}

/* Shares of a row's first `seen` scores, bf16 and not yet divided by their sum, which is returned;
 * zeros up to `whole`. */
static float softmax(const float *scores, int64_t seen, int64_t whole, uint16_t *shares) {
    const __m512 none = _mm512_set1_ps(-__builtin_inff());
    __m512 most = none, sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < seen; i += 16) {
        const __mmask16 there = seen - i >= 16 ? 0xffff : (__mmask16)((1u << (seen - i)) - 1);
        most = _mm512_max_ps(most, _mm512_mask_loadu_ps(none, there, scores + i));
    }
    const __m512 top = _mm512_set1_ps(_mm512_reduce_max_ps(most));
    for (int64_t i = 0; i < whole; i += 16) {
        const int64_t left = seen - i;
        const __mmask16 there = left >= 16 ? 0xffff : left <= 0 ? 0 : (__mmask16)((1u << left) - 1);
        const __m512 from = _mm512_sub_ps(_mm512_loadu_ps(scores + i), top);
        const __m512 share = _mm512_maskz_mov_ps(there, power_of_two(from));
        sum = _mm512_add_ps(sum, share);
        _mm256_storeu_si256((__m256i *)(shares + i), (__m256i)_mm512_cvtneps_pbh(share));
    }
    return _mm512_reduce_add_ps(sum);
}

/* sums [16, 64] of rows, `step` bytes apart, and packed columns; rows past the last of `count` are
 * that one again. */
static void multiply(const char *rows, int64_t step, int64_t count, const uint32_t *columns,
                     int64_t pairs, int tiles, float *sums) {
    (void)tiles; /* where the compiler doesn't know them */
#ifdef QM_AMX
    if (tiles) {
        qm_tiles_rows(rows, step, columns, pairs, sums);
        return;
    }
#endif
    __m512 tile[4][4];
    for (int64_t row = 0; row < count; row += 4) {
        const void *at[4];
        for (int64_t r = 0; r < 4; r++) at[r] = rows + (row + r < count ? row + r : count - 1) * step;
        qm_tile_rows(at, 4, columns, pairs, tile);
        for (int r = 0; r < 4; r++)
            for (int c = 0; c < 4; c++)
                _mm512_store_ps(sums + (row + r) * SIDE + 16 * c, tile[r][c]);
    }
}

void qm_attention_rows(const QmAttention *shape, const uint16_t *q, const uint32_t *keys,
                       const uint32_t *values, uint16_t *out, int64_t first, float scale,
                       int causal, int tiles, float *scores, uint16_t *shares) {
    const int64_t rows = shape->queries - first < ROWS ? shape->queries - first : ROWS;
    const int64_t stride = (shape->keys + SIDE - 1) / SIDE * SIDE, pairs = shape->dim / 2;
    const int64_t seen = causal && first + rows < shape->keys ? first + rows : shape->keys;
    const int64_t whole = (seen + SIDE - 1) / SIDE * SIDE;
    const __m512 factor = _mm512_set1_ps(scale * 1.44269504f); /* powers of two are quicker */
    float part[ROWS], sums[ROWS * SIDE] __attribute__((aligned(64)));
    for (int64_t key = 0; key < whole; key += SIDE) {
        multiply((const char *)(q + first * shape->q.row), shape->q.row * 2, rows,
                 keys + key * pairs, pairs, tiles, sums);
        for (int64_t row = 0; row < rows; row++)
            for (int c = 0; c < SIDE; c += 16)
                _mm512_storeu_ps(scores + row * stride + key + c,
                                 _mm512_mul_ps(_mm512_load_ps(sums + row * SIDE + c), factor));
    }
    for (int64_t row = 0; row < rows; row++) {
        const int64_t own = causal && first + row + 1 < shape->keys ? first + row + 1 : shape->keys;
        part[row] = 1.0f / softmax(scores + row * stride, own, whole, shares + row * stride);
    }
    for (int64_t column = 0; column < shape->value_dim;
         column += SIDE, values += stride / 2 * SIDE) {
        multiply((const char *)shares, stride * 2, rows, values, whole / 2, tiles, sums);
        for (int64_t row = 0; row < rows; row++) {
            uint16_t *to = out + (first + row) * shape->out.row + column;
            for (int64_t c = 0; c < SIDE && column + c < shape->value_dim; c += 16) {
                const int64_t left = shape->value_dim - column - c;
                const __mmask16 there = left >= 16 ? 0xffff : (__mmask16)((1u << left) - 1);
                const __m512 sum = _mm512_load_ps(sums + row * SIDE + c);
                _mm256_mask_storeu_epi16(
                    to + c, there,
                    (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(sum, _mm512_set1_ps(part[row]))));
            }
        }
    }
}
