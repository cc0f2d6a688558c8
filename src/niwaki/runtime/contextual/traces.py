"""Training samples of a predictor: features of many prompts, and what mattered to the text that followed.

A sample is a window cut in two: its first tokens are a prompt, the others the continuation. All features come from the
prompt alone, all scores from the continuation alone.

Size: two numbers per unit and sample in bfloat16, and the features. `nbytes` computes it.

Legend: N samples, U units, D hidden size, L blocks.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from niwaki.runtime.contextual.units import UnitLayout

STORED = torch.bfloat16  # three digits, and the range of gradients


@dataclass(frozen=True)
class Traces:
    """Samples of one model.

    `last_ND`: the output of the heads of the first block at the last prompt token. `mean_ND`: its mean over the prompt.
    `prompt_NU`: root mean square of every unit over the prompt. `score_NU`: the criterion over the continuation.
    `sensitivity_U`: root mean square of the gradient at each unit, of the loss over all tokens of a window.
    """

    last_ND: Tensor
    mean_ND: Tensor
    prompt_NU: Tensor
    score_NU: Tensor
    sensitivity_U: Tensor

    def __len__(self) -> int:
        return len(self.last_ND)

    def take(self, rows: slice | Tensor) -> "Traces":
        """Return some of the samples."""
        return Traces(
            self.last_ND[rows], self.mean_ND[rows], self.prompt_NU[rows], self.score_NU[rows], self.sensitivity_U
        )

    def to(self, device: torch.device) -> "Traces":
        """Return the samples on another device."""
        return Traces(**{name: tensor.to(device) for name, tensor in vars(self).items()})


def nbytes(samples: int, layout: UnitLayout, hidden: int) -> int:
    """Return the bytes of the traces of `samples` samples."""
    return samples * (2 * layout.size * STORED.itemsize + 2 * hidden * 4)


def prompt_lengths(tokens: int, cuts: int) -> list[int]:
    """Return the prompt lengths of the samples of a window: `cuts` lengths, evenly up to half of the window."""
    return [tokens * (cut + 1) // (2 * cuts) for cut in range(cuts)]
