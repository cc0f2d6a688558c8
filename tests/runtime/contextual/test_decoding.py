"""Verified text equals the greedy text of the dense model; logits of a given text equal those token by token."""

import copy
from typing import Any

import pytest
import torch

from niwaki.errors import InputError
from niwaki.runtime.contextual.attach import attach
from niwaki.runtime.contextual.decoding import generate_verified, read_text
from support.contextual import PROMPT, ids_of, model_of, shadow_of, step_by_step

RUNNING = [{}, {"refresh_tokens": 4}, {"min_prompt": PROMPT + 3}, {"max_kept_frac": 0.1}, {"mean_fill": 0.7}]


@pytest.mark.parametrize("family", ["llama", "qwen3", "opt"])
@pytest.mark.parametrize("every", [1, 3, 8])
@pytest.mark.parametrize("skip_frac", [0.1, 0.7])
def test_the_text_is_that_of_the_dense_model(family: str, every: int, skip_frac: float) -> None:
    model = model_of(family)
    dense, contextual = copy.deepcopy(model), attach(model, shadow_of(model, skip_frac=skip_frac, max_kept_frac=1.0))
    for seed in range(2):
        ids_1T = ids_of(1, PROMPT, seed)
        found = generate_verified(contextual, ids_1T, max_new_tokens=20, every=every)
        wanted = dense.generate(ids_1T, max_new_tokens=20, do_sample=False, eos_token_id=None)
        assert found.ids_1T.tolist() == wanted.tolist()
        assert found.drafted == found.accepted + found.removed and found.passes >= 20 // (every + 1)
        if skip_frac == 0.7:
            assert found.removed > 0  # or nothing was tested
    assert contextual.records[0].sparse_tokens >= found.passes


def test_after_a_rollback_the_cache_is_that_of_the_dense_model() -> None:
    model = model_of("llama")
    dense, contextual = copy.deepcopy(model), attach(model, shadow_of(model, skip_frac=0.7))
    ids_1T = ids_of(1, PROMPT + 6)
    _, cache = step_by_step(model, ids_1T, PROMPT)
    logits = contextual.verify()
    wanted, full = step_by_step(dense, ids_1T, PROMPT)
    assert logits is not None
    torch.testing.assert_close(logits, wanted[:, PROMPT:], rtol=1e-4, atol=1e-4)
    contextual.roll_back(4)
    for left, right in zip(cache.layers, full.layers, strict=True):
        torch.testing.assert_close(left.keys, right.keys[:, :, : PROMPT + 2], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(left.values, right.values[:, :, : PROMPT + 2], rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        model(input_ids=ids_1T[:, :1], past_key_values=cache, use_cache=True)  # the same units go on
    assert len(contextual.records[0].skipped_frac) == 1 and contextual.records[0].sparse_tokens == 7


def test_checking_measures_the_divergence() -> None:
    model = model_of("llama")
    dense, contextual = copy.deepcopy(model), attach(model, shadow_of(model, skip_frac=0.7))
    found = generate_verified(contextual, ids_of(1, PROMPT), max_new_tokens=3, every=2)  # one draft of two tokens
    assert found.passes == 1 and found.drafted == 2
    sparse = attach(copy.deepcopy(dense), shadow_of(model, skip_frac=0.7)).model
    first = int(dense(ids_of(1, PROMPT)).logits[0, -1].argmax())
    ids_1T = torch.cat([ids_of(1, PROMPT), torch.tensor([[first]])], dim=1)
    drafted, _ = step_by_step(sparse, ids_1T, PROMPT)
    second = int(drafted[0, -1].argmax())
    ids_1T = torch.cat([ids_1T, torch.tensor([[second]])], dim=1)
    drafted, _ = step_by_step(sparse, ids_1T, PROMPT)
    wanted = dense(ids_1T, use_cache=False).logits[0, PROMPT:].detach().double().log_softmax(-1)
    part = drafted[0, PROMPT:].double().log_softmax(-1)
    assert (
        found.kl == pytest.approx(float((wanted.exp() * (wanted - part)).sum(1).mean()), rel=1e-3) and found.kl > 0.01
    )
    assert contextual.records[0].verified == {"passes": 1, "agreement": found.agreement, "kl": found.kl}


def test_a_lower_bar_takes_less_back_and_an_end_stops() -> None:
    model = model_of("llama")
    contextual = attach(model, shadow_of(model, skip_frac=0.7))
    ids_1T = ids_of(1, PROMPT)
    strict = generate_verified(contextual, ids_1T, max_new_tokens=20, every=4)
    loose = generate_verified(contextual, ids_1T, max_new_tokens=20, every=4, min_probability=1e-9)
    assert loose.removed == 0 < strict.removed and loose.agreement == 1.0 > strict.agreement
    end = int(strict.ids_1T[0, PROMPT + 5])
    stopped = generate_verified(contextual, ids_1T, max_new_tokens=20, every=4, stop_tokens=(end,))
    text = strict.ids_1T[0, PROMPT:].tolist()
    assert stopped.ids_1T[0, PROMPT:].tolist() == text[: text.index(end) + 1]


def test_impossible_settings() -> None:
    model = model_of("llama")
    contextual = attach(model, shadow_of(model))
    with pytest.raises(InputError, match="continues one prompt, got 2"):
        generate_verified(contextual, ids_of(2, 4), max_new_tokens=2)
    with pytest.raises(InputError, match="expected every ≥ 1"):
        generate_verified(contextual, ids_of(1, 4), max_new_tokens=2, every=0)


@pytest.mark.parametrize("running", RUNNING)
@pytest.mark.parametrize("family", ["llama", "gemma3", "opt"])
def test_a_given_text_runs_as_if_written_one_by_one(family: str, running: dict[str, Any]) -> None:
    model = model_of(family)
    twin = copy.deepcopy(model)
    ids_BT = ids_of(1, PROMPT + 14)
    contextual, stepping = attach(model, shadow_of(model, **running)), attach(twin, shadow_of(twin, **running))
    wanted_BTV, _ = step_by_step(twin, ids_BT, PROMPT)
    for _ in range(2):  # and again, with nothing left of the first
        torch.testing.assert_close(
            read_text(contextual, ids_BT[0], PROMPT).logits(slice(0, ids_BT.shape[1])),
            wanted_BTV[0],
            atol=1e-4,
            rtol=1e-4,
        )
        assert contextual.records[-1] == stepping.records[0]
    assert bool(contextual.records[0].sparse_tokens) == ("max_kept_frac" not in running)


def test_a_prompt_alone_is_read() -> None:
    model = model_of("llama")
    ids_BT = ids_of(1, PROMPT)
    with torch.no_grad():
        wanted_BTV = model(input_ids=ids_BT, use_cache=False).logits
    torch.testing.assert_close(
        read_text(attach(model, shadow_of(model)), ids_BT[0], PROMPT).logits(slice(0, ids_BT.shape[1])), wanted_BTV[0]
    )
