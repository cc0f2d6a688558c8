"""Scores that masks were chosen by, in a few numbers per matrix, for the question why a weight went.

Every mask is chosen in `methods.shared.masks`, for a target. A walk gives every matrix a target object of its own
(`record_mask_choices`). So the code that chooses a mask knows whose scores it sees (`record_choice`), and no method has
to say so. The record holds the scores of about `SIDE` × `SIDE` weights on a grid over the matrix, and the highest score
that every row lost.

A method may choose several times, or learn from a mask until the matrix no longer agrees with it.
`last_agreeing_choice` returns the last choice that agrees with the stored matrix, or None rather than the scores of
another mask. `summarize_scores` needs no GPU, so that one can work meanwhile.

Cost: a copy of some 16,384 numbers per choice, and one sort of them per matrix; nothing outside a recording.

Legend: O outputs, I inputs, P columns of one panel.

    with record_mask_choices(targets) as (own_targets, choices):
        records = compress(own_targets)
    summarize_scores(last_agreeing_choice(choices["mlp.up_proj"], stored_OI))
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from niwaki.config.targets import Target

SIDE = 128  # rows and columns of the grid
BINS = 24
QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
AGREEMENT = 0.99  # of the sampled weights with the mask that the scores chose


@dataclass
class MaskChoice:
    """Scores and kept weights on the grid, panel by panel; `bounds`: the highest score that a row or panel lost."""

    shape: tuple[int, int]
    scores: list[Tensor] = field(default_factory=list)
    keep: list[Tensor] = field(default_factory=list)
    bounds: list[Tensor] = field(default_factory=list)
    columns: int = 0


MaskChoices = dict[str, list[MaskChoice]]  # by matrix
_recording: ContextVar[tuple[dict[int, str], MaskChoices] | None] = ContextVar("recording", default=None)


@contextmanager
def record_mask_choices(targets: Mapping[str, Target]) -> Iterator[tuple[dict[str, Target], MaskChoices]]:
    """Yield a copy of every target, and the choices that are made for them by matrix."""
    own = {name: copy.copy(target) for name, target in targets.items()}
    choices: MaskChoices = {}
    token = _recording.set(({id(target): name for name, target in own.items()}, choices))
    try:
        yield own, choices
    finally:
        _recording.reset(token)


def record_choice(
    target: Target, scores_OP: Tensor, keep_OP: Tensor, bound_O: Tensor | None, columns: int = 0, start: int = 0
) -> None:
    """Record a choice for the matrix of `target`: its columns from `start` on, of `columns` (0: these are all)."""
    recording = _recording.get()
    if recording is None or id(target) not in recording[0]:
        return
    choices = recording[1].setdefault(recording[0][id(target)], [])
    columns = columns or scores_OP.shape[1]
    if not start:
        choices.append(MaskChoice((len(scores_OP), columns)))
    down, right = _grid_steps(choices[-1].shape)
    grid = slice(0, None, down), slice(-start % right, None, right)
    choices[-1].scores.append(scores_OP[grid].detach().to(torch.float32, copy=True))
    choices[-1].keep.append(keep_OP[grid].clone())
    choices[-1].columns += scores_OP.shape[1]
    if bound_O is not None:
        choices[-1].bounds.append(bound_O.detach().float().reshape(-1))


class ScoreSample(NamedTuple):
    """Sampled scores of one matrix on the host [N], whether each weight stayed, and the bounds of rows or panels."""

    scores_N: Tensor
    kept_N: Tensor
    bounds_B: Tensor


def last_agreeing_choice(choices: list[MaskChoice], stored_OI: Tensor) -> ScoreSample | None:
    """Return the last choice whose mask `stored_OI` has, or None."""
    for choice in reversed(choices):
        if choice.shape != tuple(stored_OI.shape) or choice.columns != choice.shape[1]:
            continue
        down, right = _grid_steps(choice.shape)
        kept = torch.cat(choice.keep, dim=1)
        if float(((stored_OI[::down, ::right] != 0) == kept).float().mean()) >= AGREEMENT:
            scores = torch.cat(choice.scores, dim=1).cpu().view(-1)
            bounds_B = torch.cat(choice.bounds).cpu() if choice.bounds else torch.empty(0)
            return ScoreSample(scores, kept.cpu().view(-1), bounds_B)
    return None


def summarize_scores(sample: ScoreSample | None) -> dict[str, Any]:
    """Return {"scores": quantiles, and a histogram over log₁₀}, or {} without a sample.

    `lost` is the highest score that each row lost: its min, median and max over the rows.
    """
    if sample is None:
        return {}
    scores_N, kept_N, bounds_B = sample
    ordered_N = scores_N.sort().values
    positions = [round(q * (len(ordered_N) - 1)) for q in QUANTILES]
    positive_N = scores_N > 0
    summary: dict[str, Any] = {
        "sampled": len(scores_N),
        "quantiles": [_short(float(ordered_N[position])) for position in positions],
        "zero": int((~positive_N).sum()),
    }
    logs_N = scores_N[positive_N].log10()
    if len(logs_N):
        low, high = float(logs_N.min()), float(logs_N.max())
        span = (high - low) or 1.0
        bins_N = ((logs_N - low) / span * BINS).long().clamp_(0, BINS - 1)
        for name, mask_N in (("kept", kept_N[positive_N]), ("cut", ~kept_N[positive_N])):
            summary[name] = torch.bincount(bins_N[mask_N], minlength=BINS).tolist()
        summary["log10"] = [round(low, 4), round(low + span, 4)]
    if len(bounds_B := bounds_B[bounds_B.isfinite()]):
        summary["lost"] = [_short(float(bound)) for bound in (bounds_B.min(), bounds_B.median(), bounds_B.max())]
        summary["thresholds"] = len(bounds_B)
    return {"scores": summary}


def _short(value: float) -> float:
    """Round to 6 significant digits."""
    return float(f"{value:.6g}")


def _grid_steps(shape: tuple[int, int]) -> tuple[int, int]:
    """Return the steps of the grid along rows and columns; both are odd, so that they match no head or group."""
    down, right = (max(1, size // SIDE) for size in shape)
    return down + (down % 2 == 0), right + (right % 2 == 0)
