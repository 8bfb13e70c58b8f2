"""Passes after the first lower the error that GPTQ minimises, and keep to the layout."""

from __future__ import annotations

import pytest
import torch

from quantmill.host import default_host
from quantmill.kernels import KernelRegistry
from quantmill_gptq import refine
from quantmill_gptq.config import GptqConfig
from quantmill_gptq.solver import Problem, gptq

WIDTH = 32


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 3},
        {"bits": 2, "sym": False, "mse": 2.0},
        {"bits": 3, "desc_act": True},
        {"bits": 4, "static_groups": True, "damp_percent": 0.2},
    ],
)
def test_the_error_falls_with_every_pass(options: dict[str, object]) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 112, generator=generator)
    inputs = torch.randn(300, 112, generator=generator) @ torch.randn(112, 112, generator=generator)
    inputs[:, 5] = 0.0
    square = inputs.t() @ inputs / len(inputs)
    errors, scales = [], []
    for passes in (0, 1, 4):
        config = GptqConfig.from_user({"group_size": WIDTH, "refinements": passes, **options})
        problem = Problem(square, config, WIDTH, "layer.weight")
        form, loss = gptq(weight, problem, config, KernelRegistry([]))
        error = form.dequantize() - weight
        error[:, problem.dead] = 0.0
        damped = square + problem.damping * square.diagonal().mean() * torch.eye(112)
        errors.append(float(((error @ damped) * error).sum()))
        scales.append(form.scale)
        assert 0.0 < loss < 1.0
        assert torch.equal(form.scale, form.scale.half()) and bool((form.scale > 0).all())
    assert errors[0] > 1.001 * errors[1] > errors[2]
    if config.static_groups:
        assert torch.equal(scales[0], scales[2])


@pytest.mark.parametrize("options", [{}, {"desc_act": True}])
def test_gptaq_fits_the_outputs_on_other_inputs(options: dict[str, object]) -> None:
    """With 8 bits rounding is small beside what there is to make up for."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 64, generator=generator)
    inputs = torch.randn(400, 64, generator=generator) @ torch.randn(64, 64, generator=generator)
    exact = inputs + 0.3 * torch.randn(400, 64, generator=generator) * inputs.std()
    square = inputs.t() @ inputs / len(inputs)
    cross = inputs.t() @ (exact - inputs) / len(inputs)
    least = torch.linalg.lstsq(inputs, exact @ weight.t()).solution
    wanted = (exact @ weight.t() - inputs @ least).square().sum()
    errors = []
    for alpha in (0.0, 0.5, 1.0):
        how = {
            "bits": 8,
            "group_size": WIDTH,
            "gptaq_alpha": alpha,
            "damp_percent": 1e-4,
            **options,
        }
        config = GptqConfig.from_user(how)
        problem = Problem(square, config, WIDTH, "layer.weight")
        form, _ = gptq(weight, problem, config, KernelRegistry([]), cross)
        lacking = exact @ weight.t() - inputs @ form.dequantize().t()
        errors.append(float(lacking.square().sum() / wanted))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1.01


@pytest.mark.parametrize(("width", "passes"), [(32, 1), (64, 1), (128, 0), (-1, 0)])
def test_narrow_groups_are_chosen_twice_unless_told_otherwise(width: int, passes: int) -> None:
    assert GptqConfig.from_user({"group_size": width}).passes == passes
    assert GptqConfig.from_user({"group_size": width, "refinements": 2}).passes == 2


@pytest.mark.parametrize(
    ("width", "options"),
    [
        (128, {"bits": 4, "refinements": 1}),
        (40, {"bits": 2, "sym": False}),
        (320, {"bits": 3, "refinements": 2}),
        (64, {"bits": 4, "desc_act": True, "static_groups": True}),
    ],
)
def test_kernels_give_what_the_reference_gives(width: int, options: dict[str, object]) -> None:
    kernels = KernelRegistry.of(default_host())
    if kernels.choose("descend", "affine", {}, device="cpu", dtype="float32") is None:
        pytest.skip("there is no kernel")
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 320, generator=generator)
    inputs = torch.randn(500, 320, generator=generator) @ torch.randn(320, 320, generator=generator)
    config = GptqConfig.from_user({"group_size": width, **options})
    problem = Problem(inputs.t() @ inputs / len(inputs), config, width, "layer.weight")
    (form, loss), (exact, wanted) = (
        gptq(weight, problem, config, registry) for registry in (kernels, KernelRegistry([]))
    )
    # Sums over columns differ in their order, and a tie may fall to the other side.
    differing = (form.dequantize() != exact.dequantize()).float().mean()
    assert differing < 0.02 and abs(loss - wanted) < 0.01 * wanted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [96, 128, 512])
def test_slopes_of_many_columns_are_those_of_each_panel(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, width: int
) -> None:
    """Panels of 96 columns don't end where several of them do; groups of 512 have four panels."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 1100, generator=generator)
    inputs = torch.randn(2000, 1100, generator=generator)
    inputs = inputs @ torch.randn(1100, 1100, generator=generator)
    square = inputs.t() @ inputs / len(inputs)
    config = GptqConfig.from_user({"bits": 2, "group_size": width, "refinements": 1})
    problem = Problem(square, config, width, "layer.weight")
    damped = square + problem.damping * square.diagonal().mean() * torch.eye(1100)

    def error(several: int, precision: torch.dtype, passes: int = 1) -> float:
        monkeypatch.setattr(refine, "SEVERAL", several)
        monkeypatch.setattr(refine, "_precision", lambda device: precision)
        asked = config.model_copy(update={"refinements": passes})
        form, _ = gptq(weight, problem, asked, KernelRegistry([]))
        missing = form.dequantize() - weight
        return float(((missing @ damped) * missing).sum())

    unrefined, plain = error(512, torch.float32, passes=0), error(4096, torch.float32)
    found = error(512, dtype)
    assert plain < 0.99 * unrefined
    # Sums in another order, or of rounded numbers, choose a few codes otherwise.
    assert abs(found - plain) < 0.05 * (unrefined - plain)
