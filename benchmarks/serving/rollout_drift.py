"""Delay of the drift alarm of a roll-out until it notices other prompts: reviews, then Python's documentation.

    python -m benchmarks.serving.rollout_drift REVIEWS.jsonl benchmarks/results/serving/rollout-drift.json

Prompts are pieces of 300 to 500 characters in random order. Agreement stays the same. There are twenty seeds. Reviews
followed by reviews give the rate of false alarms. Cost: a minute.
"""

import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics

from benchmarks.common.provenance import provenance
from niwaki.rollout.drift import DriftWatch

BEFORE, AFTER, SEEDS = 500, 300, 20


def pieces(texts: Sequence[str], rng: random.Random) -> list[str]:
    """Cut texts into prompts."""
    found = []
    for text in texts:
        at = 0
        while at + 300 <= len(text):
            size = rng.randrange(300, 501)
            found.append(text[at : at + size])
            at += size
    return found


def alarm_after(before: list[str], after: list[str], seed: int) -> tuple[int, int | None]:
    """Return the alarms before the change, and the audits after it until the alarm."""
    rng = random.Random(seed)
    watch = DriftWatch(rng=rng)
    for prompt in rng.choices(before, k=BEFORE):
        watch.add(prompt, rng.gauss(0.9, 0.03), 1)
    early = len(watch.alarms)
    for count, prompt in enumerate(rng.choices(after, k=AFTER), 1):
        watch.add(prompt, rng.gauss(0.9, 0.03), 2)
        if len(watch.alarms) > early:
            return early, count
    return early, None


def main() -> None:
    """Measure both directions and no change, and write the result."""
    lines = Path(sys.argv[1]).read_text(encoding="utf-8").strip().split("\n")  # a text may have other line ends
    reviews = pieces([json.loads(line)["text"] for line in lines], random.Random(0))
    python = pieces(list(topics.values()), random.Random(0))
    rows = []
    for name, before, after in (
        ("reviews, then Python documentation", reviews, python),
        ("Python documentation, then reviews", python, reviews),
        ("reviews, then reviews", reviews, reviews),
    ):
        found = [alarm_after(before, after, seed) for seed in range(SEEDS)]
        audits = sorted(count for _, count in found if count is not None)
        rows.append(
            {
                "prompts": name,
                "alarms_before": sum(early for early, _ in found),
                "alarms_after": len(audits),
                "audits_until_alarm_median": audits[len(audits) // 2] if audits else None,
                "audits_until_alarm_most": audits[-1] if audits else None,
            }
        )
        print(rows[-1])
    what = f"{SEEDS} seeds, {BEFORE} prompts before the change, at most {AFTER} after it"
    result = {"what": what, **provenance("cpu"), "pieces": [len(reviews), len(python)], "rows": rows}
    out = "benchmarks/results/serving/rollout-drift.json"
    result["command"] = f"python -m benchmarks.serving.rollout_drift REVIEWS.jsonl {out}"
    Path(sys.argv[2]).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
