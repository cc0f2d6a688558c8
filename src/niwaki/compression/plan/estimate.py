"""Seconds and memory of a compression, from what is counted.

The walk does the same for every method: it reads a block, runs all windows through it once for the statistics that
were asked for and once more to pass on, and writes it. That is counted here from `needs`; what a method does besides it
states itself (see `costs`). Reading and writing overlap with computing.

Memory is that of two blocks (one at work, one being read), the records of a block in float32, its statistics, the
hidden states of all windows, what a forward of one batch needs, and what the method holds; or that of embeddings and
head while the windows enter, if that is more. On the CPU everything is in the memory of the process.
"""

import math
from dataclasses import dataclass, replace

import psutil

from niwaki.compression.plan.machines import Machine
from niwaki.compression.plan.sizes import BlockSizes, ModelSizes
from niwaki.data.statistics import SAMPLE_TOKENS, STRIP_COLUMNS, Needs
from niwaki.methods.cost import FLOAT_BYTES, Scope, Work, graph

FORWARD_STARTS = 60  # small operations of a block's forward
SHARES = {"cpu": 1 / 2, "cuda": 1 / 8}  # of its memory that hidden states may take (`activations.choose_place`)
CPU_FORWARD = 2  # times what a forward on a GPU holds of its intermediate values
STARTED_BYTES = 2e7  # of threads, and libraries that are imported only then
SLACK = 1.03  # what an allocator keeps beyond what it is asked for
TOKENIZED = 3e5  # tokens a second, and the windows that a model writes at once
WRITTEN_AT_ONCE = 16


@dataclass(frozen=True)
class Job:
    """What is done to every block: `needs` and `own` work of all methods, over `windows` of `tokens`.

    `batch` windows run at once; `itemsize` is that of the compute dtype. `dense`: a dense stream beside it. `scans`:
    further forwards of all blocks, `scan_tokens` tokens more, `trials` walks that try something. `squares`: gradients
    of all weights are kept on disk. `writes_text`: the model writes its own calibration text first.
    """

    windows: int
    tokens: int
    batch: int
    itemsize: int
    needs: Needs
    dense: bool
    own: dict[int, Work]
    scans: float = 0
    scan_tokens: float = 0
    trials: float = 0
    squares: bool = False
    writes_text: bool = False


def seconds(model: ModelSizes, job: Job, machine: Machine, written_bytes: int) -> dict[str, float]:
    """By phase; without opening the checkpoint, which a plan has done itself."""
    reading = model.file_bytes / machine.disk / 3  # reading is checking for finite numbers; writing also hashes
    walk = trials = scan = 0.0
    for index, block in enumerate(model.blocks):
        scope = block.scope(job.windows, job.tokens)
        compute = _spent(_walk(block, scope, job) + job.own[index], scope, model, job, machine)
        share = block.dense_bytes / max(model.file_bytes, 1)
        save = machine.shard_s + written_bytes * share / machine.disk
        walk += max(compute + share * reading, save)
        trials += job.trials * (compute + share * reading)
        scanned = Work(forward_tokens=job.scans * job.windows * job.tokens + job.scan_tokens)
        scan += _spent(scanned, scope, model, job, machine)
    found = {"walk": walk, "scans": scan, "trials": trials}
    found["ends"] = model.ends_bytes * 2 / machine.disk + machine.shard_s
    found["text"] = job.windows * job.tokens / TOKENIZED
    if job.writes_text:
        steps = -(-job.windows // WRITTEN_AT_ONCE) * job.tokens
        found["text"] += steps * (
            model.file_bytes / machine.bandwidth + len(model.blocks) * FORWARD_STARTS * machine.start_s
        )
    if job.needs.gradient:
        found["gradients"] = _gradients(model, job, machine)
    return found


def _walk(block: BlockSizes, scope: Scope, job: Job) -> Work:
    """What the walk does to a block for these needs, errors and assignments of its records included."""
    every, needs = job.windows * job.tokens, job.needs
    first = min(job.batch, job.windows) * job.tokens
    streams = 1 + job.dense if job.windows else 0
    grams = sum(2 * width**2 for width in scope.inputs) * every * block.reach
    learned = 3.0 if needs.full else 1.0
    return Work(
        forward_tokens=streams * every + (every if needs.anything else first) + first if job.windows else 0,
        gram_flops=grams * learned if needs.gram else 0,
        passed=16 * block.weights + (sum(scope.inputs) * every * block.reach if needs.sqnorm or needs.mean else 0),
        product_flops=3 * 2 * SAMPLE_TOKENS * block.weights if needs.anything else 0,
        started=60 * len(block.matrices),
    )


def _spent(work: Work, scope: Scope, model: ModelSizes, job: Job, machine: Machine) -> float:
    """Seconds of work on one block."""
    through = (
        2 * scope.weights * scope.reach + 4 * scope.tokens * model.hidden
    )  # a token's products, attention with them
    width = (sum(scope.inputs) + sum(rows for rows, _ in scope.matrices)) * min(1.0, scope.reach * 2)
    between = width * job.itemsize / FLOAT_BYTES
    batches = work.forward_tokens / max(scope.tokens * job.batch, 1)
    return (
        work.forward_tokens * (through / machine.product_flops + 2 * between / machine.passed)
        + batches * FORWARD_STARTS * machine.start_s
        + work.learned_tokens * (3 * through / machine.learn_flops + 8 * between / machine.passed)
        + work.gram_flops / machine.gram_flops
        + work.product_flops / machine.float_flops
        + work.solve_flops / machine.solve_flops
        + work.sweep_flops / machine.sweep_flops
        + work.selected / machine.selected
        + work.passed / machine.passed
        + work.started * machine.start_s
    )


def _gradients(model: ModelSizes, job: Job, machine: Machine) -> float:
    """The walk backwards, a window at a time, and the squares of all gradients on disk."""
    single = replace(job, batch=1)
    every, total = job.windows * job.tokens, 0.0
    for block in model.blocks:
        scope = block.scope(job.windows, job.tokens)
        work = Work(
            forward_tokens=every,
            learned_tokens=every,
            passed=3 * job.windows * block.weights,
            started=150 * job.windows,
        )
        squares = (2 * FLOAT_BYTES * block.weights / machine.disk + machine.shard_s) * job.squares
        total += _spent(work, scope, model, single, machine) + squares
    head_weights = model.head_bytes / job.itemsize * (1 if machine.device != "cpu" else job.itemsize / FLOAT_BYTES)
    return total + 3 * 2 * every * head_weights / machine.learn_flops


@dataclass(frozen=True)
class Memory:
    """Bytes: of the process, of the device beside it, and of files that live only as long as the run.

    `sure_bytes`, of the device, or of the process on a CPU: without a model that writes its own text, which may be
    mapped from its file instead of held.
    """

    rss_bytes: int
    device_bytes: int
    scratch_bytes: int
    sure_bytes: int


def memory(
    model: ModelSizes, job: Job, device: str, device_bytes: int, activation_bytes: int | None, base_bytes: int
) -> Memory:
    """At the worst moment. `base_bytes` is what a process with everything imported takes before it computes."""
    states = job.windows * job.tokens * model.hidden * job.itemsize
    kept = [states] * (1 + bool(job.needs.windows) + job.dense)
    inputs = states * len(model.blocks) if job.needs.gradient else 0
    free = psutil.virtual_memory().available if device == "cpu" else device_bytes
    limit = min(SHARES[device] * free, 2**62 if activation_bytes is None else activation_bytes)
    scratch = FLOAT_BYTES * model.weights if job.squares else 0
    resident = 0
    for asked in (*kept, inputs):
        scratch += asked if asked > limit else 0
        resident += asked if asked <= limit else 0
    walk = max((_block_bytes(block, model, job, index) for index, block in enumerate(model.blocks)), default=0)
    ends: float = model.ends_weights * job.itemsize + 2 * model.ends_bytes
    if job.needs.gradient:  # logits, their softmax and its gradient
        vocabulary = model.ends_weights * model.head_bytes / max(model.ends_bytes, 1) / model.hidden
        ends += 3 * FLOAT_BYTES * _at_once(job) * job.tokens * vocabulary
    sure = (resident + max(walk, ends)) * SLACK
    worst = max(sure, model.file_bytes if job.writes_text else 0)
    if device == "cpu":
        own = base_bytes + STARTED_BYTES
        return Memory(round(own + worst), 0, scratch, round(own + sure))
    stored = max((block.dense_bytes for block in model.blocks), default=0)
    host = base_bytes + 3e9 + 3 * stored + model.ends_bytes * 2  # a context, and pinned copies of blocks
    return Memory(round(host), round(worst), scratch, round(sure))


def _at_once(job: Job) -> int:
    """Windows that the walk backwards takes at once: one, where every window's gradient counts."""
    return 1 if job.squares else min(job.batch, job.windows)


def _block_bytes(block: BlockSizes, model: ModelSizes, job: Job, index: int) -> int:
    """The block at work, the one being read, and all that is held of one block."""
    scope = block.scope(job.windows, job.tokens)
    on_cpu = job.itemsize == FLOAT_BYTES
    computed = block.dense_bytes / max(block.matrices[0].itemsize, 1) * job.itemsize if block.matrices else 0
    copies = 2 * (computed + (block.dense_bytes if on_cpu else 0))
    largest = max((m.rows * m.columns for m in block.matrices), default=0)
    records = FLOAT_BYTES * block.weights
    grams = (
        FLOAT_BYTES * sum(width**2 for width in scope.inputs) * (3 if job.needs.full else 1) if job.needs.gram else 0
    )
    widest_input = max(scope.inputs, default=0)
    added = FLOAT_BYTES * widest_input * (widest_input if job.needs.full else STRIP_COLUMNS) if grams else 0
    gradients = FLOAT_BYTES * block.weights if job.squares else 0
    batch = min(job.batch, job.windows) * job.tokens
    widest = max((rows for rows, _ in scope.matrices), default=0)
    between = 6 * model.hidden + 3 * widest * min(1.0, scope.reach * 2)
    forward = batch * job.itemsize * between * (CPU_FORWARD if on_cpu else 1) + added
    own = job.own[index]
    held: float = max(own.held_bytes + own.held_values * job.itemsize, 4.0 * FLOAT_BYTES * largest)
    if job.needs.gradient:
        held = max(held, graph(scope, _at_once(job)) * job.itemsize)
    return math.ceil(copies + records + grams + gradients + max(forward, held))
