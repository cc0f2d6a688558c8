"""The running model against one that is masked, with batches, caches and prompts in chunks."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from niwaki.errors import InputError
from niwaki.model.anatomy import find_blocks
from niwaki.runtime.contextual.attach import attach
from niwaki.runtime.contextual.prefill import PrefillStatistics
from niwaki.runtime.contextual.selection import for_batch
from niwaki.runtime.contextual.sequence import Decision, Phase
from niwaki.runtime.contextual.small_linear import CompactLinear
from niwaki.runtime.contextual.sparsity import Contextual
from niwaki.runtime.contextual.units import KINDS, UnitLayout
from support.contextual import PROMPT, ids_of, masked_logits, model_of, shadow_of, step_by_step

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "opt"]


def chosen(model: Any, contextual: Contextual, prompt_BT: Tensor) -> Tensor:
    """Return the mask [B, U] that prompts lead to, each read by itself."""
    return contextual.shadow.rule.select(scored(model, contextual, prompt_BT), contextual.shadow.layout)


def scored(model: Any, contextual: Contextual, prompt_BT: Tensor) -> Tensor:
    prefill = PrefillStatistics(contextual.shadow.layout)
    contextual.enabled = False
    with torch.no_grad(), prefill.observe(contextual.blocks, torch.ones_like(prompt_BT, dtype=torch.bool)):
        model(input_ids=prompt_BT, use_cache=False)
    contextual.enabled = True
    return contextual.shadow.predictor.scores(*prefill.features)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize("mean_fill", [0.0, 0.7])
@pytest.mark.parametrize("family", FAMILIES)
def test_compact_equals_masked(family: str, mean_fill: float, scope: str, in_place: bool) -> None:
    model = model_of(family)
    dense = copy.deepcopy(model)
    shadow = shadow_of(model, mean_fill=mean_fill, scope=scope)
    contextual = attach(model, shadow, in_place=in_place)
    ids_BT = ids_of(1, PROMPT + 8)
    found, cache = step_by_step(model, ids_BT, PROMPT)
    kept_BU = chosen(model, contextual, ids_BT[:, :PROMPT])
    wanted = masked_logits(dense, ids_BT, PROMPT, kept_BU, shadow.layout, mean_fill)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(wanted[:, PROMPT:], dense(ids_BT, use_cache=False).logits[:, PROMPT:], atol=1e-2)
    heads_LG = shadow.layout.split(kept_BU)[0][0]
    assert [layer.keys.shape[1] for layer in cache.layers] == heads_LG.sum(1).tolist()
    (record,) = contextual.records
    assert record.sparse_tokens == 8 and record.dense_tokens == 0 and record.skipped_frac == pytest.approx([0.5])


def activity(model: Any, layout: UnitLayout, ids_BT: Tensor) -> Tensor:
    """Return the units [U] that are active after the prompt."""
    prefill = PrefillStatistics(layout)
    real_BT = torch.arange(ids_BT.shape[1])[None] >= PROMPT
    with torch.no_grad(), prefill.observe(find_blocks(model)[1], real_BT):
        model(input_ids=ids_BT, use_cache=False)
    return prefill.features[2][0] > 0


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_every_unit_changes_the_logits(family: str) -> None:
    """Leave out one head group or neuron of any block alone (a neuron that is off for all tokens has no say)."""
    model = model_of(family)
    shadow = shadow_of(model)
    ids_BT, layout = ids_of(1, PROMPT + 4), shadow.layout
    dense = masked_logits(model, ids_BT, PROMPT, torch.ones(1, layout.size, dtype=torch.bool), layout)
    active_U = activity(model, layout, ids_BT)
    assert active_U.float().mean() > 0.7
    for unit in range(layout.size):
        kept_BU = torch.ones(1, layout.size, dtype=torch.bool)
        kept_BU[0, unit] = False
        found = masked_logits(model, ids_BT, PROMPT, kept_BU, layout)
        torch.testing.assert_close(found[:, :PROMPT], dense[:, :PROMPT])
        assert torch.equal(found[:, PROMPT:], dense[:, PROMPT:]) != bool(active_U[unit]), unit


def test_no_later_token_influences_a_mask() -> None:
    model = model_of("llama")
    contextual = attach(model, shadow_of(model))
    ids_BT, others_BT = ids_of(1, PROMPT + 6), ids_of(1, PROMPT + 6, seed=1)
    others_BT[:, :PROMPT] = ids_BT[:, :PROMPT]
    kept = []
    for tokens in (ids_BT, others_BT):
        step_by_step(model, tokens, PROMPT)
        assert contextual.state.sequence is not None and contextual.state.sequence.active is not None
        swaps = contextual.state.sequence.active.blocks.swaps
        kept.append([swap.value.weight_OI.clone() for swap in swaps if isinstance(swap.value, CompactLinear)])
    assert all(torch.equal(left, right) for left, right in zip(*kept, strict=True))
    elsewhere = chosen(model, contextual, others_BT[:, PROMPT - 12 :])
    assert not torch.equal(elsewhere, chosen(model, contextual, ids_BT[:, :PROMPT]))  # prompts do decide


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("sharing", ["union", "shared"])
@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "opt"])
def test_a_batch_has_heads_of_its_own_and_its_order_does_not_matter(
    family: str, scope: str, sharing: str, in_place: bool
) -> None:
    model = model_of(family)
    dense = copy.deepcopy(model)
    shadow = shadow_of(model, scope=scope, max_kept_frac=1.0, batch=sharing, spread=0.2)
    contextual = attach(model, shadow, in_place=in_place)
    layout, ids_BT, order = shadow.layout, ids_of(3, PROMPT + 4), [2, 0, 1]
    found, cache = step_by_step(model, ids_BT, PROMPT)
    scores_BU = scored(model, contextual, ids_BT[:, :PROMPT])
    heads_BLG, neurons_LG = for_batch(shadow.rule, scores_BU, layout, sharing)
    kept_BU = layout.join(heads_BLG, neurons_LG.expand(3, -1, -1))
    wanted = masked_logits(dense, ids_BT, PROMPT, kept_BU, layout)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert [layer.keys.shape[1] for layer in cache.layers] == heads_BLG[0].sum(1).tolist()
    again, _ = step_by_step(model, ids_BT[order], PROMPT)
    torch.testing.assert_close(again, found[order], rtol=1e-4, atol=1e-4)
    assert contextual.records[0].kept == contextual.records[1].kept
    if scope == "local":
        assert any(not torch.equal(heads_BLG[0], heads_G) for heads_G in heads_BLG[1:])  # or nothing was tested
        assert torch.equal(heads_BLG, layout.split(shadow.rule.select(scores_BU, layout))[0])
    alone = shadow.layout.skipped_frac(chosen(model, contextual, ids_BT[:1, :PROMPT]))
    assert (contextual.records[0].skipped_frac[0] < float(alone)) or sharing == "shared"


def test_a_longer_batch_than_the_one_before_finds_room() -> None:
    """Reuse the memory of copies: masks of another size, and of another batch, must not meet what lay there."""
    model = model_of("llama")
    dense, shadow = copy.deepcopy(model), shadow_of(model, max_kept_frac=1.0)
    contextual = attach(model, shadow)
    for sequences in (1, 3, 1):
        ids_BT = ids_of(sequences, PROMPT + 4, seed=sequences)
        found, _ = step_by_step(model, ids_BT, PROMPT)
        heads_BLG, neurons_LG = for_batch(shadow.rule, scored(model, contextual, ids_BT[:, :PROMPT]), shadow.layout)
        kept_BU = shadow.layout.join(heads_BLG, neurons_LG.expand(sequences, -1, -1))
        wanted = masked_logits(dense, ids_BT, PROMPT, kept_BU, shadow.layout)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_after_beams_reorder_the_cache_no_refresh_follows() -> None:
    model = model_of("llama")
    contextual = attach(model, shadow_of(model, refresh_tokens=2))
    ids_BT = ids_of(1, PROMPT)
    found = model.generate(ids_BT, max_new_tokens=8, min_new_tokens=8, num_beams=3, do_sample=False, pad_token_id=0)
    assert found.shape == (1, PROMPT + 8)
    record = contextual.records[0]
    assert record.sequences == 3 and record.sparse_tokens == 7 and len(record.skipped_frac) == 1
    assert "reordered" in record.note
    with pytest.raises(InputError, match="beams"):
        contextual.verify()


def test_a_union_that_is_too_large_runs_dense_and_says_so() -> None:
    model = model_of("llama")
    dense, contextual = copy.deepcopy(model), attach(model, shadow_of(model, max_kept_frac=0.4))
    ids_BT = ids_of(2, PROMPT + 4)
    found, _ = step_by_step(model, ids_BT, PROMPT)
    torch.testing.assert_close(found, dense(ids_BT, use_cache=False).logits, rtol=1e-4, atol=1e-4)
    record = contextual.records[0]
    assert record.sparse_tokens == 0 and record.dense_tokens == 4
    assert record.dense_because.startswith("the batch together needs")


def test_padding_on_the_left_does_not_count() -> None:
    model = model_of("llama")
    contextual = attach(model, shadow_of(model))
    prompt_BT = ids_of(1, PROMPT)
    padded_BT = torch.cat([torch.zeros(1, 7, dtype=torch.int64), prompt_BT], dim=1)
    mask_BT = (torch.arange(PROMPT + 7) >= 7).long()[None]
    features = []
    for ids_BT, given in ((prompt_BT, {}), (padded_BT, {"attention_mask": mask_BT})):
        if given:
            given["position_ids"] = (mask_BT.cumsum(1) - 1).clamp_min(0)
        with torch.no_grad():
            model(input_ids=ids_BT, use_cache=True, **given)
        assert contextual.state.sequence is not None
        features.append(contextual.state.sequence.prefill.features)
    for left, right in zip(*features, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "mistral", "opt"])
def test_a_refresh_repairs_the_cache(family: str) -> None:
    """Read again with the full model: it leaves the keys and values that it would have left at once."""
    model = model_of(family)
    dense, contextual = copy.deepcopy(model), attach(model, shadow_of(model, refresh_tokens=4))
    ids_BT = ids_of(2, PROMPT + 10)
    _, cache = step_by_step(model, ids_BT, PROMPT)
    assert len(contextual.records[0].skipped_frac) == 3  # after the prompt, 4 and 8 tokens
    sequence = contextual.state.sequence
    assert sequence is not None
    contextual.verify()
    _, wanted = step_by_step(dense, ids_BT, PROMPT)
    for found_layer, wanted_layer in zip(cache.layers, wanted.layers, strict=True):
        torch.testing.assert_close(found_layer.keys, wanted_layer.keys, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found_layer.values, wanted_layer.values, rtol=1e-4, atol=1e-4)


def test_a_prompt_in_chunks_is_one_prompt() -> None:
    from transformers import DynamicCache

    model = model_of("llama")
    contextual = attach(model, shadow_of(model))
    ids_BT = ids_of(1, PROMPT + 1)
    wanted, _ = step_by_step(model, ids_BT, PROMPT)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        for chunk_BT in (ids_BT[:, :9], ids_BT[:, 9:PROMPT], ids_BT[:, PROMPT:]):
            found = model(input_ids=chunk_BT, past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(found, wanted[:, -1:], rtol=1e-4, atol=1e-4)
    assert contextual.records[0].kept == contextual.records[1].kept


def test_a_next_turn_is_read_by_the_full_model() -> None:
    model = model_of("llama")
    dense, contextual = copy.deepcopy(model), attach(model, shadow_of(model))
    ids_BT = ids_of(1, PROMPT + 12)
    _, cache = step_by_step(model, ids_BT[:, : PROMPT + 4], PROMPT)
    with torch.no_grad():
        found = model(input_ids=ids_BT[:, PROMPT + 4 :], past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(found, dense(ids_BT, use_cache=False).logits[:, PROMPT + 4 :], rtol=1e-4, atol=1e-4)
    assert contextual.records[0].prompt_tokens == PROMPT + 8


def test_short_prompts_run_dense_until_there_is_something_to_look_at() -> None:
    model = model_of("llama")
    contextual = attach(model, shadow_of(model, min_prompt=8))
    step_by_step(model, ids_of(1, 12), 3)
    record = contextual.records[0]
    assert (record.prompt_tokens, record.sparse_tokens) == (8, 4)


@pytest.mark.parametrize(
    ("running", "decision", "phase"),
    [
        ({}, Decision.SPARSE, Phase.SPARSE),
        ({"min_prompt": PROMPT + 9}, Decision.UNREAD, Phase.PREFILL),
        ({"max_deviation": 1e-9}, Decision.DEVIATION, Phase.DENSE),
        ({"min_margin": 1.0}, Decision.MARGIN, Phase.DENSE),
        ({"max_kept_frac": 0.1}, Decision.BATCH, Phase.DENSE),
    ],
)
def test_every_decision_names_its_reason_and_phase(running: dict[str, Any], decision: Decision, phase: Phase) -> None:
    model = model_of("llama")
    contextual = attach(model, shadow_of(model, **running))
    step_by_step(model, ids_of(1, PROMPT + 2), PROMPT)
    (record,), sequence = contextual.records, contextual.state.sequence
    assert record.decision is decision and sequence is not None and sequence.phase is phase
    assert bool(record.dense_because) == (phase is Phase.DENSE)


def test_verification_keeps_the_units_and_a_refresh_drops_them() -> None:
    model = model_of("llama")
    contextual = attach(model, shadow_of(model))
    ids_BT = ids_of(1, PROMPT + 2)
    _, cache = step_by_step(model, ids_BT, PROMPT)
    sequence = contextual.state.sequence
    assert sequence is not None and sequence.phase is Phase.SPARSE
    active = sequence.active
    contextual.verify()
    assert sequence.phase is Phase.PREFILL and sequence.active is active
    with torch.no_grad():
        model(input_ids=ids_BT[:, :1], past_key_values=cache, use_cache=True)
        assert sequence.phase is Phase.SPARSE and sequence.active is active
        model(input_ids=ids_BT[:, :3], past_key_values=cache, use_cache=True)
    assert sequence.phase is Phase.PREFILL and sequence.active is None


def test_between_forwards_the_model_is_the_full_one() -> None:
    model = model_of("opt")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attach(model, shadow_of(model))
    step_by_step(model, ids_of(1, PROMPT + 2), PROMPT)
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)


def test_fixed_caches_run_dense_and_cropped_ones_are_refused() -> None:
    from transformers import StaticCache

    model = model_of("llama")
    contextual = attach(model, shadow_of(model))
    cache = StaticCache(config=model.config, max_cache_len=40)
    with torch.no_grad():
        model(input_ids=ids_of(1, PROMPT), past_key_values=cache, use_cache=True)
        model(input_ids=ids_of(1, 1), past_key_values=cache, use_cache=True)
    assert "fixed size" in contextual.records[0].dense_because
    assert contextual.records[0].decision is Decision.UNSUPPORTED
    _, grown = step_by_step(model, ids_of(1, PROMPT + 2), PROMPT)
    grown.crop(-1)
    with pytest.raises(InputError, match="contextual sparsity cannot follow"):
        model(input_ids=ids_of(1, 1), past_key_values=grown, use_cache=True)


def test_generate_of_transformers_runs_on_the_small_matrices() -> None:
    model = model_of("llama")
    contextual = attach(model, shadow_of(model, mean_fill=0.5))
    prompt_BT = ids_of(1, PROMPT)
    with torch.no_grad():
        found = model.generate(
            prompt_BT, attention_mask=torch.ones_like(prompt_BT), max_new_tokens=6, do_sample=False, eos_token_id=None
        )
    logits, _ = step_by_step(model, found[:, :-1], PROMPT)
    assert found[0, PROMPT:].tolist() == logits[0, PROMPT - 1 :].argmax(-1).tolist()
    assert contextual.records[0].sparse_tokens == contextual.records[1].sparse_tokens == 5
    assert set(contextual.records[0].kept[0]) == set(KINDS)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_padded_batches_are_repaired_too(family: str) -> None:
    """Repair with the tokens, masks and positions that generate gave."""
    model = model_of(family)
    dense, contextual = copy.deepcopy(model), attach(model, shadow_of(model, max_kept_frac=1.0))
    ids_BT = ids_of(2, PROMPT)
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[0, :3] = 0
    with torch.no_grad():
        made = model.generate(
            ids_BT, attention_mask=mask_BT, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0,
            return_dict_in_generate=True,
        )  # fmt: skip
        found = contextual.verify()
        whole_mask = torch.cat([mask_BT, torch.ones(2, 5, dtype=torch.int64)], dim=1)
        positions = (whole_mask.cumsum(1) - 1).clamp_min(0)
        wanted = dense(
            made.sequences[:, :-1], attention_mask=whole_mask, position_ids=positions, use_cache=False
        ).logits
    assert contextual.records[0].sparse_tokens == 5 and found is not None
    torch.testing.assert_close(found, wanted[:, PROMPT:], rtol=1e-3, atol=1e-3)
