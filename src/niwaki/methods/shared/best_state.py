"""Parts that every gradient descent here shares: a cosine schedule, and the state with the lowest held-out error."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from niwaki.data.hidden_states import choose_place
from niwaki.model.device import to_host


def cosine(step: int, steps: int) -> float:
    """Return the factor of the learning rate: 1 at the first step, nearly 0 at the last."""
    return (1 + math.cos(math.pi * step / steps)) / 2


class BestState:
    """State of `tensors` at the lowest held-out error so far; the start, if the error never fell.

    On a GPU the copy is stored where hidden states of its size would be.
    """

    def __init__(self, tensors: Sequence[Tensor], error: float) -> None:
        self.tensors = tensors
        self.start_error = self.error = error
        nbytes, device = sum(tensor.nbytes for tensor in tensors), tensors[0].device
        keep = to_host if device.type == "cuda" and choose_place(nbytes, device) != "device" else torch.clone
        self._kept = [keep(tensor.detach()) for tensor in tensors]

    @property
    def kept(self) -> list[Tensor]:
        """Return the kept state."""
        return self._kept

    @property
    def improved(self) -> bool:
        """Return whether any offered error was lower than the first."""
        return self.error < self.start_error

    @property
    def detail(self) -> dict[str, float]:
        """Return the fields for the line of a matrix in blocks.jsonl."""
        return {"heldout_error_start": self.start_error, "heldout_error": self.error}

    @torch.no_grad()
    def offer(self, error: float) -> None:
        """Keep the present state if its error is the lowest so far."""
        if error < self.error:
            self.error = error
            for kept, tensor in zip(self._kept, self.tensors, strict=True):
                kept.copy_(tensor, non_blocking=True)

    @torch.no_grad()
    def restore(self) -> None:
        """Copy the kept state back into the tensors."""
        for kept, tensor in zip(self._kept, self.tensors, strict=True):
            tensor.copy_(kept, non_blocking=True)
