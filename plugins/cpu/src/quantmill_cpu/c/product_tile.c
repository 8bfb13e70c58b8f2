/* The loops of product.h. Plain C over vectors of the compiler's; compiled once for each instruction
 * set, with QM_LEVEL as its name. A tile of c stays in registers over a part of k; copies of a's and
 * b's parts lie in the second-level cache in the order in which tiles read them. */
#include "product.h"

#include <string.h>

#include "levels.h"

/* Rows of a tile, lanes of a vector, and vectors of a row: the sums fill most of the registers. */
#if defined(__AVX512F__)
enum { ROWS = 8, LANES = 16, VECTORS = 3 };
#elif defined(__AVX2__)
enum { ROWS = 6, LANES = 8, VECTORS = 2 };
#else
enum { ROWS = 4, LANES = 4, VECTORS = 2 };
#endif
enum { COLUMNS = LANES * VECTORS, DEPTH = QM_PRODUCT_DEPTH, STRIP = QM_PRODUCT_STRIP };

typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef float Anywhere __attribute__((vector_size(4 * LANES), aligned(4)));

/* `depth` rows of `from`, columns `start` to `stop`, as blocks of `width` columns: [blocks][depth]
 * [width], padded with zeros. */
static void copy(float *to, const float *from, int64_t apart, int64_t beside, int64_t depth,
                 int64_t start, int64_t stop, int64_t width) {
    for (int64_t at = start; at < stop; at += width, to += depth * width) {
        const int64_t count = stop - at < width ? stop - at : width;
        const float *first = from + at * beside;
        if (count < width) memset(to, 0, sizeof(float) * (size_t)(depth * width));
        if (beside == 1) {
            for (int64_t p = 0; p < depth; p++)
                for (int64_t i = 0; i < count; i++) to[p * width + i] = first[p * apart + i];
        } else {
            /* Along the columns of `from`, whose elements are neighbours. */
            for (int64_t i = 0; i < count; i++)
                for (int64_t p = 0; p < depth; p++)
                    to[p * width + i] = first[p * apart + i * beside];
        }
    }
}

/* A tile of c: set, or added to. Only `rows` and `columns` of it are there. */
static void tile(int64_t depth, const float *a, const float *b, float *c, int64_t stride,
                 int64_t rows, int64_t columns, int add) {
    Vector sums[ROWS][VECTORS] = {{{0}}};
    for (int64_t p = 0; p < depth; p++, a += ROWS, b += COLUMNS) {
        Vector right[VECTORS];
        for (int j = 0; j < VECTORS; j++) right[j] = *(const Vector *)(b + j * LANES);
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; i++) {
#pragma GCC unroll 3
            for (int j = 0; j < VECTORS; j++) sums[i][j] += a[i] * right[j];
        }
    }
    if (columns == COLUMNS) {
        for (int i = 0; i < ROWS; i++) {
            if (i >= rows) break;
            for (int j = 0; j < VECTORS; j++) {
                Anywhere *to = (Anywhere *)(c + i * stride + j * LANES);
                *to = add ? *to + sums[i][j] : sums[i][j];
            }
        }
        return;
    }
    float whole[ROWS][COLUMNS];
    memcpy(whole, sums, sizeof whole);
    for (int64_t i = 0; i < rows; i++)
        for (int64_t l = 0; l < columns; l++)
            c[i * stride + l] = add ? c[i * stride + l] + whole[i][l] : whole[i][l];
}

static void strip(const QmProduct *job, int64_t index, int worker) {
    float *right = job->space + worker * job->space_size;
    float *left = right + DEPTH * STRIP;
    const int64_t start = index * STRIP;
    const int64_t stop = job->n - start < STRIP ? job->n : start + STRIP;
    for (int64_t first = 0; first < job->k; first += DEPTH) {
        const int64_t depth = job->k - first < DEPTH ? job->k - first : DEPTH;
        copy(right, job->b + first * job->n, job->n, 1, depth, start, stop, COLUMNS);
        copy(left, job->a + first * job->apart, job->apart, job->beside, depth, 0, job->m, ROWS);
        for (int64_t column = start; column < stop; column += COLUMNS) {
            const float *b = right + (column - start) * depth;
            const int64_t columns = stop - column < COLUMNS ? stop - column : COLUMNS;
            for (int64_t row = 0; row < job->m; row += ROWS) {
                const int64_t rows = job->m - row < ROWS ? job->m - row : ROWS;
                tile(depth, left + row * depth, b, job->c + row * job->n + column, job->n, rows,
                     columns, first > 0);
            }
        }
    }
}

const QmProductLevel QM_JOIN(qm_product_, QM_LEVEL) = {ROWS, strip};
