"""PTQ1.61: columns of large inputs, both kinds of columns by their formulas, scales that learn and never get worse."""

from pathlib import Path

import numpy as np
import pytest
import torch

import niwaki
from niwaki.compression.walk import collect
from niwaki.config.targets import Bits
from niwaki.data.stream import CalibrationData
from niwaki.errors import TargetError
from niwaki.methods import ptq161
from niwaki.methods.ptq161 import Config, Scales
from support.binary_weights import (
    bits_of,
    output_error,
    random,
    record,
    record_and_tensors,
    wide,
)
from support.blocks import first_block
from support.models import correlated_inputs, tiny_llama, write_texts


def test_the_start_equals_the_formulas() -> None:
    weight, x = random(9, 40), correlated_inputs(200, 40)
    packed = record(ptq161, weight, x, rounds=0)
    w = weight.double().numpy()
    norms = (x.double().numpy() ** 2).sum(0)
    salient = sorted(np.argsort(-norms)[:8].tolist())
    others = [j for j in range(40) if j not in salient]
    found = packed.weight_OI.numpy()
    for i in range(9):
        mu = sum(w[i, j] for j in others) / 32
        alpha = sum(abs(w[i, j] - mu) for j in others) / 32
        low, high = min(0.0, min(w[i, salient])), max(0.0, max(w[i, salient]))
        step = (high - low) / 15
        for j in range(40):
            if j in salient:
                expected = min(max(round(w[i, j] / step) + round(-low / step), 0), 15) - round(-low / step)
                assert found[i, j] == pytest.approx(expected * step, rel=1e-3, abs=1e-6)
            else:
                assert found[i, j] == pytest.approx(mu + (alpha if w[i, j] >= mu else -alpha), rel=5e-3, abs=2e-5)


def test_weights_are_what_the_counted_tensors_say(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = wide()
    packed, tensors = record_and_tensors(monkeypatch, ptq161, weight, x, rounds=3, samples=4, rate_frac=0.05)
    assert packed.detail["method_bytes"] == ptq161._stored_bytes(96, 256, Config())
    assert packed.detail["method_bits"] == pytest.approx(1.6 + 52 / 256 + 14 / 96, abs=0.01)
    picked = bits_of(tensors["columns"], 256)
    assert picked.sum() == packed.detail["salient_columns"] == 51
    codes = sum(bits_of(tensors["codes"][k], 96, 51) * 2**k for k in range(4))
    zero = sum(bits_of(tensors["zero"][k], 96) * 2**k for k in range(4))
    expected = np.zeros((96, 256))
    expected[:, picked] = (codes - zero[:, None]) * tensors["scale"].astype(np.float64)[:, None]
    spread, middle = tensors["level"].astype(np.float64)
    sign = bits_of(tensors["sign"], 96, 205) * 2.0 - 1
    column = tensors["column_scale"].astype(np.float64)
    assert len(np.unique(column)) > 100, "column scales have learned"
    expected[:, ~picked] = (sign * spread[:, None] + middle[:, None]) * column
    np.testing.assert_allclose(packed.weight_OI.numpy(), expected, rtol=1e-5, atol=1e-8)


def test_gradients_of_all_scales_are_those_of_the_formula() -> None:
    weight = random(5, 20)
    scales = Scales.start(weight, torch.tensor([1, 6, 7, 12]))
    gradient = random(5, 20, seed=1).double()
    parameters = (scales.alpha_O, scales.row_O, scales.column_N)
    for parameter in parameters:
        parameter.requires_grad_(True)
    scales.dense().backward(gradient.float())
    alpha, row, column = (parameter.detach().double().requires_grad_(True) for parameter in parameters)
    mean, sign = scales.mean_O.double(), scales.positive_ON.double() * 2 - 1
    values = torch.outer(row, column) * (alpha[:, None] * sign + mean[:, None])
    (values * gradient[:, scales.binary_N]).sum().backward()
    for mine, exact in zip(parameters, (alpha, row, column), strict=True):
        assert mine.grad is not None and exact.grad is not None
        torch.testing.assert_close(mine.grad.double(), exact.grad, rtol=2e-3, atol=1e-7)


@pytest.mark.parametrize(("rate_frac", "improves"), [(0.01, True), (50.0, False)])
def test_learning_never_ends_above_its_start(rate_frac: float, improves: bool, tmp_path: Path) -> None:
    block, stream = first_block(tmp_path, windows=16)
    config = Config(rounds=8, samples=14, rate_frac=rate_frac, target="block")
    calib = CalibrationData(collect(block, stream, ptq161.needs(config))[0], stream)
    targets = dict.fromkeys(block.linears, Bits(8.0))
    for packed in ptq161.compress(block, calib, targets, config, torch.Generator()).values():
        start, end = packed.detail["heldout_error_start"], packed.detail["heldout_error"]
        assert (end < 0.95 * start) if improves else (end == start)
        assert packed.note == ("" if improves else ptq161.KEPT_START)


def test_large_inputs_are_worth_four_bits_and_learning_helps() -> None:
    weight, x = wide()
    start, learned = (output_error(record(ptq161, weight, x, rounds=r).weight_OI, weight, x) for r in (0, 10))
    other = output_error(record(ptq161, weight, x[:0]).weight_OI, weight, x)
    assert learned < start < other


def test_without_tokens_columns_are_ranked_by_their_weights() -> None:
    weight = random(6, 30)
    weight[:, [2, 11, 12, 20, 21, 28]] *= 5
    packed = record(ptq161, weight, correlated_inputs(8, 30)[:0])
    assert "binarised by its weights alone" in packed.note and "heldout_error" not in packed.detail
    salient = [j for j in range(30) if len(packed.weight_OI[:, j].abs().unique()) == 6]
    assert set(salient) >= {2, 11, 12, 20, 21, 28}
    assert torch.isfinite(record(ptq161, torch.zeros(8, 32), correlated_inputs(40, 32)).weight_OI).all()


def test_a_target_below_reach_is_refused(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model", blocks=1)
    calibration = {"files": (str(write_texts(tmp_path / "text.jsonl")),), "samples": 2, "seq_len": 16}
    with pytest.raises(TargetError, match=r"32×32, needs 3\.6\d\d bits with this method"):
        niwaki.compress(model, tmp_path / "out", method="ptq161", target="2bit", device="cpu", calibration=calibration)
    assert not list(tmp_path.glob("out*"))
