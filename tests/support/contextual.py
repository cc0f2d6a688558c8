"""Tiny models with random predictors, and a slow reference that masks activations and cuts no matrix."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from niwaki.model.anatomy import discover, find_blocks
from niwaki.model.hf import build_skeleton
from niwaki.runtime.contextual.predictor import Predictor
from niwaki.runtime.contextual.predictor_files import Running, Shadow
from niwaki.runtime.contextual.selection import Rule
from niwaki.runtime.contextual.units import KINDS, UnitLayout, find_layout
from support.families import build, families
from support.models import file_bytes

PROMPT = 20


def model_of(family: str, **changes: Any) -> Any:
    """Return a tiny model of a family, with four groups of heads where its config allows it."""
    config = families()[family].config
    for name, value in {"num_key_value_heads": 4, "num_attention_heads": 8, **changes}.items():
        if family != "opt":
            setattr(config, name, value)
    return build(config)


def layout_of(model: Any, width: int = 1) -> UnitLayout:
    """Return the units of a model."""
    skeleton = build_skeleton(model.config, torch.float32)
    return find_layout(discover(skeleton), skeleton, width)


def shadow_of(
    model: Any, *, skip_frac: float = 0.5, scope: str = "local", seed: int = 0, spread: float = 1.0, **running: Any
) -> Shadow:
    """Return a predictor whose scores are partly fixed, within `spread`, and partly from the prompt."""
    layout = layout_of(model)
    generator = torch.Generator().manual_seed(seed)
    prior_U = spread * torch.rand(layout.size, generator=generator) + 0.5
    trust_K2 = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    none = torch.zeros(0)
    heads = layout.blocks * layout.count("heads")
    typical_U = torch.ones(layout.size)
    predictor = Predictor((), heads, prior_U, typical_U, trust_K2, none, none, none.view(0, 0), none.view(0, 0))
    return Shadow(predictor, layout, Rule(skip_frac, scope), Running(**{"mean_fill": 0.0, **running}))


def ids_of(sequences: int, tokens: int, seed: int = 0) -> Tensor:
    """Return random token ids [sequences, tokens]."""
    return torch.randint(1, 96, (sequences, tokens), generator=torch.Generator().manual_seed(seed))


def masked_logits(
    model: Any, ids_BT: Tensor, prompt: int, kept_BU: Tensor, layout: UnitLayout, mean_fill: float = 0.0
) -> Tensor:
    """Return logits of one parallel forward pass with masks from token `prompt` on.

    Skipped units output nothing, or their mean in the prompt.
    """
    kept = dict(zip(KINDS, layout.split(kept_BU), strict=True))
    handles = []

    def hook(kind: str, index: int) -> Callable[..., Any]:
        def masked(_module: Any, args: tuple[Any, ...]) -> Any:
            x_BTC = args[0].reshape(*ids_BT.shape, -1).clone()
            keep_BC = kept[kind][:, index].repeat_interleave(x_BTC.shape[2] // layout.count(kind), dim=1)
            instead_B1C = mean_fill * x_BTC[:, :prompt].mean(1, keepdim=True) * (kind == "neurons")
            x_BTC[:, prompt:] = torch.where(keep_BC[:, None], x_BTC[:, prompt:], instead_B1C)
            return (x_BTC.view(args[0].shape),)

        return masked

    for index, block in enumerate(find_blocks(model)[1]):
        for kind in KINDS:
            part = block.get_submodule(layout.units[kind].consumer)
            handles.append(part.register_forward_pre_hook(hook(kind, index)))
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids_BT, use_cache=False).logits
    for handle in handles:
        handle.remove()
    return logits


def step_by_step(model: Any, ids_BT: Tensor, prompt: int, **given: Any) -> tuple[Tensor, Any]:
    """Return logits [B, T, V] of a prompt and then one token after another, and the cache."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        found = [model(input_ids=ids_BT[:, :prompt], past_key_values=cache, use_cache=True, **given).logits]
        found += [
            model(input_ids=ids_BT[:, place : place + 1], past_key_values=cache, use_cache=True).logits
            for place in range(prompt, ids_BT.shape[1])
        ]
    return torch.cat(found, dim=1), cache


def assert_repeats_and_resumes(compress: Callable[..., Any], tmp_path: Path, *, walked: str) -> None:
    """Check that a compression gives the same bytes again, and after a stop without another walk (event `walked`)."""
    compress(tmp_path)
    compress(tmp_path, "again")
    assert file_bytes(tmp_path / "out") == file_bytes(tmp_path / "again")

    def stop(event: str, **fields: Any) -> None:
        if event == "saved":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(tmp_path, "later", report=stop)
    events: list[str] = []
    compress(tmp_path, "later", resume=True, report=lambda event, **fields: events.append(event))
    assert walked not in events and file_bytes(tmp_path / "later") == file_bytes(tmp_path / "out")
