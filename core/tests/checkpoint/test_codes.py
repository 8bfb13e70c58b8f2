"""Every declared code is raised somewhere and provoked by a test."""

from __future__ import annotations

from pathlib import Path

from quantmill.checkpoint import codes
from quantmill.findings import FindingCode


def test_no_code_is_declared_in_vain() -> None:
    declared = {name: item for name, item in vars(codes).items() if isinstance(item, FindingCode)}
    assert len({item.code for item in declared.values()}) == len(declared) > 30
    package = Path(codes.__file__).parent
    source = "".join(path.read_text() for path in package.glob("*.py") if path.name != "codes.py")
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    unraised = [name for name in declared if f"codes.{name}" not in source]
    untested = [item.code for item in declared.values() if item.code not in tests]
    assert unraised == [] and untested == []
