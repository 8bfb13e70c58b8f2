"""Findings of the GGUF plugin."""

from __future__ import annotations

from quantmill.findings import Severity, declare

__all__ = [
    "ALIGNMENT",
    "BAD_TENSOR",
    "BAD_TOKENIZER",
    "BAD_VALUE",
    "CANT_EXPORT",
    "COUNT",
    "DIMENSIONS",
    "DUPLICATE",
    "IMPORTANCE",
    "INEXACT_TOKENIZER",
    "METADATA",
    "MISSING_KEY",
    "NOT_FINITE",
    "NOT_GGUF",
    "NOT_MEASURED",
    "NOT_QUANTIZED",
    "NO_BLOCKS",
    "NO_IMPORTANCE",
    "NO_TOKENIZER",
    "OFFSET",
    "OVERLAP",
    "REQUANTIZED",
    "SPLIT",
    "STRING",
    "TRUNCATED",
    "TYPE",
    "UNEVEN",
    "UNKNOWN_ARCHITECTURE",
    "UNKNOWN_MIX",
    "UNREADABLE",
    "UNSUPPORTED",
    "VERSION",
]

NOT_GGUF = declare("QM-GGUF-001", "A file is not a GGUF file")
TRUNCATED = declare("QM-GGUF-002", "A GGUF file ends early")
VERSION = declare("QM-GGUF-003", "A GGUF file has a version that is not read")
COUNT = declare("QM-GGUF-004", "A GGUF file claims more entries than it has room for")
STRING = declare("QM-GGUF-005", "A text in a GGUF file can't be read")
METADATA = declare("QM-GGUF-006", "A metadata value of a GGUF file is malformed")
DUPLICATE = declare("QM-GGUF-007", "A GGUF file has a name twice")
DIMENSIONS = declare("QM-GGUF-008", "A tensor of a GGUF file has impossible dimensions")
TYPE = declare("QM-GGUF-009", "A tensor of a GGUF file has an unknown type")
OFFSET = declare("QM-GGUF-010", "A tensor of a GGUF file lies where none can")
OVERLAP = declare("QM-GGUF-011", "Two tensors of a GGUF file overlap")
ALIGNMENT = declare("QM-GGUF-012", "A GGUF file has an impossible alignment")
SPLIT = declare("QM-GGUF-013", "The files of a split GGUF don't belong together")
UNREADABLE = declare("QM-GGUF-014", "A GGUF file can't be opened or written")
UNKNOWN_ARCHITECTURE = declare(
    "QM-GGUF-020", "The architecture of a GGUF file is not known here", Severity.WARNING
)
MISSING_KEY = declare("QM-GGUF-021", "A GGUF file lacks metadata that its architecture needs")
BAD_VALUE = declare("QM-GGUF-022", "A metadata value of a GGUF file can't be right")
UNSUPPORTED = declare("QM-GGUF-023", "A GGUF file uses something that can't be loaded yet")
BAD_TENSOR = declare("QM-GGUF-024", "A quantized weight of a GGUF file contradicts the model")
CANT_EXPORT = declare("QM-GGUF-040", "A model can't be written to a GGUF file")
NO_TOKENIZER = declare(
    "QM-GGUF-043", "A model that is written to a GGUF file has no tokenizer", Severity.WARNING
)
BAD_TOKENIZER = declare("QM-GGUF-044", "A tokenizer can't be written to a GGUF file, or read")
UNEVEN = declare("QM-GGUF-041", "Parts of one tensor would have different types")
NOT_QUANTIZED = declare("QM-GGUF-042", "A weight that was planned quantized stayed float")
NO_BLOCKS = declare("QM-GGUF-030", "The rows of a weight don't fill a type's blocks")
UNKNOWN_MIX = declare("QM-GGUF-031", "A mix or type that was asked for does not exist")
NOT_FINITE = declare("QM-GGUF-032", "A weight can't be quantized to finite blocks")
IMPORTANCE = declare("QM-GGUF-033", "An importance matrix can't be read or does not fit")
REQUANTIZED = declare("QM-GGUF-034", "A tensor is quantized already")
NOT_MEASURED = declare(
    "QM-GGUF-035", "An importance matrix lacks tensors of the model", Severity.WARNING
)
NO_IMPORTANCE = declare(
    "QM-GGUF-036", "A mix is made without the importance matrix that it needs", Severity.WARNING
)
INEXACT_TOKENIZER = declare(
    "QM-GGUF-045",
    "llama.cpp cuts some texts in another way than the tokenizer",
    Severity.WARNING,
)
