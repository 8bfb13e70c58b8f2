/* Codes to and from panels (matmul.h draws the layout), and to and from the forms' packings. */
#define _DEFAULT_SOURCE /* madvise */
#include "matmul.h"

#include <stdlib.h>
#include <string.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "pool.h"

#define QM_API __attribute__((visibility("default")))

static inline int64_t ceil_of(int64_t value, int64_t by) { return (value + by - 1) / by; }

/* ---- Packings ---------------------------------------------------------------------------------
 * The words below are assembled from bytes by shifts where order matters, so that the code does
 * not depend on the machine's byte order; 8 codes of b bits are exactly b bytes. */

static uint64_t load_bytes(const uint8_t *from, int count) {
    uint64_t value = 0;
    for (int i = 0; i < count; i++) value |= (uint64_t)from[i] << (8 * i);
    return value;
}

/* Eight codes, each in a byte of a word, side by side in its lowest bits; and back. */
static inline uint64_t gathered(uint64_t word, int bits) {
    const uint64_t two = 0x00ff00ff00ff00ffull, four = 0x0000ffff0000ffffull, eight = 0xffffffffull;
    word = (word & two) | (word & ~two) >> (8 - bits);
    word = (word & four) | (word & ~four) >> (16 - 2 * bits);
    return (word & eight) | (word & ~eight) >> (32 - 4 * bits);
}

static inline uint64_t spread(uint64_t word, int bits) {
    const uint64_t one = (1ull << bits) - 1, two = (1ull << 2 * bits) - 1, four = (1ull << 4 * bits) - 1;
    word = (word & four) | (word & four << 4 * bits) << (32 - 4 * bits);
    const uint64_t low_two = two * 0x0000000100000001ull;
    word = (word & low_two) | (word & low_two << 2 * bits) << (16 - 2 * bits);
    const uint64_t low_one = one * 0x0001000100010001ull;
    return (word & low_one) | (word & low_one << bits) << (8 - bits);
}

static void dense_unpack(const uint8_t *packed, int bits, int64_t start, int64_t count,
                         uint8_t *codes) {
    const unsigned mask = (1u << bits) - 1;
    int64_t i = 0;
    /* One by one until a byte begins with a code, then eight at a time, then the rest. */
    for (;;) {
        if ((start + i) % 8 == 0)
            for (; i + 8 <= count; i += 8) {
                uint64_t word = spread(load_bytes(packed + (start + i) / 8 * bits, bits), bits);
                for (int k = 0; k < 8; k++) codes[i + k] = (uint8_t)(word >> (8 * k));
            }
        if (i >= count) return;
        int64_t bit = (start + i) * bits;
        unsigned pair = packed[bit / 8];
        if (bit % 8 + bits > 8) pair |= (unsigned)packed[bit / 8 + 1] << 8;
        codes[i++] = (uint8_t)(pair >> (bit % 8) & mask);
    }
}

static void dense_pack(const uint8_t *codes, int bits, int64_t count, uint8_t *packed) {
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) {
        const uint64_t word = gathered(load_bytes(codes + i, 8), bits);
        for (int k = 0; k < bits; k++) packed[i / 8 * bits + k] = (uint8_t)(word >> (8 * k));
    }
    if (i == count) return;
    uint64_t word = 0;
    for (int k = 0; i + k < count; k++) word |= (uint64_t)codes[i + k] << (bits * k);
    int64_t bytes = ceil_of((count - i) * bits, 8);
    for (int k = 0; k < bytes; k++) packed[i / 8 * bits + k] = (uint8_t)(word >> (8 * k));
}

QM_API void qm_codes_unpack(const uint8_t *packed, int packing, int bits, int64_t start,
                            int64_t count, uint8_t *codes) {
    const uint8_t half = (uint8_t)(1u << (bits - 1));
    if (packing == QM_DENSE && bits == 4) packing = QM_LOW_FIRST; /* the same bytes */
    switch (packing) {
    case QM_BYTES:
        memcpy(codes, packed + start, (size_t)count);
        return;
    case QM_SIGNED:
        for (int64_t i = 0; i < count; i++) codes[i] = (uint8_t)(packed[start + i] + half);
        return;
    case QM_DENSE:
        dense_unpack(packed, bits, start, count, codes);
        return;
    default: {
        const int first = packing == QM_HIGH_FIRST ? 4 : 0, second = 4 - first;
        int64_t i = 0;
        if (start % 2 && count) codes[i++] = packed[start / 2] >> second & 15;
        const uint8_t *at = packed + (start + i) / 2;
        for (; i + 2 <= count; i += 2, at++) {
            codes[i] = *at >> first & 15;
            codes[i + 1] = *at >> second & 15;
        }
        if (i < count) codes[i] = *at >> first & 15;
    }
    }
}

QM_API void qm_codes_pack(const uint8_t *codes, int packing, int bits, int64_t count,
                          uint8_t *packed) {
    const uint8_t half = (uint8_t)(1u << (bits - 1));
    if (packing == QM_DENSE && bits == 4) packing = QM_LOW_FIRST; /* the same bytes */
    switch (packing) {
    case QM_BYTES:
        memcpy(packed, codes, (size_t)count);
        return;
    case QM_SIGNED:
        for (int64_t i = 0; i < count; i++) packed[i] = (uint8_t)(codes[i] - half);
        return;
    case QM_DENSE:
        dense_pack(codes, bits, count, packed);
        return;
    default: {
        const int first = packing == QM_HIGH_FIRST ? 4 : 0, second = 4 - first;
        for (int64_t i = 0; i + 2 <= count; i += 2)
            packed[i / 2] = (uint8_t)(codes[i] << first | codes[i + 1] << second);
        if (count % 2) packed[count / 2] = (uint8_t)(codes[count - 1] << first);
    }
    }
}

/* ---- Panels ----------------------------------------------------------------------------------- */

/* Each row has a column of 32-bit words in a chunk. Byte `p` of a word holds 8 / b codes of a plane
 * of b bits, so that one shift of a vector gives, in byte `p`, the code of column 4 * j + p. */

/* Four codes of a plane of b bits, a byte each: what is done to the word is done to each byte. */
static inline uint32_t four_of(uint32_t codes, int b) {
    return codes & 0x01010101u * ((1u << b) - 1);
}

static inline void plane_pack(const uint8_t *codes, int shift, int b, uint8_t *out) {
    for (int word = 0; word < b; word++) {
        uint32_t bits = 0;
        for (int i = 0; i < 8 / b; i++) {
            uint32_t four;
            memcpy(&four, codes + 4 * (word * (8 / b) + i), 4);
            bits |= four_of(four >> shift, b) << (b * i);
        }
        memcpy(out + 64 * word, &bits, 4);
    }
}

static inline void plane_unpack(const uint8_t *in, int shift, int b, uint8_t *codes) {
    for (int word = 0; word < b; word++) {
        uint32_t bits;
        memcpy(&bits, in + 64 * word, 4);
        for (int i = 0; i < 8 / b; i++) {
            uint32_t four;
            uint8_t *at = codes + 4 * (word * (8 / b) + i);
            memcpy(&four, at, 4);
            four |= four_of(bits >> (b * i), b) << shift;
            memcpy(at, &four, 4);
        }
    }
}

/* The widths are constants in each call, so that the loops above are unrolled. */
#define ALL_PLANES(work, codes, panel) \
    switch (bits) { \
    case 1: work(codes, 0, 1, panel); break; \
    case 2: work(codes, 0, 2, panel); break; \
    case 3: work(codes, 0, 2, panel); work(codes, 2, 1, panel + 128); break; \
    case 4: work(codes, 0, 4, panel); break; \
    case 5: work(codes, 0, 4, panel); work(codes, 4, 1, panel + 256); break; \
    case 6: work(codes, 0, 4, panel); work(codes, 4, 2, panel + 256); break; \
    case 8: work(codes, 0, 8, panel); break; \
    }

static void chunk_row_pack(const uint8_t *codes, int bits, uint8_t *out) {
    ALL_PLANES(plane_pack, codes, out)
}

#define UNPACK(codes, shift, b, panel) plane_unpack(panel, shift, b, codes)

static void chunk_row_unpack(const uint8_t *in, int bits, uint8_t *codes) {
    memset(codes, 0, 32);
    ALL_PLANES(UNPACK, codes, in)
}

QM_API int64_t qm_panels_size(int64_t rows, int64_t columns, int bits) {
    if (bits < 1 || bits > 8 || bits == 7) return -1;
    return ceil_of(rows, QM_PANEL) * ceil_of(columns, QM_CHUNK_COLUMNS) * 64 * bits;
}

typedef struct {
    const uint8_t *from;
    uint8_t *to;
    int packing, bits, pad;
    int64_t rows, columns;
    const int32_t *order;
} Move;

/* Sixteen rows of any width begin and end with a whole byte: no two threads write the same. */
static void pack_piece(void *argument, int64_t panel, int worker) {
    const Move *m = argument;
    (void)worker;
    int64_t chunks = ceil_of(m->columns, QM_CHUNK_COLUMNS), width = chunks * QM_CHUNK_COLUMNS;
    uint8_t *row = malloc((size_t)width * 2 + 1), *plain = row + width;
    if (!row) abort(); /* a few kilobytes */
    uint8_t *out = m->to + panel * chunks * 64 * m->bits;
    for (int r = 0; r < QM_PANEL; r++) {
        int64_t n = panel * QM_PANEL + r;
        memset(row, m->pad, (size_t)width);
        if (n < m->rows) {
            uint8_t *to = m->order ? plain : row;
            qm_codes_unpack(m->from, m->packing, m->bits, n * m->columns, m->columns, to);
            if (m->order)
                for (int64_t k = 0; k < m->columns; k++) row[k] = plain[m->order[k]];
        }
        for (int64_t c = 0; c < chunks; c++)
            chunk_row_pack(row + c * QM_CHUNK_COLUMNS, m->bits, out + c * 64 * m->bits + 4 * r);
    }
    free(row);
}

static void unpack_piece(void *argument, int64_t panel, int worker) {
    const Move *m = argument;
    (void)worker;
    int64_t chunks = ceil_of(m->columns, QM_CHUNK_COLUMNS), width = chunks * QM_CHUNK_COLUMNS;
    int64_t first = panel * QM_PANEL, count = m->rows - first;
    if (count > QM_PANEL) count = QM_PANEL;
    uint8_t *codes = malloc((size_t)(m->columns * count + width) + 1);
    if (!codes) abort();
    uint8_t *row = codes + m->columns * count;
    const uint8_t *in = m->from + panel * chunks * 64 * m->bits;
    for (int64_t r = 0; r < count; r++) {
        for (int64_t c = 0; c < chunks; c++)
            chunk_row_unpack(in + c * 64 * m->bits + 4 * r, m->bits, row + c * QM_CHUNK_COLUMNS);
        uint8_t *to = codes + r * m->columns;
        if (m->order)
            for (int64_t k = 0; k < m->columns; k++) to[m->order[k]] = row[k];
        else
            memcpy(to, row, (size_t)m->columns);
    }
    int width_bits = m->packing == QM_BYTES || m->packing == QM_SIGNED ? 8
                     : m->packing == QM_DENSE                         ? m->bits
                                                                      : 4;
    uint8_t *out = m->to + first * m->columns * width_bits / 8;
    qm_codes_pack(codes, m->packing, m->bits, count * m->columns, out);
    free(codes);
}

QM_API void qm_panels_pack(const uint8_t *packed, int packing, int bits, int64_t rows,
                           int64_t columns, const int32_t *order, int pad, uint8_t *panels,
                           int threads) {
    Move move = {packed, panels, packing, bits, pad, rows, columns, order};
    qm_parallel_own(pack_piece, &move, ceil_of(rows, QM_PANEL), threads);
}

QM_API void qm_panels_unpack(const uint8_t *panels, int packing, int bits, int64_t rows,
                             int64_t columns, const int32_t *order, uint8_t *packed, int threads) {
    Move move = {panels, packed, packing, bits, 0, rows, columns, order};
    qm_parallel_own(unpack_piece, &move, ceil_of(rows, QM_PANEL), threads);
}

typedef struct {
    const uint8_t *from;
    uint8_t *to;
    int bytes;
    int64_t rows, groups;
} Values;

static void values_piece(void *argument, int64_t panel, int worker) {
    const Values *v = argument;
    (void)worker;
    const int64_t first = panel * QM_PANEL, there = v->rows - first;
    const int64_t count = there < QM_PANEL ? there : QM_PANEL;
    uint8_t *to = v->to + panel * v->groups * QM_PANEL * v->bytes;
    if (count < QM_PANEL) memset(to, 0, (size_t)(v->groups * QM_PANEL * v->bytes));
    for (int64_t r = 0; r < count; r++) {
        const uint8_t *from = v->from + (first + r) * v->groups * v->bytes;
        for (int64_t g = 0; g < v->groups; g++) {
            uint8_t *at = to + (g * QM_PANEL + r) * v->bytes;
            if (v->bytes == 2) memcpy(at, from + 2 * g, 2);
            else if (v->bytes == 4) memcpy(at, from + 4 * g, 4);
            else *at = from[g];
        }
    }
}

QM_API void qm_panels_values(const void *values, int bytes, int64_t rows, int64_t groups, void *out,
                             int threads) {
    Values v = {values, out, bytes, rows, groups};
    qm_parallel_own(values_piece, &v, ceil_of(rows, QM_PANEL), threads);
}

/* ---- Memory ----------------------------------------------------------------------------------- */

/* Whole pages of 2 MiB within a run of memory that nobody wrote to yet: where small ones end, the
 * hardware stops fetching ahead. Advice: without it everything works. */
QM_API void qm_large_pages(void *memory, int64_t bytes) {
#ifdef MADV_HUGEPAGE
    const uintptr_t page = 2u << 20, first = ((uintptr_t)memory + page - 1) / page * page;
    const uintptr_t last = ((uintptr_t)memory + (uintptr_t)bytes) / page * page;
    if (first < last) (void)madvise((void *)first, last - first, MADV_HUGEPAGE);
#else
    (void)memory, (void)bytes;
#endif
}

/* ---- Reading ----------------------------------------------------------------------------------- */

#define READ_PIECE (1 << 18)

typedef struct {
    const uint8_t *from;
    int64_t count;
    uint64_t sums[QM_POOL_MOST][8];
} Read;

static void read_piece(void *argument, int64_t index, int worker) {
    Read *r = argument;
    const uint8_t *from = r->from + index * READ_PIECE;
    int64_t count = r->count - index * READ_PIECE;
    if (count > READ_PIECE) count = READ_PIECE;
    uint64_t sums[32] = {0}; /* enough for the additions of vectors to run beside each other */
    int64_t i = 0;
    for (; i + 256 <= count; i += 256) {
        uint64_t words[32];
        memcpy(words, from + i, 256);
        __builtin_prefetch(from + i + 4096);
        __builtin_prefetch(from + i + 4160);
        __builtin_prefetch(from + i + 4224);
        __builtin_prefetch(from + i + 4288);
        for (int k = 0; k < 32; k++) sums[k] += words[k];
    }
    for (; i < count; i++) sums[0] += from[i];
    for (int k = 0; k < 32; k++) r->sums[worker][k % 8] += sums[k];
}

/* The sum of all bytes' words: what it costs is to read them, which benchmarks compare with. */
QM_API int64_t qm_read(const uint8_t *from, int64_t count, int threads) {
    Read read = {.from = from, .count = count};
    uint64_t sum = 0;
    qm_parallel(read_piece, &read, ceil_of(count, READ_PIECE), threads);
    for (int i = 0; i < QM_POOL_MOST * 8; i++) sum += read.sums[i / 8][i % 8];
    return (int64_t)sum;
}
