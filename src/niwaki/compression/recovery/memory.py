"""Memory of a recovery, by one formula for every model, and the way of training that fits.

    bytes = student + teacher + learned · (master 4 + gradient 4 + AdamW 8 + best state 4 on a CPU) + masks
            + activations + logits

Frozen weights lie in the compute dtype, learned ones as float32 masters alone. Codes that are learned in thin matrices,
or by their scales, lie as one byte each. Activations are those of one micro-batch: of all blocks, or with
recomputation only the hidden state before each block, and all of one block. Some matrices are computed from what is
learned: casts of masters, thin products, decoded codes. They exist in all blocks, or with recomputation in one.

    plan = choose(Size.of(skeleton), Learning("low-rank", 16, 0.0, codes=False), budget_bytes, tokens=2048)

Legend: D hidden size, V vocabulary.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import psutil
import torch

from niwaki.compression.recovery.codes import MODES, Mode
from niwaki.errors import InputError
from niwaki.formats.trellis import STATES
from niwaki.model.decoder import Decoder
from niwaki.model.device import free_device_bytes
from niwaki.model.logits import FLOAT_BYTES, LOGIT_BYTES, vocabulary_of

MASTER_BYTES = 4 + 4 + 8  # master, gradient, two moments
BEST_BYTES = 4
STATES_PER_TOKEN = 18  # hidden states of a block that its backward pass reads, beside what lies inside its matrices
LOGIT_COPIES = 6  # of a slice of logits in float32: both models, their log-probabilities, products, gradient
USED_SHARE = 0.9  # of the free memory
RESERVED_BYTES = 2**29  # of the process and the libraries on the device


@dataclass(frozen=True)
class Size:
    """Sizes of a model: weights of its compressed matrices, all others, and widths. `inner`: outputs per block."""

    weights: int
    others: int
    dense_weights: int
    blocks: int
    hidden: int
    inner: int
    sides: int
    vocabulary: int

    @classmethod
    def of(cls, skeleton: Decoder, dense: Decoder | None) -> "Size":
        """Return the sizes of a model, and the number of all weights of its dense model."""
        anatomy = skeleton.anatomy
        linears = [linear for block in anatomy.blocks for linear in block.linears.values()]
        total = sum(parameter.numel() for parameter in skeleton.model.parameters())
        return cls(
            anatomy.weights,
            total - anatomy.weights,
            0 if dense is None else sum(parameter.numel() for parameter in dense.model.parameters()),
            len(anatomy.blocks),
            skeleton.hidden_size,
            sum(linear.rows for linear in linears) // len(anatomy.blocks),
            sum(linear.rows + linear.columns for linear in linears),
            vocabulary_of(skeleton.model),
        )


@dataclass(frozen=True)
class Learning:
    """Choice of what is learned: the mode, the rank of thin matrices, and the form of the weights.

    `scales`: learned scales and levels per weight. `codes`: weights are codes. `pruned`: some are zero. `paths`:
    weights that a trellis codes, for which thin matrices do nothing.
    """

    mode: Mode
    rank: int
    scales: float = 0.0
    codes: bool = False
    pruned: bool = False
    paths: int = 0

    @classmethod
    def of(cls, packed: Mapping[str, Mapping[str, Any]], rank: int) -> "Learning":
        """Return what is learned of a model with these descriptions of packed modules; all weights, if they fit."""
        coded = [about for about in packed.values() if "sparse" not in about]
        weights = sum(math.prod(about["shape"]) for about in coded)
        scales = sum(_learned_scales(about) for about in coded) / max(1, weights)
        paths = sum(math.prod(about["shape"]) for about in coded if "trellis" in about)
        return cls("weights", rank, scales, codes=bool(coded), pruned=True, paths=paths)

    def modes(self, train: Mode | Literal["auto"], size: Size) -> tuple[Mode, ...]:
        """Return the modes to choose from.

        Of a model of paths alone scales are learned, unless weights are asked for: those cost more and gained nothing
        (docs/recovery.md). Thin matrices do nothing for paths.
        """
        if self.paths >= size.weights and train != "weights":
            return ("scales",)
        return MODES[:2] if train == "auto" else (train,)

    def learned(self, size: Size) -> int:
        """Return the number of learned numbers."""
        scales = int(self.scales * size.weights)
        return scales + {"weights": size.weights, "low-rank": self.rank * size.sides, "scales": 0}[self.mode]


def _learned_scales(about: Mapping[str, Any]) -> int:
    """Return the learned scales, offsets, zero points and levels of a matrix of codes."""
    rows: int = about["shape"][0]
    if "trellis" in about:
        return len(about["trellis"]) * (rows + STATES)
    pairs = [(2 if part["grid"] in ("free", "affine") else 1, part) for part in about["parts"]]
    return sum(rows * count * -(-part["columns"] // part["group"]) for count, part in pairs)


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of a recovery by part, and how it trains: tokens of a micro-batch, recomputation, teacher in memory."""

    student: int
    teacher: int
    learned: int
    masks: int
    activations: int
    logits: int
    micro_tokens: int
    recompute: bool
    resident: bool
    mode: Mode

    @property
    def total(self) -> int:
        """Return all bytes."""
        return self.student + self.teacher + self.learned + self.masks + self.activations + self.logits + RESERVED_BYTES

    def record(self) -> dict[str, Any]:
        """Return the plan as JSON has it."""
        return {**asdict(self), "total": self.total}


def plan_memory(
    size: Size,
    learning: Learning,
    *,
    micro_tokens: int,
    recompute: bool,
    resident: bool,
    itemsize: int,
    best: bool,
    held_tokens: int = 0,
) -> MemoryPlan:
    """Return the memory of a recovery. `best`: the best state lies on the same device.

    A resident teacher keeps its final hidden states of `held_tokens`.
    """
    frozen = 0 if learning.mode == "weights" else (1 if learning.codes else itemsize) * size.weights
    codes = size.weights if learning.codes and learning.mode == "weights" else 0  # as bytes for the backward pass
    every = itemsize * size.weights
    computed = every if learning.mode != "scales" or learning.codes else 0
    states = STATES_PER_TOKEN * size.hidden + 3 * size.inner
    block = micro_tokens * states * itemsize
    if recompute:
        activations = micro_tokens * size.hidden * itemsize * size.blocks + block + (computed + codes) // size.blocks
    else:
        activations = block * size.blocks + computed + codes
    slice_bytes = min(LOGIT_BYTES, micro_tokens * size.vocabulary * FLOAT_BYTES)
    return MemoryPlan(
        student=size.others * itemsize + frozen,
        teacher=(size.dense_weights + held_tokens * size.hidden) * itemsize if resident else 0,
        learned=learning.learned(size) * (MASTER_BYTES + (BEST_BYTES if best else 0)),
        masks=size.weights if learning.pruned and learning.mode == "weights" else 0,
        activations=activations,
        logits=LOGIT_COPIES * slice_bytes,
        micro_tokens=micro_tokens,
        recompute=recompute,
        resident=resident,
        mode=learning.mode,
    )


def choose(
    size: Size, learning: Learning, budget_bytes: int, *, tokens: int, window: int, itemsize: int, best: bool,
    modes: tuple[Mode, ...] = MODES[:2], held_tokens: int = 0,
) -> MemoryPlan:  # fmt: skip
    """Return the fastest way that fits: `modes` in their order, teacher in memory, no recomputation, large batches.

    `tokens` is the batch of one step, `window` that of the smallest micro-batch. Raises InputError if nothing fits.
    """
    least: MemoryPlan | None = None
    for mode in modes:
        for plan in _ways(size, replace(learning, mode=mode), tokens, window, itemsize, best, held_tokens):
            if plan.total <= budget_bytes:
                return plan
            least = plan if least is None or plan.total < least.total else least
    assert least is not None, "there is a mode"
    raise InputError(
        f"this recovery needs {least.total / 1e9:.1f} GB in its smallest form ({least.mode}), and there are "
        f"{budget_bytes / 1e9:.1f} GB: give a lower --rank or --seq-len, or a larger device"
    )


def _ways(
    size: Size, learning: Learning, tokens: int, window: int, itemsize: int, best: bool, held_tokens: int
) -> Iterator[MemoryPlan]:  # fmt: skip
    for resident in (True, False):
        for recompute in (False, True):
            micro = max(tokens, window)
            while True:
                yield plan_memory(
                    size, learning, micro_tokens=micro, recompute=recompute, resident=resident, itemsize=itemsize,
                    best=best, held_tokens=held_tokens,
                )  # fmt: skip
                if micro < 2 * window:
                    break
                micro = micro // 2 // window * window


def budget(device: torch.device) -> int:
    """Return the bytes that a recovery may use on a device."""
    free_bytes = free_device_bytes(device) if device.type == "cuda" else psutil.virtual_memory().available
    return int(USED_SHARE * free_bytes)
