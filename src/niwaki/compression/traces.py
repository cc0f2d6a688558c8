"""Traces of a dense model: forwards for the activity in prompts, backwards for the importance after them.

The forward walk takes activations of all windows at every block. The backward walk runs on all windows if a criterion
needs gradients of its own. Otherwise it runs on the first `gradient_windows` only, for the mean squared gradient of
every unit.

Cost: a forward of all windows; two forwards and a backward of those with gradients. Memory: one block, the hidden
states (see `backward`), and the traces, whose size is known beforehand.

Legend: S windows, B windows in a batch, T tokens, D hidden size, C channels, G units of a kind in one block, U units.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from niwaki.compression.backward import Gradients, backprop_blocks
from niwaki.compression.walk import loaded_blocks
from niwaki.config.events import Event, Report, silent
from niwaki.config.targets import Kind
from niwaki.data.stream import Stream
from niwaki.model.decoder import Block, Decoder
from niwaki.runtime.contextual.criteria import WITHOUT_GRADIENTS, score
from niwaki.runtime.contextual.traces import STORED, Traces, nbytes, prompt_lengths
from niwaki.runtime.contextual.units import KINDS, UnitLayout, mean_square

MakeStream = Callable[[Tensor, str], Stream]


def trace(
    decoder: Decoder,
    ids_ST: Tensor,
    layout: UnitLayout,
    criteria: Sequence[str],
    *,
    cuts: int,
    gradient_windows: int,
    make_stream: MakeStream,
    activation_bytes: int | None = None,
    folder: Path | None = None,
    report: Report = silent,
) -> dict[str, Traces]:
    """Return samples of all windows, each cut at `cuts` prompt lengths, for every criterion.

    `make_stream(ids_ST, name)` gives windows before the first block. The traces share all but their scores.
    """
    lengths = prompt_lengths(ids_ST.shape[1], cuts)
    report(Event.TRACES, samples=len(ids_ST) * cuts, bytes=nbytes(len(ids_ST) * cuts, layout, decoder.hidden_size))
    scores = {criterion: _Rows(len(ids_ST), cuts, layout) for criterion in criteria}
    own = [criterion for criterion in criteria if criterion not in WITHOUT_GRADIENTS]
    sensitivity = _Rows(1, 1, layout)
    consumers = {layout.units[kind].consumer: kind for kind in KINDS}

    def visit(block: Block, gradients: Gradients) -> None:
        for name, kind in consumers.items():
            x_BTC, grad_BTC = (_by_window(part, gradients.rows) for part in gradients.inputs[name])
            square_BG = mean_square(grad_BTC, layout.count(kind))
            sensitivity.parts[kind][0, 0, block.index] += square_BG.sum(0).cpu()
            for (cut, length), criterion in product(enumerate(lengths), own):
                value_BG = score(criterion, kind, x_BTC[:, length:], grad_BTC[:, length:], layout.count(kind))
                scores[criterion].put(kind, gradients.rows, cut, block.index, value_BG)
        if gradients.rows.stop == len(with_gradients_ST):
            report(Event.GRADIENTS, index=len(decoder) - 1 - block.index, of=len(decoder))

    with_gradients_ST = ids_ST if own else ids_ST[:gradient_windows]
    stream = make_stream(with_gradients_ST, "gradients")
    backprop_blocks(
        decoder, stream, visit, inputs=consumers, activation_bytes=activation_bytes, folder=folder, report=report
    )
    forwards = {criterion: rows for criterion, rows in scores.items() if criterion in WITHOUT_GRADIENTS}
    prompts, last_ND, mean_ND = _forward(decoder, make_stream(ids_ST, "traces"), layout, lengths, report, forwards)
    sensitivity_U = (sensitivity.row()[0] / len(with_gradients_ST)).sqrt()
    prompt_NU = prompts.row()
    return {name: Traces(last_ND, mean_ND, prompt_NU, rows.row(), sensitivity_U) for name, rows in scores.items()}


def _forward(
    decoder: Decoder,
    stream: Stream,
    layout: UnitLayout,
    lengths: list[int],
    report: Report,
    scores: "Mapping[str, _Rows]",
) -> tuple["_Rows", Tensor, Tensor]:
    """Return statistics of all prompts and features of the first block; fill `scores` of criteria without gradients."""
    consumers = {layout.units[kind].consumer: kind for kind in KINDS}
    prompts = _Rows(len(stream), len(lengths), layout)
    width = decoder.anatomy.blocks[0].linears[layout.units["heads"].consumer].columns
    last_SPD, mean_SPD = (torch.empty(len(stream), len(lengths), width) for _ in range(2))
    for block in loaded_blocks(decoder):
        for rows in stream.slices():
            met: dict[str, Tensor] = {}

            def seen(name: str, x: Tensor, met: dict[str, Tensor] = met, rows: slice = rows) -> None:
                if name in consumers:
                    met[name] = _by_window(x, rows)

            stream.advance(block, rows, seen)
            for name, kind in consumers.items():
                count = layout.count(kind)
                for cut, length in enumerate(lengths):
                    x_BTC = met[name]
                    prompts.put(kind, rows, cut, block.index, mean_square(x_BTC[:, :length], count).sqrt())
                    for criterion, trace_rows in scores.items():
                        value_BG = score(criterion, kind, x_BTC[:, length:], None, count)
                        trace_rows.put(kind, rows, cut, block.index, value_BG)
                    if block.index == 0 and kind == "heads":
                        last_SPD[rows, cut] = x_BTC[:, length - 1].float().cpu()
                        mean_SPD[rows, cut] = x_BTC[:, :length].float().mean(1).cpu()
        block.release()
        report(Event.ACTIVATIONS, index=block.index, of=len(decoder))
    return prompts, last_SPD.flatten(0, 1), mean_SPD.flatten(0, 1)


class _Rows:
    """Values of all samples and units, filled block by block; samples are windows × cuts, window by window."""

    def __init__(self, windows: int, cuts: int, layout: UnitLayout) -> None:
        dtype = STORED if windows > 1 else torch.float32
        shape = (windows, cuts, layout.blocks)
        self.layout = layout
        self.parts = {kind: torch.zeros(*shape, layout.count(kind), dtype=dtype) for kind in KINDS}

    def put(self, kind: Kind, rows: slice, cut: int, block: int, value_BG: Tensor) -> None:
        self.parts[kind][rows, cut, block] = value_BG.to(self.parts[kind].dtype).cpu()

    def row(self) -> Tensor:
        """Return the values of all samples [N, U]."""
        return self.layout.join(*(self.parts[kind].flatten(0, 1) for kind in KINDS))


def _by_window(x: Tensor, rows: slice) -> Tensor:
    """Return the inputs of a matrix as [B, T, C]; some models give [B·T, C] (OPT)."""
    return x.reshape(rows.stop - rows.start, -1, x.shape[-1])
