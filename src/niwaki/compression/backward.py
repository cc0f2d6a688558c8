"""The backward walk: exact gradients of the language-model loss at every block, with one block in memory.

The windows first pass all blocks forwards, and the input of every block is kept. The head gives the loss and its
gradient at the output of the last block. Then each block is loaded, from the last to the first, and runs again on its
stored inputs with gradients. The caller's `visit` receives the gradients that it asked for, and the gradient of the
input goes on to the block before. The result is the gradient of the whole model: nothing is approximated.

The loss of a window is the mean negative log-likelihood of its predicted tokens. The loss of a batch is the sum over
its windows. Windows do not see each other, so the rows of the gradient of an activation belong to the loss of each
window. Gradients of weights are summed over the batch: use batches of one for the gradient of every window.

Cost: two forwards and a backward, twice the reads. Memory: one block with its graph for a batch, and the hidden states
of all windows for every block, and once more. They are in memory or in mapped files, by the same limit as everywhere.

Legend: S windows, B windows in a batch, T tokens, D hidden size, O outputs and I inputs of a matrix, V vocabulary.

    stream = Stream(decoder, ids_ST)
    losses_S = backprop_blocks(decoder, stream, visit, inputs=["mlp.down_proj"], folder=folder)
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from niwaki.compression.result_folder import ResultFolder
from niwaki.compression.run_record import RECORD, JournalEntry
from niwaki.compression.walk import forward, loaded_blocks
from niwaki.config.events import Event, Report, silent
from niwaki.data.call_arguments import Stored
from niwaki.data.hidden_states import Activations, choose_place
from niwaki.data.stream import Stream
from niwaki.errors import NumericalError
from niwaki.methods.shared.determinism import run_deterministically
from niwaki.model.decoder import Block, Decoder
from niwaki.model.files import write_shard
from niwaki.model.logits import token_losses


@dataclass(frozen=True)
class Gradients:
    """Gradients of one block for the windows `rows`, by matrix; only what was asked for is filled.

    `inputs` are the inputs [B, T, I] of the matrix ([N, I] for tokens that a router sends there) and their gradients.
    `weights` are the gradients [O, I], summed over the windows.
    """

    rows: slice
    inputs: Mapping[str, tuple[Tensor, Tensor]]
    weights: Mapping[str, Tensor]


Visit = Callable[[Block, Gradients], None]


def backprop_blocks(
    decoder: Decoder,
    stream: Stream,
    visit: Visit,
    *,
    inputs: Collection[str] = (),
    weights: bool = False,
    activation_bytes: int | None = None,
    folder: Path | None = None,
    report: Report = silent,
) -> Tensor:
    """Call `visit` for every batch of every block, last block first; return the loss of every window [S].

    `inputs` names the matrices whose inputs are wanted with their gradients; `weights` asks for the gradients of all
    matrices. `stream` is before the first block, and ends after the last. Raises NumericalError if a gradient is not
    finite.
    """
    kept = stored_inputs(decoder, stream, activation_bytes, folder, report)
    losses_S = torch.empty(len(stream), dtype=torch.float64)
    for rows in stream.slices():  # the gradient takes the place of the output it belongs to
        losses_S[rows], grad_BTD = head_gradient(decoder, stream.ids_ST[rows], stream.hidden.read(rows))
        stream.hidden.write(rows, grad_BTD)
    for block in loaded_blocks(decoder, backwards=True):
        for rows in stream.slices():
            x_BTD, grad_BTD = kept[block.index].read(rows), stream.hidden.read(rows)
            grad_BTD, fields = block_gradients(block, stream, rows, x_BTD, grad_BTD, inputs, weights)
            if not torch.isfinite(grad_BTD).all():
                raise NumericalError(
                    f"the gradient of the loss is not finite at the input of block {block.index}: use a wider dtype"
                )
            visit(block, Gradients(rows, *fields))
            stream.hidden.write(rows, grad_BTD)
        block.release()
    return losses_S


def squared_gradients(
    folder: ResultFolder, decoder: Decoder, ids_ST: Tensor, activation_bytes: int | None, report: Report
) -> Callable[[int], Mapping[str, Tensor]]:
    """Return a reader of block → matrix → Σ over windows of the squared gradient [O, I], float32.

    The backward pass runs once over the dense model, before the first block is compressed. Each block is a file in the
    journal, so that a resume does not repeat it and memory holds one block. Cost: the backward pass, one window at a
    time; four bytes a weight on disk while the run lasts.
    """
    device, journal = decoder.device, folder.path / RECORD / "journal"
    sums: dict[str, Tensor] = {}

    def visit(block: Block, gradients: Gradients) -> None:
        for name, grad_OI in gradients.weights.items():
            square_OI = grad_OI.float().square()
            sums[name] = sums[name].add_(square_OI) if name in sums else square_OI
        if gradients.rows.stop == len(ids_ST):
            shard = f"{_gradients_part(block.index)}.safetensors"
            sha256 = write_shard(journal / shard, sums)
            entry = JournalEntry(shard=f"{RECORD}/journal/{shard}", sha256=sha256)
            folder.finish_part(_gradients_part(block.index), entry)
            report(Event.GRADIENTS, index=len(decoder) - 1 - block.index, of=len(decoder))
            sums.clear()

    if not all(_gradients_part(index) in folder.finished for index in range(len(decoder))):
        stream = Stream(
            decoder, ids_ST, batch_tokens=1, activation_bytes=activation_bytes, folder=journal, name="gradients"
        )
        backprop_blocks(
            decoder, stream, visit, weights=True, activation_bytes=activation_bytes, folder=journal, report=report
        )

    def read(index: int) -> dict[str, Tensor]:
        stored = load_file(folder.path / str(folder.finished[_gradients_part(index)].shard))
        return {name: square_OI.to(device, torch.float32) for name, square_OI in stored.items()}

    return read


def stored_inputs(
    decoder: Decoder,
    stream: Stream,
    activation_bytes: int | None = None,
    folder: Path | None = None,
    report: Report = silent,
) -> list[Activations]:
    """Return the input of every block for all windows; the stream passes all blocks.

    `folder` holds the inputs that exceed the memory limit.
    """
    shape = tuple(stream.hidden.store_STD.shape)
    needed_bytes = len(decoder) * stream.hidden.store_STD.nbytes
    place = choose_place(needed_bytes, decoder.device, activation_bytes)
    kept: list[Activations] = []

    def keep(block: Block) -> None:
        name = f"inputs-{block.index:05d}.bin"
        kept.append(Activations.allocate(shape, decoder.dtype, decoder.device, place, folder, name))
        for rows in stream.slices():
            kept[-1].write(rows, stream.hidden.read(rows))
        report(Event.INPUTS, index=block.index, of=len(decoder))

    forward(decoder, [stream], keep)
    return kept


def next_token_losses(decoder: Decoder, ids_BT: Tensor, x_BTD: Tensor) -> Tensor:
    """Return the negative log-likelihood [B, T − 1] of every predicted token after the last block, float32 or wider."""
    loss_BT: Tensor = token_losses(decoder.logits, ids_BT, x_BTD, decoder.position_slices(ids_BT.numel()))
    return loss_BT


def mean_loss(decoder: Decoder, stream: Stream) -> float:
    """Return the mean negative log-likelihood of a predicted token, after the last block."""
    total = 0.0
    for row in range(len(stream.ids_ST)):
        rows = slice(row, row + 1)
        loss_1T = next_token_losses(decoder, stream.ids_ST[rows], stream.hidden.read(rows))
        total += float(loss_1T.double().mean())
    return total / len(stream.ids_ST)


def head_gradient(decoder: Decoder, ids_BT: Tensor, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss of every window [B], and the gradient of their sum at the output of the last block [B, T, D]."""
    parts = decoder.position_slices(ids_BT.numel())
    loss_BT, grad_BTD = token_losses(decoder.logits, ids_BT, x_BTD, parts, gradient=True)
    return loss_BT.mean(1).double().cpu(), grad_BTD


def block_gradients(
    block: Block,
    stream: Stream,
    rows: slice,
    x_BTD: Tensor,
    grad_BTD: Tensor,
    inputs: Collection[str],
    weights: bool,
) -> tuple[Tensor, tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]]:
    """Return the gradient at the input of a block from that at its output, and the fields of its `Gradients`.

    What the block reads from earlier ones gets its gradient too. What it hands on has that of all its readers.
    """
    linears = block.linears if weights else {}
    sought = {linear.parameter: block.module.get_parameter(linear.parameter) for linear in linears.values()}
    met: dict[str, Tensor] = {}
    read: list[Stored] = []

    def seen(name: str, x: Tensor) -> None:
        if name in inputs:
            met[name] = x

    def work() -> tuple[Tensor, ...]:
        call = stream.call(rows, block.index)
        read[:] = call.inherited
        handed = [x.requires_grad_(True) for x in call.inherited.values()]
        leaf_BTD = x_BTD.detach().clone().requires_grad_(True)
        outputs, grads = [block.run(call, leaf_BTD, seen)], [grad_BTD]
        for stored, x in stream.arguments.written(block.index, call).items():
            outputs.append(x)
            grads.append(stored.read(rows, stream.arguments.gradient(stored)))
        leaves = [leaf_BTD, *met.values(), *sought.values(), *handed]
        return torch.autograd.grad(outputs, leaves, grads, allow_unused=True, materialize_grads=True)

    for parameter in sought.values():
        parameter.requires_grad_(True)
    try:
        first_BTD, *others = run_deterministically(work)
    finally:
        for parameter in sought.values():
            parameter.requires_grad_(False)
    for stored, grad in zip(read, others[len(met) + len(sought) :], strict=True):
        total = stream.arguments.gradient(stored)
        stored.write(rows, stored.read(rows, total) + grad, total)
    of_inputs = {name: (x.detach(), grad) for (name, x), grad in zip(met.items(), others[: len(met)], strict=True)}
    by_parameter = dict(zip(sought, others[len(met) : len(met) + len(sought)], strict=True))
    of_weights = {name: linear.view(by_parameter[linear.parameter]) for name, linear in linears.items()}
    return first_BTD, (of_inputs, of_weights)


def _gradients_part(index: int) -> str:
    """Return the name of a block's squared gradients in the journal."""
    return f"gradients-{index:05d}"
