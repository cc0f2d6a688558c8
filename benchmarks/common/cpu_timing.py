"""Times and memory of this process on a CPU: works in turns, cold copies, bandwidth, resident bytes."""

import statistics
import time
from collections.abc import Callable
from copy import deepcopy
from itertools import cycle
from pathlib import Path

import torch

COLD_BYTES = 256 * 2**20


def bandwidth() -> float:
    """Return the bytes per second of reading memory. The best of some runs counts: it is a limit."""
    numbers = torch.ones(64 * 2**20)
    times = []
    for _ in range(7):
        begin = time.perf_counter()
        numbers.sum()
        times.append(time.perf_counter() - begin)
    return numbers.nbytes / min(times)


def in_turns(layer: torch.nn.Module, x: torch.Tensor) -> Callable[[], object]:
    """Return a call that runs the next copy of the layer each time."""
    nbytes = sum(tensor.nbytes for tensor in layer.state_dict().values())
    copies = cycle([layer, *(deepcopy(layer) for _ in range(COLD_BYTES // nbytes))])
    return lambda: next(copies)(x)


def interleaved(works: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return the median seconds of each work, measured in turns."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            begin = time.perf_counter()
            work()
            times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(found) for name, found in times.items()}


def resident_bytes() -> int:
    """Return VmRSS of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))
