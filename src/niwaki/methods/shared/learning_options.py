"""Options that all learning methods share, with what they need of the walk and what they cost.

`block_training` does the learning that they ask for.
"""

import math
from dataclasses import replace
from typing import Annotated, Protocol

from niwaki.data.statistics import Needs
from niwaki.methods.cost import Scope, Work, learning

TARGETS = ("block", "dense", "both")
RECONSTRUCTIONS = ("block", "parts", "both")
NORMALIZATIONS = ("token", "channel", "released")
MAX_CHECKS = 5  # held-out measurements; with a cosine schedule the last is nearly always the best
OPTIMIZERS = ("adam", "rmsprop")
LearningTarget = Annotated[
    str,
    "Output to learn: that of the dense block on the same inputs (block), "
    "that in the dense model (dense), or the mean of both (both).",
]
Reconstruct = Annotated[
    str,
    "Output that weights are learned from: that of the block (block), that of attention for its matrices and that of "
    "the block for all others (parts), or both errors together (both).",
]

Ahead = Annotated[
    int, "Blocks after this one, dense, whose outputs count as well; each costs about as much time as the block."
]
LogitDivergence = Annotated[
    float,
    "Weight of the divergence of logits from the dense model (nats) beside the squared error, where the error reaches "
    "the last block: there, and `ahead` blocks before it; 0 for none.",
]


class LearningConfig(Protocol):
    """Options that the Configs of all learning methods have."""

    @property
    def samples(self) -> int:
        """Return the windows per round."""

    @property
    def batch(self) -> int:
        """Return the windows per step."""

    @property
    def rate_frac(self) -> float:
        """Return the length of a step as a share of the RMS of a parameter."""


def learning_needs(batch: int, target: str, ahead: int = 0, kl: float = 0.0) -> Needs:
    """Ask for norms to rank by, windows to learn from, and blocks `ahead`.

    Ask for the dense stream too if the target or the divergence of logits uses it.
    """
    dense = target != "block" or kl > 0
    return Needs(sqnorm=True, learn_batches=frozenset({1, batch}), dense=dense, ahead=ahead)


def learning_cost(
    scope: Scope,
    rounds: int,
    samples: int,
    batch: int,
    *,
    copies: float = 3.5,
    passes: float = 14,
    reconstruct: str = "block",
    ahead: int = 0,
    kl: float = 0.0,
) -> Work:
    """Count the work of the training of one block with its measurements (see `cost.learning`); none without rounds.

    A block `ahead` costs as much as the block: a forward of the outputs and one of the targets, and a backward pass.
    With `kl`, the logits of both models of every window that is learned or measured count too.
    """
    if not rounds:
        return Work()
    held = scope.windows // 8 or scope.windows
    batch = min(batch, max(1, scope.windows - held))
    steps, checks = rounds * math.ceil(samples / batch), min(MAX_CHECKS, rounds)
    work = learning(scope, steps, batch, checks=checks, copies=copies, passes=passes)
    further = learning(scope, steps, batch, checks=2 * checks, copies=0, passes=0) * ahead
    held_values = work.held_values + ahead * (scope.weights + further.held_values)
    work = replace(work + further, held_values=held_values)
    logits = Work(logit_tokens=(steps * batch + (checks + 1) * held) * scope.tokens) if kl else Work()
    return work + attention_cost(scope, steps * batch, reconstruct) + logits


def attention_cost(scope: Scope, windows: int, reconstruct: str) -> Work:
    """Count the forward of dense attention, about a third of a block, if `windows` learn it apart."""
    return Work() if reconstruct == "block" else Work(forward_tokens=windows * scope.tokens / 3)


def check_learning_options(
    target: str,
    optimizer: str = "adam",
    reconstruct: str = "block",
    normalize: str = "token",
    ahead: int = 0,
    kl: float = 0.0,
) -> None:
    """Raise ValueError unless all are known, and go together."""
    if not 0 <= kl < math.inf:
        raise ValueError(f"expected kl ≥ 0, got {kl}")
    if ahead < 0 or (ahead and reconstruct != "block"):
        raise ValueError(f"expected ahead ≥ 0, and reconstruct=block with it, got {ahead} and {reconstruct}")
    if normalize not in NORMALIZATIONS:
        raise ValueError(f"normalize must be one of {', '.join(NORMALIZATIONS)}, got {normalize!r}")
    if normalize != "token" and reconstruct != "block":
        raise ValueError(f"normalize={normalize} divides the error of the whole block: it needs reconstruct=block")
    if reconstruct not in RECONSTRUCTIONS:
        raise ValueError(f"reconstruct must be one of {', '.join(RECONSTRUCTIONS)}, got {reconstruct!r}")
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {optimizer!r}")
    if target not in TARGETS:
        raise ValueError(f"target must be one of {', '.join(TARGETS)}, got {target!r}")
