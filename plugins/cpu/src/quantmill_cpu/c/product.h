/* Products of float32 matrices whose rows are summed over: c = a.T @ b. Calibrated methods pass on by
 * them what rounded columns lack, and libraries that know the processor's newest instructions only
 * under another vendor's name take twice as long. */
#ifndef QUANTMILL_PRODUCT_H
#define QUANTMILL_PRODUCT_H

#include <stdint.h>

/* Part of the ABI: `c` [m, n] of `a` [k, m], whose rows and columns lie so many elements apart, and
 * `b` [k, n]. Each sum has one order, whatever the number of threads. 0, or -1 where there is no
 * memory for a thread's copies of a part of both. */
int qm_product(int64_t k, int64_t m, int64_t n, const float *a, int64_t apart, int64_t beside,
               const float *b, float *c, int threads);

#define QM_PRODUCT_DEPTH 192 /* of k at a time */
#define QM_PRODUCT_STRIP 192 /* columns of a piece of the work: a multiple of every level's tile */

typedef struct QmProduct QmProduct;

/* Internal: one strip of columns of c, for each instruction set. */
typedef struct {
    int rows; /* of a tile: copies of `a` are padded to a multiple */
    void (*strip)(const QmProduct *job, int64_t index, int worker);
} QmProductLevel;

struct QmProduct {
    const QmProductLevel *level;
    int64_t k, m, n;
    int64_t apart, beside; /* rows and columns of a */
    const float *a, *b;
    float *c;
    float *space; /* of each thread */
    int64_t space_size; /* elements */
};

extern const QmProductLevel qm_product_baseline;
#ifdef QM_X86_LEVELS
extern const QmProductLevel qm_product_avx2, qm_product_avx512;
#endif

#endif
