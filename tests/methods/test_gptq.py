"""GPTQ and rounding to nearest as methods: budgets in bytes, act-order, clear refusals."""

import json
from pathlib import Path

import pytest
import torch

import niwaki
from niwaki.config.targets import Bits, parse_target
from niwaki.data.statistics import Needs, Statistics
from niwaki.data.stream import CalibrationData
from niwaki.errors import TargetError
from niwaki.formats.quantized import stored_tensors
from niwaki.methods import gptq, rtn
from support.models import calibration_of, correlated_inputs, make_block, run_method, tiny_llama, write_texts

PUBLISHED = {"clip": False, "act_order": False, "rounds": 0, "damping_frac": 0.01}


def output_error(found: torch.Tensor, weight: torch.Tensor, x: torch.Tensor) -> float:
    return float((x @ (found - weight).T).square().sum())


def matrix(rows: int = 32, columns: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)), correlated_inputs(300, columns)


@pytest.mark.parametrize("bits", ["2bit", "3bit", "4bit", "8bit"])
@pytest.mark.parametrize("group", [0, 16])
def test_gptq_beats_rounding_and_rounds_beat_gptq(bits: str, group: int) -> None:
    weight, x = matrix()
    target = parse_target(bits)
    plain = run_method(rtn, weight, x, target, group=group)
    swept = run_method(gptq, weight, x, target, group=group, rounds=0)
    better = run_method(gptq, weight, x, target, group=group)
    errors = [output_error(found, weight, x) for found in (plain, swept, better)]
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("bits", ["2bit", "3bit", "4bit"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group", [0, 16])
def test_the_defaults_beat_the_published_form_on_other_inputs(bits: str, symmetric: bool, group: int) -> None:
    weight, x = matrix()
    others = correlated_inputs(1300, 64)[300:]
    grid = {"symmetric": symmetric, "group": group}
    found = run_method(gptq, weight, x, parse_target(bits), **grid)
    published = run_method(gptq, weight, x, parse_target(bits), **grid, **PUBLISHED)
    assert output_error(found, weight, others) < 0.9 * output_error(published, weight, others)


@pytest.mark.parametrize("tokens", [80, 600])
def test_the_damping_is_that_of_least_error_on_held_out_tokens(tokens: int) -> None:
    """Choose among fixed dampings by float64 errors on the last eighth of the tokens, codes from all others."""
    weight, x = torch.randn(32, 64, generator=torch.Generator().manual_seed(0)), correlated_inputs(tokens, 64)
    others, held = x[: tokens - tokens // 8], x[tokens - tokens // 8 :]
    target = parse_target("3bit")
    errors = {}
    for damping_frac in gptq.DAMPINGS:
        found = run_method(gptq, weight, others, target, group=16, damping_frac=damping_frac)
        errors[damping_frac] = float((held.double() @ (found - weight).double().T).square().sum())
    best = min(errors, key=errors.__getitem__)
    chosen = run_method(gptq, weight, x, target, group=16, damping_frac=0)
    assert torch.equal(chosen, run_method(gptq, weight, x, target, group=16, damping_frac=best))
    assert best >= 0.1 or tokens > 100, "few tokens need much damping"


@pytest.mark.parametrize("symmetric", [False, True])
def test_rtn_is_within_half_a_step(symmetric: bool) -> None:
    weight, x = matrix()
    found = run_method(rtn, weight, x, parse_target("4bit"), group=0, symmetric=symmetric, clip=False)
    top = weight.abs().amax(1) / 7 if symmetric else (weight.amax(1) - weight.amin(1)) / 15
    # The symmetric grid has one level less above zero: what lies beyond it is cut.
    inside = weight.abs() <= (7.4 * top)[:, None] if symmetric else torch.ones_like(weight, dtype=torch.bool)
    assert ((found - weight).abs() <= top[:, None] * 0.51 + 1e-3)[inside].all()


def test_act_order_helps_where_inputs_differ_in_size() -> None:
    weight, x = matrix()
    x = x * torch.logspace(-1.5, 1.5, 64)[torch.randperm(64, generator=torch.Generator().manual_seed(4))]
    errors = [
        output_error(
            run_method(gptq, weight, x, parse_target("3bit"), group=0, **PUBLISHED | {"act_order": order}), weight, x
        )
        for order in (False, True)
    ]
    assert errors[1] < errors[0]


@pytest.mark.parametrize(("bits", "group", "symmetric", "expected"), [
    ("4bit", 0, False, 4 + 20 / 64), ("4bit", 16, True, 4 + 16 / 16), ("2bit", 32, True, 2 + 16 / 32),
    ("2bit", 64, False, 2.28125),
])  # fmt: skip
def test_bits_count_codes_scales_and_zero_codes(bits: str, group: int, symmetric: bool, expected: float) -> None:
    weight, x = matrix()
    block = make_block({"m": weight})
    config = rtn.Config(group=group, symmetric=symmetric)
    packed = rtn.compress(
        block, calibration_of(block, x, rtn.needs(config)), {"m": parse_target(bits)}, config, torch.Generator()
    )["m"]
    assert packed.nbytes(torch.bfloat16) == sum(t.nbytes for t in stored_tensors(packed.parts, 64).values())
    assert packed.nbytes(torch.bfloat16) * 8 / weight.numel() == expected


@pytest.mark.parametrize("method", ["gptq", "rtn"])
@pytest.mark.parametrize(("target", "options", "message"), [
    ("4bit", {"group": 24}, "groups of 24 do not divide its 32 columns: for example 32"),
    ("5bit", {"group": 0}, "rounds to 2, 3, 4 or 8 bits"),
    ("1.6bit", {"group": 0}, "squeeze10 mixes widths"),
    ("0.5", {}, "meets bits such as 4bit"),
])  # fmt: skip
def test_what_does_not_fit_is_refused_and_nothing_is_written(
    method: str, target: str, options: dict, message: str, tmp_path: Path
) -> None:
    model = tiny_llama(tmp_path / "model", blocks=1)
    text = write_texts(tmp_path / "text.jsonl")
    with pytest.raises(TargetError, match=message):
        niwaki.compress(
            model, tmp_path / "out", method=method, target=target, options=options, device="cpu",
            calibration={"files": (str(text),), "samples": 2, "seq_len": 8},
        )  # fmt: skip
    assert not list(tmp_path.glob("out*"))


def test_lines_tell_bits_and_bytes(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model", blocks=1)
    niwaki.compress(
        model, tmp_path / "out", method="rtn", target="4bit", options={"group": 16, "symmetric": True}, device="cpu"
    )
    lines = [json.loads(line) for line in (tmp_path / "out/niwaki/blocks.jsonl").read_text().splitlines()]
    for line in lines:
        rows, columns = line["shape"]
        assert line["kind"] == "codes" and line["bits"] == 8 * line["bytes"] / (rows * columns)
        assert line["bits"] > 4


@pytest.mark.parametrize("options", [{"rounds": 0}, {"rounds": 0, "act_order": False}, {}, {"symmetric": True}])
def test_toward_dense_comes_nearer_to_the_outputs_of_the_dense_model(options: dict[str, object]) -> None:
    full = correlated_inputs(300, 32)
    x = 0.9 * full + 0.4 * torch.randn(full.shape, generator=torch.Generator().manual_seed(9))
    weight = torch.randn(12, 32, generator=torch.Generator().manual_seed(0))
    statistics = Statistics(Needs(gram=True, full=True))
    statistics.add(x, full)
    block, calib = make_block({"m": weight}), CalibrationData({"m": statistics})
    errors = []
    for share in (0.0, 0.5, 1.0):
        config = gptq.Config(toward_dense=share, group=16, **options)
        assert gptq.needs(config).full == gptq.needs(config).dense == (share > 0)
        found = gptq.compress(block, calib, {"m": Bits(4)}, config, torch.Generator())["m"].weight_OI
        errors.append(float((x @ found.T - full @ weight.T).square().sum()))
    assert errors[2] < errors[1] < errors[0]
