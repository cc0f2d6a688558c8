"""Squares of the gradients of all weights, summed over windows: kept on disk, for the walk needs them block by block.

The walk backwards runs once over the dense model before the first block is compressed. What it finds of a block is a
file in the journal, so that a resume does not run it again, and memory holds one block whatever the depth.

Cost: the walk backwards, one window at a time; on disk four bytes a weight while the run lasts.

Legend: O outputs, I inputs.
"""

from collections.abc import Callable, Mapping

import torch
from safetensors.torch import load_file
from torch import Tensor

from niwaki.compression.backward import Gradients, descend
from niwaki.compression.run import RECORD, Run
from niwaki.config.events import Event, Report
from niwaki.data.stream import Stream
from niwaki.model.decoder import Block, Decoder
from niwaki.model.files import write_shard


def squared_gradients(
    run: Run, decoder: Decoder, ids_ST: Tensor, activation_bytes: int | None, report: Report
) -> Callable[[int], Mapping[str, Tensor]]:
    """Reads block → matrix → Σ over windows of the squared gradient [O, I], float32; what is missing is made first."""
    device, folder = decoder.device, run.folder / RECORD / "journal"
    sums: dict[str, Tensor] = {}

    def visit(block: Block, found: Gradients) -> None:
        for name, grad_OI in found.weights.items():
            square_OI = grad_OI.float().square()
            sums[name] = sums[name].add_(square_OI) if name in sums else square_OI
        if found.rows.stop == len(ids_ST):
            shard = f"{_part(block.index)}.safetensors"
            sha256 = write_shard(folder / shard, sums)
            run.finish_part(_part(block.index), {"shard": f"{RECORD}/journal/{shard}", "sha256": sha256})
            report(Event.GRADIENTS, index=len(decoder) - 1 - block.index, of=len(decoder))
            sums.clear()

    if not all(_part(index) in run.finished for index in range(len(decoder))):
        stream = Stream(
            decoder, ids_ST, batch_tokens=1, activation_bytes=activation_bytes, folder=folder, name="gradients"
        )
        descend(decoder, stream, visit, weights=True, activation_bytes=activation_bytes, folder=folder, report=report)

    def read(index: int) -> dict[str, Tensor]:
        stored = load_file(run.folder / run.finished[_part(index)]["shard"])
        return {name: square_OI.to(device, torch.float32) for name, square_OI in stored.items()}

    return read


def _part(index: int) -> str:
    return f"gradients-{index:05d}"
