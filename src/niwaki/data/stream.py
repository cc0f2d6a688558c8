"""Hidden states of all windows on their way through the blocks, and the calibration data of one block.

Legend: S windows, B windows in a batch, T tokens, D hidden size.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from niwaki.data.call_arguments import CallArguments, Windows
from niwaki.data.hidden_states import Activations, choose_place
from niwaki.data.statistics import Statistics
from niwaki.formats.packed import Packed
from niwaki.model.block_calls import Call
from niwaki.model.decoder import Block, Decoder


class _AllMet(Exception):  # noqa: N818 (ends a forward, and is not an error)
    """Signal that every matrix of a block has met its input."""


class Stream:
    """Hidden states of all windows, and the call arguments of all blocks.

    A method that learns draws `learn_batches` windows at a time; for it the outputs of the dense block are kept beside
    its inputs. `total_tokens`: those of all streams that are in memory together, which decide where the hidden states
    lie.
    """

    def __init__(
        self,
        decoder: Decoder,
        ids_ST: Tensor,
        *,
        batch_tokens: int | None = None,
        activation_bytes: int | None = None,
        folder: Path | None = None,
        name: str = "stream",
        learn_batches: frozenset[int] = frozenset(),
        total_tokens: int | None = None,
    ) -> None:
        count, tokens = ids_ST.shape
        self.decoder = decoder
        self.ids_ST = ids_ST
        self.batch = max(1, min(count, (batch_tokens or default_batch_tokens(decoder.device)) // tokens))

        def allocate(what: str, x_BTD: Tensor) -> Activations:
            shape = (count, *x_BTD.shape[1:])
            needed_bytes = (total_tokens or count * tokens) * x_BTD[0, 0].numel() * decoder.dtype.itemsize
            place = choose_place(needed_bytes, decoder.device, activation_bytes)
            return Activations.allocate(shape, decoder.dtype, decoder.device, place, folder, f"{what}.bin")

        self.outputs: Activations | None = None
        for rows in self.slices():
            x_BTD, calls = decoder.embed(ids_ST[rows])
            if not rows.start:
                self.hidden = allocate(name, x_BTD)
                self.outputs = allocate(f"{name}-outputs", x_BTD) if learn_batches else None
                nbytes = self.hidden.store_STD.nbytes
                self.arguments = CallArguments(decoder, ids_ST, nbytes, activation_bytes, folder, name)
            self.hidden.write(rows, x_BTD)
            self.arguments.record(rows, calls)

    def __len__(self) -> int:
        return len(self.ids_ST)

    def slices(self) -> Iterator[slice]:
        """Yield the batches of windows in order. The last one may be smaller."""
        for first in range(0, len(self.ids_ST), self.batch):
            yield slice(first, min(first + self.batch, len(self.ids_ST)))

    def call(self, windows: Windows, index: int) -> Call:
        """Return the call arguments of block `index` for `windows`, rows or a list in any order."""
        return self.arguments.call(windows, index)

    def observe(
        self,
        block: Block,
        seen: Callable[[str, Tensor], None] | None,
        *,
        first_only: bool = False,
        outputs: Activations | None = None,
        before: Callable[[slice], None] | None = None,
    ) -> Tensor:
        """Run the block and keep the hidden states. Return its output [B, T, D] for the first batch.

        `before(rows)` runs before each batch. Without `outputs`, later batches end after `seen` has met every
        matrix: the last product of a block is more than a fifth of its operations.
        """
        first: Tensor | None = None
        met: list[str] = []
        stops = False

        def meet(name: str, x: Tensor) -> None:
            assert seen is not None
            seen(name, x)
            met.append(name)
            if stops and len(set(met)) == len(block.linears):
                raise _AllMet

        for rows in self.slices():
            if before is not None:
                before(rows)
            x_BTD = self.hidden.read(rows)
            met.clear()
            try:
                out_BTD = block.run(self.call(rows, block.index), x_BTD, None if seen is None else meet)
            except _AllMet:
                continue
            if first is None:
                first = out_BTD
                # A block that uses a matrix twice, or routes tokens to experts, runs to its end.
                stops = outputs is None and len(met) == len(block.linears) == len(set(met))
            if outputs is not None:
                outputs.write(rows, out_BTD)
            if first_only:
                break
        assert first is not None
        return first

    def advance(
        self, block: Block, rows: slice | None = None, seen: Callable[[str, Tensor], None] | None = None
    ) -> Tensor:
        """Replace the hidden states of all windows, or of `rows`, by the output of the block.

        Return the output of the first batch, as a tensor that later steps do not change.
        """
        first: Tensor | None = None
        for part in self.slices() if rows is None else [rows]:
            x_BTD = self.hidden.read(part)
            call = self.call(part, block.index)
            out_BTD = block.run(call, x_BTD, seen)
            self.hidden.write(part, out_BTD)
            self.arguments.keep(part, block.index, call)
            first = out_BTD if first is None else first
        assert first is not None
        return first


@dataclass(frozen=True)
class HeldOut:
    """Windows that are never learned: they decide which state of a learning is kept.

    `stream` passes the compressed blocks, and `dense` those of the dense model if a method asks for it.
    """

    stream: Stream
    dense: Stream | None = None


@dataclass(frozen=True)
class CalibrationData:
    """Calibration data of one block, as far as the `needs` of a method ask for it.

    `statistics` of each matrix come from the dense block on its inputs in the compressed model. `stream` holds these
    inputs and the outputs of the dense block. `dense` holds the outputs of the same block in the dense model.
    `start` holds the records of the step before in a chain of methods, else nothing. `gradients`: squared gradients
    [O, I] of each matrix in the dense model, summed over the windows. `held`: windows to judge what is learned by,
    None for an eighth of those of `stream`.
    """

    statistics: Mapping[str, Statistics]
    stream: Stream | None = None
    dense: Stream | None = None
    start: Mapping[str, Packed] = field(default_factory=dict)
    gradients: Mapping[str, Tensor] = field(default_factory=dict)
    held: HeldOut | None = None


def default_batch_tokens(device: torch.device) -> int:
    """Return the tokens per forward: enough to fill the device, few enough to bound its temporary tensors."""
    return 16384 if device.type == "cuda" else 2048
