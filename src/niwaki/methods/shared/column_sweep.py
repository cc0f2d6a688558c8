"""Least squares by a sweep over columns: fix one column after another, and the later ones absorb its error.

The sweep minimizes ‖(W − Ŵ)X‖² row by row. It is the optimal brain surgeon step in a fixed order of the columns:
SparseGPT (Frantar & Alistarh 2023, Algorithm 1) and GPTQ (Frantar et al. 2023). H = XᵀX + λI, and U is the upper factor
of H⁻¹ = UᵀU. A column j that is fixed with error e_j = (w_j − ŵ_j)/U_jj changes the columns after it by −e_j·U_j.

U is not formed through the inverse. The index-reversed H has the factor L, H = LLᵀ. L reversed is an upper R with H =
RRᵀ, so U = R⁻¹. This takes one Cholesky and one triangular inverse. It is half the work of Cholesky → inverse →
Cholesky, and better conditioned.

Cost for [O, I]: I³·2/3 for the factor (once for all matrices that share inputs), O·I² for the sweep.

Legend: O rows, I columns, P columns of one panel.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from niwaki.config.targets import NM
from niwaki.errors import NumericalError
from niwaki.kernels.sweep import sweep_panel

SOLVED_COLUMNS = 1024  # of a triangle, in one call of the solver
REFIT_ITERATIONS = 20
WARM_ITERATIONS = 6  # of a refit in an exchange, which begins at the refit before it

# (weights [O, P], diagonal of U for the panel [P], first column) → keep mask [O, P]
ChoosePanelMask = Callable[[Tensor, Tensor, int], Tensor]


def check_damping(damping_frac: float) -> None:
    """Raise ValueError unless `damping_frac` is a share that `inverse_factor` can begin with."""
    if not 0 < damping_frac <= 1:
        raise ValueError(f"damping_frac must lie in (0, 1], got {damping_frac}")


def inverse_factor(gram_II: Tensor, damping_frac: float) -> tuple[Tensor, float]:
    """Return the upper U [I, I] float32 with (XᵀX + λI)⁻¹ = UᵀU, and the damping that was needed.

    λ = damping_frac · mean diagonal (1 if every feature is silent). The diagonal of a feature that never fired holds λ
    alone, so that its weights are the cheapest. A matrix that is not positive definite in float32 (fewer tokens than
    columns) is damped ten times more, up to 1. Raises NumericalError if that is not enough.
    """

    def upper(damping: float) -> Tensor | None:
        work_II = gram_II.flip(0, 1)  # 3.3 GB for a 70B model: this copy serves up to the inverse
        work_II.diagonal().add_(damping)
        info = torch.empty((), dtype=torch.int32, device=work_II.device)
        torch.linalg.cholesky_ex(work_II, out=(work_II, info))
        if int(info):
            return None
        upper_II = invert_lower(work_II).flip(0, 1)
        return upper_II if torch.isfinite(upper_II.diagonal()).all() else None

    return _damped_until(gram_II, damping_frac, upper)


def invert_lower(lower_II: Tensor) -> Tensor:
    """Invert a lower triangle [I, I] in place, halved down to blocks that a solver takes.

    This takes I³/3 multiplications, mostly products of matrices; a solution for every column of the identity takes I³.
    """
    width = len(lower_II)
    if width <= SOLVED_COLUMNS:
        identity_II = torch.eye(width, dtype=lower_II.dtype, device=lower_II.device)
        return lower_II.copy_(torch.linalg.solve_triangular(lower_II, identity_II, upper=False))
    half = width // 2
    first_II, last_II, below_II = lower_II[:half, :half], lower_II[half:, half:], lower_II[half:, :half]
    invert_lower(first_II)
    invert_lower(last_II)
    below_II.copy_(last_II @ (below_II @ first_II)).neg_()
    return lower_II


def inverse(gram_II: Tensor, damping_frac: float) -> tuple[Tensor, float]:
    """Return (XᵀX + λI)⁻¹ [I, I] float32 and the damping that was needed; half the memory of `inverse_factor`."""

    def inverted(damping: float) -> Tensor | None:
        damped_II = gram_II.clone()
        damped_II.diagonal().add_(damping)
        lower_II, info = torch.linalg.cholesky_ex(damped_II)
        if int(info):
            return None
        inverse_II = torch.cholesky_inverse(lower_II)
        return inverse_II if torch.isfinite(inverse_II.diagonal()).all() else None

    return _damped_until(gram_II, damping_frac, inverted)


def pull_to_dense(cross_II: Tensor, gram_II: Tensor, damped_II: Tensor, share: float) -> Tensor:
    """Return P [I, I]: W·P on the inputs X of the compressed model comes nearest to W on those of the dense model.

    ‖V·X − W·F‖² + λ‖V − W‖² is least for V = W·(FᵀX + λI)(XᵀX + λI)⁻¹. `cross_II` is FᵀX and `damped_II` is XᵀX + λI.
    A sweep that starts from V minimizes the objective of GPTAQ (Li et al. 2025). P goes `share` of the way from I.
    """
    cross_II = cross_II.clone()
    cross_II.diagonal().add_(damped_II.diagonal() - gram_II.diagonal())  # λ pulls to W itself
    pull_II: Tensor = torch.cholesky_solve(cross_II.T, torch.linalg.cholesky(damped_II)).T * share
    pull_II.diagonal().add_(1 - share)
    return pull_II


def _damped_until(
    gram_II: Tensor, damping_frac: float, solve: Callable[[float], Tensor | None]
) -> tuple[Tensor, float]:
    """Return the first result of `solve(λ)` that is not None, and its damping; each attempt has ten times more λ."""
    diagonal_I = gram_II.diagonal()
    if not torch.isfinite(diagonal_I).all():
        raise NumericalError("activations hold NaN or infinite values: check the checkpoint and the calibration text")
    scale = float(diagonal_I.mean()) or 1.0
    while damping_frac <= 1:
        if (solution := solve(damping_frac * scale)) is not None:
            return solution, damping_frac
        damping_frac *= 10
    raise NumericalError("XᵀX stays singular even with damping 1: give more or different calibration text")


def prune_by_sweep(
    weight_OI: Tensor,
    upper_II: Tensor,
    target: NM | None,
    choose: ChoosePanelMask | None,
    panel_columns: int,
    until: int | None = None,
) -> Tensor:
    """Prune `weight_OI` (float32, changed in place) and return the keep mask [O, I].

    For an unstructured target `choose` chooses the mask of each panel from its present weights. For N:M (`target`) the
    kernel chooses inside the panel, group by group. Columns from `until` on stay, and take up the errors of the others.
    """
    columns = weight_OI.shape[1] if until is None else until
    keep_OI = torch.ones_like(weight_OI, dtype=torch.bool)
    for start in range(0, columns, panel_columns):
        end = min(start + panel_columns, columns)
        panel_OP, upper_PP = weight_OI[:, start:end], upper_II[start:end, start:end]
        keep_OP = None if choose is None else choose(panel_OP, upper_PP.diagonal(), start)
        errors_OP, keep_OP = sweep_panel(panel_OP, upper_PP, keep_OP, target)
        keep_OI[:, start:end] = keep_OP
        weight_OI[:, end:].addmm_(errors_OP, upper_II[start:end, end:], alpha=-1)
    return keep_OI


def refit_kept(
    dense_OI: Tensor,
    start_OI: Tensor,
    keep_OI: Tensor,
    gram_II: Tensor,
    damping_frac: float,
    iterations: int = REFIT_ITERATIONS,
) -> Tensor:
    """Return the kept weights that minimize ‖(V − W)X‖² + λ‖V − W‖² exactly; the sweep does so in one pass only.

    W is `dense_OI`, V is zero where `keep_OI` is false, λ as in `inverse_factor`. The sweep moves errors to the right
    only. Here every kept weight of a row compensates every removed one. Conjugate gradients with a diagonal
    preconditioner solve all rows at once, each with its own mask; they begin at `start_OI`. Twenty iterations reach the
    least error within 0.1 % (docs/log). Cost: 2·O·I² operations each.
    """
    scale = float(gram_II.diagonal().mean()) or 1.0
    damping = damping_frac * scale
    diagonal_I = gram_II.diagonal() + damping
    keep_OI = keep_OI.to(dense_OI.dtype)

    def curvature(v_OI: Tensor) -> Tensor:
        return (v_OI @ gram_II).add_(v_OI, alpha=damping).mul_(keep_OI)

    fitted_OI = start_OI * keep_OI
    residual_OI = curvature(dense_OI - fitted_OI)
    step_OI = residual_OI / diagonal_I
    energy_O1 = (residual_OI * step_OI).sum(1, keepdim=True)
    floor_O1 = energy_O1 * 1e-10 + torch.finfo(torch.float32).tiny  # float32 gains nothing below it
    for _ in range(iterations):
        curved_OI = curvature(step_OI)
        bend_O1 = (step_OI * curved_OI).sum(1, keepdim=True)
        length_O1 = torch.where((energy_O1 > floor_O1) & (bend_O1 > 0), energy_O1 / bend_O1, 0.0)
        fitted_OI += length_O1 * step_OI
        residual_OI -= length_O1 * curved_OI
        scaled_OI = residual_OI / diagonal_I
        before_O1, energy_O1 = energy_O1, (residual_OI * scaled_OI).sum(1, keepdim=True)
        step_OI = scaled_OI + torch.where(before_O1 > floor_O1, energy_O1 / before_O1, 0.0) * step_OI
    return fitted_OI


def exchange(
    dense_OI: Tensor,
    fitted_OI: Tensor,
    keep_OI: Tensor,
    gram_II: Tensor,
    damping_frac: float,
    choose: Callable[[Tensor], Tensor],
    rounds: int,
) -> tuple[Tensor, Tensor]:
    """Exchange kept weights for removed ones while that lowers the fitted error. Return (weights, keep mask).

    After a refit, a revived weight gains about g²/d (g: its gradient, d: its curvature), and a removed one costs about
    v²·d. `choose` makes a mask of these scores, and a refit follows. The first round that does not lower
    ‖(V − W)X‖² + λ‖V − W‖² is the last.
    """
    scale = float(gram_II.diagonal().mean()) or 1.0
    damping = damping_frac * scale
    diagonal_I = gram_II.diagonal() + damping

    def pull(v_OI: Tensor) -> Tensor:
        missing_OI = dense_OI - v_OI
        return (missing_OI @ gram_II).add_(missing_OI, alpha=damping)

    def error(v_OI: Tensor, pull_OI: Tensor) -> float:
        return float(((dense_OI - v_OI) * pull_OI).sum(dtype=torch.float64))

    pull_OI = pull(fitted_OI)
    best = error(fitted_OI, pull_OI)
    for _ in range(rounds):
        scores_OI = torch.where(keep_OI, fitted_OI.square() * diagonal_I, pull_OI.square() / diagonal_I)
        other_keep_OI = choose(scores_OI)
        other_OI = refit_kept(dense_OI, fitted_OI, other_keep_OI, gram_II, damping_frac, WARM_ITERATIONS)
        pull_OI = pull(other_OI)
        other_error = error(other_OI, pull_OI)
        if not other_error < best:
            break
        best, fitted_OI, keep_OI = other_error, other_OI, other_keep_OI
    return fitted_OI, keep_OI
