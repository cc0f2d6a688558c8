"""Decoding in memory of fixed size, against transformers' own greedy text."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from niwaki.errors import InputError
from niwaki.runtime.contextual.attach import attach
from niwaki.runtime.cuda_graph import CudaGraphGenerator
from support.contextual import PROMPT, ids_of, model_of, shadow_of

NEW = 10


def greedy(model: Any, ids_BT: Tensor, **given: Tensor) -> Tensor:
    model.generation_config.eos_token_id = None  # nothing ends the text early
    found: Tensor = model.generate(ids_BT, max_new_tokens=NEW, do_sample=False, pad_token_id=0, **given)
    return found[:, ids_BT.shape[1] :]


@pytest.mark.parametrize("family", ["llama", "qwen3", "opt", "gpt_neox"])
def test_the_dense_text_is_that_of_generate(family: str) -> None:
    model = model_of(family)
    generator = CudaGraphGenerator(model, room=PROMPT + NEW)
    for seed in (0, 1):  # the second prompt meets what the first left in the cache
        ids_BT = ids_of(2, PROMPT, seed=seed)
        assert torch.equal(generator.generate(ids_BT, max_new_tokens=NEW), greedy(model, ids_BT))


@pytest.mark.parametrize("mean_fill", [0.0, 0.5])
@pytest.mark.parametrize("sequences", [1, 3])
@pytest.mark.parametrize("family", ["llama", "qwen3", "opt"])
def test_the_sparse_text_is_that_of_generate(family: str, sequences: int, mean_fill: float) -> None:
    model = model_of(family)
    dense = copy.deepcopy(model)
    running = {"max_kept_frac": 1.0, "mean_fill": mean_fill, "batch": "shared"}
    model.contextual = attach(model, shadow_of(model, **running))
    generator, steps = CudaGraphGenerator(model, room=PROMPT + NEW + 3), set()
    for seed in (0, 1):
        ids_BT = ids_of(sequences, PROMPT + seed, seed=seed)
        wanted = greedy(model, ids_BT)
        assert torch.equal(generator.generate(ids_BT, max_new_tokens=NEW), wanted)
        record = model.contextual.records[-1]
        assert record.sparse_tokens == NEW - 1 and record.dense_tokens == 0
        assert not torch.equal(wanted, greedy(dense, ids_BT))
        steps |= set(generator._steps)
    if sequences == 1:
        assert len(steps) == 1  # the second prompt runs on what was recorded for the first


def test_padding_on_the_left() -> None:
    model = model_of("llama")
    model.contextual = attach(model, shadow_of(model, max_kept_frac=1.0))
    ids_BT, mask_BT = ids_of(2, PROMPT), torch.ones(2, PROMPT, dtype=torch.int64)
    ids_BT[0, :3], mask_BT[0, :3] = 0, 0
    found = CudaGraphGenerator(model, room=PROMPT + NEW).generate(ids_BT, max_new_tokens=NEW, mask_BT=mask_BT)
    assert torch.equal(found, greedy(model, ids_BT, attention_mask=mask_BT))


def test_prompts_that_are_too_short_run_dense_and_say_so() -> None:
    model = model_of("llama")
    dense = copy.deepcopy(model)
    model.contextual = attach(model, shadow_of(model, min_prompt=16))
    ids_BT = ids_of(1, 8)
    found = CudaGraphGenerator(model, room=32).generate(ids_BT, max_new_tokens=NEW)
    assert torch.equal(found, greedy(dense, ids_BT))
    assert "shorter than 16" in model.contextual.records[-1].dense_because


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(InputError, match="do not fit in room 24"):
        CudaGraphGenerator(model_of("llama"), room=24).generate(ids_of(1, PROMPT), max_new_tokens=5)
    with pytest.raises(InputError, match="window"):
        CudaGraphGenerator(model_of("gemma2"), room=64).generate(ids_of(1, PROMPT), max_new_tokens=5)
