/* The codes of ggml's types on a grid, taken out of their blocks as the core's forms have them. */
#include "ggml.h"

#include <string.h>

#include "matmul.h"
#include "pool.h"

#define QM_API __attribute__((visibility("default")))
#define MOST 256 /* values of a block */

/* `bytes` from `first` on hold codes of `bits` bits: every run of `width` bytes first the lowest
 * bits of all of them, then the next ones. They count from bit `shift` of a code on. */
typedef struct {
    int first, bytes, bits, width, shift;
} Plane;

typedef struct {
    int values, size, bits;
    Plane planes[2]; /* a width of zero: there is none */
} Layout;

static const Layout LAYOUTS[QM_TYPES] = {
    [QM_Q4_0] = {32, 18, 4, {{2, 16, 4, 16, 0}}},
    [QM_Q4_1] = {32, 20, 4, {{4, 16, 4, 16, 0}}},
    [QM_Q5_0] = {32, 22, 5, {{6, 16, 4, 16, 0}, {2, 4, 1, 1, 4}}},
    [QM_Q5_1] = {32, 24, 5, {{8, 16, 4, 16, 0}, {4, 4, 1, 1, 4}}},
    [QM_Q8_0] = {32, 34, 8, {{2, 32, 8, 32, 0}}},
    [QM_Q2_K] = {256, 84, 2, {{16, 64, 2, 32, 0}}},
    [QM_Q3_K] = {256, 110, 3, {{32, 64, 2, 32, 0}, {0, 32, 1, 32, 2}}},
    [QM_Q4_K] = {256, 144, 4, {{16, 128, 4, 32, 0}}},
    [QM_Q5_K] = {256, 176, 5, {{48, 128, 4, 32, 0}, {16, 32, 1, 32, 4}}},
    [QM_Q6_K] = {256, 210, 6, {{0, 128, 4, 64, 0}, {128, 64, 2, 32, 4}}},
    [QM_IQ4_NL] = {32, 18, 4, {{2, 16, 4, 16, 0}}},
    [QM_IQ4_XS] = {256, 136, 4, {{8, 128, 4, 16, 0}}},
    [QM_TQ2_0] = {256, 66, 2, {{0, 64, 2, 32, 0}}},
    [QM_MXFP4] = {32, 17, 4, {{1, 16, 4, 16, 0}}},
    [QM_NVFP4] = {64, 36, 4, {{4, 32, 4, 8, 0}}},
    [QM_Q1_0] = {128, 18, 1, {{2, 16, 1, 1, 0}}},
    [QM_Q2_0] = {64, 18, 2, {{2, 16, 2, 1, 0}}},
};

static inline void run(const uint8_t *in, int width, int low, int bits, int shift, uint8_t *codes) {
    const uint8_t mask = (uint8_t)((1u << bits) - 1);
    for (int i = 0; i < width; i++)
        codes[i] |= (uint8_t)((uint8_t)(in[i] >> low & mask) << shift);
}

static void add_plane(const uint8_t *block, const Plane *p, uint8_t *codes) {
    const uint8_t *in = block + p->first;
    for (int at = 0; at < p->bytes; at += p->width)
        for (int low = 0; low < 8; low += p->bits, codes += p->width) {
            /* The widths as constants, so that the loops are vectors. */
            if (p->width == 32)
                run(in + at, 32, low, p->bits, p->shift, codes);
            else if (p->width == 64)
                run(in + at, 64, low, p->bits, p->shift, codes);
            else if (p->width == 16)
                run(in + at, 16, low, p->bits, p->shift, codes);
            else
                run(in + at, p->width, low, p->bits, p->shift, codes);
        }
}

typedef struct {
    const Layout *layout;
    const uint8_t *raw;
    uint8_t *out;
    int64_t blocks, piece;
} Taking;

static void take_piece(void *argument, int64_t index, int worker) {
    const Taking *t = argument;
    const Layout *l = t->layout;
    (void)worker;
    const int packing = l->bits == 4 ? QM_LOW_FIRST : QM_DENSE;
    const int64_t first = index * t->piece;
    const int64_t last = first + t->piece < t->blocks ? first + t->piece : t->blocks;
    uint8_t *out = t->out + first * (l->values * l->bits / 8);
    for (int64_t b = first; b < last; b++, out += l->values * l->bits / 8) {
        const uint8_t *block = t->raw + b * l->size;
        uint8_t codes[MOST] = {0};
        if (l->bits == 8) { /* signed bytes, as they are */
            memcpy(out, block + l->planes[0].first, (size_t)l->values);
            continue;
        }
        for (int k = 0; k < 2 && l->planes[k].width; k++) add_plane(block, &l->planes[k], codes);
        qm_codes_pack(codes, packing, l->bits, l->values, out);
    }
}

QM_API int qm_ggml_codes(int number, const uint8_t *raw, int64_t blocks, uint8_t *out,
                         int threads) {
    if (number < 0 || number >= QM_TYPES || !LAYOUTS[number].values) return -1;
    if (blocks <= 0) return 0;
    Taking t = {&LAYOUTS[number], raw, out, blocks, 65536 / LAYOUTS[number].values};
    qm_parallel(take_piece, &t, (blocks + t.piece - 1) / t.piece, threads);
    return 0;
}
