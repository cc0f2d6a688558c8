"""Walk over the blocks: hidden states of all windows pass block after block, and each block may be replaced first.

One block is in memory. Meanwhile the next one is read and the last one is written. The statistics of a block are
collected on inputs that have already passed the compressed prefix. Peak memory does not depend on the number of blocks.

Legend: S windows, B windows in a batch, T tokens, D hidden size, N tokens, O outputs, I inputs.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from niwaki.compression.experts import shrink_experts
from niwaki.compression.run_record import MatrixRecord
from niwaki.config.events import Event, Report
from niwaki.config.targets import KeepUnits, Target
from niwaki.data.hidden_states import Activations
from niwaki.data.statistics import Needs, Statistics
from niwaki.data.stream import CalibrationData, HeldOut, Stream
from niwaki.errors import ArchitectureError, NumericalError
from niwaki.formats.packed import Packed, PackedTensors, Packing, join_notes
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

ReadBlock = Callable[[], dict[str, Tensor]]  # returns the tensors of one finished block, by names on disk

NOT_SMALLER = "zeros are stored in place: there are too few of them for nonzeros to be smaller"
NOT_PACKABLE = "zeros are stored in place: fused and transposed matrices have no packed form"
NO_FAST_PATH = "smaller, but not faster here: this processor, or this installation, has no kernel for nonzeros"
STORED_DENSE = "codes are stored as the weights they stand for, so the file is not smaller"


def loaded_blocks(
    decoder: Decoder,
    finished: Mapping[int, ReadBlock] = MappingProxyType({}),
    *,
    backwards: bool = False,
    ahead: int = 0,
) -> Iterator[Block]:
    """Yield every block in turn, from `finished` where it has a reader, with `ahead` following blocks in memory.

    The next block is read while the caller works. The caller releases the blocks.
    """
    order = list(range(len(decoder)))[:: -1 if backwards else 1]
    with ThreadPoolExecutor(1, thread_name_prefix="load") as reader:

        def load(index: int) -> Block:
            return decoder.load(index, finished[index]() if index in finished else None)

        upcoming: deque[Future[Block]] = deque(reader.submit(load, index) for index in order[: ahead + 1])
        for place in range(len(order)):
            block = upcoming.popleft().result()
            if place + ahead + 1 < len(order):
                upcoming.append(reader.submit(load, order[place + ahead + 1]))
            block.following = [future.result() for future in list(upcoming)[:ahead]]
            yield block


def forward(decoder: Decoder, streams: Sequence[Stream], visit: Callable[[Block], None] | None = None) -> None:
    """Run all streams through all blocks, each read once; `visit` receives a block before the streams pass it."""
    for block in loaded_blocks(decoder):
        if visit is not None:
            visit(block)
        for stream in streams:
            stream.advance(block)
        block.release()


def collect(
    block: Block, stream: Stream, needs: Needs, dense: Stream | None = None
) -> tuple[dict[str, Statistics], Tensor]:
    """Return the statistics of every matrix (shared within a group), and the block's output for the first batch.

    The output comes from the same forward, before any matrix changes: `block_error` is relative to it. Without needs
    only the first batch runs, for its samples. If the inputs in the dense model are needed, the stream `dense` passes
    the block at the same time.
    """
    groups = {leader: Statistics(needs) for leader in block.anatomy.groups}
    full: dict[str, Tensor] = {}

    def keep(name: str, x: Tensor) -> None:
        if name in groups:
            full[name] = x.clone()  # the stream overwrites what a block without a norm reads

    def add(name: str, x: Tensor) -> None:
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
    first_BTD = stream.observe(block, add, first_only=not needs.anything, outputs=outputs, before=before)
    if not torch.isfinite(first_BTD).all():
        raise NumericalError(
            f"block {block.index} puts out NaN or infinite values on the calibration text: "
            "check the checkpoint, or use a wider dtype"
        )
    return {name: groups[linear.group] for name, linear in block.linears.items()}, first_BTD


@dataclass(frozen=True)
class WalkPlan:
    """Work of the walk on each block: one method after another, with their targets and their seed.

    Without targets, a block passes as it is. `last` is the last block that a stream has to pass; by default all are.
    `expert_tokens`: see `experts`.

    `pack` selects which matrices are stored packed (see `Packed.pack`). Without `records`, blocks are only replaced, to
    evaluate a candidate. `gradients` reads the squared gradients of a block, if a step needs them.
    """

    steps: Sequence[Step]
    targets: list[dict[str, Target]]
    seed: int
    pack: Packing = "codes"
    records: bool = True
    gradients: Callable[[int], Mapping[str, Tensor]] = lambda index: {}
    last: int | None = None
    expert_tokens: int = 0

    @property
    def needs(self) -> Needs:
        """Return the needs of all steps together."""
        return merged_needs(self.steps)


def compress_blocks(
    decoder: Decoder,
    plan: WalkPlan,
    stream: Stream | None,
    dense: Stream | None,
    *,
    save: Callable[[Block, list[MatrixRecord]], None],
    report: Report,
    finished: Mapping[int, ReadBlock] = MappingProxyType({}),
    riders: Sequence[Stream] = (),
    origin: Decoder | None = None,
    held: HeldOut | None = None,
) -> None:
    """Compress every block on the stream and hand it to `save`, with a record of each of its matrices.

    The records describe the new weights. The weights themselves are in `block.result`, and `save` turns them into the
    tensors of a file (`Decoder.disk_tensors`). `finished` has a reader for each block that an earlier run completed.
    Such a block is only replayed, and its reader is called once. A block without targets is saved as it is.

    `stream` may be None for a method without data. A `dense` stream follows the dense model and yields the drift of
    the compressed prefix at every depth. It passes the blocks of `origin` where those of the decoder stay as they are.
    The `riders` only pass the compressed blocks. So do the windows `held`, which learning is judged by.
    """
    followers = [] if held is None or held.dense is None else [held.dense]
    for block in loaded_blocks(decoder, finished, ahead=plan.needs.ahead):
        started = time.perf_counter()
        replayed, passes = block.index in finished, plan.last is None or block.index <= plan.last
        changes = bool(plan.targets[block.index]) and not replayed
        if passes:
            own = [] if dense is None or (changes and plan.needs.full) else [dense]
            passed = decoder if plan.targets[block.index] else origin or decoder
            _advance_dense(decoder, [*own, *followers], block, replayed, passed)
        if changes:
            compressed = _compress_block(block, plan, stream, dense, held)
        after_BTD = stream.advance(block) if stream is not None and passes else None
        for rider in [*riders, *([] if held is None else [held.stream])]:
            rider.advance(block)
        if changes:
            late = _block_error(compressed.before_BTD, after_BTD)
            late["drift"] = None if dense is None or stream is None else _relative_error(stream.hidden, dense.hidden)
            save(block, compressed.complete(late))
        elif not replayed:
            save(block, [])
        block.release()
        seconds = time.perf_counter() - started
        report(Event.BLOCK, index=block.index, of=len(decoder), replayed=replayed, seconds=round(seconds, 3))


@dataclass(frozen=True)
class _Compressed:
    """Records of the matrices of a block, a sample of the scores of each, and the dense output of the first batch.

    Scores are described, and outputs compared, while a GPU works on the windows that pass the block.
    """

    records: list[MatrixRecord]
    samples: list[ScoreSample | None]
    before_BTD: Tensor | None

    def complete(self, late: dict[str, float | None]) -> list[MatrixRecord]:
        """Return the records with their scores and the fields `late`."""
        pairs = zip(self.records, self.samples, strict=True)
        return [record.model_copy(update=summarize_scores(sample) | late) for record, sample in pairs]


def _block_error(before_BTD: Tensor | None, after_BTD: Tensor | None) -> dict[str, float | None]:
    """Return the relative squared error of the output of a block as a field of its records; {} without data."""
    if before_BTD is None or after_BTD is None:
        return {}
    return {"block_error": _energy_ratio(after_BTD - before_BTD, before_BTD)}


def _compress_block(
    block: Block, plan: WalkPlan, stream: Stream | None, dense: Stream | None, held: HeldOut | None
) -> _Compressed:
    """Run the steps on one block and put the last records in the place of its matrices."""
    targets = plan.targets[block.index]
    statistics: dict[str, Statistics] = {name: Statistics(Needs()) for name in block.linears}
    before_BTD = None
    if stream is not None:
        statistics, before_BTD = collect(block, stream, plan.needs, dense)
        shrink_experts(block, stream, statistics, plan.needs, plan.expert_tokens)
    if held is not None:
        held.stream.observe(block, None, outputs=held.stream.outputs)
    packed: dict[str, Packed] = {}
    chosen: dict[str, list[MaskChoice]] = {}
    masks: dict[str, Tensor] = {}  # a later quantizer rounds some of the kept weights to zero
    gradients = plan.gradients(block.index)
    for number, step in enumerate(plan.steps):
        generator = torch.Generator().manual_seed((plan.seed * 1_000_003 + block.index) * 101 + number)
        calib = CalibrationData(statistics, stream, dense, packed, gradients, held)
        parts = {name: step.part(target) for name, target in targets.items()}
        with record_mask_choices(parts if plan.records else {}) as (own, choices):
            results = step.compress(block, calib, own or parts, generator)
        chosen = {name: chosen.get(name, []) + choices.get(name, []) for name in targets}
        masks |= {name: record.weight_OI for name, record in results.items() if record.kind == "masked"}
        packed = {name: record.after(packed[name]) if packed else record for name, record in results.items()}
    if not plan.records:
        for name, record in packed.items():
            _replace(block, name, targets[name], record)
        return _Compressed([], [], None)
    with torch.no_grad():
        records = [
            _store(block, name, targets[name], record, statistics[name], plan.pack) for name, record in packed.items()
        ]
        samples = [
            last_agreeing_choice(chosen[name], masks.get(name, record.weight_OI)) for name, record in packed.items()
        ]
    return _Compressed(records, samples, before_BTD)


def _replace(block: Block, name: str, target: Target, record: Packed) -> None:
    """Put a compressed matrix and its bias in the place of the dense ones."""
    block.assign(name, record.decode(block.storage_dtype(name)))
    if isinstance(target, KeepUnits) and not target.count:
        block.silence(name)
    if record.bias_O is not None:
        block.add_bias(name, record.bias_O)


def _store(
    block: Block, name: str, target: Target, record: Packed, statistics: Statistics, packing: Packing
) -> MatrixRecord:
    """Replace one matrix, pack it if possible, and return its record.

    The record describes the matrix. Its weights stay in `block.result`, from which the file of the block is made.
    """
    old_OI = block.weight(name).to(torch.float32, copy=True)
    _replace(block, name, target, record)
    new_OI = block.weight(name).float()
    if not torch.isfinite(new_OI).all():
        raise NumericalError(f"block {block.index} {name}: the compressed weights are not finite")
    packed = record.pack(block.storage_dtype(name), packing) if name in block.packable else None
    if packed is not None:
        block.result.packed[name] = packed
    count = math.prod(record.shape)
    zeros = int((new_OI == 0).sum()) - (new_OI.numel() - count)
    nbytes = record.plain_nbytes(block.storage_dtype(name)) if packed is None else packed.nbytes
    error_before_update, error = _output_errors(old_OI, new_OI, statistics)
    fields = {
        "block": block.index,
        "matrix": name,
        "shape": list(record.shape),
        "target": str(target),
        "kind": record.kind,
        "zeros": zeros,
        "zeros_frac": zeros / max(count, 1),
        "bytes": nbytes,
        "bits": 8 * nbytes / max(count, 1),
        "tokens": statistics.own_tokens,
        "error_before_update": error_before_update,
        "error": error,
        "note": join_notes(record.note, _storage_note(record, packed, packing, name in block.packable)),
    }
    stored = {} if packed is None else {"stored": dict(packed.description)}
    return MatrixRecord.model_validate({**fields, **record.detail, **stored})


def _output_errors(old_OI: Tensor, new_OI: Tensor, statistics: Statistics) -> tuple[float | None, float | None]:
    """Return relative squared output errors on sampled inputs, None without inputs.

    The first is the error if the pruned weights are only removed, the second that of the final matrix.
    """
    if statistics.sample_NI is None or not len(statistics.sample_NI):
        return None, None
    x_NI = statistics.sample_NI.float()
    wanted_NO = x_NI @ old_OI.T
    error = _energy_ratio(x_NI @ new_OI.T - wanted_NO, wanted_NO)
    masked_OI = old_OI * (new_OI != 0)
    return _energy_ratio(x_NI @ masked_OI.T - wanted_NO, wanted_NO), error


def _storage_note(record: Packed, packed: PackedTensors | None, packing: Packing, packable: bool) -> str:
    """Return a note if the stored form is larger or slower than a reader may expect."""
    if packed is None:
        if record.coded:
            return STORED_DENSE
        return (NOT_SMALLER if packable else NOT_PACKABLE) if record.kind == "masked" and packing == "auto" else ""
    return NO_FAST_PATH if "sparse" in packed.description and not fast_path() else ""


def _advance_dense(decoder: Decoder, streams: Sequence[Stream], block: Block, replayed: bool, passed: Decoder) -> None:
    """Advance the streams of the dense model past `block`, or past that of the other decoder `passed`.

    A replayed block is compressed already, so its source is read.
    """
    if not streams:
        return
    compressed: dict[str, Tensor] | None = None
    source = block
    if passed is not decoder:
        source = passed.load(block.index)
    elif replayed:
        compressed = {name: tensor.clone() for name, tensor in block.stored.items()}
        source = decoder.load(block.index)
    for dense in streams:
        dense.advance(source)
    if passed is not decoder:
        source.release()
    if compressed is not None:
        decoder.load(block.index, compressed)


def _relative_error(hidden: Activations, wanted: Activations) -> float:
    """Return ‖x − y‖² / ‖y‖² over all windows."""
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
