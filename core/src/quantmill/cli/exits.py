"""Exit codes, documented in ``quantmill --help``."""

from typing import Final

OK: Final = 0
PROBLEM: Final = 1
USAGE: Final = 2
ENVIRONMENT: Final = 3
INTERRUPTED: Final = 130
