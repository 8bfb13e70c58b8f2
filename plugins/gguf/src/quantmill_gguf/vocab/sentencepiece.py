"""``tokenizer.model``: the pieces of a SentencePiece model, read from its protocol buffer.

Only what a file needs is read: pieces with scores and types, and a few settings. Source: the
message ``ModelProto`` of SentencePiece (``sentencepiece_model.proto``), field numbers alone.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

__all__ = ["PieceModel", "parse"]

_UNIGRAM = 1


@dataclass(slots=True)
class PieceModel:
    """A SentencePiece model."""

    pieces: list[tuple[str, float, int]] = field(default_factory=list)
    """Text, score and type: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte."""
    kind: int = _UNIGRAM
    """1 unigram, 2 BPE."""
    space_prefix: bool = True
    """A space is put before the text."""
    squeeze: bool = True
    """Runs of spaces become one."""
    charsmap: bytes = b""


def parse(data: bytes) -> PieceModel:
    """Parse a model.

    Raises:
        ValueError: the bytes are no such message.
    """
    found = PieceModel()
    for number, value in _fields(data):
        if number == 1 and isinstance(value, bytes):
            found.pieces.append(_piece(value))
        elif number == 2 and isinstance(value, bytes):
            for inner, content in _fields(value):
                if inner == 3 and isinstance(content, int):
                    found.kind = content
        elif number == 3 and isinstance(value, bytes):
            for inner, content in _fields(value):
                if inner == 2 and isinstance(content, bytes):
                    found.charsmap = content
                elif inner == 3 and isinstance(content, int):
                    found.space_prefix = bool(content)
                elif inner == 4 and isinstance(content, int):
                    found.squeeze = bool(content)
    if not found.pieces:
        raise ValueError("it has no pieces")
    return found


def _piece(data: bytes) -> tuple[str, float, int]:
    text, score, kind = "", 0.0, 1
    for number, value in _fields(data):
        if number == 1 and isinstance(value, bytes):
            text = value.decode("utf-8", "replace")
        elif number == 2 and isinstance(value, float):
            score = value
        elif number == 3 and isinstance(value, int):
            kind = value
    return text, score, kind


def _fields(data: bytes) -> Iterator[tuple[int, int | float | bytes]]:
    position, size = 0, len(data)

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            if position >= size or shift > 63:
                raise ValueError("a number is cut off")
            byte = data[position]
            position += 1
            value |= (byte & 127) << shift
            if not byte & 128:
                return value
            shift += 7

    while position < size:
        key = varint()
        number, wire = key >> 3, key & 7
        if wire == 0:
            yield number, varint()
            continue
        width = {1: 8, 5: 4}.get(wire)
        if wire == 2:
            width = varint()
        if width is None or position + width > size:
            raise ValueError(f"field {number} is cut off or of wire type {wire}")
        chunk = data[position : position + width]
        position += width
        yield number, struct.unpack("<f", chunk)[0] if wire == 5 else chunk
