"""Thresholds of the inputs that tokens skip: damage by the backward walk, shares of one budget, and a trial.

0. Scales. Inputs with large gradients count more: their sizes are multiplied by the root of the root mean square of
   their gradients. So the threshold of an input is that of its place over its scale.
1. Damage. Let x be the input of a place and g the gradient of the summed loss at x. A token that leaves out the inputs
   S changes the loss by Σ_S g·x to first order. Half of the mean square of this number estimates the divergence from
   the dense model (the Fisher information). One backward walk gives it for all places and shares.
2. Shares. The curves of damage over the share get their convex hulls. The cheapest steps per byte are taken until
   together they leave out the wanted share of the weights. `local` takes the same share everywhere.
3. Thresholds. Windows pass the blocks with all inputs masked, and every threshold is set where the inputs are those of
   the model that skips. So the share that is left out is the wanted one.
4. Trial. Held-out windows pass the same blocks and give perplexity and divergence.

Cost: two forwards and a backward of the gradient windows, a forward of the threshold windows, and two of the held-out
ones. Memory: one block, and the hidden states.

Legend: P places, S windows, B windows in a batch, T tokens, N tokens of a batch, I inputs, L levels of a share.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from niwaki.compression.backward import Gradients, backprop_blocks, next_token_losses
from niwaki.compression.walk import loaded_blocks
from niwaki.config.events import Event, Report, silent
from niwaki.data.stream import Stream
from niwaki.errors import ArchitectureError
from niwaki.methods.shared.divergence import logit_divergences
from niwaki.model.decoder import Block, Decoder
from niwaki.runtime.contextual.places import Place

MakeStream = Callable[[Tensor, str], Stream]
LEVELS = tuple(level / 40 for level in range(1, 39))  # shares at which damage is measured
MAX_SHARE = LEVELS[-1]
SAMPLED = 2**20  # inputs of a batch from which a quantile is taken
MIN_SCALE, TINY = 1e-3, 1e-30  # of the scale of an input; of a mean that divides


@dataclass(frozen=True)
class Damage:
    """Estimated divergence [P, L] per token after the prompt, and the scales [I] of the inputs of every place."""

    damage_PL: Tensor
    scales: list[Tensor]


def prompt_of(tokens: int) -> int:
    """Return the tokens of a window that run with all weights, as a prompt does."""
    return max(1, min(128, tokens // 4))


def damages(
    decoder: Decoder,
    places: Sequence[Place],
    ids_ST: Tensor,
    make_stream: MakeStream,
    *,
    activation_bytes: int | None = None,
    folder: Path | None = None,
    report: Report = silent,
    weighted: bool = True,
) -> Damage:
    """Return the damage of every place alone at all `LEVELS`, and the scales of its inputs."""
    damage_PL = torch.zeros(len(places), len(LEVELS), dtype=torch.float64)
    squares = [torch.zeros(place.inputs, dtype=torch.float64) for place in places]
    tokens, prompt = ids_ST.shape[1], prompt_of(ids_ST.shape[1])
    level_L = torch.tensor(LEVELS, device=decoder.device)

    def visit(block: Block, gradients: Gradients) -> None:
        for index, place in enumerate(places):
            if place.block == block.index:
                x_NI, grad_NI = _after_prompt(gradients, place, prompt)
                own_I = grad_NI.square().sum(0, dtype=torch.float64)
                size_NI = x_NI.abs() * _scale(own_I).to(x_NI) if weighted else x_NI.abs()
                damage_PL[index] += _squares(size_NI, x_NI * grad_NI * (tokens - 1), level_L).sum(0).cpu()
                squares[index] += own_I.cpu()
        if gradients.rows.stop == len(ids_ST):
            report(Event.GRADIENTS, index=len(decoder) - 1 - block.index, of=len(decoder))

    stream = make_stream(ids_ST, "gradients")
    names = {name for place in places for name in place.names}
    try:
        backprop_blocks(
            decoder, stream, visit, inputs=names, activation_bytes=activation_bytes, folder=folder, report=report
        )
    except RuntimeError as error:
        if "inplace operation" not in str(error):
            raise
        raise ArchitectureError(
            "a block of this model changes its activations in place, so it has no gradients to share the budget by: "
            "set scope=local and score=size"
        ) from error
    damage_PL /= 2 * len(ids_ST) * (tokens - prompt)
    return Damage(
        damage_PL, [_scale(square_I).float() if weighted else torch.ones(len(square_I)) for square_I in squares]
    )


def _scale(square_I: Tensor) -> Tensor:
    """Return the root of the root mean square gradient of every input, with mean 1."""
    root_I = square_I.sqrt().sqrt()
    return (root_I / root_I.mean().clamp_min(TINY)).clamp_min(MIN_SCALE)


def _after_prompt(gradients: Gradients, place: Place, prompt: int) -> tuple[Tensor, Tensor]:
    """Return the input [N, I] of a place after the prompts, and its gradient through all matrices."""
    count = gradients.rows.stop - gradients.rows.start
    x, total = gradients.inputs[place.names[0]]
    for name in place.names[1:]:  # of one tensor all have the whole gradient, of several views each has its own
        grad = gradients.inputs[name][1].view(total.shape)
        total = total if torch.equal(grad, gradients.inputs[place.names[0]][1]) else total + grad
    found = [part.reshape(count, -1, place.inputs)[:, prompt:].flatten(0, 1).float() for part in (x, total)]
    return found[0], found[1]


def _squares(size_NI: Tensor, change_NI: Tensor, level_L: Tensor) -> Tensor:
    """Return the squared sum [N, L] of the changes by inputs whose size is below the quantile of every level."""
    threshold_NL = quantiles(size_NI, level_L).expand(len(size_NI), -1).contiguous()
    size_NI, order_NI = size_NI.sort(dim=1)
    change_NI = change_NI.gather(1, order_NI).double().cumsum(1)
    count_NL = torch.searchsorted(size_NI, threshold_NL, right=True)
    return change_NI.gather(1, (count_NL - 1).clamp_min(0)).masked_fill(count_NL == 0, 0).square()


def quantiles(size_NI: Tensor, level_L: Tensor) -> Tensor:
    """Return the sizes [L] below which these shares lie, from evenly taken tokens."""
    size_M = size_NI[:: max(1, size_NI.numel() // SAMPLED)].float().flatten().sort().values
    return size_M[(level_L.to(size_M) * len(size_M)).long().clamp(0, len(size_M) - 1)]


def allocate(damage_PL: Tensor, places: Sequence[Place], skip_frac: float) -> list[float]:
    """Return the share of every place that leaves out `skip_frac` of all weights with the least sum of damages."""
    steps = [
        (slope / place.weights, index, first, last)
        for index, place in enumerate(places)
        for slope, first, last in _hull(damage_PL[index].tolist())
    ]
    shares, left = [0.0] * len(places), skip_frac * sum(place.weights for place in places)
    for _, index, first, last in sorted(steps):
        size = (last - first) * places[index].weights
        part = min(1.0, left / size)
        shares[index] = first + part * (last - first)
        left -= part * size
        if left <= 0:
            break
    return shares


def _hull(damage_L: Sequence[float]) -> Iterator[tuple[float, float, float]]:
    """Yield the steps (slope, first share, last share) of the lower convex hull of a curve that begins at zero."""
    points = [(0.0, 0.0)]
    for share, damage in zip(LEVELS, damage_L, strict=True):
        while len(points) > 1 and _slope(points[-1], (share, damage)) <= _slope(points[-2], points[-1]):
            points.pop()
        points.append((share, damage))
    for first, last in pairwise(points):
        yield _slope(first, last), first[0], last[0]


def _slope(first: tuple[float, float], last: tuple[float, float]) -> float:
    return (last[1] - first[1]) / (last[0] - first[0])


@dataclass
class Trial:
    """Shares that windows pass the blocks with, none if the thresholds are known, and what was found.

    `thresholds` and `skipped` are those of every place, `skipped` on the held-out windows. `ratio` is the perplexity
    over that of the dense model, `divergence` in nats per token.
    """

    shares: Sequence[float]
    thresholds: list[float]
    skipped: list[float]
    ratio: float = math.nan
    divergence: float = math.nan


@torch.no_grad()
def run_trials(
    decoder: Decoder,
    places: Sequence[Place],
    shares: Sequence[Sequence[float]],
    ids_ST: Tensor,
    held_ST: Tensor,
    make_stream: MakeStream,
    report: Report = silent,
    *,
    known: Sequence[Sequence[float]] = (),
    scales: Sequence[Tensor] | None = None,
) -> list[Trial]:
    """Return the trial of every list of shares: thresholds from the windows `ids_ST`, losses from `held_ST`.

    After them come the trials of `known` lists of thresholds. `scales` multiply the sizes of the inputs of a place.
    """
    on_device = None if scales is None else [scale_I.to(decoder.device) for scale_I in scales]
    none = [0.0] * len(places)
    trials = [Trial(one, [*none], [*none]) for one in shares] + [Trial((), [*one], [*none]) for one in known]
    dense = make_stream(held_ST, "trial-dense")
    pairs = [
        (make_stream(ids_ST, f"trial-{number}") if trial.shares else None, make_stream(held_ST, f"trial-held-{number}"))
        for number, trial in enumerate(trials)
    ]
    for block in loaded_blocks(decoder):
        own = [(index, place) for index, place in enumerate(places) if place.block == block.index]
        for trial, (fitted, held) in zip(trials, pairs, strict=True):
            if fitted is not None:
                _advance(block, own, trial, fitted, on_device, learns=True)
            _advance(block, own, trial, held, on_device, learns=False)
        dense.advance(block)
        block.release()
        report(Event.CANDIDATE_BLOCK, index=block.index, of=len(decoder))
    for trial, (_, held) in zip(trials, pairs, strict=True):
        rise, trial.divergence = _compare(decoder, dense, held)
        trial.ratio = math.exp(min(rise, 50.0))
    return trials


def _advance(
    block: Block,
    own: Sequence[tuple[int, Place]],
    trial: Trial,
    stream: Stream,
    scales: Sequence[Tensor] | None,
    *,
    learns: bool,
) -> None:
    """Move a stream past a block that skips. If it `learns`, set the thresholds; otherwise measure what is skipped."""
    prompt = prompt_of(stream.ids_ST.shape[1])

    def change(index: int, x_BTI: Tensor, passed: int) -> Tensor:
        """Mask an input; thresholds and shares are means over the batches that passed."""
        after_BTI = x_BTI[:, prompt:]
        size_BTI = after_BTI.abs() if scales is None else after_BTI.abs().float() * scales[index]
        if learns:
            level_1 = torch.tensor([trial.shares[index]])
            found = float(quantiles(size_BTI.flatten(0, 1), level_1)) if trial.shares[index] else 0.0
            trial.thresholds[index] += (found - trial.thresholds[index]) / passed
        kept_BTI = size_BTI > trial.thresholds[index]
        if not learns:
            skipped = 1 - float(kept_BTI.float().mean())
            trial.skipped[index] += (skipped - trial.skipped[index]) / passed
        return torch.cat([x_BTI[:, :prompt], torch.where(kept_BTI, after_BTI, 0)], dim=1)

    for number, rows in enumerate(stream.slices(), start=1):
        with masked_inputs(block, own, rows, partial(change, passed=number)):
            stream.advance(block, rows)


@contextmanager
def masked_inputs(
    block: Block, own: Sequence[tuple[int, Place]], rows: slice, change: Callable[[int, Tensor], Tensor]
) -> Iterator[None]:
    """Replace the inputs [B, T, I] of the places `own` of a block by `change(index, input)` in the forwards inside."""
    count = rows.stop - rows.start
    with ExitStack() as stack:
        for index, place in own:
            hook = _hook(index, count, change)
            for name in place.names:
                handle = block.module.get_submodule(name).register_forward_pre_hook(hook)
                stack.callback(handle.remove)
        yield


def _hook(index: int, count: int, change: Callable[[int, Tensor], Tensor]) -> Callable[..., Any]:
    """Return a hook that changes the input once for all matrices of a place."""
    last: list[Any] = []

    def hook(_module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0]
        if not last or last[0].data_ptr() != x.data_ptr() or last[0].shape != x.shape:
            last[:] = x, change(index, x.reshape(count, -1, x.shape[-1])).view(x.shape)
        return (last[1], *args[1:])

    return hook


def _compare(decoder: Decoder, dense: Stream, held: Stream) -> tuple[float, float]:
    """Return the rise of the mean loss after the prompts, and the mean divergence from the dense model."""
    prompt, rise, divergence, count = prompt_of(dense.ids_ST.shape[1]), 0.0, 0.0, 0
    for rows in dense.slices():
        ids_BT = dense.ids_ST[rows].to(decoder.device)
        own_BTD, dense_BTD = held.hidden.read(rows), dense.hidden.read(rows)
        losses = [next_token_losses(decoder, ids_BT, x_BTD)[:, prompt:].double() for x_BTD in (own_BTD, dense_BTD)]
        found_BT = logit_divergences(decoder, decoder, ids_BT, own_BTD, dense_BTD)[:, prompt:-1].double()
        rise += float((losses[0] - losses[1]).sum())
        divergence += float(found_BT.sum())
        count += found_BT.numel()
    return rise / count, divergence / count


def too_harmful(skip_frac: float, trial: Trial, max_ratio: float, trials: Callable[[list[float]], list[Trial]]) -> str:
    """Return one line for a target with too much damage, and the largest of some lower ones without it."""
    lower = sorted({round(skip_frac * part / 6, 2) for part in range(1, 6)} - {0.0, skip_frac})
    ratios = [found.ratio for found in trials(lower)] if lower else []
    fine = [one for one, ratio in zip(lower, ratios, strict=True) if ratio <= max_ratio]
    step = f"the largest that stays below is about {fine[-1]:g}" if fine else "no lower target stays below"
    return (
        f"target {skip_frac:g} multiplies perplexity on held-out windows by {trial.ratio:.3g}, and max_ratio is "
        f"{max_ratio:g}: {step}; lower the target, or set shadow.max_ratio"
    )


def by_kind(places: Sequence[Place], shares: Sequence[float]) -> dict[str, list[float]]:
    """Return the shares of every kind of place, in the order of the blocks."""
    found: dict[str, list[float]] = {}
    for place, share in zip(places, shares, strict=True):
        found.setdefault(place.kind, []).append(round(share, 4))
    return found
