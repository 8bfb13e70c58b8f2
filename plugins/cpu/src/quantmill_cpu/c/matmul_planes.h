/* Codes from their planes, for the levels that have AVX-512 VBMI. */
#ifndef QUANTMILL_MATMUL_PLANES_H
#define QUANTMILL_MATMUL_PLANES_H

#include <immintrin.h>

#include "matmul_driver.h"

/* Bytes: memory answers late, and the hardware stops looking ahead at the end of a page. */
#define QM_AHEAD 4096

typedef uint16_t QmWords __attribute__((vector_size(64)));

/* Words of 16 bits shifted right by `by`, or left where it is negative. */
QM_INLINE __m512i qm_shift(__m512i value, int by) {
    return (__m512i)(by >= 0 ? (QmWords)value >> by : (QmWords)value << -by);
}

/* Bits of the first where the mask (of 16 bits) has ones, of the second elsewhere. */
QM_INLINE __m512i qm_choose(int mask, __m512i ones, __m512i zeros) {
    return _mm512_ternarylogic_epi64(_mm512_set1_epi16((short)mask), ones, zeros, 0xca);
}

/* Vector `j` (of 8 in a chunk) of a plane of `width` bits, its codes beginning at bit `to` of each
 * byte; other bits are not cleared. */
QM_INLINE __m512i qm_plane(const uint8_t *at, int width, int j, int to) {
    const int each = 8 / width;
    return qm_shift(_mm512_loadu_si512(at + 64 * (j / each)), width * (j % each) - to);
}

/* The codes of columns 4 * j to 4 * j + 3 of 16 rows, each in a byte from bit `to` on; other bits
 * are not cleared. */
QM_INLINE __m512i qm_codes(const uint8_t *chunk, int j, int bits, int to) {
    const int low = bits == 3 ? 2 : 4; /* width of the first plane where there are two */
    if (bits != 3 && bits != 5 && bits != 6) return qm_plane(chunk, bits, j, to);
    return qm_choose(((1 << low) - 1) * 0x0101 << to, qm_plane(chunk, low, j, to),
                     qm_plane(chunk + 64 * low, bits - low, j, to + low));
}

QM_INLINE void qm_prefetch(const uint8_t *chunk, int bits) {
#pragma GCC unroll 8
    for (int line = 0; line < bits; line++)
        _mm_prefetch((const char *)chunk + QM_AHEAD + 64 * line, _MM_HINT_T1);
}

#endif
