"""Rates of machines for the work that `niwaki.methods.cost` counts, and their memory.

The CPU of this machine is measured, in about a second: a matrix product, a Cholesky, a sweep, a selection and a copy.
The launch of small operations and the writing of a shard are measured too.

Rates of GPUs are published (data sheets of NVIDIA: dense bf16 with float32 accumulation, float32, memory), times the
shares that we reached. `_REACHED` is fitted to benchmarks/results/speed/compression-speed-7b-*.json and -70b-h100.json
(H100 and H200; 17 rows, 0.81 to 1.20 of each). Methods became faster since: 29 rows are now predicted at 0.7 to 1.4.
The shares are assumed to hold for the other cards, which nothing was measured on.
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from niwaki.errors import InputError, unknown
from niwaki.kernels.sweep import sweep_panel
from niwaki.model.files import write_shard, write_text


@dataclass(frozen=True)
class Machine:
    """Rates of a machine in operations, bytes or weights a second.

    `start_s` is the time of a small operation, `shard_s` that of a written file without its bytes. `memory_bytes` is
    the memory of the device. `measured`: the rates were measured here and now.
    """

    name: str
    device: str
    memory_bytes: int
    bandwidth: float
    product_flops: float
    learn_flops: float
    gram_flops: float
    float_flops: float
    solve_flops: float
    sweep_flops: float
    selected: float
    passed: float
    start_s: float
    shard_s: float
    disk: float
    measured: bool


# Published: bf16 FLOP/s, float32 FLOP/s, memory bytes/s, memory bytes.
GPUS = {
    "h100": (989e12, 67e12, 3.35e12, 80e9),
    "h200": (989e12, 67e12, 4.8e12, 141e9),
    "a100": (312e12, 19.5e12, 2.04e12, 80e9),
    "4090": (165e12, 82.6e12, 1.01e12, 24e9),
}
# Shares of the published rates: of bf16 in forwards and in learning, of bf16 in Gram matrices, of float32 in products,
# in factors and inside panels; of the memory rate in passes; weights ranked a second for every byte a second.
_REACHED = {
    "forward": 0.603,
    "learn": 0.52,
    "gram": 0.8,
    "float32": 0.722,
    "solve": 0.327,
    "sweep": 0.0226,
    "pass": 0.253,
    "select": 3.75e-3,
}
MIN_S, MAX_S, MIN_RUNS = 0.1, 0.3, 5  # per measurement of this machine
_GPU_START_S = 7.0e-6  # seconds per operation of a block, Python and launch
_GPU_SHARD_S, _GPU_DISK = 0.05, 1.05e9  # further seconds per block in the same runs, and bytes a second of the disk


def machine_named(gpu: str | None, out: Path) -> Machine:
    """Return a machine: `cpu` is this one, measured; None is the GPU of this machine, or its CPU if it has none.

    Raises InputError with the nearest name.
    """
    if gpu is None:
        gpu = _own_gpu()
    name = gpu.lower()
    if name == "cpu":
        return measure_cpu(out)
    if name not in GPUS:
        raise InputError(unknown("GPU", gpu, [*GPUS, "cpu"]))
    return gpu_of(name)


def gpu_of(name: str) -> Machine:
    """Return a GPU of the table."""
    half, single, bandwidth, memory_bytes = GPUS[name]
    return Machine(
        name=name,
        device="cuda",
        memory_bytes=int(memory_bytes),
        bandwidth=bandwidth,
        product_flops=_REACHED["forward"] * half,
        learn_flops=_REACHED["learn"] * half,
        gram_flops=_REACHED["gram"] * half,
        float_flops=_REACHED["float32"] * single,
        solve_flops=_REACHED["solve"] * single,
        sweep_flops=_REACHED["sweep"] * single,
        selected=_REACHED["select"] * bandwidth,
        passed=_REACHED["pass"] * bandwidth,
        start_s=_GPU_START_S,
        shard_s=_GPU_SHARD_S,
        disk=_GPU_DISK,
        measured=False,
    )


def _own_gpu() -> str:
    if not torch.cuda.is_available():
        return "cpu"
    title = torch.cuda.get_device_name().lower()
    name = next((name for name in GPUS if name in title), None)
    if name is None:
        raise InputError(f"{title} is not in the table of GPUs: give --gpu {', '.join(GPUS)} or cpu")
    return name


def measure_cpu(folder: Path) -> Machine:
    """Measure the rates of this machine now; files are written below `folder`, or where temporary files go."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    a, b = normal(1024, 512), normal(512, 1024)
    product = 2 * 1024 * 512 * 1024 / _seconds(lambda: a @ b)
    gram = b @ b.T + 512 * torch.eye(512)

    def factor() -> None:
        torch.linalg.solve_triangular(torch.linalg.cholesky(gram), torch.eye(512), upper=False)

    solve = 4 / 3 * 512**3 / _seconds(factor)
    panel, upper = normal(512, 128), torch.triu(gram[:128, :128]).contiguous()
    keep = panel > 0
    sweep = 512 * 128 * 128 / _seconds(lambda: sweep_panel(panel.clone(), upper, keep, None))
    scores = normal(512, 1024)
    selected = scores.numel() / _seconds(lambda: scores.topk(512, dim=1, largest=False, sorted=False))
    large = torch.empty(2**24)
    other = torch.empty_like(large)
    copy_s = _seconds(lambda: other.copy_(large))
    small = torch.zeros(8)

    def start() -> None:
        for _ in range(100):
            small.add(1.0).sum()  # two operations count as one: most take longer than the simplest

    shard_s, disk = _measure_disk(folder)
    return Machine(
        name="cpu",
        device="cpu",
        memory_bytes=psutil.virtual_memory().total,
        bandwidth=2 * large.nbytes / copy_s,
        product_flops=product,
        learn_flops=product,
        gram_flops=product,
        float_flops=product,
        solve_flops=solve,
        sweep_flops=sweep,
        selected=selected,
        passed=large.numel() / copy_s,
        start_s=_seconds(start) / 100,
        shard_s=shard_s,
        disk=disk,
        measured=True,
    )


def _measure_disk(folder: Path) -> tuple[float, float]:
    """Return the seconds of a shard without its bytes, and the bytes a second."""
    place = folder if folder.is_dir() else None
    seconds = []
    try:
        with tempfile.TemporaryDirectory(prefix=".niwaki-plan-", dir=place) as name:
            for count in (2**14, 2**22):
                begin = time.perf_counter()
                write_shard(Path(name) / f"{count}.safetensors", {"x": torch.ones(count)})
                write_text(Path(name) / f"{count}.json", "{}")
                seconds.append(time.perf_counter() - begin)
    except OSError:
        return 0.1, 3e8
    return seconds[0], 4 * (2**22 - 2**14) / max(seconds[1] - seconds[0], 4 * 2**22 / 5e9)


def _seconds(work: Callable[[], object]) -> float:
    """Return the mean seconds of some runs without the slowest fifth, after one that does not count.

    The minimum would be too low: a compression also waits for cores that others use.
    """
    work()
    times: list[float] = []
    while sum(times) < MIN_S or (len(times) < MIN_RUNS and sum(times) < MAX_S):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    kept = sorted(times)[: max(1, len(times) * 4 // 5)]
    return sum(kept) / len(kept)
