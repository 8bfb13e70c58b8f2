"""The garbage collector rests during imports, and works as before after them."""

from __future__ import annotations

import gc
import weakref

from quantmill.importing import without_collector


class _Cycle:
    def __init__(self) -> None:
        self.own = self


def test_nothing_is_collected_until_the_end_and_all_of_it_afterwards() -> None:
    with without_collector():
        assert not gc.isenabled()
        lost = weakref.ref(_Cycle())
        with without_collector():
            pass
        assert not gc.isenabled()
        assert lost() is not None
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0
    gc.collect()
    assert lost() is None


def test_who_stopped_the_collector_starts_it() -> None:
    gc.disable()
    try:
        with without_collector():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
