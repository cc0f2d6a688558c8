"""Inputs skipped at every token: against a slow reference that masks activations, in models of many forms."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers

from niwaki.errors import ArchitectureError, CheckpointError, InputError
from niwaki.runtime.contextual.attach import attach
from niwaki.runtime.contextual.decoding import generate_verified, read_text
from niwaki.runtime.contextual.predictor_files import TENSORS, InputShadow, read_shadow, write_shadow
from niwaki.runtime.contextual.sequence import Decision
from niwaki.runtime.cuda_graph import CudaGraphGenerator
from support.contextual import PROMPT, ids_of, model_of, step_by_step
from support.families import build, families, sharing_families
from support.inputs import input_shadow_of, masked_input_logits, places_of

FAMILIES = ("llama", "opt", "gpt2", "falcon", "gpt_neox", "phi3", "gemma2", "qwen2")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_form_skips_what_the_reference_masks(family: str) -> None:
    model = build(families()[family].config)
    shadow, ids_BT = input_shadow_of(model, scaled=family in FAMILIES[::2]), ids_of(2, PROMPT + 6)
    wanted_BTV, share = masked_input_logits(model, ids_BT, PROMPT, shadow)
    with torch.no_grad():
        dense_BTV = model(input_ids=ids_BT, use_cache=False).logits
    contextual = attach(model, shadow)
    found_BTV, _ = step_by_step(model, ids_BT, PROMPT)
    torch.testing.assert_close(found_BTV, wanted_BTV, rtol=1e-4, atol=1e-5)
    assert float((found_BTV - dense_BTV)[:, PROMPT:].abs().max()) > 1e-3
    (record,) = contextual.records
    assert record.decision is Decision.SPARSE and record.sparse_tokens == 6
    assert record.skipped_frac == pytest.approx([share], abs=1e-9) and 0.2 < share < 0.8
    contextual.enabled = False
    with torch.no_grad():  # the weights of the model are views now, and the same
        torch.testing.assert_close(model(input_ids=ids_BT, use_cache=False).logits, dense_BTV, rtol=1e-4, atol=1e-5)


def test_a_text_in_one_forward_and_in_fixed_memory_gives_the_same() -> None:
    model = model_of("llama")
    shadow, ids_T = input_shadow_of(model), ids_of(1, PROMPT + 12)[0]
    wanted_1TV, share = masked_input_logits(model, ids_T[None], PROMPT, shadow)
    model.contextual = attach(model, shadow)
    text = read_text(model.contextual, ids_T, PROMPT)
    torch.testing.assert_close(text.logits(slice(0, len(ids_T))), wanted_1TV[0], rtol=1e-4, atol=1e-5)
    assert model.contextual.records[-1].skipped_frac == pytest.approx([share], abs=1e-9)
    prompt_BT = ids_of(2, PROMPT)
    told = model.generate(prompt_BT, max_new_tokens=5, do_sample=False, eos_token_id=None)[:, PROMPT:]
    by_generate = model.contextual.records[-1].skipped_frac
    fixed = CudaGraphGenerator(model, PROMPT + 8).generate(prompt_BT, max_new_tokens=5)
    assert torch.equal(fixed, told) and model.contextual.records[-1].skipped_frac == pytest.approx(by_generate)


def test_verified_text_is_that_of_the_dense_model() -> None:
    model = model_of("llama")
    ids_1T = ids_of(1, PROMPT)
    dense = model.generate(ids_1T, max_new_tokens=16, do_sample=False, eos_token_id=None)
    contextual = attach(model, input_shadow_of(model, quantile=0.6))
    text = generate_verified(contextual, ids_1T, max_new_tokens=16, every=4)
    assert torch.equal(text.ids_1T, dense) and text.removed > 0


def test_two_sequences_in_turns_keep_their_own_accounts() -> None:
    from transformers import DynamicCache

    from niwaki.runtime.contextual.sparsity import ContextualState

    model = model_of("llama")
    contextual = attach(model, input_shadow_of(model))
    alone = []
    for seed in (1, 2):
        step_by_step(model, ids_of(1, PROMPT + 4, seed), PROMPT)
        alone.append(contextual.records[-1].skipped_frac[0])
    assert alone[0] != alone[1]
    states, caches = [ContextualState() for _ in alone], [DynamicCache(config=model.config) for _ in alone]
    for part in (slice(0, PROMPT), *(slice(PROMPT + step, PROMPT + step + 1) for step in range(4))):
        for seed, (state, cache) in enumerate(zip(states, caches, strict=True), start=1):
            with contextual.switched(state), torch.no_grad():
                model(input_ids=ids_of(1, PROMPT + 4, seed)[:, part], past_key_values=cache, use_cache=True)
    assert [record.skipped_frac[0] for record in contextual.records[-2:]] == pytest.approx(alone)


@pytest.mark.parametrize(("sequences", "prompt", "decision"), [(9, PROMPT, Decision.BATCH), (1, 4, Decision.UNREAD)])
def test_large_batches_and_short_prompts_run_dense(sequences: int, prompt: int, decision: Decision) -> None:
    model = model_of("llama")
    contextual = attach(model, input_shadow_of(model, min_prompt=8))
    step_by_step(model, ids_of(sequences, prompt + 3), prompt)
    (record,) = contextual.records
    assert record.decision is decision and record.sparse_tokens == 0
    assert "at most 8" in record.dense_because or decision is Decision.UNREAD


def test_a_model_that_changes_its_dtype_skips_on() -> None:
    """Convert after the attachment: the layers get memory of their own, and the views have to be made again."""
    model = model_of("llama").to(torch.bfloat16)
    shadow = input_shadow_of(model)
    contextual, ids_BT = attach(model, shadow), ids_of(1, PROMPT + 4)
    step_by_step(model, ids_BT, PROMPT)
    model.float()
    wanted_BTV, _ = masked_input_logits(model, ids_BT, PROMPT, shadow)
    found_BTV, _ = step_by_step(model, ids_BT, PROMPT)
    torch.testing.assert_close(found_BTV, wanted_BTV, rtol=1e-4, atol=1e-5)
    assert [record.sparse_tokens for record in contextual.records if record.sparse_tokens] == [4, 4]


@pytest.mark.parametrize("name", ["lfm2", "gemma4"])
def test_caches_that_cannot_be_put_back_are_skipped_too(name: str) -> None:
    """Mix convolutions and attention, or caches within a window: skip, but verify nothing."""
    if name == "lfm2":
        model: Any = build(
            transformers.Lfm2Config(
                vocab_size=96,
                hidden_size=32,
                num_hidden_layers=3,
                num_attention_heads=4,
                num_key_value_heads=2,
                intermediate_size=48,
                layer_types=["conv", "full_attention", "conv"],
                block_auto_adjust_ff_dim=False,
            )
        )
    else:
        model = build(sharing_families()["gemma4"])
    shadow, ids_BT = input_shadow_of(model), ids_of(1, PROMPT + 5)
    wanted_BTV, _ = masked_input_logits(model, ids_BT, PROMPT, shadow)
    contextual = attach(model, shadow)
    found_BTV, cache = step_by_step(model, ids_BT, PROMPT)
    torch.testing.assert_close(found_BTV, wanted_BTV, rtol=1e-3, atol=1e-4)
    (record,) = contextual.records
    assert record.sparse_tokens == 5 and 0.2 < record.skipped_frac[0] < 0.8
    if name == "lfm2":
        with pytest.raises(InputError, match="cannot be put back"):
            contextual.verify()
    with torch.no_grad():  # a longer input runs dense, and single tokens after it skip again
        model(input_ids=ids_of(1, 4, seed=5), past_key_values=cache, use_cache=True)
        model(input_ids=ids_of(1, 1, seed=6), past_key_values=cache, use_cache=True)
    assert record.sparse_tokens == 6 and len(record.skipped_frac) == 2


def test_a_model_without_a_cache_says_that_it_runs_dense() -> None:
    model = model_of("llama")
    contextual = attach(model, input_shadow_of(model))
    with torch.no_grad():
        model(input_ids=ids_of(1, PROMPT), use_cache=False)
    assert "no cache of keys and values" in contextual.records[-1].note


def test_experts_are_refused() -> None:
    with pytest.raises(ArchitectureError, match="is one of several experts"):
        places_of(build(families()["mixtral"].config))


def test_the_file_is_read_again_and_every_fault_is_told(tmp_path: Any) -> None:
    model = model_of("llama")
    shadow = input_shadow_of(model, scaled=True)
    write_shadow(tmp_path, shadow)
    read = read_shadow(tmp_path)
    assert isinstance(read, InputShadow) and read.places == shadow.places and read.running == shadow.running
    assert shadow.scale_N is not None and read.scale_N is not None and torch.equal(read.scale_N, shadow.scale_N)
    assert torch.equal(read.threshold_P, shadow.threshold_P) and read.shares == shadow.shares
    for changed, message in (
        (replace(shadow, threshold_P=-shadow.threshold_P), "negative"),
        (replace(shadow, threshold_P=shadow.threshold_P[1:]), "expected float32"),
        (replace(shadow, scale_N=shadow.scale_N[1:]), "scale_N is float32"),
        (replace(shadow, scale_N=0 * shadow.scale_N), "not positive"),
        (replace(shadow, threshold_P=shadow.threshold_P * torch.nan), "NaN"),
        (replace(shadow, shares=(1.5, *shadow.shares[1:])), "places.0.share"),
        (replace(shadow, places=(shadow.places[1], *shadow.places[1:])), "name a matrix twice"),
    ):
        write_shadow(tmp_path, changed)
        with pytest.raises(CheckpointError, match=message):
            read_shadow(tmp_path)
    assert (tmp_path / TENSORS).is_file()
    for place, message in (
        (replace(shadow.places[0], block=7), "name self_attn.q_proj of block 7, which this model lacks"),
        (replace(shadow.places[0], inputs=3), "has other sizes than the thresholds say"),
    ):
        with pytest.raises(ArchitectureError, match=message):
            attach(model, replace(shadow, places=(place, *shadow.places[1:])))
