"""Weights take large pages while these come fast, and small ones for a while after a slow one."""

from __future__ import annotations

import pytest
import torch

from quantmill_cpu import pages

MIB = 1 << 20


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes for which large pages were asked for."""
    sizes: list[int] = []
    real = pages.large_pages

    def large(size: int) -> torch.Tensor:
        sizes.append(size)
        return real(size)

    monkeypatch.setattr(pages, "large_pages", large)
    return sizes


def test_memory_can_be_written_whole(asked: list[int]) -> None:
    supply = pages.Supply()
    for size in (0, 1, 5 * MIB + 3):
        memory = supply.take(size)
        assert memory.shape == (size,) and memory.dtype == torch.uint8
        memory.fill_(7)
        pages.written(memory)
        assert bool((memory == 7).all())


def test_a_slow_page_is_followed_by_small_ones(asked: list[int]) -> None:
    supply = pages.Supply()
    supply.note(10**9)
    for _ in range(4):
        supply.take(16 * MIB)
    assert not asked
    supply.note(10**9)  # the second pause is twice as long
    for _ in range(8):
        supply.take(16 * MIB)
    assert not asked
    supply.take(1)
    assert asked == [1]


def test_fast_pages_shorten_the_next_pause(asked: list[int]) -> None:
    supply = pages.Supply()
    for took in (10**9, 10**9, 10**9, 1000, 1000, 1000, 10**9):
        supply._small = 0
        supply.note(took)
    for _ in range(5):
        supply.take(16 * MIB)
    assert asked == [16 * MIB]
