"""A text that is given against the same text written token by token."""

import copy
from typing import Any

import pytest
import torch

from niwaki.runtime.contextual.following import follow
from niwaki.runtime.contextual.sparsity import attach
from support.contextual import PROMPT, ids_of, model_of, shadow_of, step_by_step

RUNNING = [{}, {"refresh_tokens": 4}, {"min_prompt": PROMPT + 3}, {"max_kept_frac": 0.1}, {"mean_fill": 0.7}]


@pytest.mark.parametrize("running", RUNNING)
@pytest.mark.parametrize("family", ["llama", "gemma3", "opt"])
def test_a_given_text_runs_as_if_written_one_by_one(family: str, running: dict[str, Any]) -> None:
    model = model_of(family)
    twin = copy.deepcopy(model)
    ids_BT = ids_of(1, PROMPT + 14)
    contextual, stepping = attach(model, shadow_of(model, **running)), attach(twin, shadow_of(twin, **running))
    wanted_BTV, _ = step_by_step(twin, ids_BT, PROMPT)
    for _ in range(2):  # and again, with nothing left of the first
        torch.testing.assert_close(follow(contextual, ids_BT[0], PROMPT), wanted_BTV[0], atol=1e-4, rtol=1e-4)
        assert contextual.records[-1] == stepping.records[0]
    assert bool(contextual.records[0].sparse_tokens) == ("max_kept_frac" not in running)


def test_a_prompt_alone_is_read() -> None:
    model = model_of("llama")
    ids_BT = ids_of(1, PROMPT)
    with torch.no_grad():
        wanted_BTV = model(input_ids=ids_BT, use_cache=False).logits
    torch.testing.assert_close(follow(attach(model, shadow_of(model)), ids_BT[0], PROMPT), wanted_BTV[0])
