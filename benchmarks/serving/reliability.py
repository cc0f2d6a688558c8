"""The 26 demands on reliability, each run at its stated size on real processes: what was asked, what was reached.

    python -m benchmarks.serving.reliability --out benchmarks/results/serving/reliability-cpu.json
    python -m benchmarks.serving.reliability --rows 4,7,12 --out benchmarks/results/serving/reliability-cpu.json

A row that runs again replaces its record. The rows are functions in `tests/system/reliability` (1 to 12) and
`tests/system/serving` (13 to 26). Servers and gateways are processes of their own, over loopback sockets. Cost: an hour
on two cores, and the minutes of the soak. Exit status 1: a row failed.
"""

import argparse
import importlib
import json
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from benchmarks.common.provenance import provenance

ROOT = Path(__file__).parents[2]
# Row: the demand, and the function that runs it.
ROWS: dict[int, tuple[str, str]] = {
    1: (
        "SIGKILL at 20 random points: resumed output byte-identical, ≤ 1 block redone",
        "reliability.interrupted.killed",
    ),
    2: (
        "resume with changed weights, data or config: refused, exit ≠ 0",
        "reliability.interrupted.resumed_from_others",
    ),
    3: (
        "ENOSPC or read-only target: clear error, earlier output intact, 0 partial files",
        "reliability.interrupted.full_or_read_only",
    ),
    4: (
        "flip one byte in each shard × 100: 100 % detected by SHA-256 before serving",
        "reliability.folders.flipped",
    ),
    5: (
        "truncated, overlapping, 100 MB+ header safetensors: 1,000 mutants, 0 crashes, rejection ≤ 1 s",
        "reliability.folders.mutants",
    ),
    6: ("pickle canary (.bin, .pt, .pkl): 0 executions, never loaded", "reliability.code.pickles"),
    7: ("`auto_map` repository without opt-in: 0 executions, also under `python -O`", "reliability.code.auto_map"),
    8: ("symlink, `../`, absolute shard names: 0 reads outside the model's folder", "reliability.folders.outside"),
    9: (
        "NaN or Inf weights or activations, rank-deficient H, dead channels: finite output or named error",
        "reliability.numbers.strange",
    ),
    10: (
        "preflight RAM, VRAM, disk estimate within 15 %; impossible jobs refused ≤ 5 s",
        "reliability.estimates.preflight",
    ),
    11: ("same seed twice: identical masks", "reliability.numbers.twice"),
    12: (
        "packed against dequantized: relative error ≤ 1e-3 float32, ≤ 1e-2 bf16; odd shapes, poisoned outputs; AVX2, "
        "AVX-512 and fallback agree",
        "reliability.products.packed",
    ),
    13: (
        "overload 10 × capacity: rejection P99 ≤ 100 ms, 429 or 503 with Retry-After, accepted 0 % lost, RSS "
        "≤ +100 MB",
        "serving.reach_load.overload",
    ),
    14: (
        "cancel 200 streams: slots free ≤ 1 s, next request ≤ 5 s, other streams unaffected",
        "serving.reach_load.cancelled_streams",
    ),
    15: ("cancel a queued request: active output unchanged", "serving.reach_load.cancelled_in_queue"),
    16: (
        "malformed JSON, types, UTF-8, 10,000 fuzz cases: only 4xx, 0 5xx, 0 restarts",
        "serving.reach_fuzz.fuzzed",
    ),
    17: (
        "body > 2 MB, gzip bomb, 1 MB header, slowloris: 413, 431, 408, memory ≤ +50 MB",
        "serving.reach_limits.too_large_and_too_slow",
    ),
    18: ("prompt over context: 400 naming the limit, ≤ 50 ms after tokenizing", "serving.reach_limits.beyond_context"),
    19: ("queue, first-token and total timeouts: fire within ± 10 %", "serving.reach_ends.timeouts"),
    20: (
        "SIGTERM: readiness 503 ≤ 1 s, in-flight finishes ≤ 30 s, no orphans ≤ 10 s",
        "serving.reach_ends.terminated",
    ),
    21: ("engine killed: health 503 ≤ 5 s, supervised restart, no hang", "serving.reach_ends.killed"),
    22: (
        "API keys: constant-time compare, 401 on every non-health route, keys never logged",
        "serving.reach_limits.keys",
    ),
    23: (
        "template bombs, SSTI: sandboxed, ≤ 100 ms, ≤ 1 MB output; request templates off; URL inputs disabled",
        "serving.reach_limits.templates",
    ),
    24: (
        "metrics totals equal client counts exactly over 10,000 requests; bounded label set",
        "serving.reach_load.counted",
    ),
    25: (
        "canary 5 → 50 % with 2 % errors, 2 × latency or perplexity + 5 %: rollback ≤ 2 intervals, 0 primary errors; "
        "good build promotes; shadow: primary P99 ≤ +2 %",
        "serving.reach_rollout.rolled_out_all",
    ),
    26: ("7 h soak (1 h in CI): 0 failures, RSS slope ≤ 10 MB/h, P99 drift ≤ 10 %", "serving.reach_soak.soaked"),
}


NOT_ASKED: dict[str, Any] = {"reached": "not run", "figure": {}, "passed": None, "not_run": "the row was not asked for"}


def run(number: int, soak_minutes: float) -> dict[str, Any]:
    """Run one row. An exception is a failure with its last line."""
    asked, place = ROWS[number]
    module, _, name = place.rpartition(".")
    function = getattr(importlib.import_module(f"tests.system.{module}"), name)
    began = time.monotonic()
    try:
        found = function(soak_minutes) if number == 26 else function()
    except Exception as error:
        traceback.print_exc()
        found = {"reached": f"{type(error).__name__}: {error}"[:300], "figure": {}, "passed": False}
    return {"asked": asked, **found, "seconds": round(time.monotonic() - began, 1)}


def main() -> None:
    """Run the rows, and write each record as soon as it is there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rows", default=",".join(map(str, ROWS)), help="numbers with commas between them")
    parser.add_argument("--soak-minutes", type=float, default=60)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    sys.path.insert(0, str(ROOT / "tests"))  # for `support`, as pytest does
    about = provenance("cpu")
    for number in map(int, given.rows.split(",")):
        row = run(number, given.soak_minutes)
        print(number, "passed" if row["passed"] else "FAILED", row["reached"], flush=True)
        found = json.loads(given.out.read_text(encoding="utf-8"))["rows"] if given.out.is_file() else {}
        found[str(number)] = {**row, **{key: about[key] for key in ("date", "device", "command")}}
        found = {str(other): {"asked": asked, **NOT_ASKED} for other, (asked, _) in ROWS.items()} | found
        result = {
            "what": "the 26 demands on reliability, on the sapling, tiny models and real processes over loopback",
            **about,
            "rows": dict(sorted(found.items(), key=lambda item: int(item[0]))),
        }
        given.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    sys.exit(any(row["passed"] is False for row in found.values()))


if __name__ == "__main__":
    main()
