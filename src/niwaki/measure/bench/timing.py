"""Seconds in turns, the highest memory on the way, and how fast this device reads its memory.

A B A B …: what else the machine does meets both, and what is compared is the ratio within a round.

Cost: a measurement of the bandwidth takes less than a second and 256 MB (CPU) or 2 GB (GPU).
"""

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import psutil
import torch

from niwaki.model.device import peak_rss_bytes, return_free_memory

CPU_BYTES, GPU_BYTES = 2**28, 2**30  # of the tensor that is read
RUNS, GPU_REPEATS = 7, 8
_CLEAR = Path("/proc/self/clear_refs")


def now(device: torch.device) -> float:
    """Seconds, when all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def in_turns(
    works: Sequence[Callable[[], float]],
    rounds: int,
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> list[list[float]]:
    """What every work says it took at each round, one after the other.

    No round begins when `seconds` have passed; one round there always is.
    """
    found: list[list[float]] = [[] for _ in works]
    begin = clock()
    for _ in range(rounds):
        for times, work in zip(found, works, strict=True):
            times.append(work())
        if clock() - begin >= seconds:
            break
    return found


def bandwidth(device: torch.device) -> float:
    """Bytes a second: of a sum over a large tensor with the threads in use; on a GPU of that or a copy, the faster."""
    size = (GPU_BYTES if device.type == "cuda" else CPU_BYTES) // 4
    numbers = torch.ones(size, device=device)
    if device.type != "cuda":
        return numbers.nbytes / _median(numbers.sum, device, 1)
    other = torch.empty_like(numbers)
    read = numbers.nbytes / _median(numbers.sum, device, GPU_REPEATS)
    copied = 2 * numbers.nbytes / _median(lambda: other.copy_(numbers), device, GPU_REPEATS)
    return max(read, copied)


def _median(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    work()
    found = []
    for _ in range(RUNS):
        begin = now(device)
        for _ in range(repeats):
            work()
        found.append((now(device) - begin) / repeats)
    return statistics.median(found)


class Meter:
    """The memory of this process (CPU) or of the device: what there is, and the highest since `begin`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._begin_bytes = 0
        self._known = True

    def level(self) -> int:
        """Bytes in use now; what is freed is given back first."""
        if self.device.type == "cuda":
            return int(torch.cuda.memory_allocated(self.device))
        return_free_memory()
        return int(psutil.Process().memory_info().rss)

    def begin(self) -> None:
        """From here on."""
        self._begin_bytes = self.level()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        self._known = False
        with suppress(OSError):  # only Linux lets a process forget its peak
            _CLEAR.write_text("5")
            self._known = True

    def rise(self) -> int | None:
        """The highest since `begin` beyond what there was then; None where the system does not say."""
        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.device)) - self._begin_bytes
        return max(peak_rss_bytes() - self._begin_bytes, 0) if self._known else None
