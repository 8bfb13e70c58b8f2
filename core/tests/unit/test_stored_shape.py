"""Planning a packed checkpoint where nothing knows its architecture."""

from __future__ import annotations

import pytest

from quantmill.findings import QuantmillError
from quantmill.stages.measure import _stored_target
from quantmill.targeting.types import ModuleInfo, ParameterInfo


@pytest.mark.parametrize(
    ("config", "fix"), [({"model_type": "llama"}, "quantmill[transformers]"), ({}, "config.json")]
)
def test_a_packed_weight_of_unknown_shape_is_named_with_what_to_get(
    config: dict[str, str], fix: str
) -> None:
    name = "model.layers.0.mlp.up_proj"
    packed = ParameterInfo(f"{name}.weight_packed", (64, 8), "I32")
    with pytest.raises(QuantmillError) as caught:
        _stored_target(ModuleInfo(name, "other", "Module", {"weight_packed": packed}), config)
    (found,) = caught.value.findings
    assert (found.code, found.where) == ("QM-TARGET-106", name)
    assert fix in found.fix
