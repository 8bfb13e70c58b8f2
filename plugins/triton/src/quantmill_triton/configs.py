"""Which tiles a matmul runs with: a small table, measured on an H200, and what follows from it.

Nothing is tuned at run time: the first call would wait for it, and results would differ between
runs. ``benchmarks/triton_tune.py`` measures candidates for this table.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple, TypeVar

from quantmill_triton.facts import Facts

__all__ = ["FUSED_ROWS", "Config", "choose", "shared_bytes", "split_of"]

_T = TypeVar("_T")


class Config(NamedTuple):
    """How one matmul is launched."""

    bm: int
    """Rows of activations of a product."""
    bn: int
    """Rows of the weight of a tile."""
    warps: int
    stages: int
    """Tiles of the pipeline from memory to shared memory."""
    resident: int
    """Programs that one processor is meant to hold at once."""
    teams: int = 1
    """Parts of a row that a program's warps share among them: 1, or as many as warps."""
    prescale: bool = False
    """Scale each weight in place of each group's sum."""
    early: int = -1
    """Bytes of codes, a power of two or 0, that a program fetches into the second-level cache while
    the kernel before it still runs, where the device can start it so early. -1: it starts later."""
    streamed: bool = False
    """The kernel for Hopper, in which a warp of its own moves tiles."""


FUSED_ROWS = 384
"""With more rows of activations the weight is dequantized first and PyTorch multiplies."""

_TABLE: tuple[tuple[int, Config], ...] = (
    (8, Config(8, 128, 4, 3, 2)),
    (16, Config(16, 128, 4, 4, 2)),
    (32, Config(32, 128, 4, 3, 2)),
    (64, Config(64, 64, 4, 3, 2)),
    (FUSED_ROWS, Config(128, 128, 8, 3, 1)),
)


# Started early, these are the quickest for 4 bits with a zero beside each scale: up to 8 rows as
# long as all programs are resident at once, each with whole rows of the weight; and up to 16.
_EARLY = 8192
_FEW = Config(8, 32, 4, 4, 2, 4, early=_EARLY)


def _streamed(bm: int, *tiles: tuple[int, int, int, int]) -> tuple[Config, ...]:
    return tuple(
        Config(bm, bn, warps, stages, resident, early=_EARLY, streamed=True)
        for bn, warps, stages, resident in tiles
    )


_STREAMED: tuple[tuple[int, tuple[Config, ...]], ...] = (
    (8, _streamed(8, (128, 4, 4, 2), (64, 4, 4, 2))),
    (16, _streamed(16, (128, 4, 4, 2), (64, 4, 4, 2))),
    (32, _streamed(32, (128, 4, 3, 2), (64, 4, 4, 2))),
    (FUSED_ROWS, _streamed(64, (128, 8, 4, 1), (64, 4, 5, 1))),
)
"""By rows: of two, the one that leaves the fewest processors idle. Wide tiles read activations less
often, narrow ones need fewer parts."""
_STREAMED_WEIGHT = 1 << 22
"""Elements of a weight from which on the kernel for Hopper was measured."""


@lru_cache(maxsize=4096)
def choose(facts: Facts, rows: int, shared: int, streams: int = 0) -> Config:
    """The tiles for ``rows`` of activations, with stages that fit ``shared`` bytes.

    ``streams``: processors of a device that runs the kernel for Hopper, or 0.
    """
    if streams and _streamable(facts):
        known = _of_rows(_STREAMED, rows)

        def worth(config: Config) -> float:
            # With several tiles of activations, narrow ones of the weight read them too often.
            narrow = config.bn == 64 and rows > config.bm
            return _best_parts(facts, rows, config, streams)[0] * (0.87 if narrow else 1)

        return max(known, key=worth)
    config = _of_rows(_TABLE, rows)
    if facts.bits == 4 and facts.offset == 1 and not facts.ordered:
        if rows <= _FEW.bm and 4096 <= facts.rows <= 8192 and facts.chunks <= 32:
            config = _FEW
        elif config.bm == 16 and facts.rows >= 8192:
            config = config._replace(early=_EARLY)
    while config.stages > 1 and shared_bytes(config, facts) > shared:
        config = config._replace(stages=config.stages - 1)
    return config


def _of_rows(table: Sequence[tuple[int, _T]], rows: int) -> _T:
    """The entry for so many rows: the first one's whose most are as many, or the last one's."""
    return next((entry for most, entry in table if rows <= most), table[-1][1])


def _streamable(facts: Facts) -> bool:
    """Whether the kernel for Hopper can multiply by the weight, and is known to be quicker."""
    codes = (facts.bits, facts.high_bits, facts.width, facts.values, facts.middle, facts.paired)
    return (
        codes == (4, 0, 64, 0, 0, 0)
        and (facts.group, facts.tall, facts.offset) == (128, 1, 1)
        and facts.scales in (1, 2)
        and facts.columns % facts.chunk == 0
        and facts.rows * facts.columns >= _STREAMED_WEIGHT
    )


def shared_bytes(config: Config, facts: Facts) -> int:
    """Bytes of shared memory that a program of the kernel for all devices takes."""
    words = facts.width * facts.slices * (facts.bits + facts.high_bits) // 16
    pairs = 8 * config.bn * facts.chunk // facts.flush
    ahead = max(1, config.stages - 1) * (2 * config.bn * words + pairs)
    # Of activations the tile that is being multiplied is in shared memory too.
    return config.teams * (ahead + config.stages * 2 * config.bm * facts.chunk)


@lru_cache(maxsize=4096)
def split_of(facts: Facts, rows: int, config: Config, processors: int) -> tuple[int, int]:
    """Parts that a row's chunks are divided in, and chunks of a part.

    As many as fill the processors, whole rounds if possible. Each part has so many columns at least
    that the sums written and read again weigh less than its codes.
    """
    part = -(-facts.chunks // _best_parts(facts, rows, config, processors)[1])
    return -(-facts.chunks // part), part


def _best_parts(facts: Facts, rows: int, config: Config, processors: int) -> tuple[float, int]:
    """How much of the processors' time is used at best, and with how many parts."""
    tiles = -(-facts.rows // config.bn) * -(-rows // config.bm)
    places = processors * config.resident
    # Sums of more rows weigh more.
    columns = 1024 if config.streamed and config.bm > 8 else 512
    least = max(1, -(-columns // facts.chunk)) * config.teams
    best, most = (0.0, 1), max(1, min(16, facts.chunks // least))
    for parts in range(1, most + 1):
        programs = tiles * parts
        used = programs / (-(-programs // places) * places)
        # A round of programs lasts as long as a part, and each part more costs some of the time:
        # for its start, and its sums, written and read, beside the 17 bytes of 32 codes.
        if config.streamed:
            used /= 1 + (0.06 + 15 * config.bm / facts.columns) * parts
        else:
            used -= 0.03 * parts
        if used > best[0]:
            best = (used, parts)
    return best
