"""What calibration will take, from a plan: the memory of :class:`quantmill.calibration.engine.Run`.

In memory at once are the modules outside the blocks, one block, its inputs for all windows, what
the windows have computed where they pause in a block, and what its calibrator works with. What one
batch computes is gone by then, but lies free between the rest in the heap.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import torch

from quantmill.memory import Sizes
from quantmill.registrations import resolve

if TYPE_CHECKING:
    from quantmill.backend import BlockCalibrator
    from quantmill.job import Job, Selection
    from quantmill.planning import ModulePlan
    from quantmill.targeting.types import Target

__all__ = ["BATCH_TOKENS", "STAGED_BYTES", "calibrating_bytes", "calibrator_of", "staged_bytes"]

BATCH_TOKENS: Final = 2048
"""Tokens that run through a block at once."""
STAGED_BYTES: Final = 2 << 30
"""Most memory for intermediate results of all batches in one block."""
_KEPT: Final = 12
"""Tensors of the size of the hidden states that a paused batch holds, roughly: residual, norm,
queries, keys, values, rotated copies, a wide MLP's two halves."""
_WIDE: Final = 5
"""Tensors of a batch that are as wide as the widest input, while the block computes."""

_BLOCK = re.compile(r"(.*?\.\d+)\.")


def staged_bytes(hidden: int) -> int:
    """What all batches hold while they pause within a block, from the bytes of its inputs."""
    return hidden * _KEPT


def calibrator_of(job: Job, selection: Selection) -> BlockCalibrator[Any]:
    """A new calibrator of a method that calibrates."""
    assert selection.method.calibrator is not None
    made: BlockCalibrator[Any] = resolve(selection.method.calibrator)(
        selection.config,
        device=torch.device(job.device),
        kernels=job.kernels,
        seed=job.options.seed,
    )
    return made


def calibrating_bytes(
    job: Job, modules: Sequence[ModulePlan], settings: Mapping[str, Any], itemsize: int
) -> int:
    """The peak of calibrating as planned, in bytes; zero where nothing is calibrated.

    ``itemsize`` is that of the float model's dtype. Windows are taken to be as many and as long
    as the options say, which data can fall short of.
    """
    targets: dict[str, dict[str, list[Target]]] = {}
    sizes: dict[str, int] = {}
    for entry in modules:
        found = _BLOCK.match(entry.name)
        block = "" if found is None else found[1]
        sizes[block] = sizes.get(block, 0) + entry.parameters * itemsize
        if entry.action == "quantize" and entry.target is not None:
            label = entry.method or next(iter(job.selections))
            if job.selections[label].method.calibrator is not None:
                targets.setdefault(block, {}).setdefault(label, []).append(entry.target)
    if not targets:
        return 0
    labels = {label for members in targets.values() for label in members}
    calibrators = {label: calibrator_of(job, job.selections[label]) for label in labels}
    working = max(
        calibrators[label].working_bytes(own)
        for members in targets.values()
        for label, own in members.items()
    )
    widest = max(
        target.in_features
        for members in targets.values()
        for own in members.values()
        for target in own
    )
    tokens = job.options.samples * job.options.length
    # Beside these, moments are summed in float32.
    computed = min(tokens, BATCH_TOKENS) * widest * (_WIDE * itemsize + 8)
    hidden = tokens * Sizes.of(settings).hidden * itemsize
    staged = staged_bytes(hidden)
    inputs = hidden + (staged if staged <= STAGED_BYTES else hidden)
    # The float model's hidden states, and its inputs of a block's linears, each counted by itself.
    inputs += max(
        (
            hidden + tokens * itemsize * sum(target.in_features for target in own)
            for members in targets.values()
            for label, own in members.items()
            if calibrators[label].exact_inputs(job.selections[label].config)
        ),
        default=0,
    )
    outside = sizes.pop("", 0)
    return outside + max(sizes.values(), default=0) + inputs + computed + working
