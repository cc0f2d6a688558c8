"""The gate lies where the agreement asked for is reached, and the runtime keeps it."""

from pathlib import Path

import pytest
import torch

import niwaki
from niwaki.errors import InputError
from niwaki.measure.prompt_gate import CLOSED, calibrate_gate, choose_limits, measure_break_even
from niwaki.runtime.contextual.attach import attach
from niwaki.runtime.contextual.predictor_files import read_shadow
from niwaki.runtime.contextual.selection import Rule, margin
from support.contextual import PROMPT, ids_of, layout_of, model_of, shadow_of, step_by_step
from support.models import tiny_llama, write_texts


def test_the_gate_lets_most_prompts_through_that_agree_enough() -> None:
    found = [(3.0, 0.5, 0.2), (1.0, 0.5, 1.0), (2.0, 0.5, 0.6), (4.0, 0.5, 0.9)]
    gates = {2.0: (0.9, 2, (1.0 + 0.6 + 2) / 4), 3.0: (0.7, 3, (1.0 + 0.6 + 0.2 + 1) / 4), 4.0: (0.6, 4, 2.7 / 4)}
    for deviation, (agreement, sparse, reached) in gates.items():
        limits = {"max_deviation": deviation, "min_margin": 0.0}
        assert choose_limits(found, agreement) == (limits, sparse, pytest.approx(reached))
    closed = {"max_deviation": CLOSED, "min_margin": 0.0}
    assert choose_limits([(1.0, 0.5, 0.5)], 0.9) == (closed, 0, 1.0)
    with_dense = [(float("inf"), 0.0, 1.0), (1.0, 0.5, 0.9)]
    assert choose_limits(with_dense, 0.9) == ({"max_deviation": 1.0, "min_margin": 0.0}, 1, pytest.approx(0.95))


def test_a_margin_is_asked_for_where_it_tells_more_than_the_deviation() -> None:
    found = [(1.0, 0.2, 0.1), (2.0, 0.8, 1.0), (3.0, 0.9, 1.0)]
    assert choose_limits(found, 0.95) == ({"max_deviation": 3.0, "min_margin": 0.8}, 2, 1.0)


def test_margins_are_what_a_mask_holds() -> None:
    model = model_of("llama")
    layout = layout_of(model)
    scores_BU = torch.rand(2, layout.size, generator=torch.Generator().manual_seed(0))
    kept_BU = Rule(0.5).select(scores_BU, layout)
    wanted = []
    for row, mask in zip(scores_BU, kept_BU, strict=True):
        shares = []
        for kind, kept in zip(layout.split(row[None]), layout.split(mask[None]), strict=True):
            shares += [[float((u[k] ** 2).sum() / (u**2).sum()) for u, k in zip(kind[0], kept[0], strict=True)]]
        wanted.append(sum(sum(part) / len(part) for part in shares) / 2)
    assert margin(scores_BU, kept_BU, layout).tolist() == pytest.approx(wanted, rel=1e-5)
    flat = torch.ones(1, layout.size)
    assert float(margin(flat, Rule(0.5).select(flat, layout), layout)[0]) == pytest.approx(0.5)


def test_prompts_with_too_small_a_margin_run_dense() -> None:
    held = None
    for factor, sparse in ((0.0, 2), (0.99, 2), (1.01, 0)):
        model = model_of("llama")
        contextual = attach(model, shadow_of(model, min_margin=factor * (held or 0.0)))
        step_by_step(model, ids_of(1, PROMPT + 2), PROMPT)
        (record,) = contextual.records
        held = record.margin[0]
        assert record.sparse_tokens == sparse and ("expected to matter" in record.dense_because) == (not sparse)


def test_break_even_is_where_dense_and_part_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use a clock of our own: 10 ms dense, 4 ms with half of the units, 48 ms for the choice, then 32 tokens."""
    model = model_of("llama")
    contextual = attach(model, shadow_of(model))
    now = 0.0

    def forward(_module: object, _args: object, _kwargs: object, _output: object) -> None:
        nonlocal now
        record = contextual.records[-1] if contextual.enabled else None
        now += 0.010 if record is None or not record.sparse_tokens else 0.052 if record.sparse_tokens == 1 else 0.004

    model.register_forward_hook(forward, with_kwargs=True)
    monkeypatch.setattr("niwaki.measure.prompt_gate.time.perf_counter", lambda: now)
    found = measure_break_even(contextual, ids_of(1, PROMPT + 32), PROMPT)
    assert found["dense"] == pytest.approx(0.010) and found["part"] == pytest.approx(0.004)
    assert found["choice"] == pytest.approx(0.048)
    skipped = contextual.records[-1].skipped_frac[0]
    assert found["max_kept_frac"] == pytest.approx(1 - 0.048 / (32 * 0.006 / skipped))
    assert contextual.shadow.running.max_kept_frac == shadow_of(model).running.max_kept_frac


def test_prompts_beyond_the_gate_run_dense() -> None:
    model = model_of("llama")
    contextual = attach(model, shadow_of(model))
    step_by_step(model, ids_of(1, PROMPT + 2), PROMPT)
    deviation = contextual.records[0].deviation[0]
    for gate, sparse in ((deviation * 1.01, 2), (deviation * 0.99, 0)):
        model = model_of("llama")
        contextual = attach(model, shadow_of(model, max_deviation=gate))
        step_by_step(model, ids_of(1, PROMPT + 2), PROMPT)
        assert contextual.records[0].sparse_tokens == sparse
        assert ("deviates by" in contextual.records[0].dense_because) == (not sparse)


def test_calibration_writes_what_the_runtime_reads(tmp_path: Path) -> None:
    tiny_llama(tmp_path / "model", num_attention_heads=8, num_key_value_heads=4)
    text = write_texts(tmp_path / "text.jsonl")
    niwaki.compress(
        tmp_path / "model", tmp_path / "out", method="shadow", target="0.5", device="cpu",
        calibration={"files": (str(text),), "samples": 12, "seq_len": 24},
        options={"unit": "prompt", "min_prompt": 8, "features": "last", "size_frac": 0.5},
    )  # fmt: skip
    settings = {"data": str(text), "samples": 6, "prompt_tokens": 16, "new_tokens": 8, "device": "cpu"}
    assert calibrate_gate(tmp_path / "out", bos="on", **settings)["bos"] == "on"  # type: ignore[arg-type]
    strict = calibrate_gate(tmp_path / "out", agreement=1.0, **settings)  # type: ignore[arg-type]
    assert strict["bos"] == "off" and strict["agreement"] == 1.0 and strict["agreement_all_sparse"] < 1.0
    running = read_shadow(tmp_path / "out").running
    assert (running.max_deviation, running.min_margin) == (strict["max_deviation"], strict["min_margin"])
    assert running.max_kept_frac == 0.85 and "seconds" not in strict
    loose = calibrate_gate(tmp_path / "out", agreement=0.01, **settings)  # type: ignore[arg-type]
    assert loose["sparse_frac"] == 1.0 > strict["sparse_frac"]
    model = niwaki.load(tmp_path / "out", device="cpu")
    with torch.no_grad():
        model.generate(ids_of(1, 16), max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert model.contextual.shadow.running.max_deviation == loose["max_deviation"]
    timed = calibrate_gate(tmp_path / "out", agreement=0.01, batch=2, **settings)  # type: ignore[arg-type]
    assert 0 <= timed["max_kept_frac"] <= 1 and set(timed["seconds"]) == {"dense", "part", "choice", "max_kept_frac"}
    assert read_shadow(tmp_path / "out").running.max_kept_frac == timed["max_kept_frac"]
    with pytest.raises(InputError, match="holds no predictor"):
        calibrate_gate(tmp_path / "model", **settings)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="expected agreement in"):
        calibrate_gate(tmp_path / "out", agreement=1.5, **settings)  # type: ignore[arg-type]
