"""Products of a few tokens with a matrix stored by inputs on a GPU (see `kernels.inputs`).

Floor: the bytes of the kept rows over the memory bandwidth. At half of the inputs, gate and up of a 7B model are 90 MB
in bf16: 23 µs at 4 TB/s.

Weights (`_dot`): a program owns some neighbouring outputs and a share of the inputs. It first lists the kept inputs of
a chunk, in a buffer of its own, and then reads only their rows. Threads lie along the outputs, 16 bytes each, and then
along the inputs. Masked loads of all rows (`chunk` 0) need no list, but memory bounds the time only if enough bytes are
on the way. At a half, half of the threads then load nothing. On an H200 that took three quarters of the time of all
rows.

Codes (`_codes`): a program takes one token and some whole runs of inputs, each in one group, and lists them at once. So
skipped inputs cost no arithmetic, which bounds codes of 4 bits: an AND and a multiply-add each. A code stays at its
place in the word, as a tiny float of 2⁻¹⁴⁹ per unit. The inputs make up for the power of two.

A narrow matrix has too few outputs to fill a GPU. Its inputs are split over programs, and a second kernel adds up their
sums in a fixed order. So results are deterministic. Grids are fixed, the threshold may lie on the device, nothing goes
to the host: a CUDA graph can capture a call.

Legend: B tokens, I inputs, O outputs, P outputs in whole blocks of 128, S splits, W words of eight codes, G groups.
"""

# ruff: noqa: RUF005 (Triton knows no starred tuples)

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LOAD_BYTES = 16  # of neighbouring outputs: one load of a thread
RUN = 256  # most inputs of one list of codes
SUM_OUTPUTS, SUM_SPLITS = 128, 16  # of a program of the second kernel, and of its steps
POWER = tl.constexpr(90)  # of two, in the inputs of codes: sums of tiny floats would lose bits
UNIT = tl.constexpr(59)  # 149 − POWER


class InputsLaunch(NamedTuple):
    """Launch of a product with kept inputs."""

    columns: int  # outputs of a program, or words of eight codes
    rows: int  # inputs of a step
    warps: int
    splits: int  # of the inputs
    stages: int = 1  # of loads that a program has on the way
    chunk: int = 0  # inputs of a list of weights; 0 for masked loads


class Levels(NamedTuple):
    """Levels of codes in the order of the nibbles: [G, 8, W]. Scales and offsets are float16."""

    scale: Tensor
    offset: Tensor | None
    zero: Tensor | None
    centre: float


def default_launch(outputs: int, inputs: int, tokens: int, processors: int) -> InputsLaunch:
    """Return the launch for a shape: some programs per processor."""
    padded = triton.next_power_of_2(tokens)
    columns, chunk = 64, 512
    rows = {1: 128, 2: 64, 4: 64}.get(padded, 32)
    blocks = triton.cdiv(outputs, columns)
    splits = max(1, min(triton.cdiv(4 * processors, blocks), triton.cdiv(inputs, chunk)))
    return InputsLaunch(columns, rows, 4, splits, chunk=chunk)


def default_codes_launch(outputs: int, runs: int, processors: int) -> InputsLaunch:
    """Return the launch for codes. Every split takes whole runs."""
    words = 64
    blocks = triton.cdiv(outputs, 8 * words)
    return InputsLaunch(words, 8, 4, max(1, min(runs, triton.cdiv(4 * processors, blocks))), stages=3)


def processors_of(device: torch.device) -> int:
    """Return the number of processors of a GPU; of the interpreter 4."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def inputs_dot_triton(
    x_BI: Tensor,
    weight_IO: Tensor,
    threshold: float | Tensor,
    bias_O: Tensor | None,
    count: Tensor | None,
    launch: InputsLaunch | None = None,
) -> Tensor:
    """Implement `kernels.inputs.inputs_dot`."""
    (tokens, inputs), outputs = x_BI.shape, weight_IO.shape[1]
    launch = launch or default_launch(outputs, inputs, tokens, processors_of(x_BI.device))
    out_BO = x_BI.new_empty(tokens, outputs)
    share = triton.cdiv(triton.cdiv(inputs, launch.splits), launch.rows) * launch.rows
    splits = triton.cdiv(inputs, share)
    sums = _buffer(out_BO, splits)
    blocks = triton.cdiv(outputs, launch.columns)
    listed = None
    if launch.chunk:
        width = triton.cdiv(share, launch.chunk) * launch.chunk
        listed = torch.empty(blocks, splits, width, dtype=torch.int32, device=x_BI.device)
    _dot[blocks, splits](
        x_BI, weight_IO, threshold, bias_O, sums, count, listed, tokens, inputs, outputs, share, weight_IO.stride(0),
        padded=triton.next_power_of_2(tokens), rows=launch.rows, columns=launch.columns, whole=splits == 1,
        stages=launch.stages, chunk=launch.chunk, fold=_fold(launch, weight_IO.element_size()),
        on_device=isinstance(threshold, Tensor), num_warps=launch.warps,
    )  # fmt: skip
    return _summed(sums, bias_O, out_BO)


def codes_dot_triton(
    x_BI: Tensor,
    codes_IB: Tensor,
    levels: Levels,
    group: int,
    threshold: float | Tensor,
    bias_O: Tensor | None,
    count: Tensor | None,
    outputs: int,
    launch: InputsLaunch | None = None,
) -> Tensor:
    """Implement `kernels.inputs.codes_inputs_dot`."""
    tokens, inputs = x_BI.shape
    run = min(group, RUN)
    runs_per_group = triton.cdiv(group, run)
    runs = triton.cdiv(inputs, group) * runs_per_group
    launch = launch or default_codes_launch(outputs, runs, processors_of(x_BI.device))
    words_IW = codes_IB.view(torch.int32)
    blocks, block = triton.cdiv(words_IW.shape[1], launch.columns), max(triton.next_power_of_2(run), launch.rows)
    out_BO = x_BI.new_empty(tokens, outputs)
    sums = _buffer(out_BO, launch.splits)
    listed = torch.empty(tokens, blocks, runs, block, dtype=torch.int32, device=x_BI.device)
    about = torch.empty(tokens, blocks, runs, 2, device=x_BI.device)
    share = triton.cdiv(runs, launch.splits)
    _codes[blocks, launch.splits, tokens](
        x_BI, words_IW, levels.scale, levels.offset, levels.zero, threshold, bias_O, sums, count, listed, about,
        tokens, inputs, outputs, words_IW.shape[1], runs, share, many=triton.next_power_of_2(share),
        group=group, run=run, runs_per_group=runs_per_group, block=block, rows=launch.rows, words=launch.columns,
        whole=launch.splits == 1, stages=launch.stages, centre=levels.centre, on_device=isinstance(threshold, Tensor),
        num_warps=launch.warps,
    )  # fmt: skip
    return _summed(sums, bias_O, out_BO)


def _fold(launch: InputsLaunch, nbytes: int) -> int:
    """Return how many rows of a step lie in one thread."""
    return max(1, launch.rows * launch.columns * nbytes // (LOAD_BYTES * 32 * launch.warps))


def _buffer(out_BO: Tensor, splits: int) -> Tensor:
    """Return the tensor of the first kernel: the output, or sums [S, B, O] in float32."""
    return out_BO if splits == 1 else out_BO.new_empty(splits, *out_BO.shape, dtype=torch.float32)


def _summed(sums: Tensor, bias_O: Tensor | None, out_BO: Tensor) -> Tensor:
    if sums is not out_BO:
        outputs = out_BO.shape[1]
        _sum[triton.cdiv(outputs, SUM_OUTPUTS), len(out_BO)](
            sums, bias_O, out_BO, len(out_BO), outputs, len(sums), block=SUM_OUTPUTS, step=SUM_SPLITS, num_warps=4
        )
    return out_BO


@triton.jit
def _limit(threshold, on_device: tl.constexpr):
    """Return the threshold, from the device or from the call."""
    if on_device:
        threshold = tl.load(threshold).to(tl.float32)
    return threshold


@triton.jit
def _kept(x, place, inside, tokens, inputs, limit, padded: tl.constexpr):
    """Load some inputs of every token, zero where it does not keep them, and where any token keeps them."""
    values = ()
    kept = place < 0
    for b in tl.static_range(padded):
        value = tl.load(x + tl.minimum(b, tokens - 1) * inputs + place, mask=inside, other=0.0).to(tl.float32)
        own = (tl.abs(value) <= limit) == 0  # not a number is kept
        kept = kept | own
        values = values + (tl.where(own, value, 0.0),)
    return values, kept & inside


@triton.jit
def _add_count(count, x, inputs, last, first, limit, tokens, block: tl.constexpr, padded: tl.constexpr):
    """Add the kept inputs [first, last) of all tokens to the count."""
    found = tl.zeros((), tl.int32)
    for start in range(first, last, block):
        place = start + tl.arange(0, block)
        for b in tl.static_range(padded):
            inside = place < tl.where(b < tokens, last, first)
            value = tl.load(x + b * inputs + place, mask=inside, other=0.0).to(tl.float32)
            found += tl.sum((((tl.abs(value) <= limit) == 0) & inside).to(tl.int32))
    tl.atomic_add(count, found.to(tl.int64), sem="relaxed")


@triton.jit(do_not_specialize=["tokens", "share"])
def _dot(
    x,
    weight,
    threshold,
    bias,
    out,
    count,
    listed,
    tokens,
    inputs,
    outputs,
    share,
    stride,
    padded: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
    whole: tl.constexpr,
    stages: tl.constexpr,
    chunk: tl.constexpr,
    fold: tl.constexpr,
    on_device: tl.constexpr,
):
    """Multiply a share of the inputs with some outputs. Sums are [rows / fold, columns]."""
    column = tl.program_id(0) * columns + tl.arange(0, columns)
    here = column < outputs
    first = tl.program_id(1) * share
    last = tl.minimum(first + share, inputs)
    limit = _limit(threshold, on_device)
    if count is not None and tl.program_id(0) == 0:
        _add_count(count, x, inputs, last, first, limit, tokens, rows, padded)
    total = ()
    for _ in tl.static_range(padded):
        total = total + (tl.zeros((rows // fold, columns), tl.float32),)
    if chunk > 0:
        width = (share + chunk - 1) // chunk * chunk
        listed += (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)).to(tl.int64) * width
        for own in tl.range(first, last, chunk):
            found = _list_chunk(x, listed + (own - first), own, last, tokens, inputs, limit, chunk, padded)
            for start in tl.range(0, found, rows, num_stages=stages):
                at = start + tl.arange(0, rows)
                place = tl.load(listed + (own - first) + at, mask=at < found, other=0)
                values, kept = _kept(x, place, at < found, tokens, inputs, limit, padded)
                row = place.to(tl.int64)[:, None] * stride + column[None, :]
                weights = tl.load(weight + row, mask=(at < found)[:, None] & here[None, :], other=0.0)
                total = _add_products(total, weights.to(tl.float32), values, padded, fold)
    else:
        for start in tl.range(first, last, rows, num_stages=stages):
            place = start + tl.arange(0, rows)
            values, kept = _kept(x, place, place < last, tokens, inputs, limit, padded)
            row = place.to(tl.int64)[:, None] * stride + column[None, :]
            weights = tl.load(weight + row, mask=kept[:, None] & here[None, :], other=0.0)
            total = _add_products(total, weights.to(tl.float32), values, padded, fold)
    for b in tl.static_range(padded):
        y = tl.sum(total[b], axis=0)
        _put(out, bias, y, b, column, column < tl.where(b < tokens, outputs, 0), tokens, outputs, whole)


@triton.jit
def _list_chunk(x, listed, first, last, tokens, inputs, limit, chunk: tl.constexpr, padded: tl.constexpr):
    """Write the inputs of a chunk that any token keeps, in order, and return their number."""
    place = first + tl.arange(0, chunk)
    _, kept = _kept(x, place, place < last, tokens, inputs, limit, padded)
    tl.store(listed + tl.cumsum(kept.to(tl.int32), 0) - 1, place, mask=kept)
    tl.debug_barrier()
    return tl.sum(kept.to(tl.int32))


@triton.jit
def _add_products(total, weights, values, padded: tl.constexpr, fold: tl.constexpr):
    """Add weights · values for every token. `fold` rows lie in one thread, which adds them up at once."""
    rows: tl.constexpr = weights.shape[0]
    columns: tl.constexpr = weights.shape[1]
    new = ()
    for b in tl.static_range(padded):
        product = tl.reshape(weights * values[b][:, None], (fold, rows // fold, columns))
        new = new + (total[b] + tl.sum(product, axis=0),)
    return new


@triton.jit
def _put(out, bias, y, b, column, here, tokens, outputs, whole: tl.constexpr):
    """Store the outputs of a token, or its sums of one split."""
    if whole:
        if bias is not None:
            y += tl.load(bias + column, mask=here, other=0.0).to(tl.float32)
        tl.store(out + b * outputs + column, y.to(out.dtype.element_ty), mask=here)
    else:
        tl.store(out + (tl.program_id(1) * tokens + b).to(tl.int64) * outputs + column, y, mask=here)


@triton.jit(do_not_specialize=["tokens", "splits"])
def _sum(sums, bias, out, tokens, outputs, splits, block: tl.constexpr, step: tl.constexpr):
    """Add up the sums of all splits, in an order that only their number decides."""
    column = tl.program_id(0) * block + tl.arange(0, block)
    here = column < outputs
    b = tl.program_id(1)
    total = tl.zeros((step, block), tl.float32)
    for first in tl.range(0, splits, step):
        split = first + tl.arange(0, step)
        at = (split * tokens + b).to(tl.int64)[:, None] * outputs + column[None, :]
        total += tl.load(sums + at, mask=(split < splits)[:, None] & here[None, :], other=0.0)
    y = tl.sum(total, axis=0)
    if bias is not None:
        y += tl.load(bias + column, mask=here, other=0.0).to(tl.float32)
    tl.store(out + b * outputs + column, y.to(out.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["tokens", "runs", "share"])
def _codes(
    x,
    codes,
    scale,
    offset,
    zero,
    threshold,
    bias,
    out,
    count,
    listed,
    about,
    tokens,
    inputs,
    outputs,
    width,
    runs,
    share,
    group: tl.constexpr,
    run: tl.constexpr,
    runs_per_group: tl.constexpr,
    block: tl.constexpr,
    many: tl.constexpr,
    rows: tl.constexpr,
    words: tl.constexpr,
    whole: tl.constexpr,
    stages: tl.constexpr,
    centre: tl.constexpr,
    on_device: tl.constexpr,
):
    """Multiply some runs of one token with some words. Sums are [rows, words] for each of the eight codes of a word."""
    word = tl.program_id(0) * words + tl.arange(0, words)
    here = word < width
    token = tl.program_id(2)
    x += token * inputs
    listed += (token * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * runs * block
    limit = _limit(threshold, on_device)
    total = _eight(rows, words)
    first_run = tl.program_id(1) * share
    own_runs = tl.minimum(share, runs - first_run)
    about += (token * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * runs * 2
    found = _list_runs(
        x, listed, about, first_run, own_runs, inputs, limit, group, run, runs_per_group, block, many
    )  # fmt: skip
    if count is not None and tl.program_id(0) == 0:
        tl.atomic_add(count, found.to(tl.int64), sem="relaxed")
    for number in tl.range(first_run, first_run + own_runs):
        kept = tl.load(about + number * 2).to(tl.int32)
        x_sum = tl.load(about + number * 2 + 1)
        levels = _load_levels(scale, offset, zero, number // runs_per_group, word, here, width, centre)
        sums = _sums_of_run(x, codes, listed + number * block, kept, word, here, width, rows, words, stages)
        total = _add_run(total, sums, levels, x_sum, rows)
    for n in tl.static_range(8):
        column = _output_of(word, n)
        y = tl.sum(total[n], axis=0)
        _put(out, bias, y, token, column, here & (column < outputs), tokens, outputs, whole)


@triton.jit
def _list_runs(
    x,
    listed,
    about,
    first_run,
    own_runs,
    inputs,
    limit,
    group: tl.constexpr,
    run: tl.constexpr,
    runs_per_group: tl.constexpr,
    block: tl.constexpr,
    many: tl.constexpr,
):
    """Write the kept inputs of every run in order, their number and their sum, and return the number of all."""
    number = first_run + tl.arange(0, many)
    own = number // runs_per_group
    first = own * group + number % runs_per_group * run
    last = tl.minimum(tl.minimum(first + run, own * group + group), inputs)
    place = first[:, None] + tl.arange(0, block)[None, :]
    inside = place < tl.where(number < first_run + own_runs, last, 0)[:, None]
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    kept = ((tl.abs(value) <= limit) == 0) & inside
    at = number[:, None] * block + tl.cumsum(kept.to(tl.int32), 1) - 1
    tl.store(listed + at, place, mask=kept)
    found = tl.sum(kept.to(tl.int32), axis=1)
    tl.store(about + number * 2, found.to(tl.float32), mask=number < first_run + own_runs)
    x_sum = tl.sum(tl.where(kept, value, 0.0), axis=1)
    tl.store(about + number * 2 + 1, x_sum, mask=number < first_run + own_runs)
    tl.debug_barrier()
    return tl.sum(found)


@triton.jit
def _sums_of_run(
    x, codes, listed, kept, word, here, width, rows: tl.constexpr, words: tl.constexpr, stages: tl.constexpr
):
    """Return Σ code · input of the listed inputs for the eight codes of every word."""
    sums = _eight(rows, words)
    for start in tl.range(0, kept, rows, num_stages=stages):
        at = start + tl.arange(0, rows)
        place = tl.load(listed + at, mask=at < kept, other=0)
        value = tl.load(x + place, mask=at < kept, other=0.0).to(tl.float32)
        inside = (at < kept)[:, None] & here[None, :]
        packed = tl.load(codes + place.to(tl.int64)[:, None] * width + word[None, :], mask=inside, other=0)
        sums = _add_codes(sums, packed, value)
    return sums


@triton.jit
def _load_levels(scale, offset, zero, own, word, here, width, centre: tl.constexpr):
    """Load scales and offsets of a group for the eight codes of every word."""
    levels = ()
    for n in tl.static_range(8):
        at = (own * 8 + n) * width + word
        own_scale = tl.load(scale + at, mask=here, other=0.0)
        if offset is not None:
            levels = levels + ((own_scale, tl.load(offset + at, mask=here, other=0.0).to(tl.float32)),)
        elif zero is not None:
            own_zero = tl.load(zero + at, mask=here, other=0).to(tl.float32)
            levels = levels + ((own_scale, -own_scale.to(tl.float32) * own_zero),)
        else:
            levels = levels + ((own_scale, own_scale.to(tl.float32) * (0.0 - centre)),)
    return levels


@triton.jit
def _eight(rows: tl.constexpr, words: tl.constexpr):
    """Return zero sums for the codes of a word."""
    sums = ()
    for _ in tl.static_range(8):
        sums = sums + (tl.zeros((rows, words), tl.float32),)
    return sums


@triton.jit
def _add_codes(sums, packed, value):
    """Add code · value for the codes of every word. Each code is read where it lies, the last three 12 bits lower."""
    lower = packed >> 12
    new = ()
    for n in tl.static_range(8):
        if n < 5:
            new = new + (_add_code(sums[n], packed, value, 4 * n),)
        else:
            new = new + (_add_code(sums[n], lower, value, 4 * n - 12),)
    return new


@triton.jit
def _add_code(sums, words, value, bit: tl.constexpr):
    """Add the codes at a bit of every word, times the inputs of the rows."""
    tiny = (words & (15 << bit)).to(tl.float32, bitcast=True)
    return sums + tiny * (value * (2.0 ** (POWER - bit)))[:, None]


@triton.jit
def _add_run(total, sums, levels, x_sum, rows: tl.constexpr):
    """Apply the levels of a group to the sums of a run. The first row takes the offset."""
    once = tl.where(tl.arange(0, rows) == 0, x_sum, 0.0)[:, None]
    new = ()
    for n in tl.static_range(8):
        unit = levels[n][0].to(tl.float32) * (2.0**UNIT)
        new = new + (total[n] + sums[n] * unit[None, :] + once * levels[n][1][None, :],)
    return new


@triton.jit
def _output_of(word, n: tl.constexpr):
    """Return the output of nibble n of every word (`kernels.inputs.InputCodes`)."""
    inner = word % 16
    return word // 16 * 128 + inner // 2 % 2 * 64 + n % 4 * 16 + inner // 4 * 4 + inner % 2 * 2 + n // 4
