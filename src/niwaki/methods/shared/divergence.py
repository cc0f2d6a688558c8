"""Divergence of the logits of a compressed model from those of its dense model, and its gradient, in slices.

Hidden states after the last block pass final norm and LM head, one slice of positions after another (`model.logits`).
The head treats every position alone. So the gradient of each slice is made with its value, and its logits are freed
before the next slice. What is kept is as large as the hidden states.

Legend: B windows, T tokens, N positions of a slice, D hidden size, V vocabulary.

    errors_BT = logit_divergences(stream.decoder, dense.decoder, ids_BT, y_BTD, dense_BTD)
"""

from typing import Any

import torch
from torch import Tensor

from niwaki.model.decoder import Decoder
from niwaki.model.logits import logits_of_part


def divergence(wanted_NV: Tensor, logits_NV: Tensor) -> Tensor:
    """Return KL(dense ‖ compressed) per position [N] of the logits of both models."""
    log_p_NV, log_q_NV = wanted_NV.log_softmax(-1), logits_NV.log_softmax(-1)
    return (log_p_NV.exp() * (log_p_NV - log_q_NV)).sum(-1)


def logit_divergences(decoder: Decoder, dense: Decoder, ids_BT: Tensor, y_BTD: Tensor, dense_BTD: Tensor) -> Tensor:
    """Return KL(dense ‖ compressed) of every position [B, T], differentiable in `y_BTD`.

    Both hidden states are those after the last block, each of its own decoder. Sums are float32, or wider if the
    logits are.
    """
    out: Tensor = _LogitDivergence.apply(y_BTD, dense_BTD, ids_BT, decoder, dense)
    return out


class _LogitDivergence(torch.autograd.Function):
    """Divergence per position, with its gradient made in the forward: each position depends on its own state alone."""

    @staticmethod
    def forward(ctx: Any, y_BTD: Tensor, dense_BTD: Tensor, ids_BT: Tensor, decoder: Decoder, dense: Decoder) -> Tensor:
        learns = ctx.needs_input_grad[0]
        leaf_BTD = y_BTD.detach().requires_grad_(learns)
        grad_BTD = torch.zeros_like(leaf_BTD) if learns else None
        found = []
        for part in decoder.position_slices(ids_BT.numel()):
            with torch.no_grad():
                wanted_NV = _wide(logits_of_part(dense.logits, ids_BT, dense_BTD.detach(), part))
            with torch.set_grad_enabled(learns):
                found_N = divergence(wanted_NV, _wide(logits_of_part(decoder.logits, ids_BT, leaf_BTD, part)))
                if grad_BTD is not None:
                    grad_BTD += torch.autograd.grad(found_N.sum(), [leaf_BTD])[0]
            found.append(found_N.detach())
            del wanted_NV, found_N  # its graph holds logits
        ctx.save_for_backward(*([] if grad_BTD is None else [grad_BTD]))
        return torch.cat(found).view(ids_BT.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_BTD,) = ctx.saved_tensors
        by_position_BT = grads[0].reshape(*grad_BTD.shape[:2], *[1] * (grad_BTD.dim() - 2))
        return (grad_BTD * by_position_BT).to(grad_BTD.dtype), None, None, None, None


def _wide(logits_NV: Tensor) -> Tensor:
    return logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()
