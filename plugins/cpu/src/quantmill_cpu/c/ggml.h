/* ggml's block types: values to blocks and back. Part of the ABI are the functions that begin with
 * qm_ggml; types have ggml's numbers.
 *
 * The bytes and bits are those of ggml's reference functions and of quantmill-gguf's definitions
 * in PyTorch, with every instruction set.
 */
#ifndef QUANTMILL_GGML_H
#define QUANTMILL_GGML_H

#include <stdint.h>

enum {
    QM_Q4_0 = 2, QM_Q4_1 = 3, QM_Q5_0 = 6, QM_Q5_1 = 7, QM_Q8_0 = 8, QM_Q2_K = 10, QM_Q3_K = 11,
    QM_Q4_K = 12, QM_Q5_K = 13, QM_Q6_K = 14, QM_Q8_K = 15, QM_IQ2_XXS = 16, QM_IQ2_XS = 17,
    QM_IQ3_XXS = 18, QM_IQ1_S = 19, QM_IQ4_NL = 20, QM_IQ3_S = 21, QM_IQ2_S = 22, QM_IQ4_XS = 23,
    QM_IQ1_M = 29, QM_TQ1_0 = 34, QM_TQ2_0 = 35, QM_MXFP4 = 39, QM_NVFP4 = 40, QM_Q1_0 = 41,
    QM_Q2_0 = 42, QM_TYPES = 43
};

/* Values on their way to blocks. */
typedef struct {
    const void *source;       /* float32 (dtype 0), bfloat16 (1) or float16 (2); any alignment */
    int dtype;
    int64_t columns;
    const float *importance;  /* of each column, or NULL */
    const float *energy;      /* of each row, for types of 32 with importance */
    uint8_t *out;
    int64_t blocks;
} QmGgmlSource;

typedef struct {
    int values, size; /* of a block */
    /* Blocks from `first` on, as many as there are lanes and blocks. */
    void (*encode)(const QmGgmlSource *source, int64_t first);
    void (*decode)(const uint8_t *raw, int64_t blocks, const int8_t *points, float *out);
} QmGgmlType;

/* By number; entries without functions are of types that are not known. */
extern const QmGgmlType qm_ggml_baseline[QM_TYPES];
extern const int qm_ggml_lanes_baseline;
#ifdef QM_X86_LEVELS
extern const QmGgmlType qm_ggml_avx2[QM_TYPES], qm_ggml_avx512[QM_TYPES];
extern const int qm_ggml_lanes_avx2, qm_ggml_lanes_avx512;
#endif

/* Rows to blocks. `columns` is a multiple of the type's block. `importance` has `columns` numbers
 * that are not negative, or is NULL. `largest` gets the largest magnitude of the values; where that
 * is NaN or infinity, blocks are missing. 0, or -1: the type can't be made. */
int qm_ggml_encode(int type, const void *values, int dtype, int64_t rows, int64_t columns,
                   const float *importance, uint8_t *out, float *largest, int threads);

/* Blocks to float32. `points` is the lattice of an IQ1, IQ2 or IQ3 type: its coordinates point by
 * point; otherwise NULL. 0, or -1: the type is not known. */
int qm_ggml_decode(int type, const uint8_t *raw, int64_t blocks, const int8_t *points, float *out,
                   int threads);

/* The codes of blocks of a type on a grid, block by block: pairs with the first one low for 4 bits,
 * signed bytes for 8, otherwise a dense stream from the lowest bits on. 0, or -1: the type has no
 * such codes. */
int qm_ggml_codes(int type, const uint8_t *raw, int64_t blocks, uint8_t *out, int threads);

/* `out [tokens, rows]` = `x [tokens, columns]` times the transposed matrix of the blocks, plus
 * `bias [rows]` or nothing (NULL), in float32. Rows are decoded a few at a time. 0, or -1: the type
 * is not known; -2: there is no memory. */
int qm_ggml_matmul(int type, const uint8_t *raw, int64_t rows, int64_t columns,
                   const int8_t *points, const float *x, int64_t tokens, const float *bias,
                   float *out, int threads);

#endif
