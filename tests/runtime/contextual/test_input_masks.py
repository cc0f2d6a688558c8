"""Masks of inputs in benchmarks: exact against slow float64 loops, and causal where they are said to be."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from benchmarks.common.input_masks import SCORES, WHEN, InputMasks, Rule, find_places, skipped_bytes
from niwaki.model.decoder import open_decoder
from support.models import build, tiny_llama

PROMPT, MEMORY, LENGTH = 16, 8, 64
CAUSAL = [when for when in WHEN if not when.endswith("oracle")]


def masks_of(folder: Path) -> InputMasks:
    decoder = open_decoder(folder, torch.device("cpu"), torch.float64)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    masks = InputMasks(model.requires_grad_(False), find_places(decoder, model), PROMPT, MEMORY)
    generator = torch.Generator().manual_seed(3)
    for place in masks.places:
        masks.means[place] = torch.randn(len(place.norms2_C), generator=generator, dtype=torch.float64) / 8
        for score in SCORES:
            masks.thresholds[place, 0.5, score] = torch.tensor(0.01, dtype=torch.float64)
    return masks


@pytest.fixture(scope="module")
def masks(tmp_path_factory: pytest.TempPathFactory) -> InputMasks:
    return masks_of(tiny_llama(tmp_path_factory.mktemp("masks"), blocks=2))


def ids(seed: int) -> Tensor:
    return torch.randint(0, 4096, (2, LENGTH), generator=torch.Generator().manual_seed(seed))


def loss_of_future(masks: InputMasks, when: str, score: str, units: int | None, cut: int) -> float:
    """Return how far the logits before `cut` move when all tokens from there on change."""
    rules = {p: Rule(0.5, when, score, units if p.kind == "o" else None) for p in masks.places}
    first = ids(0)
    second = torch.cat([first[:, :cut], ids(1)[:, cut:]], dim=1)
    found = [masks.logits(each, rules)[:, : cut - PROMPT] for each in (first, second)]
    return float((found[0] - found[1]).abs().max())


@pytest.mark.parametrize("cut", [17, 40])
@pytest.mark.parametrize("when", CAUSAL)
def test_later_tokens_change_no_earlier_logits(masks: InputMasks, when: str, cut: int) -> None:
    for score, units in zip(SCORES, (None, None, 4), strict=True):
        assert loss_of_future(masks, when, score, units, cut) < 1e-5, (score, units)


@pytest.mark.parametrize("when", [when for when in WHEN if when.endswith("oracle")])
def test_an_oracle_is_seen_to_read_the_future(masks: InputMasks, when: str) -> None:
    assert loss_of_future(masks, when, "size", None, 40) > 1e-4


def slow_choice(score_TU: Tensor, t: int, when: str) -> Tensor:
    """Return what the mask of token `t` is chosen by, from the definition."""
    if when in ("prompt", "prompt, oracle"):
        return score_TU[PROMPT:].mean(0) if when.endswith("oracle") else score_TU[:PROMPT].mean(0)
    if when == "16 tokens":
        start = t - (t - PROMPT) % 16
        return score_TU[start - MEMORY : start].mean(0)
    if when == "16 tokens, oracle":
        start = t - (t - PROMPT) % 16
        return score_TU[start : start + 16].mean(0)
    return score_TU[t - MEMORY : t].mean(0) if when == "1 token" else score_TU[t]


def slowly_masked(x_TC: Tensor, rule: Rule, norms2_C: Tensor, mean_C: Tensor, threshold: float) -> Tensor:
    """Mask one sequence token by token and unit by unit."""
    moved_TC = x_TC - mean_C if rule.score == "centred" else x_TC
    score_TC = moved_TC**2 * (norms2_C if rule.score == "weighted" else 1)
    size = 1 if rule.units is None else x_TC.shape[1] // rule.units
    score_TU = torch.stack([score_TC[:, u : u + size].sum(1) for u in range(0, x_TC.shape[1], size)], 1)
    out = x_TC.clone()
    for t in range(PROMPT, len(x_TC)):
        value_U = slow_choice(score_TU, t, rule.when).tolist()
        order = sorted(range(len(value_U)), key=value_U.__getitem__)
        skipped = order[: round(rule.share * len(order))]
        if rule.when == "token, threshold":
            skipped = [u for u, value in enumerate(value_U) if value <= threshold]
        for u in skipped:
            own = slice(u * size, (u + 1) * size)
            out[t, own] = mean_C[own] if rule.score == "centred" else 0.0
    return out


@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("units", [None, 4])
def test_masks_follow_their_definition(masks: InputMasks, when: str, score: str, units: int | None) -> None:
    place = next(place for place in masks.places if place.kind == "o")
    x_BTC = torch.randn(2, LENGTH, 32, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    rule = Rule(0.5, when, score, units)
    found = masks.masked(x_BTC, place, rule)
    norms2_C = place.norms2_C.double()
    slow = [slowly_masked(x_TC, rule, norms2_C, masks.means[place], 0.01) for x_TC in x_BTC]
    assert torch.equal(found, torch.stack(slow))


def test_a_model_runs_on_masked_inputs(masks: InputMasks) -> None:
    """Check hooks and places: a share of nothing is dense, and a masked matrix equals one with zero columns."""
    sequence, places = ids(2), masks.places
    dense = masks.model(input_ids=sequence).logits[:, PROMPT:].float()
    assert torch.equal(masks.logits(sequence, {p: Rule(0.0, "prompt") for p in places}), dense)
    down = next(p for p in places if p.kind == "down" and p.block == 1)
    seen: dict[Any, Tensor] = {}
    masks.observe(sequence, seen.__setitem__)
    rule = Rule(0.5, "prompt, oracle")
    masked = masks.masked(seen[down], down, rule)
    assert 0.45 < float((masked[:, PROMPT:] == 0).double().mean()) < 0.55
    linear = masks.model.get_submodule(down.names[0])
    handle = linear.register_forward_hook(lambda *_: torch.nn.functional.linear(masked, linear.weight))
    expected = masks.model(input_ids=sequence).logits[:, PROMPT:].float()
    handle.remove()
    assert torch.equal(masks.logits(sequence, {down: rule}), expected)
    assert not torch.equal(expected, dense)


def test_every_weight_of_the_blocks_has_a_place(masks: InputMasks, tmp_path: Path) -> None:
    assert [p.kind for p in masks.places] == ["q/k/v", "o", "gate/up", "down"] * 2
    assert skipped_bytes({p: Rule(0.5) for p in masks.places}, masks.places) == pytest.approx(0.5)
    weights = sum(p.weights for p in masks.places)
    assert weights == sum(p.numel() for name, p in masks.model.named_parameters() if "proj" in name)
    config = transformers.OPTConfig(
        vocab_size=512, hidden_size=32, ffn_dim=64, num_hidden_layers=1, num_attention_heads=4, word_embed_proj_dim=32
    )
    build(config, torch.float32).save_pretrained(tmp_path)
    assert [p.kind for p in masks_of(tmp_path).places] == ["q/k/v", "o", "up", "down"]
