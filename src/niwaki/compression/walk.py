"""The loop: hidden states of all windows pass block after block, and each block may be replaced on its way.

One block is in memory, the next one is read meanwhile, the last one written meanwhile. The statistics of a
block are collected on inputs that have already passed the compressed prefix. Peak memory does not depend on
the number of blocks.

Legend: S windows, B windows in a batch, T tokens, D hidden size, N tokens, O outputs, I inputs.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from niwaki.config.events import Event, Report
from niwaki.config.recipe import KeepUnits, Target
from niwaki.data.hidden_states import Activations
from niwaki.data.statistics import Needs, Statistics
from niwaki.data.stream import CalibrationData, Stream
from niwaki.errors import ArchitectureError, NumericalError
from niwaki.formats.record import Packed, Packing, join_notes
from niwaki.kernels.sparse_product import fast_path
from niwaki.methods.mask_scores import (
    MaskChoice,
    ScoreSample,
    last_agreeing_choice,
    record_mask_choices,
    summarize_scores,
)
from niwaki.methods.registry import Step, merged_needs
from niwaki.model.decoder import Block, Decoder

NOT_SMALLER = "zeros are stored in place: there are too few of them for nonzeros to be smaller"
NOT_PACKABLE = "zeros are stored in place: fused and transposed matrices have no packed form"
NO_FAST_PATH = "smaller, but not faster here: this processor, or this installation, has no kernel for nonzeros"
STORED_DENSE = "codes are stored as the weights they stand for, so the file is not smaller"


def loaded_blocks(
    decoder: Decoder,
    stored: Callable[[int], dict[str, Tensor] | None] = lambda index: None,
    *,
    backwards: bool = False,
) -> Iterator[Block]:
    """Every block in turn, the next one being read while the caller works. The caller releases them."""
    order = list(range(len(decoder)))[:: -1 if backwards else 1]
    with ThreadPoolExecutor(1, thread_name_prefix="load") as reader:

        def load(index: int) -> Block:
            return decoder.load(index, stored(index))

        upcoming: Future[Block] = reader.submit(load, order[0])
        for _, following in zip_longest(order, order[1:]):
            block = upcoming.result()
            if following is not None:
                upcoming = reader.submit(load, following)
            yield block


def forward(decoder: Decoder, streams: Sequence[Stream], visit: Callable[[Block], None] | None = None) -> None:
    """Runs all streams through all blocks, each block read once; `visit` sees a block before they pass it."""
    for block in loaded_blocks(decoder):
        if visit is not None:
            visit(block)
        for stream in streams:
            stream.advance(block)
        block.release()


def collect(
    block: Block, stream: Stream, needs: Needs, dense: Stream | None = None
) -> tuple[dict[str, Statistics], Tensor]:
    """Statistics of every matrix (shared within a group), and the block's output for the first batch.

    Without needs only the first batch runs, for its samples. If the inputs in the dense model are needed, `dense`
    passes the block meanwhile.
    """
    groups = {leader: Statistics(needs) for leader in block.anatomy.groups}
    full: dict[str, Tensor] = {}

    def keep(name: str, x: Tensor) -> None:
        if name in groups:
            full[name] = x.clone()  # the stream overwrites what a block without a norm reads

    def seen(name: str, x: Tensor) -> None:
        if name not in groups:  # a group is collected once, at its first matrix
            return
        paired = full.pop(name, None)
        if needs.full and (paired is None or paired.shape != x.shape):
            raise ArchitectureError(
                f"block {block.index} {name}: other tokens reach it in the dense model, so their inputs cannot be "
                "paired (a mixture of experts): use a method option without the dense model's inputs"
            )
        groups[name].add(x, paired)

    def lead(rows: slice) -> None:
        assert dense is not None, "needs() must ask for the dense stream"
        full.clear()
        dense.advance(block, rows, keep)

    outputs = stream.outputs if needs.windows else None
    before = lead if needs.full else None
    first_BTD = stream.observe(block, seen, first_only=not needs.anything, outputs=outputs, before=before)
    if not torch.isfinite(first_BTD).all():
        raise NumericalError(
            f"block {block.index} puts out NaN or infinite values on the calibration text: "
            "check the checkpoint, or use a wider dtype"
        )
    return {name: groups[linear.group] for name, linear in block.linears.items()}, first_BTD


@dataclass(frozen=True)
class Plan:
    """What the walk does to each block: one method after another, their targets and their seed.

    `pack`: what is stored packed where the matrix can be (see `Packed.pack`), or none. `trial`: blocks
    are only replaced, and no lines are written of them. `gradients` reads the squared gradients of a block, if a step
    needs them.
    """

    steps: Sequence[Step]
    targets: list[dict[str, Target]]
    seed: int
    pack: Packing = "codes"
    trial: bool = False
    gradients: Callable[[int], Mapping[str, Tensor]] = lambda index: {}

    @property
    def needs(self) -> Needs:
        """What all steps together want to be collected."""
        return merged_needs(self.steps)


def compress_blocks(
    decoder: Decoder,
    plan: Plan,
    stream: Stream | None,
    dense: Stream | None,
    *,
    finished: Callable[[int], dict[str, Tensor] | None],
    save: Callable[[Block, list[dict[str, Any]]], None],
    report: Report,
    riders: Sequence[Stream] = (),
) -> None:
    """Compresses every block on the stream and hands it to `save` with its report lines.

    `finished(index)` gives the stored tensors of a block that an earlier run completed: it is only replayed.
    `stream` may be None for a method that needs no data; `dense`, if given, follows the dense model and
    yields the drift of the compressed prefix at every depth. `riders` only pass the compressed blocks.
    """
    for block in loaded_blocks(decoder, finished):
        started = time.perf_counter()
        done = finished(block.index) is not None
        if dense is not None and (done or not plan.needs.full):
            _advance_dense(decoder, dense, block, done)
        if not done:
            found = _compress_block(block, plan, stream, dense)
        after_BTD = None if stream is None else stream.advance(block)
        for rider in riders:
            rider.advance(block)
        if not done:
            lines = _finished(found, after_BTD)
            drift = None if dense is None or stream is None else _relative_error(stream.hidden, dense.hidden)
            save(block, [{**line, "drift": drift} for line in lines])
        block.release()
        seconds = time.perf_counter() - started
        report(Event.BLOCK, index=block.index, of=len(decoder), replayed=done, seconds=round(seconds, 3))


@dataclass(frozen=True)
class _Compressed:
    """What is to be told of a block: one line per matrix, a sample of its scores, and the first batch's dense output.

    Scores are described, and outputs compared, while a GPU is busy with the windows that pass the block.
    """

    lines: list[dict[str, Any]]
    samples: list[ScoreSample | None]
    before_BTD: Tensor | None


def _finished(found: _Compressed, after_BTD: Tensor | None) -> list[dict[str, Any]]:
    """The lines with everything that was left for later; `after_BTD`: the output of the compressed block."""
    lines = [line | summarize_scores(sample) for line, sample in zip(found.lines, found.samples, strict=True)]
    if found.before_BTD is None or after_BTD is None:
        return lines
    block_error = _energy_ratio(after_BTD - found.before_BTD, found.before_BTD)
    return [{**line, "block_error": block_error} for line in lines]


def _compress_block(block: Block, plan: Plan, stream: Stream | None, dense: Stream | None) -> _Compressed:
    """Runs the steps on one block and assigns the last records."""
    targets = plan.targets[block.index]
    statistics: dict[str, Statistics] = {name: Statistics(Needs()) for name in block.linears}
    before_BTD = None
    if stream is not None:
        statistics, before_BTD = collect(block, stream, plan.needs, dense)
    packed: dict[str, Packed] = {}
    chosen: dict[str, list[MaskChoice]] = {}
    masks: dict[str, Tensor] = {}  # a quantizer behind rounds some of what they keep to zero
    gradients = plan.gradients(block.index)
    for number, step in enumerate(plan.steps):
        generator = torch.Generator().manual_seed((plan.seed * 1_000_003 + block.index) * 101 + number)
        evidence = CalibrationData(statistics, stream, dense, packed, gradients)
        parts = {name: step.part(target) for name, target in targets.items()}
        with record_mask_choices({} if plan.trial else parts) as (own, choices):
            found = step.compress(block, evidence, own or parts, generator)
        chosen = {name: chosen.get(name, []) + choices.get(name, []) for name in targets}
        masks |= {name: record.weight_OI for name, record in found.items() if record.kind == "masked"}
        packed = {name: record.after(packed[name]) if packed else record for name, record in found.items()}
    if plan.trial:
        for name, record in packed.items():
            _assign(block, name, targets[name], record)
        return _Compressed([], [], None)
    with torch.no_grad():
        lines = [
            _line(block, name, targets[name], record, statistics[name], plan.pack) for name, record in packed.items()
        ]
        samples = [
            last_agreeing_choice(chosen[name], masks.get(name, record.weight_OI)) for name, record in packed.items()
        ]
    return _Compressed(lines, samples, before_BTD)


def _assign(block: Block, name: str, target: Target, record: Packed) -> None:
    """Puts a record in the place of a matrix, with what it says of the bias."""
    block.assign(name, record.decode(block.storage_dtype(name)))
    if isinstance(target, KeepUnits) and not target.count:
        block.silence(name)
    if record.bias_O is not None:
        block.add_bias(name, record.bias_O)


def _line(
    block: Block, name: str, target: Target, record: Packed, statistics: Statistics, pack: Packing
) -> dict[str, Any]:
    """Assigns one record and describes it; errors are relative squared output errors on sampled inputs.

    `error_before_update` is that of only removing the pruned weights, `error` that of the final matrix.
    """
    old_OI = block.weight(name).to(torch.float32, copy=True)
    _assign(block, name, target, record)
    new_OI = block.weight(name).float()
    if not torch.isfinite(new_OI).all():
        raise NumericalError(f"block {block.index} {name}: the compressed weights are not finite")
    error = error_before_update = None
    if statistics.sample_NI is not None and len(statistics.sample_NI):
        x_NI = statistics.sample_NI.float()
        wanted_NO = x_NI @ old_OI.T
        error = _energy_ratio(x_NI @ new_OI.T - wanted_NO, wanted_NO)
        masked_OI = old_OI * (new_OI != 0)
        error_before_update = _energy_ratio(x_NI @ masked_OI.T - wanted_NO, wanted_NO)
    shape = record.cut or tuple(new_OI.shape)
    count = math.prod(shape)
    zeros = int((new_OI == 0).sum()) - (new_OI.numel() - count)
    stored: dict[str, Any] = {}
    dtype = block.storage_dtype(name)
    nbytes, note = count * dtype.itemsize, record.note
    packing = record.pack(dtype, pack) if name in block.packable else None
    if packing is not None:
        block.packed[name] = dict(packing.tensors)
        nbytes, stored = packing.nbytes, {"stored": dict(packing.description)}
    elif record.parts:
        note = join_notes(note, STORED_DENSE)
    elif record.kind == "masked" and pack == "auto":
        note = join_notes(note, NOT_SMALLER if name in block.packable else NOT_PACKABLE)
    if "sparse" in stored.get("stored", ()) and not fast_path():
        note = join_notes(note, NO_FAST_PATH)
    return {
        "block": block.index,
        "matrix": name,
        "shape": list(shape),
        "target": str(target),
        "kind": record.kind,
        "zeros": zeros,
        "zeros_frac": zeros / max(count, 1),
        "bytes": nbytes,
        "bits": 8 * nbytes / max(count, 1),
        "tokens": statistics.tokens,
        "error_before_update": error_before_update,
        "error": error,
        "note": note,
        **record.detail,
        **stored,
    }


def _advance_dense(decoder: Decoder, dense: Stream, block: Block, replayed: bool) -> None:
    """Moves the dense stream past `block`; a replayed block is compressed already, so its source is read."""
    if not replayed:
        dense.advance(block)
        return
    compressed = {name: tensor.clone() for name, tensor in block.stored.items()}
    dense.advance(decoder.load(block.index))
    decoder.load(block.index, compressed)


def _relative_error(hidden: Activations, wanted: Activations) -> float:
    """‖x − y‖² / ‖y‖² over all windows."""
    error = energy = 0.0
    for row in range(len(wanted)):
        y_TD = wanted.read(slice(row, row + 1)).float()
        error += float((hidden.read(slice(row, row + 1)).float() - y_TD).square().sum(dtype=torch.float64))
        energy += float(y_TD.square().sum(dtype=torch.float64))
    return error / energy


def _energy_ratio(difference: Tensor, wanted: Tensor) -> float:
    energy = float(wanted.float().square().sum(dtype=torch.float64))
    error = float(difference.float().square().sum(dtype=torch.float64))
    return error / energy if energy else 0.0
