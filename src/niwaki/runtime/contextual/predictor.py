"""One predictor for the whole model: from what the prompt shows to how much every head and neuron will matter.

    expected   e_u = Σ_r φ_r V_ru,  φ = W·f           learned: how the score differs from the usual one
    seen       a_u = x_u / x̄_u − 1                    how the unit's activity in the prompt differs from the usual one
    score      ŝ_u = p_u · (1 + e_u + b·(a_u − e_u)),  b = β·max(0, 1 − ν / mean_u (a_u − e_u)²)

p is the mean score over the calibration text (alone: a static mask) and x how active the unit was in the prompt (b = 1
and no more: the idea of GRIFFIN). f are features of the prompt: what the heads of the first block put out at its last
token (`last`), the mean of that over the prompt (`mean`), and a itself, of all units (`prompt`). W and V are factors of
a small rank R, so that the predictor stays within its share of the decoder's parameters whatever the number of units.

For heads nothing is learned, e = 0: what was learned of them gained a percent on text like that of the calibration
and cost up to seventeen on other text (docs/log/2026-11-22-contextual.md).

b is the trust in what was seen, as James and Stein shrink a measurement: a prompt is short, so a is noisy by about ν.
Where it differs from what is expected by no more than that, as on text like that of the calibration, the learned part
decides; the more it differs, the more what was seen does. β and ν are one pair for heads and one for neurons.

Everything is fitted in closed form, on the device of the samples: ridge regression of s_u/p_u − 1 on f, groups of
features with equal weight, its fitted values cut to rank R (reduced-rank regression). Both the cut and the fit of β and
ν, which is done on held-out samples, weigh units by p (relative to their block): what rarely matters is noise in
relative terms. The penalty is the one that keeps most of the score there. N samples cost an N×N system and N²·(F + U)
operations.

Legend: N samples, B sequences, F features, U units, R rank, D hidden size, K kinds of units.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from niwaki.runtime.contextual.selection import highest
from niwaki.runtime.contextual.traces import Traces
from niwaki.runtime.contextual.units import Layout

FEATURES = ("last", "mean", "prompt")
PENALTIES = (1.0, 3.0, 10.0, 30.0)
NOISES = (0.0, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0)  # ν, as shares of the median deviation
LIMIT = 4.0  # of features in standard deviations, and of activity as a multiple: no outlier is to decide alone
MIN_WEIGHT = 1e-3
SMALLEST = 1e-12


@dataclass(frozen=True)
class Predictor:
    """The tensors of the map. `features` names the groups it reads, in order; empty: nothing is learned.

    `trust_K2`: β and ν for heads and for neurons, of which the first `heads` units of a row are the former.
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
        """Numbers it is made of."""
        return sum(tensor.numel() for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """By their names in a file."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def scores(self, last_BD: Tensor, mean_BD: Tensor, prompt_BU: Tensor) -> Tensor:
        """Predicted importance [B, U] of every unit, float32."""
        seen_BU = seen(prompt_BU, self.typical_U)
        expected_BU = self.expected(last_BD, mean_BD, seen_BU)
        return self.prior_U * (1 + expected_BU + self._correction(seen_BU - expected_BU))

    def deviation(self, last_BD: Tensor, mean_BD: Tensor, prompt_BU: Tensor) -> Tensor:
        """How far a prompt lies from what is expected of it [B]: mean squared gap of the neurons."""
        seen_BU = seen(prompt_BU, self.typical_U)
        gap_BU = seen_BU - self.expected(last_BD, mean_BD, seen_BU)
        return gap_BU[:, self.heads :].square().mean(1)

    def expected(self, last_BD: Tensor, mean_BD: Tensor, seen_BU: Tensor) -> Tensor:
        """The learned part [B, U]."""
        if not self.features:
            return torch.zeros_like(seen_BU)
        raw_BF = gather(self.features, last_BD, mean_BD, seen_BU)
        inputs_BF = ((raw_BF - self.center_F) * self.scale_F).clamp(-LIMIT, LIMIT)
        return inputs_BF @ self.into_FR @ self.out_RU

    def _correction(self, gap_BU: Tensor) -> Tensor:
        parts = gap_BU[:, : self.heads], gap_BU[:, self.heads :]
        return torch.cat([trusted(gap, *trust) for gap, trust in zip(parts, self.trust_K2, strict=True)], dim=1)

    def to(self, device: torch.device) -> "Predictor":
        """The same on another device."""
        moved = {name: tensor.to(device) for name, tensor in self.tensors().items()}
        return Predictor(self.features, self.heads, **moved)


def seen(prompt_BU: Tensor, typical_U: Tensor) -> Tensor:
    """How the activity in a prompt differs from the usual one [B, U], within bounds."""
    return (prompt_BU.float() / typical_U - 1).clamp_max(LIMIT)


def trusted(gap_BU: Tensor, beta: Tensor, noise: Tensor) -> Tensor:
    """How much of the gap between seen and expected is believed, for units of one kind."""
    deviation_B1 = gap_BU.square().mean(1, keepdim=True).clamp_min(SMALLEST)
    return beta * (1 - noise / deviation_B1).clamp_min(0) * gap_BU


def gather(features: Sequence[str], last_BD: Tensor, mean_BD: Tensor, seen_BU: Tensor) -> Tensor:
    """The features [B, F] of these groups side by side, float32."""
    groups = {"last": last_BD, "mean": mean_BD, "prompt": seen_BU}
    return torch.cat([groups[name].float() for name in features], dim=1)


def fit(
    traces: Traces, layout: Layout, features: Sequence[str], shrinkage: bool, rank: int
) -> tuple[Predictor, dict[str, Any]]:
    """The predictor of these samples, and what its choices found. `shrinkage`: whether b may differ from zero.

    The last quarter of the samples is held out for the penalty and the trust; then the rest is fitted to all.
    """
    held = max(1, len(traces) // 4)
    train, judge = traces.take(slice(0, -held)), traces.take(slice(-held, None))
    kept: dict[float, float] = {}
    tried: dict[float, Predictor] = {}
    for penalty in PENALTIES if features else (0.0,):
        tried[penalty] = _fit(train, layout, features, rank, penalty)
        if shrinkage:
            tried[penalty] = replace(tried[penalty], trust_K2=_trust(tried[penalty], judge, layout))
        kept[penalty] = kept_share(tried[penalty], judge, layout)
    penalty = max(kept, key=lambda p: kept[p])
    predictor = replace(_fit(traces, layout, features, rank, penalty), trust_K2=tried[penalty].trust_K2)
    found = {"samples": len(traces), "rank": predictor.out_RU.shape[0], "penalty": penalty, "held_out_kept": kept}
    return predictor, found | {"trust": predictor.trust_K2.tolist()}


def kept_share(predictor: Predictor, judge: Traces, layout: Layout, share: float = 0.5) -> float:
    """How much of the squared true score the best `share` of every block holds, mean over blocks, kinds and samples."""
    found_NU = predictor.scores(judge.last_ND, judge.mean_ND, judge.prompt_NU)
    true_NU = judge.score_NU.float().square()
    shares = []
    for found_NLG, true_NLG in zip(layout.split(found_NU), layout.split(true_NU), strict=True):
        keep = highest(found_NLG, max(1, round(share * found_NLG.shape[2])))
        kept_NL = (true_NLG * keep).sum(2) / true_NLG.sum(2).clamp_min(SMALLEST)
        shares.append(float(kept_NL.mean()))
    return sum(shares) / len(shares)


def _fit(traces: Traces, layout: Layout, features: Sequence[str], rank: int, penalty: float) -> Predictor:
    """The learned part on all of these samples, without trust."""
    score_NU, prompt_NU = traces.score_NU.float(), traces.prompt_NU.float()
    heads, trust_K2 = layout.blocks * layout.count("heads"), score_NU.new_zeros(2, 2)
    prior_U, typical_U = score_NU.mean(0).clamp_min(SMALLEST), prompt_NU.mean(0).clamp_min(SMALLEST)
    if not features:
        none = score_NU.new_zeros(0)
        return Predictor((), heads, prior_U, typical_U, trust_K2, none, none, none.view(0, 0), none.view(0, 0))
    rest_NU, seen_NU = score_NU / prior_U - 1, seen(prompt_NU, typical_U)
    rest_NU[:, :heads] = 0  # nothing is learned for heads
    groups = [gather([name], traces.last_ND, traces.mean_ND, seen_NU) for name in features]
    raw_NF = torch.cat(groups, dim=1)
    center_F, scale_F = raw_NF.mean(0), 1 / raw_NF.std(0).clamp_min(1e-6)
    inputs_NF = ((raw_NF - center_F) * scale_F).clamp(-LIMIT, LIMIT)
    weight_F = torch.cat([g.new_full((g.shape[1],), 1 / g.shape[1]) for g in groups])  # groups count alike
    kernel_NN = (inputs_NF * weight_F) @ inputs_NF.T
    ridge_NN = kernel_NN + penalty * len(groups) * torch.eye(len(kernel_NN), device=kernel_NN.device)
    weight_U = _weights(prior_U, layout)
    dual_NU = torch.linalg.solve(ridge_NN, rest_NU) * weight_U
    out_RU = _directions(kernel_NN @ dual_NU, rank)
    into_FR = weight_F[:, None] * (inputs_NF.T @ (dual_NU @ out_RU.T))
    out_RU /= weight_U
    return Predictor(tuple(features), heads, prior_U, typical_U, trust_K2, center_F, scale_F, into_FR, out_RU)


def _weights(prior_U: Tensor, layout: Layout) -> Tensor:
    """How much units count [U]: p over its mean in the block, and not nothing."""
    parts = (prior_1LG / prior_1LG.mean(2, keepdim=True) for prior_1LG in layout.split(prior_U[None]))
    return layout.join(*parts)[0].clamp_min(MIN_WEIGHT)


def _trust(predictor: Predictor, judge: Traces, layout: Layout) -> Tensor:
    """β and ν of heads and neurons [K, 2] by least squares on samples that the learned part has not seen."""
    seen_NU = seen(judge.prompt_NU, predictor.typical_U)
    expected_NU = predictor.expected(judge.last_ND, judge.mean_ND, seen_NU)
    gap_NU, rest_NU = seen_NU - expected_NU, judge.score_NU.float() / predictor.prior_U - 1 - expected_NU
    found, weight_U = [], _weights(predictor.prior_U, layout)
    for part in (slice(0, predictor.heads), slice(predictor.heads, None)):
        gap_NG, rest_NG, weight_G = gap_NU[:, part], rest_NU[:, part], weight_U[part]
        middle = gap_NG.square().mean(1).median()
        errors = {}
        for noise in NOISES:
            believed_NG = trusted(gap_NG, torch.tensor(1.0), noise * middle) * weight_G
            wanted_NG = rest_NG * weight_G
            square = believed_NG.square().sum().clamp_min(SMALLEST)
            beta = ((believed_NG * wanted_NG).sum() / square).clamp(0, 1)
            errors[noise] = float((wanted_NG - beta * believed_NG).square().mean()), beta
        best = min(errors, key=lambda noise: errors[noise][0])
        found.append(torch.stack([errors[best][1], best * middle]))
    return torch.stack(found)


def _directions(fitted_NU: Tensor, rank: int) -> Tensor:
    """Orthonormal rows [R, U] that hold most of the fitted values; fewer where these have fewer dimensions."""
    values, vectors_NN = torch.linalg.eigh((fitted_NU @ fitted_NU.T).double())
    rank = min(rank, int((values > values[-1] * 1e-5).sum()))
    basis_NR, energy_R = vectors_NN[:, -rank:].flip(1), values[-rank:].flip(0)
    rows_RU: Tensor = (basis_NR.float().T @ fitted_NU) / energy_R.float().sqrt()[:, None]
    return rows_RU
