"""Codes of everything that can be wrong with a checkpoint, in one place."""

from __future__ import annotations

from quantmill.findings import Severity, declare

# Finding the checkpoint.
SOURCE_MISSING = declare("QM-CKPT-001", "The source does not exist or cannot be read")
NO_CHECKPOINT = declare("QM-CKPT-002", "The source holds no weights that quantmill reads")
PICKLE = declare("QM-CKPT-003", "The weights are pickles, which can run code when loaded")
BAD_SPEC = declare("QM-CKPT-004", "A source is neither an existing path nor a Hub id")
FOREIGN_FILE = declare("QM-CKPT-005", "The source is a file that no installed plugin reads")
UNSAFE_NAME = declare("QM-CKPT-006", "A file name points outside the checkpoint's folder")
SHARD_MISSING = declare("QM-CKPT-007", "A shard named by the index is missing")
INDEX_INVALID = declare("QM-CKPT-008", "The index of shards is malformed")
INDEX_TENSOR = declare("QM-CKPT-009", "A tensor of the index is not in the shard named for it")
NOT_INDEXED = declare(
    "QM-CKPT-010", "A shard holds a tensor that the index does not place there", Severity.WARNING
)
JSON_INVALID = declare("QM-CKPT-011", "A JSON file of the checkpoint is malformed")
AMBIGUOUS = declare("QM-CKPT-012", "Several safetensors files and no index that joins them")
NO_INDEX = declare(
    "QM-CKPT-013", "Numbered shards without an index; all of them are read", Severity.WARNING
)
DUPLICATE_TENSOR = declare(
    "QM-CKPT-014", "Two shards hold the same tensor and no index says which is meant"
)

# The header of a safetensors file.
NO_SOURCE = declare("QM-CKPT-018", "An object that is no source stands where one is expected")
TRUNCATED = declare("QM-CKPT-020", "A safetensors file is shorter than its header says")
HEADER_LENGTH = declare("QM-CKPT-021", "A safetensors header has an absurd length")
HEADER_JSON = declare("QM-CKPT-022", "A safetensors header is not valid JSON")
HEADER_DUPLICATE = declare("QM-CKPT-023", "A safetensors header names a tensor twice")
HEADER_ENTRY = declare("QM-CKPT-024", "An entry of a safetensors header is malformed")
HEADER_DTYPE = declare("QM-CKPT-025", "A safetensors header names an unknown dtype")
HEADER_SHAPE = declare("QM-CKPT-026", "A safetensors header holds an impossible shape")
HEADER_OFFSETS = declare("QM-CKPT-027", "Offsets of a safetensors header contradict each other")
HEADER_METADATA = declare("QM-CKPT-028", "The metadata of a safetensors header is malformed")

# Reading tensors.
READ_SHORT = declare("QM-CKPT-030", "A file became shorter than its header says")
READ_FAILED = declare("QM-CKPT-031", "A file cannot be read")
UNKNOWN_TENSOR = declare("QM-CKPT-032", "The checkpoint has no tensor of this name")
NO_TORCH_DTYPE = declare("QM-CKPT-033", "The installed PyTorch has no dtype for a tensor")

# The Hugging Face Hub.
HUB_FAILED = declare("QM-CKPT-040", "The Hub cannot be reached or refused a request")
HUB_NOT_FOUND = declare("QM-CKPT-041", "The Hub has no such repository, revision or file")
HUB_DENIED = declare("QM-CKPT-042", "The Hub's repository is gated or private")
HUB_OFFLINE = declare("QM-CKPT-043", "Offline, and the local cache lacks what is needed")
HUB_RANGE = declare("QM-CKPT-044", "The Hub's answer is not the requested range of bytes")

# Writing.
OUTPUT_EXISTS = declare("QM-CKPT-050", "The output folder exists and is not empty")
DISK_FULL = declare("QM-CKPT-052", "The disk became full while writing")
WRITE_FAILED = declare("QM-CKPT-053", "The output cannot be written")
INCOMPLETE = declare("QM-CKPT-054", "A checkpoint without a single tensor would be written")
WRITTEN_TWICE = declare("QM-CKPT-055", "A tensor or file is written twice")
UNWRITABLE = declare("QM-CKPT-056", "A tensor is of a kind that safetensors can't hold")
BAD_NAME = declare("QM-CKPT-057", "A name cannot stand in a checkpoint")

# The manifest.
MANIFEST_MISSING = declare("QM-CKPT-060", "The folder has no manifest")
MANIFEST_INVALID = declare("QM-CKPT-061", "The manifest is malformed")
FILE_MISSING = declare("QM-CKPT-062", "A file of the manifest is missing")
FILE_CHANGED = declare("QM-CKPT-063", "A file differs from the manifest")
FILE_EXTRA = declare("QM-CKPT-064", "The folder has a file the manifest lacks", Severity.WARNING)
