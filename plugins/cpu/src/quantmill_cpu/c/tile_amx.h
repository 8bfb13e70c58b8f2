/* The shapes of AMX tiles, as the processor reads them. */
#ifndef QUANTMILL_TILE_AMX_H
#define QUANTMILL_TILE_AMX_H

#include <immintrin.h>
#include <stdint.h>

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} QmTileConfig;

static inline __attribute__((always_inline)) void qm_tile_configure(const QmTileConfig *config) {
    /* GCC takes the instruction to read eight bytes, and leaves out what is written to others. */
    __asm__ volatile("" : : "r"(config) : "memory");
    _tile_loadconfig(config);
}

#endif
