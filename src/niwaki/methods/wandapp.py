"""Wanda++: prune by regional gradients, then let the block repair itself.

Source: Yang et al., "Wanda++: Pruning Large Language Models via Regional Gradients" (Findings of ACL 2025).

1. The importance of a weight is α·G_ij + ‖X_j‖. G_ij is the root mean square over the calibration windows n of
   ∂‖f(X_n)‖₂/∂W_ij; f is the whole dense block. G is computed once. `gradient=mean` takes the mean of |∂‖f‖₂/∂W_ij|.
2. The mask drops the lowest scores S_ij = (α·G_ij + ‖X_j‖)·|W_ij| of each output row, or of each group for N:M.
3. Regional optimization lowers the squared error between the pruned and the dense block on the same inputs (those of
   the already pruned prefix). It takes K rounds; each draws its windows again.

The full text was not at hand. Where the sources are silent, or our ablation disagrees
(`benchmarks/results/quality/ablation-wandapp-*.json`), this is a reconstruction:

| | Paper | Here |
| --- | --- | --- |
| ‖X_j‖ | not stated; others sum over windows, which only rescales α | ‖X_j‖₂/√N for N windows, as in Wanda's code |
| α | 100, which loses to plain Wanda on the models measured | 1 |
| Mask | chosen again in each round (`enforce_mask=false`: weights may regrow) | chosen once, enforced while learning |
| Optimizer | RMSprop (`optimizer=rmsprop`) | Adam |
| Rounds K | 5 (`rounds=5`) | 10 |
| Step | 3e-7 for all matrices | `rate_frac` times the matrix's RMS, under a cosine schedule |
| Error | squared | squared, relative to each token's energy |
| Result | weights after K rounds | the round with the lowest error on held-out windows |

In a chain it starts from the masks and weights of the method before (`besa+wandapp`).

Cost: one forward and backward per window for G, rounds × samples of them to learn. Memory: the block five times
in float32, and the block's inputs and outputs for all windows.

    niwaki compress MODEL OUT --method wandapp --target 2:4 --calibration mine.txt --seq-len 512
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from niwaki.config.targets import NM, Sparsity, Target
from niwaki.data.statistics import UNREACHED, Needs
from niwaki.data.stream import CalibrationData
from niwaki.formats.packed import Packed, join_notes
from niwaki.methods.cost import Scope, Work, masks
from niwaki.methods.method import WalkMethod
from niwaki.methods.shared.block_training import (
    Matrices,
    Prune,
    Reconstruction,
    Schedule,
    assemble,
    gradients_of,
    run_with,
    train_block,
)
from niwaki.methods.shared.determinism import run_deterministically
from niwaki.methods.shared.learning_options import (
    Ahead,
    LearningTarget,
    LogitDivergence,
    Reconstruct,
    check_learning_options,
    learning_cost,
    learning_needs,
)
from niwaki.methods.shared.masks import keep_by_row
from niwaki.model.decoder import Block

GRADIENTS = ("rms", "mean")
KEPT_START = "learning did not lower the held-out block error: its start was kept"


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of Wanda++."""

    alpha: Annotated[float, "α: weight of the regional gradients; 0 is Wanda's score."] = 1.0
    gradient: Annotated[str, "G over the windows: rms, their root mean square, or mean, the mean of |gradient|."] = (
        "rms"
    )
    rounds: Annotated[int, "K: rounds of regional optimization; 0 prunes by the score alone."] = 10
    samples: Annotated[int, "Windows per round."] = 32
    batch: Annotated[int, "Windows per step."] = 2
    rate_frac: Annotated[float, "Length of a step as a share of the RMS of a matrix."] = 0.025
    optimizer: Annotated[str, "Optimizer: adam, or the published rmsprop."] = "adam"
    target: LearningTarget = "block"
    reconstruct: Reconstruct = "block"
    ahead: Ahead = 0
    kl: LogitDivergence = 0.0
    enforce_mask: Annotated[
        bool, "Keep the first mask while weights learn; false lets weights regrow and prunes again after each round."
    ] = True

    def __post_init__(self) -> None:
        check_learning_options(self.target, self.optimizer, self.reconstruct, ahead=self.ahead, kl=self.kl)
        if self.gradient not in GRADIENTS:
            raise ValueError(f"gradient must be one of {', '.join(GRADIENTS)}, got {self.gradient!r}")
        if self.alpha < 0 or self.rounds < 0 or self.samples < 1 or self.batch < 1 or not 0 < self.rate_frac < 1:
            raise ValueError("expected alpha ≥ 0, rounds ≥ 0, samples ≥ 1, batch ≥ 1 and 0 < rate_frac < 1")


def needs(config: Config) -> Needs:
    """Ask for norms for the score, and windows to learn from."""
    return learning_needs(config.batch, config.target, config.ahead, config.kl)


def cost(scope: Scope, config: Config) -> Work:
    """Count the gradients of every window once, if the score needs them, and the learning."""
    regional = Work(
        learned_tokens=scope.windows * scope.tokens,
        passed=3 * scope.windows * scope.weights,
        started=100 * scope.windows,
    )
    optimization = learning_cost(
        scope, config.rounds, config.samples, config.batch, reconstruct=config.reconstruct, ahead=config.ahead,
        kl=config.kl,
    )  # fmt: skip
    return masks(scope) + optimization + (regional if config.alpha else Work())


def compress(
    block: Block,
    calib: CalibrationData,
    targets: Mapping[str, Target],
    config: Config,
    generator: torch.Generator,
) -> dict[str, Packed]:
    """Choose the start mask by importance, then optimize the block under it."""
    weights, keep, prune = _start(block, calib, targets, config)
    notes = {name: "" if calib.statistics[name].tokens else UNREACHED for name in targets}
    detail: dict[str, float] = {}
    if config.rounds and any(record.tokens for record in calib.statistics.values()):
        task = Reconstruction(
            block, calib, config.target, generator, config.reconstruct, ahead=config.ahead, kl=config.kl
        )
        schedule = Schedule.of(config, config.rounds, config.optimizer)
        weights, best = train_block(task, weights, keep, schedule, generator, prune)
        keep = {name: weight_OI != 0 for name, weight_OI in weights.items()}
        detail = best.detail
        if not best.improved:
            notes = {name: join_notes(note, KEPT_START) for name, note in notes.items()}
    return {name: Packed.masked(weights[name], keep[name], notes[name], detail) for name in targets}


def _start(
    block: Block, calib: CalibrationData, targets: Mapping[str, Target], config: Config
) -> tuple[dict[str, Tensor], dict[str, Tensor], Prune | None]:
    """Return the start weights and their mask, and the function that chooses a mask again, if masks may change.

    In a chain, weights and mask are those of the method before.
    """
    if calib.start:
        weights = {name: record.weight_OI.float() for name, record in calib.start.items()}
        keep = {name: weight_OI != 0 for name, weight_OI in weights.items()}
        if config.enforce_mask:
            return weights, keep, None
    else:
        weights = {name: block.weight(name).float() for name in targets}
    importance = _importance(block, calib, config, weights)

    def prune(masters: Matrices) -> dict[str, Tensor]:
        return {name: keep_by_row(importance[name] * masters[name].abs(), targets[name]) for name in targets}

    if not calib.start:
        keep = prune(weights)
    return weights, keep, None if config.enforce_mask else prune


def _importance(block: Block, calib: CalibrationData, config: Config, weights: Matrices) -> dict[str, Tensor]:
    """Return α·G + ‖X‖/√N per weight, [O, I] or [1, I]; ones for a matrix that no token reached."""
    alpha = config.alpha
    reached = any(calib.statistics[name].tokens for name in weights)
    gradients = regional_gradients(block, calib, weights, config.gradient) if alpha and reached else {}
    importance = {}
    for name, weight_OI in weights.items():
        statistics = calib.statistics[name]
        if not statistics.tokens:
            importance[name] = weight_OI.new_ones(1, weight_OI.shape[1])
            continue
        windows = 1 if calib.stream is None else len(calib.stream)
        norm_1I = (statistics.sqnorm_I / windows).sqrt()[None]
        importance[name] = alpha * gradients[name] + norm_1I if alpha else norm_1I
    return importance


def regional_gradients(block: Block, calib: CalibrationData, names: Matrices, mean: str = "rms") -> dict[str, Tensor]:
    """Return G [O, I] float32 of every matrix: a mean over windows of the gradient of ‖f(X_n)‖₂, f the dense block.

    `mean`: `rms`, the root mean square, or `mean`, that of the absolute values.
    """
    assert calib.stream is not None
    total = {name: torch.zeros_like(weight_OI, dtype=torch.float32) for name, weight_OI in names.items()}
    parameters = assemble(block, {name: block.weight(name) for name in names})
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    stream = calib.stream

    def gradients(window: int) -> dict[str, Tensor]:
        call = stream.call([window], block.index)
        y_BTD = run_with(block, parameters, call, stream.hidden.take([window]))
        return gradients_of(block, torch.linalg.vector_norm(y_BTD, dtype=torch.float32), parameters, names)

    for window in range(len(calib.stream)):
        for name, gradient_OI in run_deterministically(functools.partial(gradients, window)).items():
            if mean == "mean":
                total[name].add_(gradient_OI.abs())
            else:
                total[name].addcmul_(gradient_OI, gradient_OI)
    means = {name: sum_OI / len(calib.stream) for name, sum_OI in total.items()}
    return means if mean == "mean" else {name: mean_OI.sqrt_() for name, mean_OI in means.items()}


METHOD = WalkMethod(
    doc=__doc__,
    paper="Yang et al. 2025, Wanda++: Pruning Large Language Models via Regional Gradients",
    accepts=(Sparsity, NM),
    config=Config,
    needs=needs,
    continues=True,
    compress=compress,
    cost=cost,
)
