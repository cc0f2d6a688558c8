"""Rules for every method in the registry, on tiny random models."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import niwaki
from niwaki.config.targets import Bits, Target, parse_target
from niwaki.methods.method import MethodKind
from niwaki.methods.registry import get_method, method_names
from support.families import build, families
from support.models import add_tokenizer, correlated_inputs, file_bytes, run_method, tiny_llama, weights_of
from support.models import write_texts as texts

METHODS = method_names(MethodKind.WALK)
QUANTIZERS = [name for name in METHODS if Bits in get_method(name).accepts]
PRUNERS = [name for name in METHODS if name not in QUANTIZERS]
OWN = dict.fromkeys(QUANTIZERS, "4bit") | dict.fromkeys(PRUNERS, "0.5")  # a target that each accepts
OWN |= dict.fromkeys(
    ("arb", "billm", "ptq161", "trellis"), "8bit"
)  # a few rows and columns need as many scales as weights
SMALL: dict[str, dict[str, Any]] = {  # groups of 128 columns are more than these have; less to learn is enough
    "gptq": {"group": 0},
    "rtn": {"group": 0},
    "arb": {"salient": 8, "iterations": 3},
    "billm": {"salient": 8},
    "ptq161": {"rounds": 2, "samples": 4},
    "besa": {"steps": 24},
    "squeeze10": {"rounds": 2, "learn_rounds": 1, "samples": 4},
    "trellis": {"rounds": 1, "learn_rounds": 1, "samples": 4},
    "wandapp": {"rounds": 2, "samples": 4},
}
TARGETS = ["0.05", "0.5", "0.95", "2:4", "4:8", "1:4", "3:4"]


def compress(model: Path, out: Path, method: str, target: str, text: Path, **more: Any) -> dict[str, Any]:
    calibration = {"files": (str(text),), "samples": 6, "seq_len": 16}
    return niwaki.compress(
        model,
        out,
        method=method,
        target=target,
        calibration=calibration,
        device="cpu",
        options=SMALL.get(method, {}),
        **more,
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("conformance") / "model", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return texts(tmp_path_factory.mktemp("text") / "text.jsonl")


def on_matrix(method: str, weight_OI: torch.Tensor, tokens: int, target: Target) -> torch.Tensor:
    x_NI = correlated_inputs(tokens, weight_OI.shape[1])
    return run_method(get_method(method), weight_OI, x_NI, target, **SMALL.get(method, {}))


def pairs(targets: list[str]) -> list[tuple[str, str]]:
    """Return every method with each of `targets` that it accepts."""
    return [(m, t) for m in METHODS for t in targets if isinstance(parse_target(t), get_method(m).accepts)]


@pytest.mark.parametrize(("method", "target"), pairs(TARGETS))
@pytest.mark.parametrize("shape", [(7, 24), (1, 8), (33, 16), (5, 264)])
def test_budget_is_met_exactly_on_odd_shapes(method: str, target: str, shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = on_matrix(method, weight, 64, parse_target(target))
    assert int((found == 0).sum()) == parse_target(target).zeros_in(*shape)
    assert torch.isfinite(found).all()


@pytest.mark.parametrize("tokens", [0, 1, 5])
@pytest.mark.parametrize(("method", "target"), pairs(["0.5", "2:4"]))
def test_few_or_no_tokens_stay_finite_and_exact(method: str, tokens: int, target: str) -> None:
    weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(1))
    found = on_matrix(method, weight, tokens, parse_target(target))
    assert torch.isfinite(found).all() and int((found == 0).sum()) == 96


@pytest.mark.parametrize("tokens", [0, 1, 5, 64])
@pytest.mark.parametrize(("method", "target"), [(m, t) for m in QUANTIZERS for t in sorted({OWN[m], "8bit"})])
@pytest.mark.parametrize("shape", [(32, 64), (64, 96), (40, 288)])
def test_quantized_matrices_are_finite_and_near(method: str, target: str, tokens: int, shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = on_matrix(method, weight, tokens, parse_target(target))
    assert torch.isfinite(found).all()
    if tokens != 5:  # with fewer tokens than columns, weights may go far where no input tells
        assert float((found - weight).norm()) < 0.9 * float(weight.norm())


@pytest.mark.parametrize("method", PRUNERS)
def test_zero_matrices_and_zero_rows(method: str) -> None:
    weight = torch.randn(6, 16, generator=torch.Generator().manual_seed(2))
    weight[2] = 0
    found = on_matrix(method, weight, 40, parse_target("0.5"))
    assert torch.isfinite(found).all() and (found[2] == 0).all()
    assert (on_matrix(method, torch.zeros(4, 8), 40, parse_target("0.25")) == 0).all()


@pytest.mark.parametrize("method", METHODS)
def test_same_seed_same_bytes_and_source_untouched(method: str, model: Path, text: Path, tmp_path: Path) -> None:
    before = file_bytes(model)
    compress(model, tmp_path / "a", method, OWN[method], text, seed=7)
    compress(model, tmp_path / "b", method, OWN[method], text, seed=7)
    assert file_bytes(tmp_path / "a") == file_bytes(tmp_path / "b")
    assert file_bytes(model) == before


@pytest.mark.parametrize("method", PRUNERS)
def test_claimed_zeros_are_those_in_the_file_and_bf16_stays(
    method: str, model: Path, text: Path, tmp_path: Path
) -> None:
    record = compress(model, tmp_path / "out", method, "0.5", text)
    weights = weights_of(tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out/niwaki/blocks.jsonl").read_text().splitlines()]
    assert len(lines) == 21
    for line in lines:
        weight = weights[f"model.layers.{line['block']}.{line['matrix']}.weight"]
        assert weight.dtype == torch.bfloat16
        assert int((weight == 0).sum()) == line["zeros"]
    assert record["result"]["zeros_frac"] == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_resume_equals_a_straight_run(method: str, model: Path, text: Path, tmp_path: Path) -> None:
    def stop(event: str, **fields: Any) -> None:
        if event == "block" and fields["index"] == 1:
            raise KeyboardInterrupt

    compress(model, tmp_path / "straight", method, OWN[method], text)
    with pytest.raises(KeyboardInterrupt):
        compress(model, tmp_path / "out", method, OWN[method], text, report=stop)
    compress(model, tmp_path / "out", method, OWN[method], text, resume=True)
    assert file_bytes(tmp_path / "out") == file_bytes(tmp_path / "straight")


@pytest.mark.parametrize("method", PRUNERS)
def test_experts_without_tokens_are_noted(method: str, text: Path, tmp_path: Path) -> None:
    """Leave some of 16 experts without tokens: their lines say so where data was needed."""
    config = families()["qwen3_moe"].config
    config.vocab_size, config.num_experts = 4096, 16
    build(config).save_pretrained(tmp_path / "model")
    add_tokenizer(tmp_path / "model")
    calibration = {"files": (str(text),), "samples": 1, "seq_len": 4}
    record = niwaki.compress(
        tmp_path / "model", tmp_path / "out", method=method, target="0.5", calibration=calibration, device="cpu"
    )
    unreached = "no calibration token reached this matrix: ranked by magnitude"
    declared = get_method(method)
    noted = any(unreached in note for note in record["result"]["notes"])
    assert noted == declared.needs(declared.config()).anything
    assert record["result"]["zeros_frac"] == pytest.approx(0.5, abs=1e-3)
