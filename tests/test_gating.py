"""The gate lies where the agreement asked for is reached, and the runtime keeps it."""

from pathlib import Path

import pytest
import torch

import niwaki
from contextual_helpers import PROMPT, ids_of, model_of, shadow_of, step_by_step
from helpers import tiny_llama, write_texts
from niwaki.contextual.record import read_shadow
from niwaki.errors import InputError
from niwaki.gating import LEAST, calibrate_gate, choose
from niwaki.runtime.contextual import attach


def test_the_gate_is_the_highest_that_agrees_enough() -> None:
    found = [(3.0, 0.2), (1.0, 1.0), (2.0, 0.6), (4.0, 0.9)]
    assert choose(found, 0.9) == (2.0, pytest.approx((1.0 + 0.6 + 2) / 4))
    assert choose(found, 0.7) == (3.0, pytest.approx((1.0 + 0.6 + 0.2 + 1) / 4))
    assert choose(found, 0.6) == (4.0, pytest.approx(2.7 / 4))
    assert choose([(1.0, 0.5)], 0.9) == (LEAST, 1.0)
    assert choose([(float("inf"), 1.0), (1.0, 0.9)], 0.9) == (1.0, pytest.approx(0.95))


def test_prompts_beyond_the_gate_run_dense() -> None:
    model = model_of("llama")
    contextual = attach(model, shadow_of(model))
    step_by_step(model, ids_of(1, PROMPT + 2), PROMPT)
    deviation = contextual.records[0].deviation[0]
    for gate, sparse in ((deviation * 1.01, 2), (deviation * 0.99, 0)):
        model = model_of("llama")
        contextual = attach(model, shadow_of(model, most_deviation=gate))
        step_by_step(model, ids_of(1, PROMPT + 2), PROMPT)
        assert contextual.records[0].sparse_tokens == sparse
        assert ("deviates by" in contextual.records[0].dense_because) == (not sparse)


def test_calibration_writes_what_the_runtime_reads(tmp_path: Path) -> None:
    tiny_llama(tmp_path / "model", num_attention_heads=8, num_key_value_heads=4)
    text = write_texts(tmp_path / "text.jsonl")
    niwaki.compress(
        tmp_path / "model", tmp_path / "out", method="shadow", target="0.5", device="cpu",
        calibration={"files": (str(text),), "samples": 12, "seq_len": 24},
        options={"least_prompt": 8, "features": "last", "size_frac": 0.5},
    )  # fmt: skip
    settings = {"data": str(text), "samples": 6, "prompt_tokens": 16, "new_tokens": 8, "device": "cpu"}
    strict = calibrate_gate(tmp_path / "out", agreement=1.0, **settings)  # type: ignore[arg-type]
    assert strict["agreement"] == 1.0 and strict["agreement_all_sparse"] < 1.0
    assert read_shadow(tmp_path / "out").running.most_deviation == strict["most_deviation"]
    loose = calibrate_gate(tmp_path / "out", agreement=0.01, **settings)  # type: ignore[arg-type]
    assert loose["sparse_frac"] == 1.0 > strict["sparse_frac"]
    model = niwaki.load(tmp_path / "out", device="cpu")
    with torch.no_grad():
        model.generate(ids_of(1, 16), max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert model.contextual.shadow.running.most_deviation == loose["most_deviation"]
    with pytest.raises(InputError, match="holds no predictor"):
        calibrate_gate(tmp_path / "model", **settings)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="expected agreement in"):
        calibrate_gate(tmp_path / "out", agreement=1.5, **settings)  # type: ignore[arg-type]
