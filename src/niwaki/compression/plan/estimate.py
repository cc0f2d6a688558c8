"""Seconds and memory of a compression, from counted work.

The walk does the same for every method. It reads a block, runs all windows through it once for the statistics and again
to pass on, and writes it. That is counted here from `needs`; a method states its own work (see `niwaki.methods.cost`).
Reading and writing overlap with computing.

Memory holds two blocks (one in use, one being read), the records of a block in float32, and its statistics. It also
holds the hidden states of all windows, a forward of one batch, and what the method needs. The embeddings and the head
count instead, if they take more while the windows are embedded. On the CPU everything is in the memory of the process.
"""

import math
from dataclasses import dataclass, replace

import psutil

from niwaki.compression.plan.machines import Machine
from niwaki.compression.plan.sizes import BlockSizes, ModelSizes
from niwaki.config.recipe import Recipe
from niwaki.data.statistics import SAMPLE_TOKENS, STRIP_COLUMNS, Needs
from niwaki.methods.cost import FLOAT_BYTES, Scope, Work, graph
from niwaki.model.logits import LOGIT_BYTES

FORWARD_STARTS = 60  # small operations of a block's forward
SHARES = {"cpu": 1 / 2, "cuda": 1 / 8}  # of its memory for hidden states (`hidden_states.choose_place`)
CPU_FORWARD = 2  # intermediate values of a forward, relative to a GPU
STARTED_BYTES = 2e7  # threads, and libraries that are imported late
SLACK = 1.03  # memory that an allocator keeps, relative to what it is asked for
ID_BYTES = 8  # of a token
TOKENIZED = 3e5  # tokens a second
WRITTEN_AT_ONCE = 16  # windows that a model writes in parallel


@dataclass(frozen=True)
class Workload:
    """Work on every block: `needs` and `own` work of all methods, over `windows` of `tokens`.

    A block without `own` work stays as it is, and the windows end after the last block that has some.

    `batch` windows run together; `itemsize` is that of the compute dtype. `dense`: a dense stream runs beside it.
    `scans` are further forwards of all blocks, and `scan_tokens` tokens more. `candidates` are walks that evaluate a
    shape. `squares`: gradients of all weights are kept on disk. `writes_text`: the model writes its own calibration
    text first. `lends`: experts get tokens of the others, in one more forward of their blocks. `blocks`: all of the
    model. `held`: further windows, which learning is judged by.
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
    candidates: float = 0
    squares: bool = False
    writes_text: bool = False
    lends: bool = False
    blocks: int = 0
    held: int = 0


def seconds(model: ModelSizes, load: Workload, machine: Machine, written_bytes: int) -> dict[str, float]:
    """Return the seconds of every phase; a plan adds those of opening the checkpoint."""
    reading = model.file_bytes / machine.disk / 3  # reading is checking for finite numbers; writing also hashes
    walk = candidates = scan = 0.0
    for index, block in enumerate(model.blocks):
        scope = block.scope(load.windows, load.tokens)
        compute = _spent(_on_block(index, block, scope, load), scope, model, load, machine)
        share = block.dense_bytes / max(model.file_bytes, 1)
        save = machine.shard_s + written_bytes * share / machine.disk
        walk += max(compute + share * reading, save)
        candidates += load.candidates * (compute + share * reading)
        scanned = Work(forward_tokens=load.scans * load.windows * load.tokens + load.scan_tokens)
        scan += _spent(scanned, scope, model, load, machine)
    phases = {"walk": walk, "scans": scan, "candidates": candidates}
    phases["embeddings"] = model.embeddings_bytes * 2 / machine.disk + machine.shard_s
    phases["text"] = load.windows * load.tokens / TOKENIZED
    if load.writes_text:
        steps = -(-load.windows // WRITTEN_AT_ONCE) * load.tokens
        phases["text"] += steps * (
            model.file_bytes / machine.bandwidth + len(model.blocks) * FORWARD_STARTS * machine.start_s
        )
    if load.needs.gradient:
        phases["gradients"] = _gradients(model, load, machine)
    return phases


def _on_block(index: int, block: BlockSizes, scope: Scope, load: Workload) -> Work:
    """Count the work on a block; those that stay as they are only pass the windows on, if a later one needs them."""
    if index in load.own:
        own = load.own[index]
        return _walk(block, scope, load) + replace(own, logit_tokens=_logit_tokens(index, load))
    passes = index < max(load.own, default=0)
    return Work(forward_tokens=passes * (1 + load.dense) * load.windows * load.tokens, passed=block.weights)


def _logit_tokens(index: int, load: Workload) -> float:
    """Return the tokens whose logits a block learns from: none, unless its error reaches the last block."""
    return load.own[index].logit_tokens if index + load.needs.ahead >= load.blocks - 1 else 0.0


def _walk(block: BlockSizes, scope: Scope, load: Workload) -> Work:
    """Count the work of the walk on a block for these needs, with errors and assignments of its records."""
    every, needs = load.windows * load.tokens, load.needs
    first = min(load.batch, load.windows) * load.tokens
    streams = 1 + load.dense if load.windows else 0
    grams = sum(2 * width**2 for width in scope.inputs) * every * block.reach
    learned = 3.0 if needs.full else 1.0
    lent = every if load.lends and block.reach < 1 else 0
    judged = load.held * load.tokens * (2 + needs.dense)
    return Work(
        forward_tokens=streams * every + (every if needs.anything else first) + first + lent + judged
        if load.windows
        else 0,
        gram_flops=grams * learned if needs.gram else 0,
        passed=16 * block.weights + (sum(scope.inputs) * every * block.reach if needs.sqnorm or needs.mean else 0),
        product_flops=3 * 2 * SAMPLE_TOKENS * block.weights if needs.anything else 0,
        started=60 * len(block.matrices),
    )


def _spent(work: Work, scope: Scope, model: ModelSizes, load: Workload, machine: Machine) -> float:
    """Return the seconds of work on one block."""
    through = (
        2 * scope.weights * scope.reach + 4 * scope.tokens * model.hidden
    )  # a token's products, attention with them
    width = (sum(scope.inputs) + sum(rows for rows, _ in scope.matrices)) * min(1.0, scope.reach * 2)
    between = width * load.itemsize / FLOAT_BYTES
    batches = work.forward_tokens / max(scope.tokens * load.batch, 1)
    return (
        work.forward_tokens * (through / machine.product_flops + 2 * between / machine.passed)
        + batches * FORWARD_STARTS * machine.start_s
        + work.learned_tokens * (3 * through / machine.learn_flops + 8 * between / machine.passed)
        + work.logit_tokens * 3 * 2 * _head_weights(model, load, machine.device) / machine.learn_flops
        + work.gram_flops / machine.gram_flops
        + work.product_flops / machine.float_flops
        + work.solve_flops / machine.solve_flops
        + work.sweep_flops / machine.sweep_flops
        + work.selected / machine.selected
        + work.passed / machine.passed
        + work.started * machine.start_s
    )


def _gradients(model: ModelSizes, load: Workload, machine: Machine) -> float:
    """Return the seconds of the backward pass, a window at a time, and of the squared gradients on disk."""
    single = replace(load, batch=1)
    every, total = load.windows * load.tokens, 0.0
    for block in model.blocks:
        scope = block.scope(load.windows, load.tokens)
        work = Work(
            forward_tokens=every,
            learned_tokens=every,
            passed=3 * load.windows * block.weights,
            started=150 * load.windows,
        )
        squares = (2 * FLOAT_BYTES * block.weights / machine.disk + machine.shard_s) * load.squares
        total += _spent(work, scope, model, single, machine) + squares
    return total + 3 * 2 * every * _head_weights(model, load, machine.device) / machine.learn_flops


def _head_weights(model: ModelSizes, load: Workload, device: str) -> float:
    """Return the weights of the LM head."""
    return model.head_bytes / load.itemsize * (1 if device != "cpu" else load.itemsize / FLOAT_BYTES)


@dataclass(frozen=True)
class Memory:
    """Peak bytes of the process, of the device, and of the temporary files of the run.

    `sure_bytes` is the peak of the device, or of the process on a CPU. It leaves out a model that writes its own text:
    that model may be mapped from its file.
    """

    rss_bytes: int
    device_bytes: int
    scratch_bytes: int
    sure_bytes: int


def memory(
    model: ModelSizes, load: Workload, device: str, device_bytes: int, recipe: Recipe, base_bytes: int
) -> Memory:
    """Return the peak memory. `base_bytes` is the size of a process with everything imported, before it computes."""
    states = load.windows * load.tokens * model.hidden * load.itemsize
    kept = [states] * (1 + bool(load.needs.windows) + load.dense)
    kept += [load.held * load.tokens * model.hidden * load.itemsize] * (2 + load.needs.dense) if load.held else []
    inputs = states * len(model.blocks) if load.needs.gradient else 0
    free = psutil.virtual_memory().available if device == "cpu" else device_bytes
    limit = min(SHARES[device] * free, 2**62 if recipe.activation_bytes is None else recipe.activation_bytes)
    scratch = FLOAT_BYTES * model.weights if load.squares else 0
    resident = 0
    for nbytes in (*kept, inputs):
        scratch += nbytes if nbytes > limit else 0
        resident += nbytes if nbytes <= limit else 0
    walk: float = max((_block_bytes(block, model, load, index) for index, block in enumerate(model.blocks)), default=0)
    outer: float = model.embeddings_weights * load.itemsize + 2 * model.embeddings_bytes
    vocabulary = model.embeddings_weights * model.head_bytes / max(model.embeddings_bytes, 1) / model.hidden
    slice_bytes = LOGIT_BYTES if recipe.logit_bytes is None else recipe.logit_bytes
    if any(_logit_tokens(index, load) for index in load.own):  # those of both models, with their softmax
        logit_bytes = min(FLOAT_BYTES * load.windows * load.tokens * vocabulary, slice_bytes)
        walk += model.embeddings_weights * load.itemsize + 6 * logit_bytes
    if load.needs.gradient:  # logits, their softmax and its gradient
        outer += 3 * min(FLOAT_BYTES * _at_once(load) * load.tokens * vocabulary, slice_bytes)
    sure = (resident + max(walk, outer)) * SLACK + ID_BYTES * load.windows * load.tokens
    worst = max(sure, model.file_bytes if load.writes_text else 0)
    if device == "cpu":
        own = base_bytes + STARTED_BYTES
        return Memory(round(own + worst), 0, scratch, round(own + sure))
    stored = max((block.dense_bytes for block in model.blocks), default=0)
    host = base_bytes + 3e9 + 3 * stored + model.embeddings_bytes * 2  # a context, and pinned copies of blocks
    return Memory(round(host), round(worst), scratch, round(sure))


def _at_once(load: Workload) -> int:
    """Return the windows per batch of the backward pass: one, where the gradient of every window counts."""
    return 1 if load.squares else min(load.batch, load.windows)


def _block_bytes(block: BlockSizes, model: ModelSizes, load: Workload, index: int) -> int:
    """Return the bytes of the block in use, of the one being read, and of all that is held of one block."""
    scope = block.scope(load.windows, load.tokens)
    on_cpu = load.itemsize == FLOAT_BYTES
    computed = block.dense_bytes / max(block.matrices[0].itemsize, 1) * load.itemsize if block.matrices else 0
    copies = 2 * (computed + (block.dense_bytes if on_cpu else 0))
    largest = max((m.rows * m.columns for m in block.matrices), default=0)
    records = FLOAT_BYTES * block.weights
    per_group = (3 if load.needs.full else 1) + load.needs.held
    grams = FLOAT_BYTES * sum(width**2 for width in scope.inputs) * per_group if load.needs.gram else 0
    widest_input = max(scope.inputs, default=0)
    added = FLOAT_BYTES * widest_input * (widest_input if load.needs.full else STRIP_COLUMNS) if grams else 0
    gradients = FLOAT_BYTES * block.weights if load.squares else 0
    batch = min(load.batch, load.windows) * load.tokens
    widest = max((rows for rows, _ in scope.matrices), default=0)
    between = 6 * model.hidden + 3 * widest * min(1.0, scope.reach * 2)
    forward = batch * load.itemsize * between * (CPU_FORWARD if on_cpu else 1) + added
    own = load.own.get(index, Work())
    held: float = max(own.held_bytes + own.held_values * load.itemsize, 4.0 * FLOAT_BYTES * largest)
    if load.needs.gradient:
        held = max(held, graph(scope, _at_once(load)) * load.itemsize)
    return math.ceil(copies + records + grams + gradients + max(forward, held))
