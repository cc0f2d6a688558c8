"""Perplexity, and how far a model's next-token distribution lies from a reference's.

Every window of T tokens predicts its last T−1. Perplexity is exp of the mean negative log-likelihood over all
predicted positions; KL(reference‖model) and top-1 agreement are means over the same positions.

Legend: S windows, T tokens, V vocabulary.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def compare_windows(ids_ST: Tensor, logits: Callable[[int], list[Tensor]]) -> dict[str, float]:
    """Sums over windows, one at a time. `logits(row)` gives [T, V] of the model and, second, of the reference."""
    nll = reference_nll = kl = agree = 0.0
    count = 0
    compared = False
    for row, ids_T in enumerate(ids_ST):
        found = [logits_TV[:-1].log_softmax(-1) for logits_TV in logits(row)]
        model_TV = found[0]
        wanted_T1 = ids_T[1:, None].to(model_TV.device)
        count += len(model_TV)
        nll -= _total(model_TV.gather(1, wanted_T1))
        if len(found) == 2:
            compared = True
            reference_TV = found[1]
            reference_nll -= _total(reference_TV.gather(1, wanted_T1))
            kl += _total(reference_TV.exp() * (reference_TV - model_TV))
            agree += _total(reference_TV.argmax(-1) == model_TV.argmax(-1))
    result = {"perplexity": math.exp(nll / count)}
    if compared:
        result |= {
            "reference_perplexity": math.exp(reference_nll / count),
            "kl": kl / count,
            "top1_agreement": agree / count,
        }
    return result


def _total(values: Tensor) -> float:
    return float(values.sum(dtype=torch.float64))
