"""Changes of basis that lose less when a matrix is pruned or rounded afterwards, and that fold into its neighbors.

Idea: DenoiseRotator (arXiv 2505.23049, read as an abstract) turns the basis so that importance gathers in few weights.
The importance of a weight is w²·h; h is the mean square of its input in the new basis. A rotation Q is learned that
lowers the share of importance that the target removes. For bits it lowers the squared step of the grids. Q is Q₀ times
the Cayley transform of a skew matrix, so that every step is orthogonal.

Rounding also gains from scales (AWQ, Lin et al. 2024, arXiv 2306.00978). A channel with large inputs gets larger
weights, and what feeds it becomes smaller. A scale is the RMS of the input to a power, searched on a grid.

Neurons have a nonlinearity, so only their order is free. `regroup` exchanges columns between groups of N:M while more
importance stays (Pool & Yu 2021, "Channel Permutations for N:M Sparsity").

Cost of a step: 6·R·D² operations for R rows, at most `ROWS` of each site, and one solve of D³.

Leading dimensions are rotations that are learned together, such as those of all heads.

Legend: R rows of all matrices that read a site, D width of the site, C columns of a matrix that writes to it, G groups.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from niwaki.config.targets import NM, Bits, PrunedBits, Sparsity, Target
from niwaki.methods.shared.best_state import cosine
from niwaki.methods.shared.rounding import groups_of, nearest

ROWS = 1024  # of a site that the loss sees
SCALE_STEPS = 20


@dataclass(frozen=True)
class Reads:
    """Matrices that read one site, stacked: weights [..., R, D], the mean Gram matrix of their input, and tr(WHWᵀ)."""

    weight_RD: Tensor
    gram_DD: Tensor
    energy: Tensor

    @classmethod
    def of(cls, weight_RD: Tensor, gram_DD: Tensor, generator: torch.Generator) -> "Reads":
        """Take at most ROWS rows at random."""
        rows = torch.randperm(weight_RD.shape[-2], generator=generator)[:ROWS].to(weight_RD.device)
        some_RD = weight_RD[..., rows, :].float()
        return cls(some_RD, gram_DD, ((some_RD @ gram_DD) * some_RD).sum((-2, -1)))

    def lost(self, turn_DD: Tensor, target: Target) -> Tensor:
        """Return the lost share [...] in the basis `turn_DD`."""
        input_D = ((self.gram_DD @ turn_DD) * turn_DD).sum(-2)
        return lost_importance(self.weight_RD @ turn_DD, input_D, target) / self.energy


@dataclass(frozen=True)
class Writes:
    """Matrix that writes to a site: weights [..., D, C], the mean squares of its inputs [..., C], and tr(WHWᵀ)."""

    weight_DC: Tensor
    input_C: Tensor
    energy: Tensor

    @classmethod
    def of(cls, weight_DC: Tensor, gram_CC: Tensor) -> "Writes":
        """Take the first ROWS columns, which are whole groups of any usual N:M."""
        some_DC, some_CC = weight_DC[..., :ROWS].float(), gram_CC[..., :ROWS, :ROWS]
        energy = ((some_DC @ some_CC) * some_DC).sum((-2, -1))
        return cls(some_DC, some_CC.diagonal(dim1=-2, dim2=-1), energy)

    def lost(self, turn_DD: Tensor, target: Target) -> Tensor:
        """Return the lost share [...] in the basis `turn_DD`."""
        return lost_importance(turn_DD.mT @ self.weight_DC, self.input_C, target) / self.energy


def lost_importance(weight_RC: Tensor, input_C: Tensor, target: Target, group: int = 128) -> Tensor:
    """Return Σ w²·h [...] of the weights that the target removes; for bits, squared ranges of groups times h."""
    if isinstance(target, PrunedBits):
        target = target.zeros
    lost: Tensor
    if isinstance(target, Bits):
        width = group if weight_RC.shape[-1] % group == 0 else weight_RC.shape[-1]
        range_RG = weight_RC.unflatten(-1, (-1, width)).abs().amax(-1)
        input_G = input_C.unflatten(-1, (-1, width)).sum(-1)
        lost = (range_RG.square() * input_G.unsqueeze(-2)).sum((-2, -1)) / 4.0**target.bits
        return lost
    importance_RC = weight_RC.square() * input_C.unsqueeze(-2)
    if isinstance(target, NM):
        groups = importance_RC.unflatten(-1, (-1, target.group))
        if target == NM(2, 4):  # the two lowest of four are a pair, or the lower ones of both
            a, b, c, d = groups.unbind(-1)
            pairs = torch.minimum(a + b, c + d)
            return torch.minimum(pairs, torch.minimum(a, b) + torch.minimum(c, d)).sum((-2, -1))
        lost = _falling(groups)[..., target.keep :].sum((-3, -2, -1))
        return lost
    assert isinstance(target, Sparsity), "a target that a text can ask for"
    flat = importance_RC.flatten(-2)
    count = max(1, target.zeros_in(*importance_RC.shape[-2:]))
    bound = flat.detach().kthvalue(count, dim=-1, keepdim=True).values
    lost = torch.where(flat <= bound, flat, 0.0).sum(-1)
    return lost


def lost_share(sites: Sequence[Reads | Writes], turn_DD: Tensor, target: Target) -> Tensor:
    """Return the mean lost share [...] of all sites."""
    return torch.stack([site.lost(turn_DD, target) for site in sites]).mean(0)


def learn_rotation(
    sites: Sequence[Reads | Writes], start_DD: Tensor, target: Target, *, steps: int, rate: float
) -> tuple[Tensor, Tensor]:
    """Learn rotations [..., D, D] float64 that lower the lost share, and return them with that share [...].

    Adam, cosine schedule. Each rotation is that of its best step, or its start if no step is better.
    """
    skew_DD = torch.zeros_like(start_DD, dtype=torch.float32, requires_grad=True)
    start = start_DD.float()
    optimizer = torch.optim.Adam([skew_DD])
    with torch.no_grad():
        best, kept_DD = lost_share(sites, start, target), skew_DD.detach().clone()
    for step in range(steps + 1):
        lost = lost_share(sites, start @ cayley(skew_DD), target)
        with torch.no_grad():
            better = lost < best
            best = torch.where(better, lost, best)
            kept_DD = torch.where(better[..., None, None], skew_DD, kept_DD)
        if step == steps:
            break
        optimizer.param_groups[0]["lr"] = rate * cosine(step, steps)
        optimizer.zero_grad()
        lost.sum().backward()
        optimizer.step()
    turn_DD: Tensor = start_DD.double() @ cayley(kept_DD.double())
    return turn_DD, best


def cayley(free_DD: Tensor) -> Tensor:
    """Return (I − S/2)⁻¹(I + S/2) of the skew S = A − Aᵀ: orthogonal, and the identity for A = 0."""
    half_DD = (free_DD - free_DD.transpose(-2, -1)) / 2
    identity_DD = torch.eye(free_DD.shape[-1], dtype=free_DD.dtype, device=free_DD.device)
    turned_DD: Tensor = torch.linalg.solve(identity_DD - half_DD, identity_DD + half_DD)
    return turned_DD


def principal_basis(gram_DD: Tensor, groups: int) -> Tensor:
    """Return the principal directions [..., D, D] float64, dealt out so that neighbors have unlike energy.

    Neighbors in groups of `groups` columns come from as many parts of the spectrum. With 1 the energy falls.
    """
    basis_DD: Tensor = torch.linalg.eigh(gram_DD.double())[1].flip(-1)
    width = gram_DD.shape[-1]
    if width % groups:
        return basis_DD
    order_D = torch.arange(width, device=gram_DD.device).view(groups, -1).T.reshape(-1)
    return basis_DD[..., order_D]


def random_hadamard(width: int, generator: torch.Generator) -> Tensor:
    """Return a random orthogonal matrix [D, D] float64 that spreads every direction over many.

    It is a Hadamard matrix with random signs for the power of two in `width`, times a random rotation for the rest.
    """
    odd = width
    while odd % 2 == 0:
        odd //= 2
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) * odd < width:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)]) / math.sqrt(2)
    if odd > 1:
        drawn = torch.randn(odd, odd, dtype=torch.float64, generator=generator)
        matrix = torch.kron(matrix, torch.linalg.qr(drawn)[0].contiguous())
    signs_D = torch.randint(0, 2, (width,), generator=generator).double() * 2 - 1
    return signs_D[:, None] * matrix


def search_scales(weight_RD: Tensor, input_D: Tensor, bits: int, group: int = 128) -> tuple[Tensor, float, float]:
    """Return the scales [D] that lose least when W·s is rounded to nearest, and the lost shares before and after.

    The share is Σ (Q(W·s)/s − W)²·h over Σ W²·h, for affine grids of `group` columns.
    """
    width = weight_RD.shape[1]
    groups = groups_of(0, width, bits, "affine", 0 if width % group else group)
    size_D = input_D.clamp_min(1e-12 * float(input_D.max()) + torch.finfo(torch.float32).tiny).sqrt()

    def lost(scale_D: Tensor) -> float:
        rounded_RD = nearest(weight_RD * scale_D, groups, clip=False).values_OI / scale_D
        return float(((rounded_RD - weight_RD).square() * input_D).sum() / (weight_RD.square() * input_D).sum())

    best_D, before = torch.ones_like(size_D), lost(torch.ones_like(size_D))
    best = before
    for step in range(1, SCALE_STEPS + 1):
        scale_D = size_D ** (step / SCALE_STEPS)
        scale_D /= (scale_D.max() * scale_D.min()).sqrt()
        if (now := lost(scale_D)) < best:
            best_D, best = scale_D, now
    return best_D, before, best


def regroup(importance_RC: Tensor, target: NM, generator: torch.Generator, rounds: int) -> Tensor:
    """Return an order of the columns [C] in which N:M keeps more importance.

    Every round pairs the groups at random. Each pair exchanges the two columns that gain most, if any gain.
    """
    columns, keep, width = importance_RC.shape[1], target.keep, target.group
    order_GM = torch.arange(columns, device=importance_RC.device).view(-1, width)
    pairs = len(order_GM) // 2
    for _ in range(rounds if pairs else 0):
        drawn = torch.randperm(len(order_GM), generator=generator).to(order_GM.device)
        one, other = drawn[:pairs], drawn[pairs : 2 * pairs]
        sides = []
        for chosen in (one, other):
            values_RPM = importance_RC[:, order_GM[chosen].reshape(-1)].unflatten(1, (pairs, width))
            falling = _falling(values_RPM)
            now = falling[..., :keep].sum((0, -1))
            sides.append((values_RPM, now, *_without_each(values_RPM, falling, keep)))
        (x_RPM, now_x, rest_x, edge_x), (y_RPM, now_y, rest_y, edge_y) = sides
        # Kept importance if x goes to the other group, and y comes.
        kept_x = torch.maximum(edge_x[..., :, None], y_RPM[..., None, :]) + rest_x[..., :, None]
        kept_y = torch.maximum(edge_y[..., None, :], x_RPM[..., :, None]) + rest_y[..., None, :]
        now_P = now_x + now_y
        gain_P, place_P = ((kept_x + kept_y).sum(0).flatten(1) - now_P[:, None]).max(1)
        better = gain_P > 1e-6 * now_P
        i, j = place_P[better] // width, place_P[better] % width
        a, b = one[better], other[better]
        order_GM[a, i], order_GM[b, j] = order_GM[b, j], order_GM[a, i]
    return order_GM.reshape(-1)


def _falling(values: Tensor) -> Tensor:
    """Return short groups [..., M] in falling order.

    Comparisons of neighbors, M times, are far faster on a GPU than its sort of many short rows.
    """
    width = values.shape[-1]
    parts = list(values.unbind(-1))
    for step in range(width):
        for low in range(step % 2, width - 1, 2):
            one, other = parts[low], parts[low + 1]
            parts[low], parts[low + 1] = torch.maximum(one, other), torch.minimum(one, other)
    return torch.stack(parts, dim=-1)


def _without_each(values_RPM: Tensor, highest: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """Return for each value the sum of the `keep` − 1 highest others, and the next highest other."""
    total = highest[..., :keep].sum(-1, keepdim=True)
    inside = values_RPM >= highest[..., keep - 1 : keep]
    edge = torch.where(inside, highest[..., keep : keep + 1], highest[..., keep - 1 : keep])
    rest = torch.where(inside, total - values_RPM, total - highest[..., keep - 1 : keep])
    return rest, edge
