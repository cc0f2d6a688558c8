"""Times of GPU kernels: CUDA graphs of many copies, replayed in turns, and the bandwidth of the same run."""

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

COPIES_BYTES = 160 * 2**20  # weights of all copies of a layer: three times the second-level cache of an H100
COPY_BYTES = 2 * 2**30


def graph_of(works: list[Callable[[], object]]) -> Callable[[], None]:
    """Return one launch of all works in order. Each runs before, so that nothing is compiled or loaded inside."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for work in works:
            work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for work in works:
            work()
    return graph.replay


def interleaved(runs: dict[str, tuple[Callable[[], None], int]], seconds: float) -> dict[str, float]:
    """Return the median microseconds of one work per run, measured in turns for `seconds`.

    A run comes with the number of works that it holds.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    stop = time.perf_counter() + seconds
    for turn in range(10_000):
        for name, (run, count) in runs.items():
            begin.record()
            run()
            end.record()
            end.synchronize()
            if turn > 1:
                times[name].append(begin.elapsed_time(end) * 1e3 / count)
        if time.perf_counter() > stop and turn > 5:
            break
    return {name: statistics.median(found) for name, found in times.items()}


def bandwidth() -> float:
    """Return the bytes per second of a copy, read and written."""
    source = torch.ones(COPY_BYTES // 4, device="cuda")
    target = torch.empty_like(source)
    times = interleaved({"copy": (graph_of([partial(target.copy_, source)]), 1)}, 0.3)
    return 2 * source.nbytes / times["copy"] * 1e6


def copies_of(nbytes: int) -> int:
    """Return how many copies of a layer of `nbytes` are larger than the caches."""
    return max(2, -(-COPIES_BYTES // nbytes))


def relative_error(found_NO: Tensor, x_NI: Tensor, weight_OI: Tensor) -> float:
    """Return the error against a float64 product. Not a number counts as infinitely wrong."""
    expected_NO = x_NI.double() @ weight_OI.double().T
    error = float((found_NO.double() - expected_NO).norm() / expected_NO.norm())
    return error if error == error else float("inf")
