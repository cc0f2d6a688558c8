"""What every descent here shares: a cosine schedule, and the state with the lowest held-out error so far."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from niwaki.data.hidden_states import choose_place
from niwaki.model.device import to_host


def cosine(step: int, steps: int) -> float:
    """1 at the first step, falling to nearly 0 at the last."""
    return (1 + math.cos(math.pi * step / steps)) / 2


class BestState:
    """Remembers `tensors` as they were at the lowest error: at the beginning, if it never fell.

    On a GPU the copy lies where hidden states of its size would.
    """

    def __init__(self, tensors: Sequence[Tensor], error: float) -> None:
        self.tensors = tensors
        self.began = self.error = error
        nbytes, device = sum(tensor.nbytes for tensor in tensors), tensors[0].device
        keep = to_host if device.type == "cuda" and choose_place(nbytes, device) != "device" else torch.clone
        self._kept = [keep(tensor.detach()) for tensor in tensors]

    @property
    def improved(self) -> bool:
        """Whether any error offered was lower than the first."""
        return self.error < self.began

    @property
    def detail(self) -> dict[str, float]:
        """What a matrix's line in blocks.jsonl says of it."""
        return {"heldout_error_start": self.began, "heldout_error": self.error}

    @torch.no_grad()
    def offer(self, error: float) -> None:
        """Keeps the present state if its error is the lowest so far."""
        if error < self.error:
            self.error = error
            for kept, tensor in zip(self._kept, self.tensors, strict=True):
                kept.copy_(tensor, non_blocking=True)

    @torch.no_grad()
    def restore(self) -> None:
        """Puts the kept state back."""
        for kept, tensor in zip(self._kept, self.tensors, strict=True):
            tensor.copy_(kept, non_blocking=True)
