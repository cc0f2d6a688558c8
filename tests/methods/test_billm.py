"""BiLLM against plain loops, and true bits that are those of decodable tensors."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import niwaki
from niwaki.errors import TargetError
from niwaki.methods import billm
from niwaki.methods.shared.binary import choose_salient, split_by_size
from support.binary_weights import (
    binarised,
    bits_of,
    one_bit_error,
    output_error,
    random,
    record,
    record_and_tensors,
    wide,
)
from support.models import correlated_inputs, tiny_llama, write_texts


def plain(weight: np.ndarray, salient: np.ndarray, sparse: np.ndarray, mean: bool) -> np.ndarray:
    """Return the values of one block in float64, row by row."""
    found = np.zeros_like(weight)
    for row, values in enumerate(weight):
        _, _, first = binarised(values[salient].tolist(), mean)
        _, _, second = binarised((values[salient] - np.array(first)).tolist(), mean)
        found[row, salient] = np.array(first) + np.array(second)
        for group in (~salient & ~sparse[row], ~salient & sparse[row]):
            found[row, group] = binarised(values[group].tolist(), mean)[2]
    return found


@pytest.mark.parametrize("mean", [False, True])
def test_a_block_equals_plain_loops(mean: bool) -> None:
    weight, diagonal = random(9, 40), random(1, 40, seed=4)[0].abs() + 0.01
    coded, values = billm._encode(weight, diagonal, billm.Config(mean=mean, salient=12))
    salient = choose_salient(weight, (weight**2 / diagonal**2).sum(0), 12, mean)
    assert torch.equal(coded.salient_C, salient)
    sparse = split_by_size(weight, ~salient.expand_as(weight), mean)
    expected = plain(weight.double().numpy(), salient.numpy(), sparse.numpy(), mean)
    np.testing.assert_allclose(values.numpy(), expected, rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize(("mean", "values"), [(False, 4), (True, 7)])
@pytest.mark.parametrize("columns", [256, 200])
def test_weights_are_what_the_counted_tensors_say(
    mean: bool, values: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, x = wide()
    weight, x = weight[:, :columns].contiguous(), x[:, :columns].contiguous()
    packed, tensors = record_and_tensors(monkeypatch, billm, weight, x, mean=mean)
    assert packed.detail["method_bits"] == pytest.approx(2 + 1 / 96 + 2 * values * 16 / columns, abs=1e-3)
    assert packed.kind == "dense" and packed.nbytes(torch.bfloat16) == 2 * weight.numel()
    first, second = (bits_of(tensors[name], 96, columns) * 2.0 - 1 for name in ("sign", "second"))
    salient = bits_of(tensors["salient"], columns)
    assert packed.detail["salient_columns"] == salient.sum() and 0 < salient[:128].sum() <= 50
    scale = tensors["scale"].astype(np.float64)
    mu = tensors["mean"].astype(np.float64) if mean else np.zeros((3, *scale.shape[1:]))
    for row in range(0, 96, 7):
        for column in range(columns):
            at = (column // 128, row)
            if salient[column]:
                expected = mu[0][at] + scale[0][at] * first[row, column] + scale[1][at] * second[row, column]
            else:
                group = int(second[row, column] > 0)
                expected = mu[1 + group][at] + scale[2 + group][at] * first[row, column]
            assert float(packed.weight_OI[row, column]) == pytest.approx(expected, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("mean", [False, True])
def test_it_beats_one_bit_and_inputs_help(mean: bool) -> None:
    weight, x = wide()
    found = output_error(record(billm, weight, x, mean=mean).weight_OI, weight, x)
    blind = record(billm, weight, x[:0], mean=mean)
    assert found < 0.5 * one_bit_error(weight, x)
    assert found < output_error(blind.weight_OI, weight, x)
    assert "binarised by its weights alone" in blind.note and torch.isfinite(blind.weight_OI).all()


def test_zero_rows_and_matrices_stay_zero() -> None:
    weight, x = random(6, 32), correlated_inputs(50, 32)
    weight[2] = 0
    assert (record(billm, weight, x).weight_OI[2] == 0).all()
    assert (record(billm, torch.zeros(4, 32), x).weight_OI == 0).all()


def test_a_target_below_reach_is_refused_and_bits_are_recorded(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model", blocks=1, hidden_size=64, intermediate_size=96)
    text = write_texts(tmp_path / "text.jsonl")
    calibration = {"files": (str(text),), "samples": 2, "seq_len": 16}
    with pytest.raises(TargetError, match=r"64×64, needs 3\.016 bits with this method"):
        niwaki.compress(model, tmp_path / "out", method="billm", target="3bit", device="cpu", calibration=calibration)
    assert not list(tmp_path.glob("out*"))
    result = niwaki.compress(
        model, tmp_path / "out", method="billm", target="4bit", device="cpu", calibration=calibration
    )["result"]
    lines = [json.loads(line) for line in (tmp_path / "out/niwaki/blocks.jsonl").read_text().splitlines()]
    weights = sum(line["shape"][0] * line["shape"][1] for line in lines)
    assert all(line["bits"] == 32 and line["method_bits"] < 4 for line in lines)
    assert result["method_bits"] == pytest.approx(8 * sum(line["method_bytes"] for line in lines) / weights, abs=1e-4)
    assert result["bits"] == 32
