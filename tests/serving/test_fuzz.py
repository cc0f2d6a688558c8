"""Some hundred of the malformed requests of benchmarks/serving_fuzz.py: only 4xx, and the server goes on."""

import importlib.util
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

from serving_helpers import Running

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "serving_fuzz.py"


def fuzz() -> ModuleType:
    spec = importlib.util.spec_from_file_location("serving_fuzz", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["serving_fuzz"] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def test_malformed_requests_are_refused_and_change_nothing(tiny: Running) -> None:
    script = fuzz()
    statuses: Counter[int] = Counter()
    wrong = []
    for case in script.cases(seed=1, count=400):
        status = script.exchange(tiny.port, case.sent, ends=case.ends)
        statuses[status] += 1
        wrong += [found] if (found := script.judge(case, status)) else []
    assert not wrong
    assert {400, 404, 405, 413, 415, 431} <= set(statuses), statuses
    assert statuses[400] > 200 and statuses[200] + statuses[0] < 50, statuses
    assert script.healthy(tiny.port) and tiny.service.engine.idle
