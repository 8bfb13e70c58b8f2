/* Products of bf16 with AMX tiles, for moments and attention: 16 rows at a time, where tile_bf16.h
 * takes four. Internal. */
#ifndef QUANTMILL_TILES_H
#define QUANTMILL_TILES_H

#include <stdint.h>

#define QM_TILE_PAIRS 16 /* pairs of bf16 in a row of a tile */

/* Whether tiles are there and to be used. */
int qm_has_tiles(void);
/* A thread that multiplies opens them first and closes them after. */
void qm_tiles_open(void);
void qm_tiles_close(void);

/* sums [16, 64] = rows of bf16 pairs, `step` bytes apart, times columns packed as [pairs, 64];
 * `pairs` is a multiple of QM_TILE_PAIRS. */
void qm_tiles_rows(const void *rows, int64_t step, const uint32_t *columns, int64_t pairs,
                   float *sums);
/* Of 64 columns packed as [16, 64], the pairs from `first` on of `pairs`, the tiles of
 * [64 / 16, pairs / 16, 16, 16]: as they are, for columns of a product, and turned, for its rows. */
void qm_tiles_split(const uint32_t *columns, int64_t first, int64_t pairs, uint32_t *packed,
                    uint32_t *turned);
/* sums [64, 64] = turned columns times packed ones. */
void qm_tiles_square(const uint32_t *turned, const uint32_t *packed, int64_t pairs, float *sums);

#endif
