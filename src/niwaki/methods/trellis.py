"""Trellis-coded weights: neighboring rows share bits, so that each weight chooses among more levels than its bits name.

Source: trellis-coded quantization (Marcellin & Fischer 1990), for language models QTIP (Tseng et al., "QTIP:
Quantization with Trellises and Incoherence Processing", NeurIPS 2024). Only QTIP's bit-shift trellis is taken over:

| | QTIP | Here |
| --- | --- | --- |
| States | 2^16, levels computed from the state | 256, levels fitted to the weights and stored as int8 |
| Sequence | 16 × 16 weights, row by row | 32 rows of one column, closed to a ring |
| Error feedback | between blocks of 16 columns | between all columns, largest inputs first, as in `gptq` |
| Basis | random Hadamard on both sides | as it is |
| Bits | whole numbers | two neighboring widths, the wider one for columns with the largest inputs |
| Learning | of the matrices that are not rounded yet | of all weights of the block, codes included |

Of the energy of normal weights the trellis loses 31, 8.4, 2.3 and 0.7 % at 1, 2, 3 and 4 bits. The best grids of as
many levels lose 36, 12, 3.5 and 1.0 %.

1. Levels start as those for normal weights and are fitted to the matrix. Scales start as the RMS of each row.
2. A sweep takes one column after another and searches the best path of all its rings; later columns absorb its error.
3. `rounds` refit levels and scales, with a pass of coordinate descent each (see `shared.trellis_codes`).
4. `learn_rounds` learn latent weights and scales block by block. The forward uses the nearest path of the latent
   weights, searched again after every `encode_every` steps. The backward passes the gradient straight to them.

The target counts everything that is stored: rings, scales, levels, and the mask of columns.

Cost: two forwards, one Gram matrix and factor per group of matrices, `rounds` + 2 searches of about 1,000 operations
per weight. With learning also `learn_rounds` · `samples` forwards and backwards of a window, and the searches.

    niwaki compress MODEL OUT --method trellis --target 2.28bit --calibration mine.txt --seq-len 512
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
from torch import Tensor

from niwaki.config.targets import Bits, Target
from niwaki.data.statistics import Needs, Statistics
from niwaki.data.stream import CalibrationData
from niwaki.errors import TargetError
from niwaki.formats.packed import Packed, join_notes
from niwaki.formats.quantized import SCALE_DTYPE
from niwaki.formats.trellis import STATES, trellis_bytes
from niwaki.methods.cost import FLOAT_BYTES, Scope, Work, gram_factors, products, sweeps
from niwaki.methods.method import WalkMethod
from niwaki.methods.shared.best_state import BestState
from niwaki.methods.shared.block_training import Reconstruction, Schedule, take_step, training_batches
from niwaki.methods.shared.column_sweep import check_damping, inverse_factor
from niwaki.methods.shared.learned_rounding import KEPT_START, SCALE_RATE, code_learning_cost, code_learning_needs
from niwaki.methods.shared.learning_options import (
    Ahead,
    LearningTarget,
    LogitDivergence,
    Reconstruct,
    check_learning_options,
)
from niwaki.methods.shared.rounding import ROUNDED_UNREACHED, SMALLEST_SCALE, damped
from niwaki.methods.shared.trellis_codes import (
    TrellisCodes,
    descend,
    improve,
    nearest_path,
    round_in_order,
    start_codes,
)
from niwaki.model.decoder import Block

WIDTHS = ((1, 2), (2, 3), (3, 4))  # bits of the other columns and of those with the largest inputs
SEARCH_OPERATIONS = 4 * STATES  # of a weight: two walks along its ring, with a comparison and an addition per state


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of the trellis."""

    rounds: Annotated[int, "Rounds of refitted levels and scales and of coordinate descent after the sweep."] = 2
    damping_frac: Annotated[float, "A share of the mean diagonal of XᵀX, added to the diagonal (λ)."] = 0.03
    learn_rounds: Annotated[int, "Rounds of block-wise learning of codes and scales; 0 for none."] = 8
    samples: Annotated[int, "Windows per round of learning."] = 32
    batch: Annotated[int, "Windows per step of learning."] = 2
    rate_frac: Annotated[
        float,
        "Length of a step of learning as a share of the distance between levels: the RMS of the weights at 2 bits.",
    ] = 0.005
    encode_every: Annotated[int, "Steps of learning between two searches of the nearest path."] = 4
    target: LearningTarget = "both"
    reconstruct: Reconstruct = "block"
    ahead: Ahead = 0
    kl: LogitDivergence = 0.0

    def __post_init__(self) -> None:
        check_learning_options(self.target, reconstruct=self.reconstruct, ahead=self.ahead, kl=self.kl)
        if min(self.rounds, self.learn_rounds) < 0:
            raise ValueError("expected rounds and learn_rounds ≥ 0")
        if min(self.samples, self.batch, self.encode_every) < 1 or self.rate_frac <= 0:
            raise ValueError("expected samples, batch and encode_every ≥ 1, rate_frac > 0")
        check_damping(self.damping_frac)


@dataclass(frozen=True)
class TrellisSplit:
    """Widths of the columns of a matrix: `count` have `high_bits`, all others `low_bits`."""

    low_bits: int
    high_bits: int
    count: int

    def nbytes(self, rows: int, columns: int) -> int:
        """Return the bytes of a matrix, as `Packed.nbytes` counts them."""
        return trellis_bytes(rows, {self.low_bits: columns - self.count, self.high_bits: self.count})

    def parts(self, order_I: Tensor) -> tuple[tuple[int, ...], Tensor]:
        """Return the bits of every part, and the part of every column; `order_I` has the columns to favor first."""
        part_I = torch.zeros_like(order_I)
        if self.count in (0, len(order_I)):
            return (self.high_bits if self.count else self.low_bits,), part_I
        part_I[order_I[: self.count]] = 1
        return (self.low_bits, self.high_bits), part_I


def needs(config: Config) -> Needs:
    """Ask for Gram matrices of the inputs, and windows to learn from."""
    return Needs(gram=True) | code_learning_needs(config)


def stored_bytes(name: str, rows: int, columns: int, target: Target, config: Config) -> int:
    """Return the bytes of rings, levels, scales and the mask of columns."""
    return split_widths(rows, columns, target, f"{name}: ").nbytes(rows, columns)


def min_bits(rows: int, columns: int, config: Config) -> float:
    """Return the bits per weight of a matrix with one bit for all columns."""
    return 8 * TrellisSplit(*WIDTHS[0], 0).nbytes(rows, columns) / (rows * columns)


def split_widths(rows: int, columns: int, target: Target, name: str = "") -> TrellisSplit:
    """Return the split with the most bits within the target, everything counted.

    Raises TargetError, which begins with `name`, if one bit for all columns does not fit.
    """
    assert isinstance(target, Bits)
    budget_bytes = target.bytes_in(rows, columns)
    counts = [*range(0, columns, 8), columns]
    splits = [TrellisSplit(*widths, count) for widths in WIDTHS for count in counts]
    fitting = [split for split in splits if split.nbytes(rows, columns) <= budget_bytes]
    if not fitting:
        needed = 8 * splits[0].nbytes(rows, columns) / (rows * columns)
        raise TargetError(f"{name}target {target}: a {rows}×{columns} matrix needs at least {needed:.3f} bits")
    return max(fitting, key=lambda split: split.nbytes(rows, columns))


def cost(scope: Scope, config: Config) -> Work:
    """Count a factor per group, a sweep and rounds per matrix with their searches, and learning."""
    passes = config.rounds + 2
    learned = code_learning_cost(scope, config)
    steps = config.learn_rounds * -(-config.samples // config.batch)
    searches = passes + -(-steps // config.encode_every)
    largest = max((rows * columns for rows, columns in scope.matrices), default=0)
    searching = Work(
        sweep_flops=SEARCH_OPERATIONS * searches * scope.weights,
        started=12 * passes * sum(columns for _, columns in scope.matrices),
        held_bytes=16 * largest * FLOAT_BYTES,
    )
    return gram_factors(scope) + sweeps(scope) * passes + products(scope, 3) * config.rounds + searching + learned


def compress(
    block: Block,
    calib: CalibrationData,
    targets: Mapping[str, Target],
    config: Config,
    generator: torch.Generator,
) -> dict[str, Packed]:
    """Round matrix by matrix, then learn the block as a whole."""
    latents: dict[str, TrellisLatent] = {}
    for names in block.anatomy.sharing(targets):
        problem = _Problem.of(calib.statistics[names[0]], config)
        for name in names:
            weight_OI = block.weight(name).float()
            rows, columns = weight_OI.shape
            split = split_widths(rows, columns, targets[name], f"block {block.index} {name}: ")
            latents[name] = _rounded(weight_OI, problem, split, config)
    codes = {name: latent.codes for name, latent in latents.items()}
    note, detail = "", {}
    if config.learn_rounds and any(calib.statistics[name].tokens for name in targets):
        task = Reconstruction(
            block, calib, config.target, generator, config.reconstruct, ahead=config.ahead, kl=config.kl
        )
        codes, best = learn_trellis(task, latents, config, generator)
        note, detail = "" if best.improved else KEPT_START, best.detail
    packed = {}
    for name, own in codes.items():
        unreached = "" if calib.statistics[name].tokens else ROUNDED_UNREACHED
        packed[name] = Packed.of_trellis(own.columns_coded(), join_notes(note, unreached), dict(detail))
    return packed


@dataclass(frozen=True)
class _Problem:
    """Objective of matrices with the same input: H = XᵀX + λI, the order of the sweep, and U in it, H⁻¹ = UᵀU."""

    gram_II: Tensor
    order_I: Tensor
    upper_II: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, statistics: Statistics, config: Config) -> "_Problem | None":
        """Return the problem of a group, None if no token reached it."""
        if not statistics.tokens:
            return None
        order_I = statistics.gram_II.diagonal().argsort(descending=True, stable=True)
        upper_II, damping_frac = inverse_factor(statistics.gram_II[order_I][:, order_I], config.damping_frac)
        return cls(damped(statistics.gram_II, damping_frac), order_I, upper_II)


@dataclass
class TrellisLatent:
    """Learned tensors of one matrix: latent weights and scales. `codes` are those of the last search."""

    codes: TrellisCodes
    weight_OI: Tensor
    scale_OP: Tensor

    @classmethod
    def start(cls, codes: TrellisCodes, weight_OI: Tensor) -> "TrellisLatent":
        """Start from these latent weights and the scales of `codes`, in copies of their own."""
        weight_OI, scale_OP = (t.clone(memory_format=torch.contiguous_format) for t in (weight_OI, codes.scale_OP))
        return cls(codes, weight_OI, scale_OP)

    @property
    def step(self) -> float:
        """Return the distance between levels, which halves with every bit: the RMS of the weights at two bits."""
        shares = [len(columns_C) / self.weight_OI.shape[1] for columns_C in self.codes.columns_PC]
        mean = sum(share * 2.0 ** (2 - bits) for share, bits in zip(shares, self.codes.bits, strict=True))
        return mean * float(self.weight_OI.square().mean().sqrt())

    def current(self) -> TrellisCodes:
        """Return the present codes, with scales as they are stored."""
        return replace(self.codes, scale_OP=self.scale_OP.to(SCALE_DTYPE).float().clamp_min(SMALLEST_SCALE))

    def search(self) -> None:
        """Search the nearest path of the latent weights."""
        self.codes = nearest_path(self.current(), self.weight_OI)

    def set_gradients(self, gradient_OI: Tensor) -> None:
        """Set the gradients of latent weights and scales from that of the matrix."""
        # The fused optimizer of a GPU takes gradients in the layout of their parameters alone.
        self.weight_OI.grad = gradient_OI.float().contiguous()
        self.scale_OP.grad = self.codes.by_part(self.weight_OI.grad * self.codes.levels_OI)


@torch.no_grad()
def _rounded(weight_OI: Tensor, problem: _Problem | None, split: TrellisSplit, config: Config) -> TrellisLatent:
    """Round one matrix. Its latent weights are what each column should be, given all others: that is its own path."""
    columns_I = torch.arange(weight_OI.shape[1], device=weight_OI.device)
    codes = start_codes(weight_OI, *split.parts(columns_I if problem is None else problem.order_I))
    if problem is None:
        codes = nearest_path(codes.storable(), weight_OI)
        return TrellisLatent.start(codes, weight_OI)
    codes = round_in_order(codes, weight_OI, problem.upper_II, problem.order_I)
    codes = descend(improve(codes, weight_OI, problem.gram_II, config.rounds), weight_OI, problem.gram_II)
    values_OI = codes.values_OI
    latent_OI = values_OI + ((weight_OI - values_OI) @ problem.gram_II) / problem.gram_II.diagonal()
    return TrellisLatent.start(codes, latent_OI)


def learn_trellis(
    task: Reconstruction, latents: Mapping[str, TrellisLatent], config: Config, generator: torch.Generator
) -> tuple[dict[str, TrellisCodes], BestState]:
    """Learn, and return the codes with the lowest held-out error; those before it, if learning never lowered it."""
    groups: list[dict[str, Any]] = []
    for latent in latents.values():
        scale = float(latent.scale_OP.square().mean().sqrt())
        groups.append({"params": [latent.weight_OI], "size": latent.step})
        groups.append({"params": [latent.scale_OP], "size": scale * SCALE_RATE})
    schedule = Schedule.of(config, config.learn_rounds)
    optimizer = schedule.make_optimizer(groups)

    def matrices() -> dict[str, Tensor]:
        return {name: latent.current().values_OI.to(task.block.weight(name).dtype) for name, latent in latents.items()}

    kept = {name: latent.current() for name, latent in latents.items()}
    best = BestState([latent.scale_OP for latent in latents.values()], task.error(matrices()))
    for step, batch in enumerate(training_batches(task, schedule, generator)):
        gradients = task.gradients(matrices(), batch.windows)
        for name, latent in latents.items():
            latent.set_gradients(gradients.pop(name))
        take_step(optimizer, batch.rate)
        if (step + 1) % config.encode_every == 0 or batch.measure:
            for latent in latents.values():
                latent.search()
        if batch.measure and (error := task.error(matrices())) < best.error:
            best.offer(error)
            kept = {name: latent.current() for name, latent in latents.items()}
    return kept, best


METHOD = WalkMethod(
    doc=__doc__,
    paper="Tseng et al. 2024, QTIP (its trellis)",
    accepts=(Bits,),
    config=Config,
    needs=needs,
    compress=compress,
    cost=cost,
    stored_bytes=stored_bytes,
    min_bits=min_bits,
)
