"""Predictors of strangers: a mutated one is refused with one line, or the model runs with it.

How many mutations are tried: see `tests/formats/test_mutated_records.py`.
"""

import copy
import json
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from hypothesis import given
from safetensors.torch import load_file, save_file

from niwaki.errors import NiwakiError
from niwaki.runtime.contextual.attach import attach
from niwaki.runtime.contextual.predictor_files import ABOUT, TENSORS, read_shadow, write_shadow
from support.contextual import ids_of, model_of, shadow_of, step_by_step
from support.mutations import LONG, QUICK, Mutation, mutate_bytes, mutate_json, mutate_tensors, mutations


@cache
def model() -> Any:
    """Return a tiny model of one block. Copy it before use."""
    return model_of("llama", num_hidden_layers=1)


@cache
def folder() -> Path:
    """Return a folder with its predictor."""
    made = Path(mkdtemp(prefix="niwaki-"))
    (made / "niwaki").mkdir()
    write_shadow(made, shadow_of(model(), refresh_tokens=2))
    return made


def changed(target: Path, changes: list[Mutation]) -> Path:
    """Write a copy of the predictor with these changes of its settings, its tensors or the bytes of their file."""
    about = json.loads((folder() / ABOUT).read_text())
    file = (folder() / TENSORS).read_bytes()
    tensors = load_file(folder() / TENSORS)
    for change in changes:
        if change.seed % 4 < 2:
            about = mutate_json(about, change)
        elif change.seed % 4 == 2:
            tensors = mutate_tensors(tensors, change)
    (target / "niwaki").mkdir(parents=True, exist_ok=True)
    (target / ABOUT).write_text(json.dumps(about))
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, target / TENSORS)
    if any(change.seed % 4 == 3 for change in changes):
        change = next(change for change in changes if change.seed % 4 == 3)
        (target / TENSORS).write_bytes(mutate_bytes(file, change))
    return target


@cache
def dense() -> torch.Tensor:
    """Return the logits of the full model."""
    return step_by_step(model(), ids_of(1, 24), 20)[0]


def try_predictor(target: Path) -> bool:
    """Return whether a predictor is accepted. Fail unless the model then runs, the prompt as without a predictor."""
    found = copy.deepcopy(model())
    try:
        attach(found, read_shadow(target))
    except NiwakiError as error:
        assert "\n" not in str(error)
        return False
    logits = step_by_step(found, ids_of(1, 24), 20)[0]
    assert logits.isfinite().all() and torch.equal(logits[:, :20], dense()[:, :20])
    return True


def test_the_predictor_itself_is_accepted() -> None:
    assert try_predictor(folder())


def test_mutated_predictors_are_refused_or_run(tmp_path: Path) -> None:
    accepted: list[bool] = []
    QUICK(given(changes=mutations())(lambda changes: accepted.append(try_predictor(changed(tmp_path, changes)))))()
    assert any(accepted) and not all(accepted)


@pytest.mark.fuzz
def test_many_mutated_predictors_are_refused_or_run(tmp_path: Path, record_property: Any) -> None:
    accepted: list[bool] = []
    LONG(given(changes=mutations())(lambda changes: accepted.append(try_predictor(changed(tmp_path, changes)))))()
    record_property("mutations", len(accepted))
    record_property("accepted", sum(accepted))
