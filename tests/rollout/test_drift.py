"""The alarm: quiet where nothing changes, quick where something does, kept over a restart."""

import json
import random
from collections.abc import Iterator
from pydoc_data.topics import topics

from niwaki.rollout.drift import ALARM, REFERENCE, DriftTest, DriftWatch, PromptReference
from support.rollouts import WORDS

PAGES = [text[at : at + 400] for text in topics.values() for at in range(0, len(text) - 400, 400)]


def garden(rng: random.Random) -> Iterator[str]:
    """Prompts about one thing."""
    while True:
        yield "the " + " of the ".join(rng.choice(WORDS) for _ in range(12))


def documentation(rng: random.Random) -> Iterator[str]:
    """Prompts of Python's documentation."""
    while True:
        yield rng.choice(PAGES)


def test_no_alarm_where_nothing_changes() -> None:
    for seed in range(3):
        rng = random.Random(seed)
        drift = DriftTest("none")
        for _ in range(1500):
            drift.add(rng.random(), rng)
        assert not drift.alarm and drift.strength < ALARM / 10
    for kind in (garden, documentation):
        watch, texts = DriftWatch(rng=random.Random(5)), kind(random.Random(5))
        for _ in range(400):
            watch.add(next(texts), 0.9, 1)
        assert watch.alarms == []


def test_other_prompts_raise_the_alarm_soon_and_only_that_one() -> None:
    for first, then in ((garden, documentation), (documentation, garden)):
        rng = random.Random(2)
        watch, before, after = DriftWatch(rng=rng), first(rng), then(rng)
        for _ in range(300):
            watch.add(next(before), rng.gauss(0.9, 0.03), 1)
        assert watch.alarms == []
        needed = 0
        while not watch.alarms:
            watch.add(next(after), rng.gauss(0.9, 0.03), 1)
            needed += 1
        assert needed <= 45
        assert watch.alarms == ["the prompts changed in interval 1: quality needs new proof"]
        assert watch.since == 2


def test_falling_agreement_raises_the_other_alarm() -> None:
    rng = random.Random(3)
    watch, texts = DriftWatch(rng=rng), garden(rng)
    for _ in range(300):
        watch.add(next(texts), rng.gauss(0.95, 0.03), 1)
    for _ in range(60):
        watch.add(next(texts), rng.gauss(0.80, 0.03), 1)
    assert len(watch.alarms) == 1 and "agreement" in watch.alarms[0]


def test_it_goes_on_after_a_restart() -> None:
    rng = random.Random(4)
    watch, texts = DriftWatch(rng=rng), garden(rng)
    for _ in range(100):
        watch.add(next(texts), rng.gauss(0.95, 0.03), 1)
    again = DriftWatch.from_json(json.loads(json.dumps(watch.as_json())), random.Random(0))
    assert again.as_json() == watch.as_json()
    texts = documentation(rng)
    for _ in range(60):
        again.add(next(texts), 0.95, 7)
    assert len(again.alarms) == 1 and again.since == 8 and watch.alarms == [] and watch.since == 1


def test_after_an_alarm_what_is_there_now_is_usual() -> None:
    rng = random.Random(6)
    watch, texts = DriftWatch(rng=rng), garden(rng)
    for _ in range(150):
        watch.add(next(texts), 0.95, 1)
    texts = documentation(rng)
    for _ in range(400):
        watch.add(next(texts), 0.95, 2)
    assert len(watch.alarms) == 1


def test_only_counts_of_prompts_are_kept() -> None:
    prompts = PromptReference()
    scores = [prompts.surprise("my secret garden") for _ in range(REFERENCE + 1)]
    assert scores[:-1] == [None] * REFERENCE and scores[-1] is not None
    assert "secret" not in json.dumps(prompts.as_json())
    assert prompts.surprise("ab") is None
    assert (prompts.surprise("zq xj vkw!") or 0) > (prompts.surprise("my secret garden") or 0)
