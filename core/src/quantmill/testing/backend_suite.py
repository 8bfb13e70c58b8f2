"""What ``pytest --quantmill-backend NAME`` collects: a class for each short name of the backend."""

from __future__ import annotations

from quantmill.pytest_plugin import chosen
from quantmill.testing.backends import methods_of, suite_for

for _name in chosen:
    for _method in methods_of(_name):
        _made = suite_for(_method)
        globals()[_made.__name__] = _made
