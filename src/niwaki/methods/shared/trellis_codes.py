"""Rounding of a matrix to the levels of a trellis so that its outputs survive: sweep, refits and coordinate descent.

Everything minimizes ‖(W − Q)X‖² + λ‖W − Q‖² row by row, with H = XᵀX + λI, as `shared.rounding` does for grids. The
rings of a trellis run along the rows, so that a sweep takes one column after another and passes its error on in full.
The rows of a ring share no scale: the search weighs the miss of a row by its squared scale.

Legend: O rows, I columns, C columns of a part, P parts, S states, U padded rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from niwaki.formats.quantized import SCALE_DTYPE
from niwaki.formats.trellis import MAX_LEVEL, RING, STATES, TrellisColumns
from niwaki.kernels.trellis import encode, round_columns
from niwaki.kernels.types import Codebook, Start
from niwaki.methods.shared.rounding import SMALLEST_SCALE, error_propagation

NORMAL_WEIGHTS, NORMAL_FITS = 2**16, 12
FITTED_WEIGHTS, FITS = 2**15, 2  # of a part, that its levels are fitted to
SWEPT_COLUMNS = 64  # whose errors reach the columns after them in one product
PRIOR = 8.0  # weights of mean importance that hold a level at its old value


@dataclass(frozen=True)
class TrellisCodes:
    """States of a matrix with their levels and scales: weight = level_PS[part, state] · scale_OP[row, part].

    `part_I` is the part of every column, and `columns_PC` has the columns of every part: found once, because a GPU
    waits for their number. The states `state_UI` have whole rings of rows.
    """

    bits: Sequence[int]
    part_I: Tensor
    columns_PC: Sequence[Tensor]
    state_UI: Tensor
    level_PS: Tensor
    scale_OP: Tensor

    @property
    def book(self) -> Codebook:
        """Return bits, levels and scales as the search takes them."""
        return Codebook(self.bits, self.level_PS, self.scale_OP)

    @property
    def levels_OI(self) -> Tensor:
        """Return the levels [O, I] without scales."""
        flat_PS = self.level_PS.view(-1)
        return flat_PS[self.state_UI[: len(self.scale_OP)].int() + self.part_I.int() * STATES]

    @property
    def values_OI(self) -> Tensor:
        """Return the weights [O, I] that the states stand for."""
        return self.levels_OI * self.scale_OP[:, self.part_I]

    def by_part(self, values_OI: Tensor) -> Tensor:
        """Return the sums [O, P] of each row over the columns of each part."""
        return torch.stack([values_OI[:, columns_C].sum(1) for columns_C in self.columns_PC], dim=1)

    def columns_coded(self) -> list[TrellisColumns]:
        """Return the stored form of the parts. The codes must be `storable`."""
        parts = []
        for part, (bits, columns_C) in enumerate(zip(self.bits, self.columns_PC, strict=True)):
            level_S, scale_O = self.level_PS[part].to(torch.int8), self.scale_OP[:, part].to(SCALE_DTYPE)
            parts.append(TrellisColumns(columns_C, bits, self.state_UI[:, columns_C], level_S, scale_O))
        return parts

    def storable(self) -> "TrellisCodes":
        """Return the codes with levels of whole numbers from −127 to 127, and scales rounded as they are stored."""
        step_P1 = self.level_PS.abs().amax(1, keepdim=True).clamp_min(SMALLEST_SCALE) / MAX_LEVEL
        scale_OP = (self.scale_OP * step_P1.T).to(SCALE_DTYPE).float().clamp_min(SMALLEST_SCALE)
        return replace(self, level_PS=(self.level_PS / step_P1).round(), scale_OP=scale_OP)


@cache
def normal_levels(bits: int) -> Tensor:
    """Return 256 levels for normal weights: rounds of encoding and means, from an order without pattern."""
    generator = torch.Generator().manual_seed(1)
    quantiles_S = torch.distributions.Normal(0.0, 1.0).icdf((torch.arange(STATES) + 0.5) / STATES)
    weight_OI = torch.randn(RING, NORMAL_WEIGHTS // RING, generator=generator)
    return _fit(weight_OI, quantiles_S[torch.randperm(STATES, generator=generator)], bits, NORMAL_FITS)


def fit_levels(weight_OI: Tensor, bits: int) -> Tensor:
    """Return the levels [S] that miss these weights, rows of RMS 1, least."""
    columns = max(1, min(weight_OI.shape[1], FITTED_WEIGHTS // len(weight_OI)))
    some_OI = weight_OI[:, :: weight_OI.shape[1] // columns].contiguous()
    return _fit(some_OI, normal_levels(bits).to(weight_OI.device), bits, FITS)


def _fit(some_OI: Tensor, level_S: Tensor, bits: int, rounds: int) -> Tensor:
    one_O = torch.ones_like(some_OI[:, 0])
    for _ in range(rounds):
        state_OI = encode(some_OI, one_O, level_S, bits)[: len(some_OI)]
        level_S = _means(state_OI, some_OI, torch.ones_like(some_OI), level_S, PRIOR / 4)
    return level_S


def start_codes(weight_OI: Tensor, bits: Sequence[int], part_I: Tensor) -> TrellisCodes:
    """Return codes without states: scales are the RMS of a row in a part, and levels fit the weights."""
    scales, levels = [], []
    columns_PC = [(part_I == part).nonzero().view(-1) for part in range(len(bits))]
    for own, columns_C in zip(bits, columns_PC, strict=True):
        weight_OC = weight_OI[:, columns_C]
        scale_O1 = weight_OC.square().mean(1, keepdim=True).sqrt().clamp_min(SMALLEST_SCALE)
        scales.append(scale_O1)
        levels.append(fit_levels(weight_OC / scale_O1, own))
    padded = -(-len(weight_OI) // RING) * RING
    state_UI = torch.zeros(padded, weight_OI.shape[1], dtype=torch.uint8, device=weight_OI.device)
    return TrellisCodes(bits, part_I, columns_PC, state_UI, torch.stack(levels), torch.cat(scales, dim=1))


def nearest_path(codes: TrellisCodes, wanted_OI: Tensor) -> TrellisCodes:
    """Return the codes with the states nearest to the wanted weights, for the scales and levels as they are."""
    state_UI = torch.empty_like(codes.state_UI)
    for part, columns_C in enumerate(codes.columns_PC):
        state_UI[:, columns_C] = _encode_columns(codes, part, wanted_OI[:, columns_C])
    return replace(codes, state_UI=state_UI)


def round_in_order(codes: TrellisCodes, weight_OI: Tensor, upper_II: Tensor, order_I: Tensor) -> TrellisCodes:
    """Round column after column in the order `order_I`; H⁻¹ = UᵀU in that order. Errors move to later columns."""
    propagation_II = error_propagation(upper_II)
    wanted_OI = weight_OI[:, order_I].contiguous()
    state_UI, part_I = torch.empty_like(codes.state_UI), codes.part_I[order_I]
    for start in range(0, len(order_I), SWEPT_COLUMNS):
        now, later = slice(start, start + SWEPT_COLUMNS), slice(start + SWEPT_COLUMNS, None)
        own_CC = propagation_II[now, now]
        state_UC, change_OC = round_columns(wanted_OI[:, now], own_CC, codes.book, part_I[now])
        state_UI[:, order_I[now]] = state_UC
        wanted_OI[:, later].addmm_(change_OC, propagation_II[now, later], alpha=-1)
    return replace(codes, state_UI=state_UI)


def descend(codes: TrellisCodes, weight_OI: Tensor, gram_II: Tensor) -> TrellisCodes:
    """Do one pass of coordinate descent: each column takes the path of least error given all others.

    H = `gram_II`, damping included. A ring keeps its path unless the new one misses less, so the error never rises.
    """
    state_UI, values_OI = codes.state_UI.clone(), codes.values_OI
    pull_OI = (weight_OI - values_OI) @ gram_II
    for start in range(0, len(gram_II), SWEPT_COLUMNS):
        now, later = slice(start, start + SWEPT_COLUMNS), slice(start + SWEPT_COLUMNS, None)
        old = Start(values_OI[:, now], state_UI[:, now])
        own_CC = gram_II[now, now]
        state_UI[:, now], change_OC = round_columns(pull_OI[:, now], own_CC, codes.book, codes.part_I[now], old)
        pull_OI[:, later].addmm_(change_OC, gram_II[now, later], alpha=-1)
    return replace(codes, state_UI=state_UI)


def refit_scales(codes: TrellisCodes, weight_OI: Tensor, gram_II: Tensor) -> TrellisCodes:
    """Fit the scales so that the error of every row is least for its states. Rows keep scales without a solution."""
    level_OI, parts = codes.levels_OI, len(codes.bits)
    own = [level_OI * (codes.part_I == part) for part in range(parts)]
    pull_OI = weight_OI @ gram_II
    right_OP = codes.by_part(pull_OI * level_OI)
    spread = [level @ gram_II for level in own]
    normal_OPP = torch.stack([torch.stack([(one * two).sum(1) for two in own], dim=1) for one in spread], dim=1)
    ridge_O1 = normal_OPP.diagonal(dim1=1, dim2=2).mean(1)[:, None] * 1e-6 + 1e-30
    scale_OP, _ = torch.linalg.solve_ex(normal_OPP + torch.diag_embed(ridge_O1.expand_as(right_OP)), right_OP)
    fits_O1 = (torch.isfinite(scale_OP) & (scale_OP > SMALLEST_SCALE)).all(1, keepdim=True)
    return replace(codes, scale_OP=torch.where(fits_O1, scale_OP, codes.scale_OP))


def refit_levels(codes: TrellisCodes, weight_OI: Tensor, gram_II: Tensor) -> TrellisCodes:
    """Move every level half of the way to the mean of what its weights should be, given all others."""
    values_OI = codes.values_OI
    wanted_OI = values_OI + ((weight_OI - values_OI) @ gram_II) / gram_II.diagonal()
    levels = []
    for part, level_S in enumerate(codes.level_PS):
        columns_C = codes.columns_PC[part]
        scale_O1 = codes.scale_OP[:, part, None]
        importance_OC = scale_O1.square() * gram_II.diagonal()[columns_C]
        state_OC = codes.state_UI[: len(weight_OI), columns_C]
        mean_S = _means(state_OC, wanted_OI[:, columns_C] / scale_O1, importance_OC, level_S, PRIOR)
        levels.append((level_S + mean_S) / 2)
    return replace(codes, level_PS=torch.stack(levels))


def improve(codes: TrellisCodes, weight_OI: Tensor, gram_II: Tensor, rounds: int) -> TrellisCodes:
    """Do `rounds` of refits and coordinate descent, then round levels and scales as they are stored."""
    for _ in range(rounds):
        codes = refit_levels(codes, weight_OI, gram_II)
        codes = descend(refit_scales(codes, weight_OI, gram_II), weight_OI, gram_II)
    if rounds:
        codes = refit_scales(codes, weight_OI, gram_II)
    return codes.storable()


def _encode_columns(codes: TrellisCodes, part: int, wanted_OC: Tensor) -> Tensor:
    """Return the states [U, C] of columns of one part that are nearest to the wanted weights."""
    scale_O = codes.scale_OP[:, part]
    return encode(wanted_OC / scale_O[:, None], scale_O.square(), codes.level_PS[part], codes.bits[part])


def _means(state_OC: Tensor, wanted_OC: Tensor, importance_OC: Tensor, level_S: Tensor, prior: float) -> Tensor:
    """Return the mean wanted value of every state, held to its old level by `prior` weights of mean importance."""
    state_N, importance_N = state_OC.reshape(-1).int(), importance_OC.reshape(-1).double()
    held = prior * importance_N.mean()
    total_S = torch.bincount(state_N, importance_N, STATES) + held
    wanted_S = torch.bincount(state_N, importance_N * wanted_OC.reshape(-1).double(), STATES) + held * level_S
    return (wanted_S / total_S).float()
