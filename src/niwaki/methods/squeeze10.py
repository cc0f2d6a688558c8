"""Squeeze10-LLM: most columns at one bit, the ones that must not be at four, staged through four bits.

Source: "Squeeze10-LLM: Squeezing LLMs' Weights by 10 Times via a Staged Mixed-Precision Quantization Method"
(arXiv 2507.18073). Only its abstract and introduction could be read: a reconstruction, every choice an option.

1. Stage 1 rounds everything to 4 bits (`staged`): the buffer before the loss of going to one bit at once.
2. Post-binarization activation robustness (PBAR) says what would suffer from one bit. Its formula is not verified;
   candidates for a column j, with W₄ from stage 1 and B its one-bit form (`choose`): `robustness` Σ(W₄ − B)²·H_jj,
   `surgeon` Σ(W₄ − B)²/[H⁻¹]_jj; and to compare `activation` H_jj, `magnitude` ΣW², `random`.
3. One error-compensated sweep rounds the columns at their widths, the salient ones first or last (`salient_first`).
4. Full-information activations (FIAS): the walk hands every block the inputs of the quantized prefix, so that each
   block makes up for the ones before it as far as its own columns can.

Beyond the paper: `rounds` of refitted scales and coordinate descent on all codes, and `learn_rounds` of block-wise
learning of codes and scales (`_learned_rounding`). Whole columns are chosen, so that
the choice costs one bit a column; a mask of elements would cost one bit a weight. The target counts everything that
is stored (codes, scales, offsets, the mask of columns) and decides how many columns stay at four bits.

Cost: two forwards, one Gram matrix and factor per group of matrices, two sweeps and `rounds` + 1 passes a matrix.
With learning also `learn_rounds` · `samples` forwards and backwards of a window.

    niwaki compress MODEL OUT --method squeeze10 --target 1.75bit --calibration mine.txt --seq-len 512
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from niwaki.block import Block
from niwaki.codes import TILE
from niwaki.config import Bits, Target
from niwaki.errors import TargetError
from niwaki.methods._learned_rounding import Latent, learn
from niwaki.methods._reconstruct import Reconstruction, Schedule, check_choices, learning_needs
from niwaki.methods._rounding import (
    ROUNDED_UNREACHED,
    Group,
    damped,
    fit_grid,
    groups_of,
    improve,
    nearest,
    sweep,
)
from niwaki.methods._solver import inverse_factor
from niwaki.packed import Packed, join_notes
from niwaki.statistics import Needs, Statistics
from niwaki.stream import Evidence

PAPER = "Squeeze10-LLM (arXiv 2507.18073), a reconstruction"
ACCEPTS = (Bits,)
CONTINUES = False
KEPT_START = "learning did not lower the held-out block error: the codes found before it were kept"
CHOICES = ("robustness", "surgeon", "activation", "magnitude", "random")
SALIENT_BITS = 4


@dataclass(frozen=True, kw_only=True)
class Config:
    """`choose`, `staged`, `salient_first`, `rounds`: above. `group`, `salient_group`: columns that share a scale, 0
    for all of their width. `mean`: one-bit levels around a stored mean instead of zero. `damping_frac`: λ as a share
    of the Gram's mean diagonal. Learning draws `learn_rounds` times `samples` windows, `batch` at a time, steps of
    `rate_frac` · RMS(W), towards `target` (see `_reconstruct`).
    """

    choose: str = "robustness"
    staged: bool = True
    salient_first: bool = True
    group: int = 0
    salient_group: int = 0
    mean: bool = True
    rounds: int = 8
    damping_frac: float = 0.01
    learn_rounds: int = 0
    samples: int = 32
    batch: int = 2
    rate_frac: float = 0.01
    target: str = "both"

    def __post_init__(self) -> None:
        check_choices(self.target)
        if self.choose not in CHOICES:
            raise ValueError(f"choose must be one of {', '.join(CHOICES)}, got {self.choose!r}")
        if min(self.group, self.salient_group, self.rounds, self.learn_rounds) < 0:
            raise ValueError("expected group, salient_group, rounds and learn_rounds ≥ 0")
        if self.samples < 1 or self.batch < 1 or self.rate_frac <= 0:
            raise ValueError("expected samples and batch ≥ 1, rate_frac > 0")
        if not 0 < self.damping_frac <= 1:
            raise ValueError(f"damping_frac must lie in (0, 1], got {self.damping_frac}")


def needs(config: Config) -> Needs:
    """Gram matrices of the inputs; windows and outputs to learn from."""
    return Needs(gram=True) | (learning_needs(config.batch, config.target) if config.learn_rounds else Needs())


def compress(
    block: Block,
    seen: Evidence,
    targets: Mapping[str, Target],
    config: Config,
    generator: torch.Generator,
) -> dict[str, Packed]:
    """Chooses, sweeps and improves matrix by matrix, then learns the block as a whole."""
    found: dict[str, Latent] = {}
    detail: dict[str, dict[str, float]] = {}
    for name, target in targets.items():
        weight_OI = block.weight(name).float()
        count = salient_columns(weight_OI.shape[0], weight_OI.shape[1], target, config)
        found[name] = _squeeze(weight_OI, seen.statistics[name], count, config, generator)
        detail[name] = {"salient_columns": count}
    rounded = {name: latent.rounded for name, latent in found.items()}
    note = ""
    if config.learn_rounds and any(seen.statistics[name].tokens for name in targets):
        schedule = Schedule(
            rounds=config.learn_rounds,
            samples=config.samples,
            batch=config.batch,
            rate_frac=config.rate_frac,
            optimizer="adam",
        )
        task = Reconstruction(block, seen, config.target, generator)
        rounded, errors = learn(task, found, schedule, generator)
        note = "" if errors.improved else KEPT_START
        for name in targets:
            detail[name] |= {"heldout_error_start": errors.began, "heldout_error": errors.error}
    packed = {}
    for name, codes in rounded.items():
        unreached = "" if seen.statistics[name].tokens else ROUNDED_UNREACHED
        packed[name] = Packed.codes(codes.parts(found[name].order_I), join_notes(note, unreached), detail[name])
    return packed


@torch.no_grad()
def _squeeze(
    weight_OI: Tensor, statistics: Statistics, count: int, config: Config, generator: torch.Generator
) -> Latent:
    """The codes of one matrix."""
    columns = weight_OI.shape[1]
    if not statistics.tokens:
        order_I = torch.arange(columns, device=weight_OI.device)
        rounded = nearest(weight_OI, _layout(columns, count, config), clip=True).storable()
        return Latent.start(rounded, weight_OI, order_I)
    gram_II = damped(statistics.gram_II, config.damping_frac)
    start_OI = weight_OI
    if config.staged or config.choose in ("robustness", "surgeon"):
        whole = groups_of(0, columns, SALIENT_BITS, "midrise", config.salient_group)
        upper_II, _ = inverse_factor(statistics.gram_II, config.damping_frac)
        start_OI = sweep(weight_OI, upper_II, whole, clip=True).values_OI
    best_I = _scores(start_OI, gram_II, config, generator).argsort(descending=True, stable=True)
    parts = [best_I[:count].sort().values, best_I[count:].sort().values]
    order_I = torch.cat(parts if config.salient_first else parts[::-1])
    upper_II, _ = inverse_factor(statistics.gram_II[order_I][:, order_I], config.damping_frac)
    swept_OI = start_OI if config.staged else weight_OI
    rounded = sweep(swept_OI[:, order_I].contiguous(), upper_II, _layout(columns, count, config), clip=True)
    ordered_OI, ordered_II = weight_OI[:, order_I].contiguous(), gram_II[order_I][:, order_I].contiguous()
    return Latent.start(improve(rounded, ordered_OI, ordered_II, config.rounds), ordered_OI, order_I)


def _layout(columns: int, count: int, config: Config) -> list[Group]:
    """The groups of the salient columns and of the one-bit columns, in the order of the sweep."""
    grid = "free" if config.mean else "midrise"
    if config.salient_first:
        salient = groups_of(0, count, SALIENT_BITS, "midrise", config.salient_group)
        return salient + groups_of(count, columns, 1, grid, config.group)
    binary = groups_of(0, columns - count, 1, grid, config.group)
    return binary + groups_of(columns - count, columns, SALIENT_BITS, "midrise", config.salient_group)


def _scores(weight_OI: Tensor, gram_II: Tensor, config: Config, generator: torch.Generator) -> Tensor:
    """How much each column [I] would suffer from one bit."""
    if config.choose == "activation":
        return gram_II.diagonal()
    if config.choose == "magnitude":
        return weight_OI.square().sum(0)
    if config.choose == "random":
        return torch.rand(weight_OI.shape[1], generator=generator).to(weight_OI.device)
    grid = Group(0, weight_OI.shape[1], 1, "free" if config.mean else "midrise")
    scale_O1, offset_O1 = fit_grid(weight_OI, grid, clip=False)
    binary_OI = ((weight_OI - offset_O1) / scale_O1).round().clamp(0, 1) * scale_O1 + offset_O1
    lost_I = (weight_OI - binary_OI).square().sum(0)
    if config.choose == "robustness":
        return lost_I * gram_II.diagonal()
    return lost_I / torch.cholesky_inverse(torch.linalg.cholesky(gram_II)).diagonal()


def salient_columns(rows: int, columns: int, target: Target, config: Config) -> int:
    """The most columns that can stay at four bits within the target, everything counted (a multiple of 8).

    Raises TargetError if one bit for all columns is already too much.
    """
    assert isinstance(target, Bits)
    budget_bytes = target.bits * rows * columns / 8
    counts = [*range(0, columns, 8), columns]
    fitting: list[int] = [count for count in counts if _stored_bytes(rows, columns, count, config) <= budget_bytes]
    if not fitting:
        least = 8 * _stored_bytes(rows, columns, 0, config) / (rows * columns)
        raise TargetError(
            f"target {target}: a {rows}×{columns} matrix needs at least {least:.3f} bits with these groups: "
            "raise the target, or widen group"
        )
    return fitting[-1]


def _stored_bytes(rows: int, columns: int, count: int, config: Config) -> int:
    """Bytes of a matrix with `count` salient columns, as `Packed.nbytes` counts them."""
    binary = columns - count
    planes: int = -(-rows // TILE) * TILE * (SALIENT_BITS * -(-count // 8) + -(-binary // 8))
    salient_groups = -(-count // (config.salient_group or columns))
    groups = -(-binary // (config.group or columns))
    scales = 2 * rows * (salient_groups + groups * (2 if config.mean else 1))
    return planes + scales + (-(-columns // 8) if count and binary else 0)
