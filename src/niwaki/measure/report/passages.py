"""Texts of a comparison for the page: generations side by side, worst examples, tasks with their flips."""

import math
from itertools import pairwise
from typing import Any

from niwaki.measure.report import numbers as show
from niwaki.measure.report.views import Grid, Texts, estimate
from niwaki.measure.schema import Comparison, Example, Generation, PairedAccuracy, TaskQuality, TokenDivergence

STEPS = (0.1, 0.3, 1.0, 2.0)  # nats at which the next colour begins
MAX_DETAILS = 4  # tokens of an example with a row in its table


def generations(t: Texts, comparison: Comparison) -> list[dict[str, Any]]:
    """Return for every prompt the text of the dense model, then those of the candidates with their differences."""
    texts: dict[str, dict[tuple[str, str], dict[str, Any]]] = {}
    for candidate in comparison.candidates:
        for one in candidate.generations:
            group = texts.setdefault(one.prompt, {})
            dense = {"name": t["dense_model"], "same": one.dense_text, "rest": (), "note": ""}
            group.setdefault(("", one.dense_text), dense)
            group[candidate.model.name, ""] = {"name": candidate.model.name, **_compared(t, one)}
    return [{"prompt": prompt, "texts": _dense_first(group)} for prompt, group in texts.items()]


def _dense_first(group: dict[tuple[str, str], dict[str, Any]]) -> list[dict[str, Any]]:
    return [text for key, text in sorted(group.items(), key=lambda one: one[0][0] != "")]


def _compared(t: Texts, one: Generation) -> dict[str, Any]:
    count = len(one.candidate)
    if one.diverges_at is None:
        return {"same": one.candidate_text, "rest": (), "note": t["same_text"].format(count=count)}
    tokens = one.candidate
    if "".join(tokens) != one.candidate_text:  # tokens that are parts of characters cannot be shown alone
        same = _common(one.dense_text, one.candidate_text)
        tokens, place = (one.candidate_text[:same], one.candidate_text[same:]), 1
    else:
        place = one.diverges_at
    rest = [{"text": token, "kind": "first" if not later else "later"} for later, token in enumerate(tokens[place:])]
    note = t["diverges"].format(place=one.diverges_at + 1, count=count)
    return {"same": "".join(tokens[:place]), "rest": rest, "note": note}


def _common(one: str, other: str) -> int:
    pairs = zip(one, other, strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def worst(t: Texts, comparison: Comparison) -> list[dict[str, Any]]:
    """Return the worst passages of every candidate, token by token."""
    return [
        {
            "name": candidate.model.name,
            "examples": [_example(t, number, one) for number, one in enumerate(candidate.worst, start=1)],
        }
        for candidate in comparison.candidates
        if candidate.worst
    ]


def legend() -> list[str]:
    """Return the steps of the colours as text."""
    ends = [f"{step:g}" for step in STEPS]
    return [f"< {ends[0]}", *(f"{low}–{high}" for low, high in pairwise(ends)), f"≥ {ends[-1]}"]


def _example(t: Texts, number: int, one: Example) -> dict[str, Any]:
    domain = f" ({one.domain})" if one.domain else ""
    details = sorted(one.tokens, key=lambda token: -token.kl)[:MAX_DETAILS]
    return {
        "title": t["example"].format(number=number, data=one.data, domain=domain, kl=f"{one.kl:.3f}"),
        "before": one.before,
        "tokens": [_token(t, token) for token in one.tokens],
        "details": [
            {
                "shown": visible(token.token),
                "kl": f"{token.kl:.2f}",
                "dense": visible(token.dense_top1),
                "candidate": visible(token.candidate_top1),
                "probability": f"{_probability(token.dense_nll)} → {_probability(token.candidate_nll)}",
            }
            for token in details
        ],
    }


def _token(t: Texts, token: TokenDivergence) -> dict[str, Any]:
    dense, candidate = visible(token.dense_top1), visible(token.candidate_top1)
    return {
        "text": token.token,
        "level": sum(token.kl >= step for step in STEPS),
        "differs": token.dense_top1 != token.candidate_top1,
        "title": t["token_title"].format(kl=f"{token.kl:.2f}", dense=dense, candidate=candidate),
    }


def visible(token: str) -> str:
    """Return the text of a token with visible white space."""
    return token.replace(" ", "␣").replace("\n", "↵").replace("\t", "⇥") or "∅"


def _probability(nll: float) -> str:
    share = math.exp(-nll)
    return show.percent(share) if share >= 0.001 else "< 0.1%"


def tasks(t: Texts, comparison: Comparison) -> Grid:
    """Return the accuracy of both models on every task, by both scores, and the flips."""
    rows, flips = [], []
    for candidate in comparison.candidates:
        for task in candidate.tasks:
            for key, own in (("by_likelihood", task.accuracy), ("by_characters", task.accuracy_norm)):
                rows.append((task.task, candidate.model.name, t[key], f"{task.questions:,}", *_answers(t, own)))
            if task.flips:
                flips.append(_flips(t, candidate.model.name, task))
    names = ["task", "candidate", "scored_by", "questions", "dense_accuracy", "own_accuracy", "difference"]
    columns = tuple(t[name] for name in [*names, "right_to_wrong", "wrong_to_right", "mcnemar"])
    return Grid(columns, tuple(rows), more={"flips": flips})


def _answers(t: Texts, own: PairedAccuracy) -> tuple[str, ...]:
    p = own.mcnemar_p
    return (
        show.percent(own.dense_accuracy),
        show.percent(own.accuracy),
        estimate(t, show.opposite(own.loss), show.points),
        str(len(own.right_to_wrong)),
        str(len(own.wrong_to_right)),
        "< 0.001" if p < 0.001 else f"{p:.3f}",
    )


def _flips(t: Texts, name: str, task: TaskQuality) -> dict[str, Any]:
    lost, won = len(task.accuracy.right_to_wrong), len(task.accuracy.wrong_to_right)
    made = [
        {
            "question": str(flip.question),
            "kind": t["right_to_wrong" if flip.dense == flip.right else "wrong_to_right"],
            "context": flip.context,
            "right": flip.right,
            "dense": flip.dense,
            "candidate": flip.candidate,
        }
        for flip in task.flips
    ]
    more = ""
    if len(made) < lost + won:
        more = t["and_more"].format(shown=len(made), total=lost + won, file="compare.json")
    title = t["flips_of"].format(name=name, task=task.task, lost=lost, won=won)
    return {"title": title, "flips": made, "more": more}
