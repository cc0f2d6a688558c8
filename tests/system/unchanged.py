"""A proof that nothing but names changed: runs everything on small models and compares it with a record.

    python tests/system/unchanged.py            compare with unchanged.json; exit code 1 if anything differs
    python tests/system/unchanged.py --write    write unchanged.json
    python tests/system/unchanged.py --only comp    run the cases whose name holds `comp` (a regular expression)
    python tests/system/unchanged.py --quick    run about ten cases

It calls the public surface alone, so that it runs on the code before and after a refactor. Hashes hold on one version
of torch and one kind of CPU; elsewhere `--counts` compares what no order of sums can change.
"""

import os

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")
os.environ.update(HF_HUB_DISABLE_PROGRESS_BARS="1", TOKENIZERS_PARALLELISM="false", COLUMNS="400")

import argparse
import json
import platform
import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from unchanged_cases import COMPRESSIONS, COUNTED, QUICK
from unchanged_measures import COUNTED_MEASURES, MEASURES, QUICK_MEASURES, compressed
from unchanged_names import command_names, method_names, python_names
from unchanged_reading import Values
from unchanged_world import write_world

# A refactor may rename keys and options on purpose: {new name: old name} of single segments of a key path (the parts
# between slashes). It is applied to what is found now, before the comparison.
RENAMED: dict[str, str] = {
    "candidate_windows": "trial_windows",
    "embeddings": "ends",
    "embeddings_bits": "ends_bits",
    "max_deviation": "most_deviation",
    "max_error": "most_error",
    "max_kept_frac": "most_kept_frac",
    "mean_fill": "stand_in",
    "min_margin": "least_margin",
    "min_prompt": "least_prompt",
    "shrinkage": "trust",
}

# Key paths that are gone on purpose: the manifests are files under examples/kubernetes now.
DELETED = ("niwaki rollout manifest",)

RECORD = Path(__file__).with_suffix(".json")
NAMES = {"names python": python_names, "names commands": command_names, "names methods": method_names}
# Values of a compression that no order of sums can change.
EXACT = ("files", "run/result/matrices", "run/result/bytes", "run/calibration/windows/0", "blocks/bytes")


def vendor() -> str:
    """Return who made the CPU: libraries of linear algebra take other paths for each."""
    about = Path("/proc/cpuinfo")
    found = re.search(r"vendor_id\s*: (\S+)", about.read_text(encoding="utf-8")) if about.exists() else None
    return found[1] if found else platform.machine()


def environment() -> dict[str, Any]:
    """Describe what decides the last bits of a sum."""
    return {
        "cpu_vendor": vendor(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def cases() -> dict[str, Callable[[], Values]]:
    """Return everything there is to run, by name."""
    runs = {name: (lambda name=name: compressed(name)) for name in COMPRESSIONS}
    return {**NAMES, **runs, **MEASURES}


def wanted(only: str | None, quick: bool) -> list[str]:
    """Return the names of the cases that were asked for."""
    names = [*NAMES, *QUICK, *QUICK_MEASURES] if quick else list(cases())
    return [name for name in names if only is None or re.search(only, name)]


def run_all(names: list[str]) -> dict[str, Values]:
    """Run the cases; one that fails is recorded with its error."""
    found: dict[str, Values] = {}
    known = cases()
    for name in names:
        begin = time.perf_counter()
        try:
            found[name] = known[name]()
        except Exception as error:
            found[name] = {"failed": f"{type(error).__name__}: {error}"}
        print(f"{time.perf_counter() - begin:6.1f} s  {name}: {len(found[name])} records", file=sys.stderr, flush=True)
    return found


def exact(cases: dict[str, Values]) -> dict[str, Values]:
    """Keep what is the same on every CPU: names, options, counts of matrices and bytes."""
    kept = {name: values for name, values in cases.items() if name in (*NAMES, *COUNTED_MEASURES)}
    for name in COUNTED:
        if name in cases:
            kept[name] = {path: value for path, value in cases[name].items() if path in EXACT or path == "failed"}
    return kept


def with_old_names(values: Values) -> Values:
    """Replace new names in key paths by the old ones."""
    return {"/".join(RENAMED.get(part, part) for part in path.split("/")): value for path, value in values.items()}


def differences(before: dict[str, Values], now: dict[str, Values]) -> tuple[list[str], list[str]]:
    """Compare two records; return a line for each difference, and one for each addition."""
    differing, added = [], []
    for name, found in now.items():
        old, values = before.get(name), with_old_names(found)
        if "failed" in values:
            differing.append(f"FAILED   {name}: {values['failed']}")
            continue
        if old is None:
            added.append(f"added    {name}")
            continue
        for path in sorted({**old, **values}):
            if path not in values and path.startswith(DELETED):
                added.append(f"deleted  {name}: {path}")
            elif path not in values:
                differing.append(f"REMOVED  {name}: {path} (was {old[path]})")
            elif path not in old:
                added.append(f"added    {name}: {path} = {values[path]}")
            elif old[path] != values[path]:
                differing.append(f"DIFFERS  {name}: {path}\n           was {old[path]}\n           now {values[path]}")
    return differing, added


def compare(found: dict[str, Values], counts: bool) -> int:
    """Print what differs from the record; return the exit code."""
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    before, here = record["cases"], environment()
    same_place = record["environment"] == here
    if not same_place:
        print(f"note: recorded with {record['environment']}, and this is {here}")
        if not counts:
            print("note: hashes and measured numbers may differ for that reason; --counts compares the others")
    if counts and not same_place:
        before, found = exact(before), exact(found)
    differing, added = differences(before, found)
    for line in (*added, *differing):
        print(line)
    total = sum(len(before.get(name, ())) for name in found)
    print(f"{total} records of {len(found)} cases, {len(differing)} differ, {len(added)} added or deleted on purpose")
    return int(bool(differing))


def main() -> int:
    """Run the cases and write or compare the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the record")
    parser.add_argument("--only", metavar="PATTERN", help="regular expression that the names of cases hold")
    parser.add_argument("--quick", action="store_true", help="about ten cases")
    parser.add_argument("--counts", action="store_true", help="with another torch or CPU, compare only what must agree")
    parser.add_argument("--list", action="store_true", help="print the names of the cases")
    given = parser.parse_args()
    names = wanted(given.only, given.quick)
    if given.list:
        print("\n".join(names))
        return 0
    torch.set_num_threads(1)
    home = Path.cwd()
    with tempfile.TemporaryDirectory(prefix="unchanged-") as folder:
        os.chdir(folder)
        write_world()
        found = run_all(names)
        os.chdir(home)
    if not given.write:
        return compare(found, given.counts)
    before = json.loads(RECORD.read_text(encoding="utf-8"))["cases"] if RECORD.exists() and given.only else {}
    content = {"environment": environment(), "cases": {**before, **found}}
    RECORD.write_text(json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    failed = [name for name, values in found.items() if "failed" in values]
    print(f"{sum(map(len, found.values()))} records of {len(found)} cases written, {len(failed)} failed: {failed}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
