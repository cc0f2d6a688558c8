"""Limits of `niwaki serve` under load, attack and failure, checked on real processes.

Every test runs the server on the sapling in processes of its own, over loopback sockets. The tests have the numbers of
the project's list for production: 13 to 15 and 24 (`reach_load`), 17, 18, 22 and 23 (`reach_limits`), 19 to 21
(`reach_ends`). 16 is `serving_fuzz`. A test that runs again replaces its row. See README.md beside this file.

    python -m tests.system.serving.serving_reach --out benchmarks/results/serving/serving-reach-cpu.json
    python -m tests.system.serving.serving_reach --only 13 18 --out benchmarks/results/serving/serving-reach-cpu.json
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common.provenance import provenance
from tests.system.serving import reach_ends, reach_limits, reach_load

FUZZ = Path(__file__).parents[3] / "benchmarks/results/serving/serving-fuzz-cpu.json"


def fuzzed() -> dict[str, Any]:
    """Return the row of test 16 from the result of `serving_fuzz`."""
    found = json.loads(FUZZ.read_text(encoding="utf-8"))
    fives = sum(count for status, count in found["statuses"].items() if status.startswith("5"))
    return {
        "what": "malformed requests: results/serving/serving-fuzz-cpu.json",
        "limit": "10,000 of them: only 4xx, no 5xx, no restart",
        "figure": {"cases": found["cases"], "statuses": found["statuses"], "restarts": found["restarts"]},
        "passed": found["cases"] >= 10_000 and not fives and not found["restarts"] and not found["failures"],
    }


TESTS: dict[int, Callable[[], dict[str, Any]]] = {
    13: reach_load.overload,
    14: reach_load.cancelled_streams,
    15: reach_load.cancelled_in_queue,
    16: fuzzed,
    17: reach_limits.too_large_and_too_slow,
    18: reach_limits.beyond_context,
    19: reach_ends.timeouts,
    20: reach_ends.terminated,
    21: reach_ends.killed,
    22: reach_limits.keys,
    23: reach_limits.templates,
    24: reach_load.counted,
}


def main() -> None:
    """Run the tests, and write their rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", type=int, nargs="+", choices=TESTS, default=list(TESTS))
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    about = provenance("cpu")
    found = json.loads(args.out.read_text(encoding="utf-8"))["tests"] if args.out.is_file() else {}
    for number in args.only:
        row = TESTS[number]()
        found[str(number)] = {**row, "date": about["date"], "command": about["command"]}
        print(number, "passed" if row["passed"] else "FAILED", json.dumps(row["figure"]), flush=True)
        result = {
            "what": "`niwaki serve` of the sapling, a process of its own, over loopback sockets",
            **about,
            "tests": dict(sorted(found.items(), key=lambda item: int(item[0]))),
        }
        args.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    sys.exit(not all(row["passed"] for row in found.values()))


if __name__ == "__main__":
    main()
