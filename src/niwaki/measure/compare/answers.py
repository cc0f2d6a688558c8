"""Both models on the same questions: what each answers, and which answers flip.

Equal accuracies can hide many flips, as many for the better as for the worse (Dutta et al. 2024, "Accuracy is not all
you need"); so both directions are counted, and McNemar's test asks whether they are equally likely.

    task_quality("arc.jsonl", items, dense_likelihoods, likelihoods, 0.95, rng)
"""

from collections.abc import Sequence

import numpy as np

from niwaki.measure.compare.token_metrics import estimate
from niwaki.measure.evaluate.tasks import Item, choices
from niwaki.measure.intervals import loss_interval, mcnemar
from niwaki.measure.schema import Flip, Paired, TaskQuality

FLIPS = 20  # shown with their texts
CONTEXT = 400  # characters of a context that are shown, its end
Likelihoods = list[list[float]]


def task_quality(
    path: str,
    items: Sequence[Item],
    dense: Likelihoods,
    candidate: Likelihoods,
    confidence: float,
    rng: np.random.Generator,
) -> TaskQuality:
    """Accuracy of both, flips, and the interval of the difference, by likelihood and by likelihood per character."""
    questions = list(items)
    theirs, ours = choices(questions, dense), choices(questions, candidate)
    plain = _paired(questions, theirs[0], ours[0], confidence, rng)
    flips = []
    for number in sorted([*plain.right_to_wrong, *plain.wrong_to_right])[:FLIPS]:
        pairs, gold = questions[number].pairs, questions[number].gold
        flips.append(
            Flip(
                question=number,
                context=pairs[gold][0][-CONTEXT:],
                right=pairs[gold][1],
                dense=pairs[theirs[0][number]][1],
                candidate=pairs[ours[0][number]][1],
            )
        )
    return TaskQuality(
        task=path,
        questions=len(questions),
        accuracy=plain,
        accuracy_norm=_paired(questions, theirs[1], ours[1], confidence, rng),
        flips=tuple(flips),
    )


def _paired(
    items: Sequence[Item], dense: list[int], candidate: list[int], confidence: float, rng: np.random.Generator
) -> Paired:
    dense_right = [choice == item.gold for choice, item in zip(dense, items, strict=True)]
    right = [choice == item.gold for choice, item in zip(candidate, items, strict=True)]
    lost = tuple(number for number in range(len(items)) if dense_right[number] and not right[number])
    won = tuple(number for number in range(len(items)) if right[number] and not dense_right[number])
    return Paired(
        dense_accuracy=sum(dense_right) / len(items),
        accuracy=sum(right) / len(items),
        loss=estimate(loss_interval(len(lost), len(won), len(items), confidence, rng), len(items)),
        mcnemar_p=mcnemar(len(lost), len(won)),
        right_to_wrong=lost,
        wrong_to_right=won,
    )
