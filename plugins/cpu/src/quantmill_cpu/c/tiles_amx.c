/* See tiles.h. Tiles 0 to 3 are sums, 4 and 5 rows, 6 and 7 columns. */
#include "tiles.h"

#include "tile_amx.h"

#define SIDE 64
#define PAIRS QM_TILE_PAIRS
#define STEP (4 * SIDE) /* bytes from one packed pair to the next */

void qm_tiles_open(void) {
    QmTileConfig config = {.palette = 1};
    for (int i = 0; i < 8; i++) config.rows[i] = 16, config.row_bytes[i] = 64;
    qm_tile_configure(&config);
}

void qm_tiles_close(void) { _tile_release(); }

void qm_tiles_rows(const void *rows, int64_t step, const uint32_t *columns, int64_t pairs,
                   float *sums) {
    const char *at = rows;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t p = 0; p < pairs; p += PAIRS, at += 4 * PAIRS, columns += PAIRS * SIDE) {
        _tile_loadd(4, at, (int)step);
        _tile_loadd(6, columns, STEP);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, columns + 16, STEP);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(6, columns + 32, STEP);
        _tile_dpbf16ps(2, 4, 6);
        _tile_loadd(7, columns + 48, STEP);
        _tile_dpbf16ps(3, 4, 7);
    }
    _tile_stored(0, sums, STEP);
    _tile_stored(1, sums + 16, STEP);
    _tile_stored(2, sums + 32, STEP);
    _tile_stored(3, sums + 48, STEP);
}

/* 16 rows of 16 out of 64, and their transpose. */
static void split(const uint32_t *columns, uint32_t *packed, uint32_t *turned) {
    __m512i row[16], two[16];
    for (int i = 0; i < 16; i++) {
        row[i] = _mm512_loadu_si512(columns + i * SIDE);
        _mm512_storeu_si512(packed + i * PAIRS, row[i]);
    }
    for (int i = 0; i < 16; i += 2) {
        two[i] = _mm512_unpacklo_epi32(row[i], row[i + 1]);
        two[i + 1] = _mm512_unpackhi_epi32(row[i], row[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            row[i + 2 * j] = _mm512_unpacklo_epi64(two[i + j], two[i + 2 + j]);
            row[i + 2 * j + 1] = _mm512_unpackhi_epi64(two[i + j], two[i + 2 + j]);
        }
    /* row[4 * i + c] has the columns c, 4 + c, 8 + c and 12 + c of the rows 4 * i to 4 * i + 3. */
    for (int c = 0; c < 4; c++) {
        __m512i low = _mm512_shuffle_i32x4(row[c], row[4 + c], 0x44);
        __m512i high = _mm512_shuffle_i32x4(row[c], row[4 + c], 0xee);
        __m512i low2 = _mm512_shuffle_i32x4(row[8 + c], row[12 + c], 0x44);
        __m512i high2 = _mm512_shuffle_i32x4(row[8 + c], row[12 + c], 0xee);
        _mm512_storeu_si512(turned + c * PAIRS, _mm512_shuffle_i32x4(low, low2, 0x88));
        _mm512_storeu_si512(turned + (4 + c) * PAIRS, _mm512_shuffle_i32x4(low, low2, 0xdd));
        _mm512_storeu_si512(turned + (8 + c) * PAIRS, _mm512_shuffle_i32x4(high, high2, 0x88));
        _mm512_storeu_si512(turned + (12 + c) * PAIRS, _mm512_shuffle_i32x4(high, high2, 0xdd));
    }
}

void qm_tiles_split(const uint32_t *columns, int64_t first, int64_t pairs, uint32_t *packed,
                    uint32_t *turned) {
    for (int c = 0; c < SIDE; c += 16) {
        const int64_t to = c * pairs + first * PAIRS;
        split(columns + c, packed + to, turned + to);
    }
}

void qm_tiles_square(const uint32_t *turned, const uint32_t *packed, int64_t pairs, float *sums) {
    const int64_t strip = 16 * pairs;
    for (int r = 0; r < SIDE; r += 32)
        for (int c = 0; c < SIDE; c += 32) {
            const uint32_t *rows = turned + r * pairs, *columns = packed + c * pairs;
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
            for (const uint32_t *end = rows + strip; rows < end; rows += 256, columns += 256) {
                _tile_loadd(4, rows, 4 * PAIRS);
                _tile_loadd(6, columns, 4 * PAIRS);
                _tile_loadd(7, columns + strip, 4 * PAIRS);
                _tile_loadd(5, rows + strip, 4 * PAIRS);
                _tile_dpbf16ps(0, 4, 6);
                _tile_dpbf16ps(1, 4, 7);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
            float *to = sums + r * SIDE + c;
            _tile_stored(0, to, STEP);
            _tile_stored(1, to + 16, STEP);
            _tile_stored(2, to + 16 * SIDE, STEP);
            _tile_stored(3, to + 16 * SIDE + 16, STEP);
        }
}
