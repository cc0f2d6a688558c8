"""Rounding what pruning left: zeros stay, errors go on to the right, grids know kept weights alone."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from niwaki.config.targets import NM, Bits, Sparsity
from niwaki.formats.packed import Packed
from niwaki.methods import gptq, rtn
from niwaki.methods.shared.masks import keep_by_group, keep_by_row
from support.models import calibration_of, correlated_inputs, make_block

TARGETS = [NM(2, 4), Sparsity(0.5), Sparsity(0.9)]


def problem(target: NM | Sparsity, rows: int = 12, columns: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    """Return weights, inputs and a mask by Wanda's score."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(3))
    x = correlated_inputs(200, columns, seed=5)
    score = weight.abs() * x.norm(dim=0)
    keep = keep_by_group(score, target) if isinstance(target, NM) else keep_by_row(score, target)
    return weight, x, keep


def chained(module: Any, weight: Tensor, x: Tensor, start: Tensor, bits: int = 4, **options: Any) -> Packed:
    """Return the record of a quantizer after a step that left `start`."""
    block = make_block({"m": weight})
    config = module.Config(symmetric=True, **options)
    calib = calibration_of(block, x, module.needs(config))
    calib = replace(calib, start={"m": Packed.masked(start, start != 0)})
    found: Packed = module.compress(block, calib, {"m": Bits(bits)}, config, torch.Generator())["m"]
    return found


def reference(weight: Tensor, x: Tensor, keep: Tensor, bits: int, group: int, damping_frac: float = 0.01) -> np.ndarray:
    """Round by Algorithm 1 of GPTQ in float64, one weight after another; pruned weights become zero.

    H = XᵀX + λI. Take H⁻¹ restricted to the columns that are left. Column j of a row moves the columns after it by
    −(w_j − q_j) / [H⁻¹]_jj · [H⁻¹]_j:, and is then eliminated.
    """
    left, kept = weight.double().numpy().copy(), keep.numpy()
    gram = x.double().numpy().T @ x.double().numpy()
    inverse = np.linalg.inv(gram + damping_frac * np.trace(gram) / len(gram) * np.eye(len(gram)))
    rows, columns = left.shape
    found, top = np.zeros_like(left), 2 ** (bits - 1) - 1
    scale = np.zeros(rows)
    for j in range(columns):
        if j % group == 0:
            scale = np.array([max(abs(left[r, j : j + group][kept[r, j : j + group]]), default=0) for r in range(rows)])
            scale = np.maximum(scale / top, 2.0**-24)
        for r in range(rows):
            code = np.clip(np.rint(left[r, j] / scale[r]), -top - 1, top) if kept[r, j] else 0
            found[r, j] = np.float16(scale[r]) * code
            error = (left[r, j] - scale[r] * code) / inverse[j, j]
            left[r, j + 1 :] -= error * inverse[j, j + 1 :]
        inverse -= np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return found


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("group", [8, 0])
@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_gptq_with_a_mask_is_the_definition(target: NM | Sparsity, group: int, joint: bool) -> None:
    weight, x, keep = problem(target)
    begin = weight if joint else weight * keep
    published = {"clip": False, "act_order": False, "rounds": 0, "damping_frac": 0.01}
    found = chained(gptq, weight, x, weight * keep, group=group, joint=joint, **published).weight_OI
    expected = torch.from_numpy(reference(begin, x, keep, 4, group or 32))
    assert (found[~keep] == 0).all()
    # A tie that turns changes what follows it in its row; all other rows agree.
    same = ((found - expected).abs() < 1e-3 * expected.abs().amax(1, keepdim=True)).all(1)
    assert same.float().mean() > 0.8


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_nearest_takes_the_grid_of_what_was_left(target: NM | Sparsity, bits: int) -> None:
    weight, x, keep = problem(target)
    start = weight * keep * 0.5  # what the step before learned, not the dense weights
    found = chained(rtn, weight, x, start, bits, group=8, clip=False).weight_OI
    largest = start.view(12, 4, 8).abs().amax(2, keepdim=True).expand(12, 4, 8).reshape(12, 32)
    step = largest / (2 ** (bits - 1) - 1)
    assert (found[~keep] == 0).all()
    assert ((found - start).abs() <= 0.51 * step + 1e-3 * largest).all()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"act_order": False},
        {"rounds": 0, "clip": False},
        {"clip": False},
        {"joint": True},
        {"learn_rounds": 3, "target": "block"},
    ],
    ids=str,
)
@pytest.mark.parametrize("target", TARGETS[:2], ids=str)
def test_every_option_leaves_zeros_alone_and_beats_rounding(target: NM | Sparsity, options: dict) -> None:
    weight, x, keep = problem(target, rows=24)
    start = weight * keep
    wanted = weight if options.keys() & {"joint", "learn_rounds"} else start  # learning looks at the dense block
    swept = chained(gptq, weight, x, start, group=0, **options)
    assert (swept.weight_OI[~keep] == 0).all()
    plain = chained(rtn, weight, x, start, group=0, clip=options.get("clip", True))
    errors = [float((x @ (found.weight_OI - wanted).T).square().sum()) for found in (swept, plain)]
    assert errors[0] < errors[1]
    assert swept.parts[0].grid == "symmetric"


def test_one_sweep_for_both_errors_beats_rounding_behind_a_mask_that_changed_no_weight() -> None:
    weight, x, keep = problem(NM(2, 4), rows=64)
    errors = [
        float((x @ (chained(gptq, weight, x, weight * keep, joint=joint, group=0).weight_OI - weight).T).square().sum())
        for joint in (False, True)
    ]
    assert errors[1] < 0.85 * errors[0]


@pytest.mark.parametrize("module", [gptq, rtn])
def test_without_tokens_what_was_left_is_rounded(module: Any) -> None:
    weight, _, keep = problem(NM(2, 4))
    found = chained(module, weight, torch.zeros(0, 32), weight * keep, group=0)
    assert (found.weight_OI[~keep] == 0).all() and torch.isfinite(found.weight_OI).all()
    assert float((found.weight_OI - weight * keep).norm()) < 0.1 * float(weight.norm())
