"""How much a head or a neuron mattered to the tokens of one sequence.

A is what a unit puts out: the context of a group of heads, or the activations h of neurons (of a gated layer
h = act(gate)·up), and g = ∂L/∂A, the exact gradient of the language-model loss. For each of them, over the tokens t:

    energy     √(mean_t A²)             times √(mean g²) of the unit over the calibration text (see `methods.shadow`)
    plainact   Σ_t |⟨g_t, A_t⟩|         first order: what the loss would change by without it
    fisher     √(Σ_c mean_t (A_c·g_c)²) second order, diagonal; as a root, which ranks alike and varies less
    grad_norm  ‖g‖
    l2         ‖A‖                      the norm that "DejaVu-style" predictors were trained on
    snip       Σ |g|

Source: the released code of ShadowLLM (Akhauri et al. 2024), for the heads of OPT. For its neurons that code takes the
pre-activation z (fisher, l2) or the rows of the first matrix (plainact Σ_k |W_jk·∂L/∂W_jk|, grad_norm). Here all
criteria of neurons are taken at h, which is what is skipped and what gated layers have; for ReLU z·∂L/∂z = h·∂L/∂h, so
fisher is the same. `energy` is ours: what a skipped unit takes away, weighed by how much its place matters,
which needs no gradient of the sequence at hand.

Legend: B sequences, T tokens, C channels, G units, K channels of a unit.
"""

from collections.abc import Callable

from torch import Tensor

from niwaki.runtime.contextual.units import mean_square

CRITERIA = ("energy", "plainact", "fisher", "grad_norm", "l2", "snip")
WITHOUT_GRADIENTS = ("energy", "l2")


def score(criterion: str, kind: str, x_BTC: Tensor, grad_BTC: Tensor | None, count: int) -> Tensor:
    """The importance [B, G] of `count` units of a kind, float32; `grad_BTC` where the criterion needs it."""
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
    if kind == "heads":  # a head goes as a whole, neighbouring neurons are a sum of single ones
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
