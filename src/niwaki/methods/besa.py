"""BESA: learn how much of each row to remove so that the block's output survives.

Source: Xu et al., "BESA: Pruning Large Language Models with Blockwise Parameter-Efficient Sparsity Allocation"
(ICLR 2024). Weights are ranked once inside each output row by Wanda's score. Every row (or matrix) learns logits θ over
candidate rates p_d; β = softmax(θ), and the rate is α = Σ_d β_d·p_d. The forward prunes the ⌊α·C⌋ lowest-ranked of C
weights exactly. The backward passes straight through to the soft keep value 1 − Σ_d β_d·[rank < ⌊C·p_d⌋]. Hence
∂L/∂β_d = −Σ_{rank < ⌊C·p_d⌋} ∂L/∂mask. Weights do not change.

The full text was not at hand. Differences from the released code, and their reasons:

- Its softmax∘sigmoid confines α to [0.38, 0.62]. Here θ starts as a Gaussian around the target (`width_frac`) and
  reaches any rate between 0 and 1.
- Its sparsity is penalized, not met. Here the final counts are exact: all rates shift together, then the largest
  remainders decide the rounding. `balance=shift` replaces the penalty: it shifts the rates in every forward, and takes
  the component along the mean rate out of the gradient.
- ∂L/∂β is summed in rank order (`kernels.select`), on a GPU without leaving the row. Unlike a scatter-add, this sum is
  the same in every run.
- The loss is the error of a token relative to its energy. There it is the error of a channel over the L2 norm of the
  channel in the batch (`normalize=released`). Few tokens have outliers in few channels: neither sees only these.
- The optimizer is AdamW with a cosine schedule. There it is Prodigy, whose `d_coef` was set by hand for each model.
- A step takes two windows. There it takes one, 128 steps as well (`batch=1`).
- An eighth of the windows is held out, and chooses between the states on the way, the uniform start included. There all
  windows are learned from, and the last state is the result.

`lora_rank` learns an update W + BA of low rank together with the rates, the idea of its `--lora-rank`. That part of the
code was not at hand. In the end the update is added, and the mask applied. `score` ranks by another score: the released
code has |W| and W²/[H⁻¹]_jj too.

`quant_bits` learns the clipping of quantized weights together with the rates (γ of `Clipping`). The result is stored
dequantized. N:M is not in the paper and is refused: there every row keeps the same share.

Cost: `steps` · `batch` forwards and backwards of a window. Memory: the block twice in float32, ranks and order, and the
block's inputs and outputs for all windows. Ranks and order take 10 bytes per weight, on a GPU 4 in rows of up to 16384.
`lora_rank` adds the block twice in float32, and three products of its rank per step.

    niwaki compress MODEL OUT --method besa --target 0.5 --calibration mine.txt --seq-len 512
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import torch
from torch import Tensor

from niwaki.config.targets import Sparsity, Target
from niwaki.data.statistics import UNREACHED, Needs, Statistics
from niwaki.data.stream import CalibrationData
from niwaki.formats.packed import Packed, join_notes
from niwaki.kernels.select import drop_lowest, fused, sums_below
from niwaki.methods.cost import FLOAT_BYTES, Scope, Work, gram_factors, learning
from niwaki.methods.mask_scores import record_choice
from niwaki.methods.method import WalkMethod
from niwaki.methods.shared.best_state import BestState, cosine
from niwaki.methods.shared.block_training import Matrices, Reconstruction
from niwaki.methods.shared.column_sweep import inverse
from niwaki.methods.shared.learning_options import (
    LearningTarget,
    Reconstruct,
    attention_cost,
    check_learning_options,
    learning_needs,
)
from niwaki.methods.shared.masks import wanda_scores
from niwaki.model.decoder import Block

MAX_CHECKS = 4  # held-out measurements over the course of learning
DAMPING_FRAC = 0.01  # of the mean diagonal of XᵀX, for its inverse
FIRST_GAMMA = 4.0  # σ(4) = 0.98: nearly no clipping at first
SCORES = ("wanda", "surgeon", "magnitude")
KEPT_START = "learning did not lower the held-out block error: uniform rates were kept"


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of BESA."""

    granularity: Annotated[str, "Unit that learns a rate of its own: row or layer."] = "row"
    steps: Annotated[int, "Steps of AdamW."] = 128
    batch: Annotated[int, "Windows per step."] = 2
    rate: Annotated[float, "Learning rate of θ."] = 0.2
    candidates: Annotated[int, "D: the candidate rates are 0, 1/D, …, 1."] = 100
    width_frac: Annotated[float, "Standard deviation of the first distribution over the rates."] = 0.2
    target: LearningTarget = "block"
    reconstruct: Reconstruct = "block"
    normalize: Annotated[
        str,
        "Divisor of the squared error: energy of the token (token) or of the channel (channel), or the norm of the "
        "channel (released).",
    ] = "token"
    score: Annotated[str, "Score that ranks the weights of a row: wanda, surgeon (W²/[H⁻¹]_jj) or magnitude."] = "wanda"
    lora_rank: Annotated[int, "Rank of an update of the weights, learned with the rates; 0 keeps the weights."] = 0
    lora_rate: Annotated[float, "Length of a step of the update as a share of the RMS of a matrix."] = 0.01
    balance: Annotated[str, "How the rates meet the target: the published penalty, or a common shift of all rates."] = (
        "penalty"
    )
    segments: Annotated[
        int, "Parts of a row with a rate of their own (1 in the paper); a row that they do not divide stays whole."
    ] = 1
    quant_bits: Annotated[int, "Bits of the weights, learned with the rates: 2, 3, 4, 8, or 0 for none."] = 0
    quant_group: Annotated[int, "Columns that share a scale; 0 for the whole row."] = 0

    def __post_init__(self) -> None:
        check_learning_options(self.target, reconstruct=self.reconstruct, normalize=self.normalize)
        if self.granularity not in ("row", "layer"):
            raise ValueError(f"granularity must be row or layer, got {self.granularity!r}")
        if self.balance not in ("shift", "penalty"):
            raise ValueError(f"balance must be shift or penalty, got {self.balance!r}")
        if self.steps < 1 or self.batch < 1 or self.candidates < 2 or self.rate <= 0 or self.width_frac <= 0:
            raise ValueError("expected steps and batch ≥ 1, candidates ≥ 2, rate and width_frac > 0")
        if self.score not in SCORES:
            raise ValueError(f"score must be one of {', '.join(SCORES)}, got {self.score!r}")
        if self.lora_rank < 0 or self.lora_rate <= 0:
            raise ValueError("expected lora_rank ≥ 0 and lora_rate > 0")
        if self.lora_rank and self.quant_bits:
            raise ValueError("lora_rank and quant_bits both change the weights: give one of them")
        if self.segments < 1:
            raise ValueError(f"segments must be positive, got {self.segments}")
        if self.quant_bits not in (0, 2, 3, 4, 8) or self.quant_group < 0:
            raise ValueError("expected quant_bits 0, 2, 3, 4 or 8 and quant_group ≥ 0")


def needs(config: Config) -> Needs:
    """Ask for norms for the ranking, and windows to learn from."""
    return learning_needs(config.batch, config.target) | Needs(gram=config.score == "surgeon")


def cost(scope: Scope, config: Config) -> Work:
    """Count one sort, and in every step a ranking of the gradients and a product with each candidate's mask."""
    rates = Work(
        selected=4 * scope.weights,
        product_flops=2 * config.steps * scope.weights * (config.candidates + 1),
        passed=12 * config.steps * scope.weights,
    )
    apart = attention_cost(scope, config.steps * config.batch, config.reconstruct)
    if config.score == "surgeon":
        apart = apart + gram_factors(scope)
    if config.lora_rank:
        apart = apart + Work(
            product_flops=6 * config.steps * config.lora_rank * scope.weights,
            passed=4 * config.steps * scope.weights,
            held_bytes=2 * FLOAT_BYTES * scope.weights,
        )
    return rates + apart + learning(scope, config.steps, config.batch, checks=MAX_CHECKS, copies=2.5)


def compress(
    block: Block,
    calib: CalibrationData,
    targets: Mapping[str, Target],
    config: Config,
    generator: torch.Generator,
) -> dict[str, Packed]:
    """Rank every matrix, learn the rates of the block, and prune to exact counts."""
    weights = {name: block.weight(name) for name in targets}
    zeros = sum(target.zeros_in(*weights[name].shape) for name, target in targets.items())
    scores = partial(_scores, weights, calib.statistics, config.score)
    rates = Rates(weights, scores, zeros, config)
    change: Clipping | LowRank | None = None
    if config.quant_bits or config.lora_rank:
        weights = {name: weight_OI.float() for name, weight_OI in weights.items()}
    if config.quant_bits:
        change = Clipping(weights, config.quant_bits, config.quant_group)
    elif config.lora_rank:
        change = LowRank(weights, config.lora_rank, config.lora_rate, generator)
    detail: dict[str, float] = {}
    learned = ""
    if any(calib.statistics[name].tokens for name in targets):
        task = Reconstruction(block, calib, config.target, generator, config.reconstruct, config.normalize)
        best = _learn(task, weights, rates, change, config, generator)
        detail = best.detail
        learned = "" if best.improved else KEPT_START
    with torch.no_grad():
        counts = rates.exact_counts()
        values = change.applied(weights) if change else weights
    packed = {}
    for name, weight_OI in values.items():
        unreached = "" if calib.statistics[name].tokens else UNREACHED
        keep_OI = rates.keep(name, counts[name])
        scores_OI = scores(name)
        record_choice(targets[name], scores_OI, keep_OI, torch.where(keep_OI, -torch.inf, scores_OI).amax(1))
        packed[name] = Packed.masked(
            weight_OI.float(),
            keep_OI,
            join_notes(learned, unreached),
            {**detail, "row_zeros": counts[name].view(len(weight_OI), -1).sum(1).tolist()},
        )
    return packed


def _learn(
    task: Reconstruction,
    weights: Matrices,
    rates: "Rates",
    change: "Clipping | LowRank | None",
    config: Config,
    generator: torch.Generator,
) -> BestState:
    """Train θ (and what changes the weights) with AdamW, and leave both at the lowest held-out error of all checks."""
    learned = [rates.logits_GD, *(change.parameters if change else [])]
    groups: list[dict[str, Any]] = [{"params": [rates.logits_GD], "size": config.rate}]
    groups += change.groups(config.rate) if change else []
    optimizer = torch.optim.AdamW(groups, lr=config.rate, betas=(0.9, 0.95), weight_decay=0.0)

    def heldout() -> float:
        with torch.no_grad():
            counts = rates.exact_counts()
            values = change.applied(weights) if change else weights
            return task.error({name: values[name] * rates.keep(name, counts[name]) for name in weights})

    best = BestState(learned, heldout())
    batch = min(config.batch, len(task.train))
    drawn = task.draw(config.steps * batch, generator)
    check_every = math.ceil(config.steps / MAX_CHECKS)
    for step in range(config.steps):
        windows = drawn[step * batch : (step + 1) * batch]
        for group in optimizer.param_groups:
            group["lr"] = group["size"] * cosine(step, config.steps)
        optimizer.zero_grad()
        values = change.applied(weights) if change else weights
        with torch.no_grad():
            zeros = rates.current_zeros()
            pruned = {name: rates.pruned(name, values[name], zeros[name]) for name in weights}
        gradients = task.gradients(pruned, windows)
        tokens = batch * task.outputs.store_STD.shape[1]
        if change is not None:
            kept = {name: (g * rates.keep(name, zeros[name])).float() for name, g in gradients.items()}
            change.backward(values, kept)
        rates.backward(gradients, {name: value_OI.detach() for name, value_OI in values.items()}, tokens)
        optimizer.step()
        if (step + 1) % check_every == 0 or step + 1 == config.steps:
            best.offer(heldout())
    best.restore()
    return best


class Rates:
    """Learnable sparsity of every row of a block: logits θ, masks by rank, and the straight-through gradient.

    The θ of all matrices are one tensor, because the number of started operations bounds a step on small blocks. With
    segments, a "row" of O and its C columns is one segment of a row of the matrix.

    Legend: O rows, I (or C) columns, D + 1 candidates p_d = d / D, G learned rates of all matrices (one per row, or one
    per matrix).
    """

    def __init__(self, weights: Matrices, scores: Callable[[str], Tensor], zeros: int, config: Config) -> None:
        self.matrix_shapes = {name: (weight_OI.shape[0], weight_OI.shape[1]) for name, weight_OI in weights.items()}
        self.shapes = {
            name: (rows * config.segments, columns // config.segments)
            if columns % config.segments == 0
            else (rows, columns)
            for name, (rows, columns) in self.matrix_shapes.items()
        }
        self.zeros = zeros
        self.by_row = config.granularity == "row"
        self.penalized = config.balance == "penalty"
        self.groups = [rows if self.by_row else 1 for rows, _ in self.shapes.values()]
        device = next(iter(weights.values())).device
        self.order: dict[str, Tensor] = {}
        self.rank: dict[str, Tensor] = {}
        for name in weights:
            scores_OI = scores(name).reshape(self.shapes[name])
            columns = scores_OI.shape[1]
            order_OI = scores_OI.argsort(dim=1, stable=True)
            small = torch.int16 if columns < 2**15 else torch.int32
            rank_OI = torch.empty_like(order_OI, dtype=small)
            positions_1I = torch.arange(columns, device=device, dtype=small)[None]
            self.rank[name] = rank_OI.scatter_(1, order_OI, positions_1I.expand_as(rank_OI))
            self.order[name] = order_OI.to(small) if fused(scores_OI) else order_OI  # torch gathers by int64 only

        def by_group(values: list[float]) -> Tensor:
            return torch.tensor(values, device=device).repeat_interleave(torch.tensor(self.groups, device=device))

        total = sum(rows * columns for rows, columns in self.shapes.values())
        self.share = zeros / total
        self.columns_G = by_group([float(columns) for _, columns in self.shapes.values()])
        sizes = zip(self.shapes.values(), self.groups, strict=True)
        self.weight_G = by_group([rows * columns / groups / total for (rows, columns), groups in sizes])
        self.candidates_D = torch.linspace(0, 1, config.candidates + 1, device=device)
        first_D = -(self.candidates_D - self.share).square() / (2 * config.width_frac**2)
        self.logits_GD = first_D.repeat(sum(self.groups), 1).requires_grad_(True)

    def rates(self) -> tuple[Tensor, Tensor]:
        """Return α [G] and its mean over all weights, differentiable in θ."""
        rate_G = torch.softmax(self.logits_GD, dim=1) @ self.candidates_D
        return rate_G, rate_G @ self.weight_G

    def keep(self, name: str, zeros_O: Tensor) -> Tensor:
        """Return the keep mask, shaped as the matrix, without the `zeros_O` lowest-ranked weights of each row."""
        return (self.rank[name] >= zeros_O[:, None]).view(self.matrix_shapes[name])

    def pruned(self, name: str, weight_OI: Tensor, zeros_O: Tensor) -> Tensor:
        """Return the matrix without the `zeros_O` lowest-ranked weights of each row."""
        return drop_lowest(weight_OI.reshape(self.shapes[name]), self.rank[name], zeros_O).view(weight_OI.shape)

    def current_zeros(self) -> dict[str, Tensor]:
        """Return the zeros of every row [O] in this step: ⌊α·C⌋, with α shifted to the budget unless penalized."""
        rate_G, mean = self.rates()
        shift = 0.0 if self.penalized else self.share - mean
        zeros_G = ((rate_G + shift).clamp(0, 1) * self.columns_G + 1e-4).floor()
        split = dict(zip(self.shapes, zeros_G.split(self.groups), strict=True))
        return {name: zeros_G.expand(self.shapes[name][0]) for name, zeros_G in split.items()}

    def backward(self, gradients: Matrices, values: Matrices, tokens: int) -> None:
        """Accumulate ∂L/∂θ from ∂L/∂W [O, I] of every matrix and the weights that the masks multiply.

        ∂L/∂mask is the product of the two. L is the sum over `tokens`.
        """
        by_matrix = []
        for name, shape in self.shapes.items():
            cuts_D = (self.candidates_D * shape[1] + 1e-4).floor()
            factors = gradients[name].reshape(shape), values[name].reshape(shape)
            gradient_OD = sums_below(*factors, self.order[name], cuts_D).neg_()
            by_matrix.append(gradient_OD if self.by_row else gradient_OD.sum(0, keepdim=True))
        beta_GD = torch.softmax(self.logits_GD, dim=1)
        (beta_GD * torch.cat(by_matrix).div_(tokens)).sum().backward()
        if self.penalized:
            _, mean = self.rates()
            (5 * ((mean - self.share) / max(self.share, 0.01)).square()).backward()
            return
        (direction_GD,) = torch.autograd.grad(self.rates()[1], self.logits_GD)
        gradient_GD = self.logits_GD.grad
        assert gradient_GD is not None
        along = (gradient_GD * direction_GD).sum() / direction_GD.square().sum()
        gradient_GD.sub_(along * direction_GD)

    def exact_counts(self) -> dict[str, Tensor]:
        """Return zeros of every row [O] int64 that follow the rates and add up to the budget exactly.

        A common shift of all rates meets the budget up to rounding. The rows with the largest remainders take the rest.
        """
        rows = [rows for rows, _ in self.shapes.values()]
        rate = self.rates()[0].detach().split(self.groups)
        wanted = torch.cat([rate_G.expand(count) for rate_G, count in zip(rate, rows, strict=True)]).double().cpu()
        columns = torch.cat([torch.full((count,), float(width)) for count, width in self.shapes.values()]).double()
        low, high = -1.0, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            if float(((wanted + middle).clamp(0, 1) * columns).sum()) < self.zeros:
                low = middle
            else:
                high = middle
        real = (wanted + high).clamp(0, 1) * columns
        counts = real.floor()
        left = self.zeros - int(counts.sum())
        counts[(real - counts).argsort(descending=True, stable=True)[:left]] += 1
        split = counts.long().to(self.candidates_D.device).split(rows)
        return dict(zip(self.shapes, split, strict=True))


class Clipping:
    """Learnable clipping γ of quantized weights (OmniQuant, Shao et al. 2024, equation 2), for every matrix.

    Each group of columns of a row is rounded to 2^b levels between σ(γ₀)·min and σ(γ₁)·max. Gradients pass straight
    through the rounding. `group` columns share a scale (0, or a width that does not divide: the whole row).

    Legend: O rows, I columns, G groups, M columns of a group.
    """

    def __init__(self, weights: Mapping[str, Tensor], bits: int, group: int) -> None:
        self.levels = 2**bits - 1
        self.gamma: dict[str, Tensor] = {}
        self.width: dict[str, int] = {}
        for name, weight_OI in weights.items():
            rows, columns = weight_OI.shape
            self.width[name] = group if group and columns % group == 0 else columns
            shape = (2, rows, columns // self.width[name], 1)
            self.gamma[name] = weight_OI.new_full(shape, FIRST_GAMMA).requires_grad_(True)

    @property
    def parameters(self) -> list[Tensor]:
        """Return the tensors that are learned."""
        return list(self.gamma.values())

    def groups(self, rate: float) -> list[dict[str, Any]]:
        """Return the parameter groups of the optimizer; θ learns at `rate`."""
        return [{"params": self.parameters, "size": rate}]

    def applied(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the matrices [O, I] rounded to their levels, differentiable in γ."""
        return {name: self._quantize(weights[name], self.gamma[name], self.width[name]) for name in weights}

    def backward(self, values: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> None:
        """Accumulate ∂L/∂γ from ∂L/∂(quantized matrix) [O, I]."""
        torch.autograd.backward([values[name] for name in gradients], list(gradients.values()))

    def _quantize(self, weight_OI: Tensor, gamma: Tensor, width: int) -> Tensor:
        weight_OGM = weight_OI.view(len(weight_OI), -1, width)
        low_OG1 = weight_OGM.amin(-1, keepdim=True).clamp_max(0) * gamma[0].sigmoid()
        high_OG1 = weight_OGM.amax(-1, keepdim=True).clamp_min(0) * gamma[1].sigmoid()
        step_OG1 = ((high_OG1 - low_OG1) / self.levels).clamp_min(1e-12)
        zero_OG1 = _round(-low_OG1 / step_OG1)
        code_OGM = (_round(weight_OGM / step_OG1) + zero_OG1).clamp(0, self.levels)
        rounded_OGM: Tensor = (code_OGM - zero_OG1) * step_OG1
        return rounded_OGM.view_as(weight_OI)


class LowRank:
    """Learnable update W + BA of every matrix, with B [O, R] zero and A [R, I] normal at first.

    A step of the optimizer moves the entries of BA by about `rate_frac` of the RMS of W.
    """

    def __init__(self, weights: Mapping[str, Tensor], rank: int, rate_frac: float, generator: torch.Generator) -> None:
        self.down: dict[str, Tensor] = {}
        self.up: dict[str, Tensor] = {}
        self.rates: dict[str, tuple[float, float]] = {}
        for name, weight_OI in weights.items():
            rows, columns = weight_OI.shape
            own = min(rank, rows, columns)
            start_RI = torch.randn(own, columns, generator=generator).to(weight_OI.device)
            self.down[name] = start_RI.requires_grad_(True)
            self.up[name] = weight_OI.new_zeros(rows, own).requires_grad_(True)
            size = float(weight_OI.square().mean().sqrt()) or 1.0
            self.rates[name] = rate_frac, rate_frac * size / own**0.5

    @property
    def parameters(self) -> list[Tensor]:
        """Return the tensors that are learned."""
        return [*self.down.values(), *self.up.values()]

    def groups(self, rate: float) -> list[dict[str, Any]]:
        """Return the parameter groups of the optimizer, two per matrix, at rates of their own."""
        return [
            {"params": [factor], "size": size}
            for name, sizes in self.rates.items()
            for factor, size in zip((self.down[name], self.up[name]), sizes, strict=True)
        ]

    def applied(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the matrices [O, I] with their updates, differentiable in both factors."""
        return {name: torch.addmm(weights[name], self.up[name], self.down[name]) for name in weights}

    def backward(self, values: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> None:
        """Accumulate the gradients of both factors from ∂L/∂(matrix) [O, I]."""
        torch.autograd.backward([values[name] for name in gradients], list(gradients.values()))


def _scores(weights: Matrices, statistics: Mapping[str, Statistics], score: str, name: str) -> Tensor:
    """Return the score [O, I] that ranks the weights of a row; magnitudes for a matrix that no token reached."""
    weight_OI, own = weights[name], statistics[name]
    if score == "magnitude":
        return weight_OI.float().abs()
    if score == "surgeon" and own.tokens:
        inverse_II, _ = inverse(own.gram_II, DAMPING_FRAC)
        return weight_OI.float().square() / inverse_II.diagonal()
    return wanda_scores(weight_OI, own)


def _round(x: Tensor) -> Tensor:
    """Round to the nearest integer; the gradient is that of the identity."""
    return x + (x.round() - x).detach()


METHOD = WalkMethod(
    doc=__doc__,
    paper="Xu et al. 2024, BESA: Blockwise Parameter-Efficient Sparsity Allocation",
    accepts=(Sparsity,),
    config=Config,
    needs=needs,
    compress=compress,
    cost=cost,
)
