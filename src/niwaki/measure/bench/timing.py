"""Interleaved timing, peak memory, and the memory bandwidth of the device.

Two models run in turns (A B A B …), so that other load affects both equally. The ratio within a round is compared.

Cost: a bandwidth measurement takes less than a second and 256 MB (CPU) or 2 GB (GPU).
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
_RESET_PEAK = Path("/proc/self/clear_refs")


def now(device: torch.device) -> float:
    """Return the time in seconds, after all queued work of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def time_in_turns(
    works: Sequence[Callable[[], float]],
    rounds: int,
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> list[list[float]]:
    """Run every work once per round, in turns, and return the seconds that each one reports.

    There is at least one round. No round begins after `seconds`.
    """
    all_times: list[list[float]] = [[] for _ in works]
    begin = clock()
    for _ in range(rounds):
        for times, work in zip(all_times, works, strict=True):
            times.append(work())
        if clock() - begin >= seconds:
            break
    return all_times


def measure_bandwidth(device: torch.device) -> float:
    """Measure the memory bandwidth, bytes/s: of a sum over a large tensor; on a GPU of a sum or a copy, the faster."""
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
    seconds = []
    for _ in range(RUNS):
        begin = now(device)
        for _ in range(repeats):
            work()
        seconds.append((now(device) - begin) / repeats)
    return statistics.median(seconds)


class MemoryMeter:
    """Memory of this process (CPU) or of the device: the level now, and the peak since `begin`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._begin_bytes = 0
        self._peak_known = True

    def level(self) -> int:
        """Return the bytes in use. Freed memory is returned to the system first."""
        if self.device.type == "cuda":
            return int(torch.cuda.memory_allocated(self.device))
        return_free_memory()
        return int(psutil.Process().memory_info().rss)

    def begin(self) -> None:
        """Start the measurement of the peak."""
        self._begin_bytes = self.level()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        self._peak_known = False
        with suppress(OSError):  # only Linux can reset the peak of a process
            _RESET_PEAK.write_text("5")
            self._peak_known = True

    def rise(self) -> int | None:
        """Return the peak since `begin` minus the level at `begin`, None if the system does not report it."""
        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.device)) - self._begin_bytes
        return max(peak_rss_bytes() - self._begin_bytes, 0) if self._peak_known else None
