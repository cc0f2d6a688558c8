"""What skipping costs, tried out: the loss behind the prompts of some windows, with masks, one block in memory.

A mask that holds more of the importance need not be the better one, since importance is itself a guess. So guesses are
compared by what they are for: all variants pass the blocks side by side, each block read once, and behind every
window's prompt the units that its mask skips put out nothing, or their stand-in, as the runtime does it.

Cost: a forward of the windows for every variant. Memory: one block, and the hidden states of the windows for every
variant.

Legend: S windows, B windows in a batch, T tokens, C channels, U units.

    losses = losses_behind(decoder, ids_ST, lengths_S, layout, [Variant(kept_SU, 0.5)], make_stream)
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from niwaki.compression.walk import loaded_blocks
from niwaki.config.events import Event, Report, silent
from niwaki.data.stream import Stream
from niwaki.methods.method import ContextualMethod
from niwaki.model.decoder import Block, Decoder
from niwaki.runtime.contextual.selection import Variant
from niwaki.runtime.contextual.traces import Traces, prompt_lengths
from niwaki.runtime.contextual.units import KINDS, Layout

MakeStream = Callable[[Tensor, str], Stream]


def losses_behind(
    decoder: Decoder,
    ids_ST: Tensor,
    lengths_S: Tensor,
    layout: Layout,
    variants: Sequence[Variant],
    make_stream: MakeStream,
    report: Report = silent,
) -> list[float]:
    """Mean negative log-likelihood of all tokens behind the prompts, of every variant.

    `lengths_S`: tokens of each window's prompt. The first token behind it is read with the mask, so its successor is
    the first that counts.
    """
    streams = [make_stream(ids_ST, f"trial-{place}") for place in range(len(variants))]
    for block in loaded_blocks(decoder):
        for stream, variant in zip(streams, variants, strict=True):
            for rows in stream.slices():
                with _masked(block, layout, variant, lengths_S[rows], rows):
                    stream.advance(block, rows)
        block.release()
        report(Event.TRYING, index=block.index, of=len(decoder))
    return [_mean_loss(decoder, stream, lengths_S) for stream in streams]


def evaluate_candidates(
    method: ContextualMethod,
    config: Any,
    traces: Mapping[str, Traces],
    layout: Layout,
    skip_frac: float,
    decoder: Decoder,
    ids_ST: Tensor,
    make_stream: MakeStream,
    report: Report = silent,
) -> tuple[Any, dict[str, Any]]:
    """What `method.choose_criterion` decides for a decoder, from the windows `ids_ST` that the traces are of."""
    held = method.candidate_rows(len(ids_ST), config)
    lengths = prompt_lengths(ids_ST.shape[1], config.cuts)
    lengths_S = torch.tensor([lengths[window % config.cuts] for window in held])

    def measure(variants: Sequence[Variant]) -> list[float]:
        return losses_behind(decoder, ids_ST[held.start :], lengths_S, layout, variants, make_stream, report)

    return method.choose_criterion(traces, layout, config, skip_frac, decoder.anatomy.weights, measure)


@contextmanager
def _masked(block: Block, layout: Layout, variant: Variant, lengths_B: Tensor, rows: slice) -> Iterator[None]:
    """For one batch, what reads the units of a block gets nothing of those that are skipped."""
    handles = []
    for kind, kept_SLG in zip(KINDS, layout.split(variant.kept_BU), strict=True):
        mean_fill = variant.mean_fill if kind == "neurons" else 0.0
        consumer = block.module.get_submodule(layout.units[kind].consumer)
        hook = _mask(kept_SLG[rows, block.index], lengths_B, mean_fill)
        handles.append(consumer.register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _mask(kept_BG: Tensor, lengths_B: Tensor, mean_fill: float) -> Callable[[Any, tuple[Tensor]], tuple[Tensor]]:
    """A hook before the matrix that reads the units; it gets [B, T, C], or [B·T, C] (OPT)."""

    def change(_module: Any, args: tuple[Tensor]) -> tuple[Tensor]:
        x_BTC = args[0].reshape(len(kept_BG), -1, args[0].shape[-1])
        lengths_B1 = lengths_B.to(x_BTC.device)[:, None]
        behind_BT = torch.arange(x_BTC.shape[1], device=x_BTC.device) >= lengths_B1
        keep_BC = kept_BG.to(x_BTC.device).repeat_interleave(x_BTC.shape[2] // kept_BG.shape[1], dim=1)
        skipped_BTC = behind_BT[..., None] & ~keep_BC[:, None]
        if not mean_fill:
            return (x_BTC.masked_fill(skipped_BTC, 0).view(args[0].shape),)
        mean_BC = x_BTC.masked_fill(behind_BT[..., None], 0).sum(1, dtype=torch.float32) / lengths_B1
        instead_B1C = (mean_fill * mean_BC).to(x_BTC.dtype)[:, None]
        return (torch.where(skipped_BTC, instead_B1C, x_BTC).view(args[0].shape),)

    return change


def _mean_loss(decoder: Decoder, stream: Stream, lengths_S: Tensor) -> float:
    total, count = 0.0, 0
    with torch.no_grad():
        for rows in stream.slices():
            ids_BT = stream.ids_ST[rows]
            logits_BTV = decoder.logits(ids_BT, stream.hidden.read(rows))[:, :-1]
            wanted_BT = ids_BT[:, 1:].to(logits_BTV.device)
            loss_BT = cross_entropy(logits_BTV.flatten(0, 1).float(), wanted_BT.flatten(), reduction="none")
            behind_BT = torch.arange(ids_BT.shape[1] - 1) >= lengths_S[rows, None]
            total += float(loss_BT.view(wanted_BT.shape)[behind_BT.to(loss_BT.device)].double().sum())
            count += int(behind_BT.sum())
    return total / count
