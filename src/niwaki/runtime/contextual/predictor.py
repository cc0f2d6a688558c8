"""Predictor of a whole model: from features of the prompt to the importance of every head and neuron.

    expected   e_u = Σ_r φ_r V_ru,  φ = W·f           learned: how the score differs from its mean
    activity   a_u = x_u / x̄_u − 1                    how the activity of the unit in the prompt differs from its mean
    score      ŝ_u = p_u · (1 + e_u + b·(a_u − e_u)),  b = β·max(0, 1 − ν / mean_u (a_u − e_u)²)

The prior p is the mean score over the calibration text (alone: a static mask). The activity of the unit in the prompt
is x (b = 1 alone: the idea of GRIFFIN). There are three groups of features f: `last` is the output of the heads of the
first block at the last token of the prompt. `mean` is the mean of that over the prompt. `prompt` is a itself, of all
units. W and V are factors of a small rank R. So the predictor stays within its share of the parameters of the decoder
for any number of units.

For heads nothing is learned, e = 0. A learned part gained one percent on text like that of the calibration, and cost up
to seventeen on other text (docs/log/2026-11-22-contextual.md).

b shrinks the gap between activity and expectation, as James and Stein shrink a measurement. A prompt is short, so a is
noisy by about ν. If the gap is no larger than that, as on text like that of the calibration, the learned part decides.
The larger the gap, the more the activity decides. β and ν are one pair for heads and one for neurons.

Everything is fitted in closed form, on the device of the samples. Ridge regression of s_u/p_u − 1 on f gives groups of
features equal weight. Its fitted values are cut to rank R (reduced-rank regression). The penalty, β and ν are chosen on
held-out samples. The penalty is the one that keeps most of the score there. The cut, and the fit of β and ν, weight
units by p, relative to their block. Units that rarely matter are noise in relative terms. N samples cost an N×N system
and N²·(F + U) operations.

Legend: N samples, B sequences, F features, U units, R rank, D hidden size, K kinds of units.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from niwaki.runtime.contextual.selection import highest
from niwaki.runtime.contextual.traces import Traces
from niwaki.runtime.contextual.units import UnitLayout

FEATURES = ("last", "mean", "prompt")
PENALTIES = (1.0, 3.0, 10.0, 30.0)
NOISES = (0.0, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0)  # ν, as shares of the median deviation
LIMIT = 4.0  # of features in standard deviations, and of activity as a multiple: no outlier decides alone
MIN_WEIGHT = 1e-3
SMALLEST = 1e-12


@dataclass(frozen=True)
class Predictor:
    """Tensors of the predictor. `features` names the groups of its input, in order; if empty, nothing is learned.

    `trust_K2`: β and ν for heads and for neurons. The first `heads` units of a row are heads. The fields have the names
    of the tensors in the file.
    """

    features: tuple[str, ...]
    heads: int
    prior_U: Tensor
    typical_U: Tensor
    trust_K2: Tensor
    center_F: Tensor
    scale_F: Tensor
    into_FR: Tensor
    out_RU: Tensor

    @property
    def parameters(self) -> int:
        """Return the number of parameters."""
        return sum(tensor.numel() for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by their names in the file."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def scores(self, last_BD: Tensor, mean_BD: Tensor, prompt_BU: Tensor) -> Tensor:
        """Return the predicted importance [B, U] of every unit, float32."""
        activity_BU = activity(prompt_BU, self.typical_U)
        expected_BU = self.expected(last_BD, mean_BD, activity_BU)
        return self.prior_U * (1 + expected_BU + self._correction(activity_BU - expected_BU))

    def deviation(self, last_BD: Tensor, mean_BD: Tensor, prompt_BU: Tensor) -> Tensor:
        """Return how far a prompt is from expectation [B]: the mean squared gap of the neurons."""
        activity_BU = activity(prompt_BU, self.typical_U)
        gap_BU = activity_BU - self.expected(last_BD, mean_BD, activity_BU)
        return gap_BU[:, self.heads :].square().mean(1)

    def expected(self, last_BD: Tensor, mean_BD: Tensor, activity_BU: Tensor) -> Tensor:
        """Return the learned part [B, U]."""
        if not self.features:
            return torch.zeros_like(activity_BU)
        raw_BF = gather(self.features, last_BD, mean_BD, activity_BU)
        inputs_BF = ((raw_BF - self.center_F) * self.scale_F).clamp(-LIMIT, LIMIT)
        return inputs_BF @ self.into_FR @ self.out_RU

    def _correction(self, gap_BU: Tensor) -> Tensor:
        parts = gap_BU[:, : self.heads], gap_BU[:, self.heads :]
        return torch.cat([shrunk(gap, *shrinkage) for gap, shrinkage in zip(parts, self.trust_K2, strict=True)], dim=1)

    def to(self, device: torch.device) -> "Predictor":
        """Return the predictor on another device."""
        moved = {name: tensor.to(device) for name, tensor in self.tensors().items()}
        return Predictor(self.features, self.heads, **moved)


def activity(prompt_BU: Tensor, typical_U: Tensor) -> Tensor:
    """Return how the activity in a prompt differs from its mean [B, U], within bounds."""
    return (prompt_BU.float() / typical_U - 1).clamp_max(LIMIT)


def shrunk(gap_BU: Tensor, beta: Tensor, noise: Tensor) -> Tensor:
    """Shrink the gap between activity and expectation by the factor b, for units of one kind."""
    deviation_B1 = gap_BU.square().mean(1, keepdim=True).clamp_min(SMALLEST)
    return beta * (1 - noise / deviation_B1).clamp_min(0) * gap_BU


def gather(features: Sequence[str], last_BD: Tensor, mean_BD: Tensor, activity_BU: Tensor) -> Tensor:
    """Join the features [B, F] of these groups side by side, float32."""
    groups = {"last": last_BD, "mean": mean_BD, "prompt": activity_BU}
    return torch.cat([groups[name].float() for name in features], dim=1)


def fit(
    traces: Traces, layout: UnitLayout, features: Sequence[str], shrinkage: bool, rank: int
) -> tuple[Predictor, dict[str, Any]]:
    """Fit a predictor to these samples; return it and the values of its choices. Without `shrinkage` b is zero.

    The last quarter of the samples is held out to choose the penalty, β and ν. Then the learned part is fitted to all.
    """
    held = max(1, len(traces) // 4)
    train, judge = traces.take(slice(0, -held)), traces.take(slice(-held, None))
    kept: dict[float, float] = {}
    tried: dict[float, Predictor] = {}
    for penalty in PENALTIES if features else (0.0,):
        tried[penalty] = _fit(train, layout, features, rank, penalty)
        if shrinkage:
            tried[penalty] = replace(tried[penalty], trust_K2=_fit_shrinkage(tried[penalty], judge, layout))
        kept[penalty] = kept_share(tried[penalty], judge, layout)
    penalty = max(kept, key=lambda p: kept[p])
    predictor = replace(_fit(traces, layout, features, rank, penalty), trust_K2=tried[penalty].trust_K2)
    choices = {"samples": len(traces), "rank": predictor.out_RU.shape[0], "penalty": penalty, "held_out_kept": kept}
    return predictor, choices | {"trust": predictor.trust_K2.tolist()}


def kept_share(predictor: Predictor, judge: Traces, layout: UnitLayout, share: float = 0.5) -> float:
    """Return the share of the squared true score that the best `share` of every block holds.

    It is a mean over blocks, kinds and samples.
    """
    predicted_NU = predictor.scores(judge.last_ND, judge.mean_ND, judge.prompt_NU)
    true_NU = judge.score_NU.float().square()
    shares = []
    for predicted_NLG, true_NLG in zip(layout.split(predicted_NU), layout.split(true_NU), strict=True):
        keep = highest(predicted_NLG, max(1, round(share * predicted_NLG.shape[2])))
        kept_NL = (true_NLG * keep).sum(2) / true_NLG.sum(2).clamp_min(SMALLEST)
        shares.append(float(kept_NL.mean()))
    return sum(shares) / len(shares)


def _fit(traces: Traces, layout: UnitLayout, features: Sequence[str], rank: int, penalty: float) -> Predictor:
    """Fit the learned part to these samples, without shrinkage."""
    score_NU, prompt_NU = traces.score_NU.float(), traces.prompt_NU.float()
    heads, trust_K2 = layout.blocks * layout.count("heads"), score_NU.new_zeros(2, 2)
    prior_U, typical_U = score_NU.mean(0).clamp_min(SMALLEST), prompt_NU.mean(0).clamp_min(SMALLEST)
    if not features:
        none = score_NU.new_zeros(0)
        return Predictor((), heads, prior_U, typical_U, trust_K2, none, none, none.view(0, 0), none.view(0, 0))
    rest_NU, activity_NU = score_NU / prior_U - 1, activity(prompt_NU, typical_U)
    rest_NU[:, :heads] = 0  # nothing is learned for heads
    groups = [gather([name], traces.last_ND, traces.mean_ND, activity_NU) for name in features]
    raw_NF = torch.cat(groups, dim=1)
    center_F, scale_F = raw_NF.mean(0), 1 / raw_NF.std(0).clamp_min(1e-6)
    inputs_NF = ((raw_NF - center_F) * scale_F).clamp(-LIMIT, LIMIT)
    weight_F = torch.cat([g.new_full((g.shape[1],), 1 / g.shape[1]) for g in groups])  # groups have equal weight
    kernel_NN = (inputs_NF * weight_F) @ inputs_NF.T
    ridge_NN = kernel_NN + penalty * len(groups) * torch.eye(len(kernel_NN), device=kernel_NN.device)
    weight_U = _weights(prior_U, layout)
    dual_NU = torch.linalg.solve(ridge_NN, rest_NU) * weight_U
    out_RU = _directions(kernel_NN @ dual_NU, rank)
    into_FR = weight_F[:, None] * (inputs_NF.T @ (dual_NU @ out_RU.T))
    out_RU /= weight_U
    return Predictor(tuple(features), heads, prior_U, typical_U, trust_K2, center_F, scale_F, into_FR, out_RU)


def _weights(prior_U: Tensor, layout: UnitLayout) -> Tensor:
    """Return the weights of units [U]: p over its mean in the block, at least `MIN_WEIGHT`."""
    parts = (prior_1LG / prior_1LG.mean(2, keepdim=True) for prior_1LG in layout.split(prior_U[None]))
    return layout.join(*parts)[0].clamp_min(MIN_WEIGHT)


def _fit_shrinkage(predictor: Predictor, judge: Traces, layout: UnitLayout) -> Tensor:
    """Fit β and ν of heads and neurons [K, 2] by least squares on held-out samples."""
    activity_NU = activity(judge.prompt_NU, predictor.typical_U)
    expected_NU = predictor.expected(judge.last_ND, judge.mean_ND, activity_NU)
    gap_NU, rest_NU = activity_NU - expected_NU, judge.score_NU.float() / predictor.prior_U - 1 - expected_NU
    pairs, weight_U = [], _weights(predictor.prior_U, layout)
    for part in (slice(0, predictor.heads), slice(predictor.heads, None)):
        gap_NG, rest_NG, weight_G = gap_NU[:, part], rest_NU[:, part], weight_U[part]
        middle = gap_NG.square().mean(1).median()
        errors = {}
        for noise in NOISES:
            shrunk_NG = shrunk(gap_NG, torch.tensor(1.0), noise * middle) * weight_G
            wanted_NG = rest_NG * weight_G
            square = shrunk_NG.square().sum().clamp_min(SMALLEST)
            beta = ((shrunk_NG * wanted_NG).sum() / square).clamp(0, 1)
            errors[noise] = float((wanted_NG - beta * shrunk_NG).square().mean()), beta
        best = min(errors, key=lambda noise: errors[noise][0])
        pairs.append(torch.stack([errors[best][1], best * middle]))
    return torch.stack(pairs)


def _directions(fitted_NU: Tensor, rank: int) -> Tensor:
    """Return orthonormal rows [R, U] that hold most of the fitted values; fewer if these have fewer dimensions."""
    values, vectors_NN = torch.linalg.eigh((fitted_NU @ fitted_NU.T).double())
    rank = min(rank, int((values > values[-1] * 1e-5).sum()))
    basis_NR, energy_R = vectors_NN[:, -rank:].flip(1), values[-rank:].flip(0)
    rows_RU: Tensor = (basis_NR.float().T @ fitted_NU) / energy_R.float().sqrt()[:, None]
    return rows_RU
