"""Criteria of importance: how much a head or a neuron mattered to the tokens of one sequence.

The output A of a head group is its context. That of a neuron is its activation h (in a gated layer
h = act(gate)·up). The exact gradient of the language-model loss is g = ∂L/∂A. Means and sums run over the tokens t:

    energy     √(mean_t A²)             times √(mean g²) of the unit over the calibration text (see `methods.shadow`)
    plainact   Σ_t |⟨g_t, A_t⟩|         first order: the change of the loss without it
    fisher     √(Σ_c mean_t (A_c·g_c)²) second order, diagonal; the root ranks alike and varies less
    grad_norm  ‖g‖
    l2         ‖A‖                      the norm of "DejaVu-style" predictors
    snip       Σ |g|

Source: the released code of ShadowLLM (Akhauri et al. 2024), for the heads of OPT. For its neurons that code takes the
pre-activation z (fisher, l2) or the rows of the first matrix (plainact Σ_k |W_jk·∂L/∂W_jk|, grad_norm). Here all
criteria of neurons use h, which is what a mask skips and what gated layers have. For ReLU z·∂L/∂z = h·∂L/∂h, so fisher
is the same. `energy` is ours: the output that a skipped unit loses, weighted by the mean gradient there. It needs no
gradient of the sequence itself.

Legend: B sequences, T tokens, C channels, G units, K channels of a unit.
"""

from collections.abc import Callable

from torch import Tensor

from niwaki.runtime.contextual.units import mean_square

CRITERIA = ("energy", "plainact", "fisher", "grad_norm", "l2", "snip")
WITHOUT_GRADIENTS = ("energy", "l2")


def score(criterion: str, kind: str, x_BTC: Tensor, grad_BTC: Tensor | None, count: int) -> Tensor:
    """Return the importance [B, G] of `count` units of a kind, float32; some criteria need `grad_BTC`."""
    if criterion == "energy":
        return mean_square(x_BTC, count).sqrt()
    x_BTGK = x_BTC.float().unflatten(2, (count, -1))
    if criterion == "l2":
        norm_BG: Tensor = x_BTGK.square().sum((1, 3)).sqrt()
        return norm_BG
    assert grad_BTC is not None, f"{criterion} needs gradients"
    return _WITH_GRADIENTS[criterion](kind, x_BTGK, grad_BTC.float().unflatten(2, (count, -1)))


def _plainact(kind: str, x_BTGK: Tensor, grad_BTGK: Tensor) -> Tensor:
    product_BTGK = x_BTGK * grad_BTGK
    if kind == "heads":  # a head is one unit; neighbouring neurons are a sum of single ones
        return product_BTGK.sum(3).abs().sum(1)
    return product_BTGK.abs().sum((1, 3))


def _fisher(kind: str, x_BTGK: Tensor, grad_BTGK: Tensor) -> Tensor:
    fisher_BG: Tensor = (x_BTGK * grad_BTGK).square().mean(1).sum(2).sqrt()
    return fisher_BG


def _grad_norm(kind: str, x_BTGK: Tensor, grad_BTGK: Tensor) -> Tensor:
    return grad_BTGK.square().sum((1, 3)).sqrt()


def _snip(kind: str, x_BTGK: Tensor, grad_BTGK: Tensor) -> Tensor:
    return grad_BTGK.abs().sum((1, 3))


_WITH_GRADIENTS: dict[str, Callable[[str, Tensor, Tensor], Tensor]] = {
    "plainact": _plainact,
    "fisher": _fisher,
    "grad_norm": _grad_norm,
    "snip": _snip,
}
