"""A sequence gets in a batch what it gets alone, while others join and leave beside it."""

from typing import Any

import pytest
import torch
from torch import Tensor

from niwaki.runtime.contextual.attach import attach
from niwaki.serve.batch import Batch, PaddedBatch, PerSequence, batch_for
from support.contextual import PROMPT, model_of, shadow_of
from support.families import build, families

NEW = 10
LENGTHS = (5, 11, 1, 17)
FAMILIES = sorted(families())


def prompts(lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(1, 96, (length,), generator=generator).tolist() for length in lengths]


@torch.no_grad()
def alone(model: Any, ids: list[int], count: int) -> tuple[list[int], Tensor]:
    """Return greedy tokens of one sequence by itself, and the logits [T, V] they were chosen from."""
    from transformers import DynamicCache

    cache, given, tokens, found = DynamicCache(config=model.config), torch.tensor([ids]), [], []
    while len(tokens) < count:
        found.append(model(input_ids=given, past_key_values=cache, use_cache=True).logits[0, -1])
        tokens.append(int(found[-1].argmax()))
        given = torch.tensor([tokens[-1:]])
    return tokens, torch.stack(found)


@torch.no_grad()
def together(batch: Batch, given: list[list[int]], counts: list[int], pieces: int) -> list[tuple[list[int], Tensor]]:
    """Return the same of many that join one a step and leave after `counts` tokens."""
    waiting, rows = list(range(len(given))), list[int]()
    tokens: list[list[int]] = [[] for _ in given]
    found: list[list[Tensor]] = [[] for _ in given]
    while waiting or rows:
        if waiting:
            one, place = waiting.pop(0), batch.begin()
            parts = [part for part in torch.tensor(given[one]).tensor_split(pieces) if len(part)]
            for part in parts:
                logits_TV = batch.read(place, part.tolist(), every=False)
            found[one].append(logits_TV[-1])
            tokens[one].append(int(logits_TV[-1].argmax()))
            batch.join(place)
            rows.append(one)
        for one, logits_V in zip(rows, batch.step([tokens[one][-1] for one in rows]), strict=True):
            found[one].append(logits_V)
            tokens[one].append(int(logits_V.argmax()))
        batch.leave([row for row, one in enumerate(rows) if len(tokens[one]) >= counts[one]])
        rows = [one for one in rows if len(tokens[one]) < counts[one]]
    return [(tokens[one], torch.stack(found[one])) for one in range(len(given))]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_in_a_batch_are_those_alone(family: str) -> None:
    model = build(families()[family].config)
    batch = batch_for(model)
    assert isinstance(batch, PaddedBatch)
    counts = [NEW, 6, NEW, 4]
    for ids, count, (tokens, logits_TV) in zip(prompts(), counts, together(batch, prompts(), counts, 2), strict=True):
        wanted, wanted_TV = alone(model, ids, count)
        assert tokens == wanted
        assert torch.allclose(logits_TV, wanted_TV, atol=1e-4)


def test_rows_keep_only_the_padding_they_need() -> None:
    batch = PaddedBatch(build(families()["mistral"].config))
    for ids in prompts((3, 20, 7)):
        place = batch.begin()
        batch.read(place, ids, every=False)
        batch.join(place)
    assert batch._real_BT.sum(1).tolist() == [3, 20, 7] and batch._real_BT.shape[1] == 20
    batch.leave([1])
    assert batch._real_BT.sum(1).tolist() == [3, 7] and batch._real_BT.shape[1] == 7
    assert all(layer.keys.shape[2] == 5 for layer in batch._cache.layers), "within the window of 6"
    batch.leave([0, 1])
    assert batch._real_BT.numel() == 0


@torch.no_grad()
def contextual_alone(ids: list[int], count: int, **running: Any) -> tuple[list[int], Tensor]:
    model = model_of("llama")
    attach(model, shadow_of(model, **running))
    return alone(model, ids, count)


@pytest.mark.parametrize("running", [{}, {"refresh_tokens": 3}], ids=["one look", "looking again"])
def test_contextual_sequences_take_turns_and_each_runs_what_its_prompt_chose(running: dict[str, Any]) -> None:
    model = model_of("llama")
    model.contextual = attach(model, shadow_of(model, **running))
    batch = batch_for(model)
    assert isinstance(batch, PerSequence)
    given = prompts((PROMPT, PROMPT + 5, PROMPT + 9))
    counts = [NEW, 5, NEW]
    found = together(batch, given, counts, 1)
    kept = [record.kept[0] for record in model.contextual.records]
    assert len(kept) == 3 and all(record.decision == "sparse" for record in model.contextual.records)
    for ids, count, (tokens, logits_TV) in zip(given, counts, found, strict=True):
        wanted, wanted_TV = contextual_alone(ids, count, **running)
        assert tokens == wanted
        assert torch.allclose(logits_TV, wanted_TV, atol=1e-5)
    dense, _ = alone(model_of("llama"), given[0], NEW)
    assert found[0][0] != dense, "nothing was skipped"


def test_memory_of_a_contextual_sequence_serves_the_next() -> None:
    model = model_of("llama")
    model.contextual = attach(model, shadow_of(model))
    batch = PerSequence(model)
    first = batch.begin()
    assert first.contextual is not None
    buffers = first.contextual.buffers
    with torch.no_grad():
        batch.read(first, prompts((PROMPT,))[0], every=False)
    batch.drop(first)
    second = batch.begin()
    assert second.contextual is not None and second.contextual.buffers is buffers
    third = batch.begin()
    assert third.contextual is not None and third.contextual.buffers is not buffers


def test_caches_that_are_more_than_keys_and_values_run_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import cache_utils

    class Other(cache_utils.DynamicLayer):
        pass

    model = build(families()["llama"].config)
    monkeypatch.setattr(cache_utils, "DynamicLayer", Other)
    assert isinstance(batch_for(model), PerSequence)
    monkeypatch.undo()
    given = prompts((4, 9))
    for ids, (tokens, _) in zip(given, together(PerSequence(model), given, [5, 5], 1), strict=True):
        assert tokens == alone(model, ids, 5)[0]
