"""Paired accuracy of both models on the same questions, and the answers that flip.

Equal accuracies can hide many flips in both directions (Dutta et al. 2024, "Accuracy is not all you need"). So both
directions are counted, and McNemar's test gives the probability of this result if they were equally likely.

    task_quality("arc.jsonl", items, dense_likelihoods, likelihoods, 0.95, rng)
"""

from collections.abc import Sequence

import numpy as np

from niwaki.measure.compare.token_metrics import make_estimate
from niwaki.measure.evaluate.tasks import Item, choices
from niwaki.measure.intervals import loss_interval, mcnemar
from niwaki.measure.schema import Flip, PairedAccuracy, TaskQuality

MAX_FLIPS = 20  # kept with their texts
CONTEXT_CHARACTERS = 400  # kept from the end of a context
Likelihoods = list[list[float]]


def task_quality(
    path: str,
    items: Sequence[Item],
    dense: Likelihoods,
    candidate: Likelihoods,
    confidence: float,
    rng: np.random.Generator,
) -> TaskQuality:
    """Return accuracies, flips and the interval of the loss, by likelihood and by likelihood per character."""
    questions = list(items)
    dense_choices, own_choices = choices(questions, dense), choices(questions, candidate)
    plain = _paired(questions, dense_choices[0], own_choices[0], confidence, rng)
    flips = []
    for number in sorted([*plain.right_to_wrong, *plain.wrong_to_right])[:MAX_FLIPS]:
        pairs, gold = questions[number].pairs, questions[number].gold
        flips.append(
            Flip(
                question=number,
                context=pairs[gold][0][-CONTEXT_CHARACTERS:],
                right=pairs[gold][1],
                dense=pairs[dense_choices[0][number]][1],
                candidate=pairs[own_choices[0][number]][1],
            )
        )
    return TaskQuality(
        task=path,
        questions=len(questions),
        accuracy=plain,
        accuracy_norm=_paired(questions, dense_choices[1], own_choices[1], confidence, rng),
        flips=tuple(flips),
    )


def _paired(
    items: Sequence[Item], dense: list[int], candidate: list[int], confidence: float, rng: np.random.Generator
) -> PairedAccuracy:
    dense_right = [choice == item.gold for choice, item in zip(dense, items, strict=True)]
    right = [choice == item.gold for choice, item in zip(candidate, items, strict=True)]
    lost = tuple(number for number in range(len(items)) if dense_right[number] and not right[number])
    won = tuple(number for number in range(len(items)) if right[number] and not dense_right[number])
    return PairedAccuracy(
        dense_accuracy=sum(dense_right) / len(items),
        accuracy=sum(right) / len(items),
        loss=make_estimate(loss_interval(len(lost), len(won), len(items), confidence, rng), len(items)),
        mcnemar_p=mcnemar(len(lost), len(won)),
        right_to_wrong=lost,
        wrong_to_right=won,
    )
