"""The library is found, or the reason why not is said; instruction sets can be chosen."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from quantmill.kernels import KernelRegistry
from quantmill_cpu import native
from quantmill_cpu.plugin import quantmill_kernels


def test_it_is_there() -> None:
    assert native.unavailable() is None
    assert native.library().qm_abi_version() == native.ABI_VERSION


def test_levels_ascend_and_the_best_one_is_the_default(fresh_library: pytest.MonkeyPatch) -> None:
    fresh_library.delenv("QUANTMILL_CPU_ISA", raising=False)
    known = ["baseline", "avx2", "avx512"]
    here = list(native.levels())
    assert here == known[: len(here)]
    flags = Path("/proc/cpuinfo")
    if platform.machine() == "x86_64" and flags.exists():
        words = flags.read_text(encoding="utf-8").split()
        assert ("avx2" in here) == ("avx2" in words)
        assert ("avx512" in here) == ({"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= {*words})
    for name in here:
        native.use_level(name)
        assert native.level() == name


def test_an_unknown_level_is_refused_and_changes_nothing() -> None:
    before = native.level()
    with pytest.raises(ValueError, match="'sse9' is none of"):
        native.use_level("sse9")
    assert native.level() == before


def test_the_environment_chooses_the_level(fresh_library: pytest.MonkeyPatch) -> None:
    fresh_library.setenv("QUANTMILL_CPU_ISA", "baseline")
    assert native.unavailable() is None
    assert native.level() == "baseline"


def test_a_level_that_this_machine_lacks_is_a_reason(fresh_library: pytest.MonkeyPatch) -> None:
    fresh_library.setenv("QUANTMILL_CPU_ISA", "amx")
    reason = native.unavailable()
    assert reason is not None and "QUANTMILL_CPU_ISA=amx" in reason and "baseline" in reason


def broken(kind: str, folder: Path, patch: pytest.MonkeyPatch) -> str:
    """Break the library in one way; words that the reason must have."""
    file = folder / "_native.so"
    if kind == "missing":
        words = "does not exist"
    elif kind == "text":
        file.write_text("no library", encoding="utf-8")
        words = str(file)
    elif kind == "other machine":
        whole = bytearray(native._FILE.read_bytes())
        whole[18:20] = (0x1234).to_bytes(2, "little")  # e_machine of its ELF header
        file.write_bytes(whole)
        words = str(file)
    elif kind == "other library":
        # Any library that Python itself has loaded, but not ours.
        import _ctypes

        file.write_bytes(Path(_ctypes.__file__).read_bytes())
        words = "not this package's library"
    else:
        patch.setattr(native, "ABI_VERSION", native.ABI_VERSION + 1)
        return f"has ABI {native.ABI_VERSION - 1}, this package wants {native.ABI_VERSION}"
    patch.setattr(native, "_FILE", file)
    return words


@pytest.mark.parametrize("kind", ["missing", "text", "other machine", "other library", "other ABI"])
def test_a_broken_library_is_a_reason_and_the_reference_is_used(
    kind: str, tmp_path: Path, fresh_library: pytest.MonkeyPatch
) -> None:
    words = broken(kind, tmp_path, fresh_library)
    reason = native.unavailable()
    assert reason is not None and reason.startswith("the native library can't be used")
    assert words in reason
    registry = KernelRegistry(quantmill_kernels())
    assert {registry.unavailable(kernel) for kernel in registry.kernels} == {reason}
    traits = {"bits": 4, "grouping": "flat", "group_size": 64}
    assert registry.choose("quantize", "codebook", traits, device="cpu", dtype="bfloat16") is None


def test_kernels_are_chosen_where_they_fit_and_only_there() -> None:
    registry = KernelRegistry(quantmill_kernels())

    def chosen(form: str, dtype: str, device: str = "cpu", **traits: object) -> str | None:
        choice = registry.choose("quantize", form, traits, device=device, dtype=dtype)
        return None if choice is None else choice.kernel.name

    flat = {"grouping": "flat", "group_size": 64}
    assert chosen("codebook", "float16", bits=4, **flat) == "cpu-quantize-codebook4"
    assert chosen("codebook", "float32", bits=8, **flat) == "cpu-quantize-codebook8"
    assert chosen("codebook", "bfloat16", bits=8, **flat) is None
    assert chosen("codebook", "float16", device="cuda", bits=4, **flat) is None
    assert chosen("codebook", "float16", bits=4, grouping="flat", group_size=65) is None
    rows = {"bits": 8, "grouping": "channel", "offset": "none", "packing": "i8"}
    assert chosen("affine", "bfloat16", **rows) == "cpu-quantize-rows-int8"
    assert chosen("affine", "float64", **rows) is None
