"""What masks were chosen by: the scores of a matrix in a few numbers, for whoever asks later why a weight went.

Every mask is chosen in `methods/_masks`, for a target. A walk hands out a target object for each matrix (`watched`), so
that the place which chooses can tell whose scores it sees (`note`) and no method has to say so. Kept are the scores of
about `SIDE` × `SIDE` weights on a grid over the matrix, and the highest score that every row lost.

A method may choose several times, or learn from a mask what no longer agrees with it. `agreeing` takes the last choice
that agrees with the matrix as it was stored, and gives nothing rather than scores of another mask. `described` needs no
GPU, so that one can work meanwhile.

Cost: a copy of some 16,384 numbers a choice, one sort of them for every matrix; nothing where nobody watches.

Legend: O outputs, I inputs, P columns of one panel.

    with watched(targets) as (own, seen):
        records = compress(own)
    described(agreeing(seen["mlp.up_proj"], stored_OI))
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from niwaki.config.recipe import NM, Sparsity, Target

SIDE = 128  # rows and columns of the grid
BINS = 24
QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
AGREEMENT = 0.99  # of the sampled weights with the mask that the scores chose


@dataclass
class Choice:
    """Scores and kept weights on the grid, panel by panel; `bounds` the highest score that went, by row or panel."""

    shape: tuple[int, int]
    scores: list[Tensor] = field(default_factory=list)
    keep: list[Tensor] = field(default_factory=list)
    bounds: list[Tensor] = field(default_factory=list)
    columns: int = 0


Seen = dict[str, list[Choice]]
_watch: ContextVar[tuple[dict[int, str], Seen] | None] = ContextVar("watch", default=None)


@contextmanager
def watched(targets: Mapping[str, Target]) -> Iterator[tuple[dict[str, Target], Seen]]:
    """The same targets, each of masks an object of its own, and by matrix the choices that are made for them."""
    own = {name: copy.copy(t) if isinstance(t, Sparsity | NM) else t for name, t in targets.items()}
    seen: Seen = {}
    token = _watch.set(({id(target): name for name, target in own.items()}, seen))
    try:
        yield own, seen
    finally:
        _watch.reset(token)


def note(
    target: Target, scores_OP: Tensor, keep_OP: Tensor, bound_O: Tensor | None, columns: int = 0, start: int = 0
) -> None:
    """Remembers a choice for the matrix of `target`: its columns from `start` on, of `columns` (0: these are all)."""
    watch = _watch.get()
    if watch is None or id(target) not in watch[0]:
        return
    choices = watch[1].setdefault(watch[0][id(target)], [])
    columns = columns or scores_OP.shape[1]
    if not start:
        choices.append(Choice((len(scores_OP), columns)))
    down, right = _steps(choices[-1].shape)
    grid = slice(0, None, down), slice(-start % right, None, right)
    choices[-1].scores.append(scores_OP[grid].detach().to(torch.float32, copy=True))
    choices[-1].keep.append(keep_OP[grid].clone())
    choices[-1].columns += scores_OP.shape[1]
    if bound_O is not None:
        choices[-1].bounds.append(bound_O.detach().float().reshape(-1))


class Sample(NamedTuple):
    """A choice on the host: N scores, whether each stayed, and the bounds of rows or panels."""

    scores_N: Tensor
    kept_N: Tensor
    bounds_B: Tensor


def agreeing(choices: list[Choice], stored_OI: Tensor) -> Sample | None:
    """The last choice that `stored_OI` shows, if any."""
    for choice in reversed(choices):
        if choice.shape != tuple(stored_OI.shape) or choice.columns != choice.shape[1]:
            continue
        down, right = _steps(choice.shape)
        kept = torch.cat(choice.keep, dim=1)
        if float(((stored_OI[::down, ::right] != 0) == kept).float().mean()) >= AGREEMENT:
            scores = torch.cat(choice.scores, dim=1).cpu().view(-1)
            bounds_B = torch.cat(choice.bounds).cpu() if choice.bounds else torch.empty(0)
            return Sample(scores, kept.cpu().view(-1), bounds_B)
    return None


def described(sample: Sample | None) -> dict[str, Any]:
    """{"scores": quantiles, and a histogram over log₁₀}, or {} without a sample.

    `lost` is the highest score gone by row: least, middle, most.
    """
    if sample is None:
        return {}
    scores_N, kept_N, bounds_B = sample
    ordered_N = scores_N.sort().values
    places = [round(q * (len(ordered_N) - 1)) for q in QUANTILES]
    positive_N = scores_N > 0
    found: dict[str, Any] = {
        "sampled": len(scores_N),
        "quantiles": [_short(float(ordered_N[place])) for place in places],
        "zero": int((~positive_N).sum()),
    }
    logs_N = scores_N[positive_N].log10()
    if len(logs_N):
        low, high = float(logs_N.min()), float(logs_N.max())
        span = (high - low) or 1.0
        bins_N = ((logs_N - low) / span * BINS).long().clamp_(0, BINS - 1)
        for name, mask_N in (("kept", kept_N[positive_N]), ("cut", ~kept_N[positive_N])):
            found[name] = torch.bincount(bins_N[mask_N], minlength=BINS).tolist()
        found["log10"] = [round(low, 4), round(low + span, 4)]
    if len(bounds_B := bounds_B[bounds_B.isfinite()]):
        found["lost"] = [_short(float(bound)) for bound in (bounds_B.min(), bounds_B.median(), bounds_B.max())]
        found["thresholds"] = len(bounds_B)
    return {"scores": found}


def _short(value: float) -> float:
    return float(f"{value:.6g}")


def _steps(shape: tuple[int, int]) -> tuple[int, int]:
    """Distances of the grid along rows and columns: odd, so that it does not fall in step with heads and groups."""
    down, right = (max(1, size // SIDE) for size in shape)
    return down + (down % 2 == 0), right + (right % 2 == 0)
