"""Files that a folder has beside its weights, of a source that holds all in one file."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from quantmill.architecture import COMPANIONS
from quantmill.checkpoint.containers import container_of
from quantmill.findings import QuantmillError, Severity, declare
from quantmill.job import Job
from quantmill.registrations import resolve

__all__ = ["files_beside"]

LOST_TOKENIZER = declare(
    "QM-CONVERT-006", "The tokenizer of a file can't be written as files", Severity.WARNING
)


def files_beside(job: Job) -> dict[str, bytes]:
    """The tokenizer in a file (GGUF) as files by name; nothing for a folder, which has them."""
    path = job.headers.source.describe()
    container = container_of(path, job.host)
    if container is None or container.tokenizer is None:
        return {}
    try:
        tokenizer: Any = resolve(container.tokenizer)(Path(path))
    except (ImportError, QuantmillError) as error:
        job.findings.add(
            LOST_TOKENIZER(path, str(error), "take the files of the model's own folder")
        )
        return {}
    save = getattr(tokenizer, "save_pretrained", None)
    if not callable(save):
        return {}
    with tempfile.TemporaryDirectory() as folder:
        save(folder)
        found = sorted(Path(folder).iterdir())
        return {item.name: item.read_bytes() for item in found if item.name in COMPANIONS}
