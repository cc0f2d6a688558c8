"""Simulated roll-outs through the real decision: the rate of returned equal canaries, the delay for bad ones.

    python -m benchmarks.serving.rollout_simulated benchmarks/results/serving/rollout-simulated.json

Requests, latencies and audits are drawn, not served. An interval has 500 requests of the canary, 100 pairs of latencies
and 40 audits. Latencies are lognormal with sigma 0.3 on each side. Agreements are beta with mean 0.97 and the spread of
20 tokens. Log-ratios of perplexity have mean 0.02 and deviation 0.1. `borderline` lies exactly on the limit of
agreement. Cost: minutes on one core.
"""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common.provenance import provenance
from niwaki.rollout.decision import Policy, decide
from niwaki.rollout.histogram import Interval
from niwaki.rollout.signals import SIGNALS

POLICY = Policy()
LIMITS = {
    "error_rate": 0.002, "prefill_latency_ratio": 1.5, "decode_latency_ratio": 1.5, "top1_agreement": 0.9,
    "perplexity_ratio": 1.1,
}  # fmt: skip
MOST = 40
KINDS: dict[str, dict[str, Any]] = {
    "equal": {},
    "borderline agreement": {"agreement": 0.9},
    "2 % errors": {"errors": 0.02},
    "2× latency": {"slow": 2.0},
    "agreement 0.8": {"agreement": 0.8},
    "2 % errors from interval 5": {"errors": 0.02, "begins": 5},
    "agreement 0.8 from interval 5": {"agreement": 0.8, "begins": 5},
}


def roll_out(
    seed: int, errors: float = 0.0, slow: float = 1.0, agreement: float = 0.97, begins: int = 1
) -> tuple[str, int]:
    """Return the end of a roll-out and its number of intervals."""
    rng, step, seen = np.random.default_rng(seed), 0, []
    for number in range(1, MOST + 1):
        bad = number >= begins
        own = Interval(number, step, 60.0 * number)
        for failed in rng.random(POLICY.min_requests) < (errors if bad else 0.0):
            own.observe("error_rate", float(failed))
        for name in ("prefill_latency_ratio", "decode_latency_ratio"):
            for log in rng.normal(0, 0.3, 100) - rng.normal(0, 0.3, 100):
                own.observe(name, SIGNALS[name].scaled(float(np.exp(log)) * (slow if bad else 1.0)))
        mean = agreement if bad else 0.97
        for value in rng.beta(20 * mean, 20 * (1 - mean), 40):
            own.observe("top1_agreement", float(value))
        for log in rng.normal(0.02, 0.1, 40):
            own.observe("perplexity_ratio", SIGNALS["perplexity_ratio"].scaled(float(np.exp(log))))
        seen.append(own)
        verdict = decide(POLICY, LIMITS, step, seen)
        if verdict.action == "return":
            return "returned", number
        step += verdict.action == "widen"
        if step == len(POLICY.steps) and begins == 1:
            return "promoted", number
        step = min(step, len(POLICY.steps) - 1)
    return "held", MOST


def main() -> None:
    """Write one row per kind of canary."""
    out, count = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 200
    rows = []
    for name, how in KINDS.items():
        ends = [roll_out(seed, **how) for seed in range(count)]
        begins = how.get("begins", 1)
        after = [number - begins + 1 for end, number in ends if end == "returned" and number >= begins]
        rows.append(
            {
                "canary": name,
                "ends": dict(Counter(end for end, _ in ends)),
                "returned_frac": sum(end == "returned" for end, _ in ends) / count,
                "returned_within_two_intervals_frac": sum(number <= 2 for number in after) / count,
                "intervals_median": float(np.median([number for _, number in ends])),
            }
        )
        print(rows[-1])
    what = f"{count} simulated roll-outs of each kind of canary, {POLICY.min_requests} requests an interval"
    found = {"what": what, **provenance("cpu"), "policy": POLICY.model_dump(), "limits": LIMITS, "rows": rows}
    out.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
