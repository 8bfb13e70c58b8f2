"""Text files to measure on."""

from __future__ import annotations

from pathlib import Path

from quantmill.findings import QuantmillError, declare

__all__ = ["named_text", "read_text"]

NO_TEXT = declare("QM-EVAL-004", "A file to measure on is empty or no UTF-8 text")


def read_text(path: Path) -> str:
    """The text of a UTF-8 file.

    Raises:
        QuantmillError: ``QM-EVAL-004``, it is empty, or no UTF-8.
        OSError: it can't be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        cause = f"byte {error.start} is not UTF-8"
    else:
        if text.strip():
            return text
        cause = "it is empty" if not text else "it holds spaces and line breaks only"
    raise QuantmillError(NO_TEXT(str(path), cause, "give a text file"))


def named_text(text: str | Path) -> tuple[str, str]:
    """The words of a text or of a file, and what reports call it.

    Raises:
        QuantmillError: as :func:`read_text`.
    """
    if isinstance(text, Path):
        return read_text(text), text.name
    return text, "the given text"
