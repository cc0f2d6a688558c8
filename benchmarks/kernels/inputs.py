"""Products of a few tokens that read only kept inputs, beside dense torch and our 4-bit planes. Shapes of 1.1B and 7B.

    python -m benchmarks.kernels.inputs --out benchmarks/results/kernels/inputs-cpu.json
    python -m benchmarks.kernels.inputs --device cuda --out benchmarks/results/kernels/inputs-h200.json

All products of a shape take turns. Each runs on the next of several copies, which no cache holds together. On a GPU a
CUDA graph runs all copies one after another, and the threshold lies on the device.

- `dense`: torch's bfloat16 linear, with the matrix as transformers stores it
- `planes`: our product with 4 bits in groups of 128
- `kept`, `codes`: the same weights by inputs, with the share of the inputs that is skipped

Microseconds are medians, and on a CPU also the best. `bandwidth` compares the bytes of the kept rows of one token per
second with that of the run. On a CPU that is the best read of a large buffer, in the same turns; on a GPU a copy. A GPU
first times some launches at a share of a half (`launches`), and the best of them serve all shares.
"""

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.common.devices import require_gpu
from benchmarks.common.gpu_timing import bandwidth, copies_of, graph_of, interleaved
from benchmarks.common.provenance import provenance
from niwaki.formats.quantized import TILE
from niwaki.kernels import planes
from niwaki.kernels.inputs import InputCodes, codes_inputs_dot, inputs_dot, kept_inputs
from niwaki.kernels.types import PlanePart

# Inputs and outputs of q/k/v, o, gate/up and down.
SMALL = {"qkv": (2048, 2560), "o": (2048, 2048), "up": (2048, 5632), "gate/up": (2048, 11264), "down": (5632, 2048)}
FEW = ("o", "gate/up", "down")  # of the small model, on a GPU
TOKENS = {"o": (1, 2, 4, 8), "gate/up": (1, 2, 4, 8)}  # on a CPU; of all others one
LARGE = {"qkv": (4096, 12288), "o": (4096, 4096), "gate/up": (4096, 22016), "down": (11008, 4096)}
SHARES = (0.0, 0.3, 0.5, 0.7)
THREADS = (1, 2)
GROUP = 128
COLD_BYTES = 100 * 2**20
READ_BYTES, READS = 32 * 2**20, 16  # of a turn, and turns until it is read again
COMPILERS = 12  # processes
# Launches that a sweep tries: outputs of a program (of codes words), inputs of a step, warps, splits, stages, chunk.
TILES = [(64, 128, 4, s, 1, chunk) for s in (1, 2, 4, 8) for chunk in (0, 512)]
TILES += [(64, 64, 4, s, stages, 512) for s in (2, 4, 8) for stages in (1, 3)]
TILES += [(64, 64, 4, 8, 3, 0), (64, 64, 4, 16, 1, 256), (64, 128, 4, 16, 1, 256), (128, 64, 4, 8, 1, 512)]
TILES += [(64, 256, 8, s, 1, 512) for s in (2, 4)] + [(128, 64, 8, s, 1, 512) for s in (4, 8)]
CODE_TILES = [(64, 8, 4, s, n, 0) for s in (4, 8, 16) for n in (1, 3, 4)] + [(64, 8, 4, 32, 4, 0)]
CODE_TILES += [(64, 16, 8, s, n, 0) for s in (4, 8, 16) for n in (1, 4)] + [(32, 16, 4, s, 3, 0) for s in (4, 8)]


def thresholds_of(x_BI: Tensor) -> dict[float, Tensor]:
    """Return the threshold of every share. That of zero keeps all inputs."""
    sizes_I = x_BI.float().abs().flatten().sort().values
    last = {share: sizes_I[int(share * len(sizes_I)) - 1] if share else sizes_I.new_tensor(-1.0) for share in SHARES}
    return {share: value[None] for share, value in last.items()}


def random_planes(inputs: int, outputs: int, device: str) -> PlanePart:
    """Return random bit planes of 4 bits."""
    planes_TKBR = torch.randint(0, 256, (outputs // TILE, 4, inputs // 8, TILE), dtype=torch.uint8, device=device)
    scale_GO = torch.ones(inputs // GROUP, outputs, device=device).half().view(torch.int16)
    zero_GO = torch.randint(0, 16, scale_GO.shape, dtype=torch.uint8, device=device)
    return PlanePart(planes_TKBR, scale_GO, None, zero_GO, None, 0.0, inputs, GROUP)


def random_codes(inputs: int, outputs: int, device: str) -> InputCodes:
    """Return random codes of the same matrix."""
    codes_IB = torch.randint(0, 256, (inputs, outputs // 2), dtype=torch.uint8, device=device)
    scale_GP = torch.ones(inputs // GROUP, outputs, device=device).half().view(torch.int16)
    zero_GP = torch.randint(0, 16, scale_GP.shape, dtype=torch.uint8, device=device)
    return InputCodes(codes_IB, scale_GP, None, zero_GP, 0.0, GROUP, outputs)


def random_weights(inputs: int, outputs: int, device: str) -> Tensor:
    """Return random bfloat16 weights by inputs."""
    return torch.randn(inputs, outputs, device=device).bfloat16()


def row_of(name: str, shape: tuple[int, int], times: dict[str, float]) -> dict[str, Any]:
    """Return a row of the result: microseconds, and speed over dense and planes."""
    speed = {n: round(times["dense" if "kept" in n else "planes"] / us, 2) for n, us in times.items() if " " in n}
    us = {own: round(value, 1) for own, value in times.items()}
    print(name, shape, us, flush=True)
    return {"matrix": name, "inputs": shape[0], "outputs": shape[1], "us": us, "speedup": speed}


def bandwidths(row: dict[str, Any], us: dict[str, float], bytes_per_s: float) -> dict[str, float]:
    """Return the share of the bandwidth that every product with kept inputs reaches."""
    reached = {}
    for own in row["speedup"]:
        kind, share = own.split()
        nbytes = row["inputs"] * row["outputs"] * (1 - float(share)) * (2 if kind == "kept" else 0.5)
        reached[own] = round(nbytes / us[own] * 1e6 / bytes_per_s, 2)
    return reached


def measure_cpus(threads: int, names: list[str], rounds: int) -> list[dict[str, Any]]:
    """Return the rows of some matrices for a number of threads."""
    torch.set_num_threads(threads)
    rows = [measure_cpu(name, tokens, rounds) for name in names for tokens in TOKENS.get(name, (1,))]
    read = max(row["read_gb_s"] for row in rows)
    for row in rows:
        if row["tokens"] == 1:
            row["bandwidth"] = bandwidths(row, row["best"]["us"], read * 1e9)
    return [{"threads": threads} | row | {"read_gb_s": read} for row in rows]


def measure_cpu(name: str, tokens: int, rounds: int) -> dict[str, Any]:
    """Return the times of a shape on a CPU."""
    inputs, outputs = shape = SMALL[name]
    x_BI = torch.randn(tokens, inputs).bfloat16()
    count, fewer = (1 + COLD_BYTES // (inputs * outputs * 2 // bits) for bits in (1, 4))
    by_input = [random_weights(inputs, outputs, "cpu") for _ in range(count)]
    kept, dense = cycle(by_input), cycle([weight_IO.T.contiguous() for weight_IO in by_input])
    parts = [random_planes(inputs, outputs, "cpu") for _ in range(fewer)]
    plain = cycle([planes.prepared_layer([part], outputs, inputs) for part in parts])
    coded = cycle([random_codes(inputs, outputs, "cpu") for _ in range(fewer)])
    buffers = cycle(torch.ones(READS, READ_BYTES // 4))
    works: dict[str, Callable[[], object]] = {
        "read": lambda: next(buffers).sum(),
        "dense": lambda: linear(x_BI, next(dense)),
        "planes": lambda: planes.cpu_product(next(plain), x_BI, outputs),
    }
    for share, limit in thresholds_of(x_BI).items():
        works[f"kept {share}"] = lambda limit=float(limit): inputs_dot(x_BI, next(kept), limit)  # type: ignore[misc]
        works[f"codes {share}"] = lambda limit=float(limit): codes_inputs_dot(x_BI, next(coded), limit)  # type: ignore[misc]
    times: dict[str, list[float]] = {own: [] for own in works}
    for turn in range(rounds + 2):
        for own, work in works.items():
            began = time.perf_counter()
            work()
            if turn > 1:
                times[own].append(1e6 * (time.perf_counter() - began))
    read = READ_BYTES / min(times.pop("read")) / 1e3
    best = row_of(name, shape, {own: min(found) for own, found in times.items()})
    middle = row_of(name, shape, {own: statistics.median(found) for own, found in times.items()})
    picked = {key: best[key] for key in ("us", "speedup")}
    return {"tokens": tokens} | middle | {"best": picked, "read_gb_s": round(read, 1)}


def measure_gpu(name: str, shape: tuple[int, int], seconds: float, bytes_per_s: float) -> dict[str, Any]:
    """Return the times of a shape on a GPU, with the launches that are best at a share of a half."""
    inputs, outputs = shape
    x_BI = torch.randn(1, inputs, device="cuda").bfloat16()
    out_BO = x_BI.new_empty(1, outputs)
    nbytes = int(inputs * outputs * 2 * (1 - max(SHARES)))
    by_input = [random_weights(inputs, outputs, "cuda") for _ in range(copies_of(nbytes))]
    dense = [weight_IO.T.contiguous() for weight_IO in by_input]
    coded = [random_codes(inputs, outputs, "cuda") for _ in range(copies_of(nbytes // 4))]
    plain = [random_planes(inputs, outputs, "cuda").for_gpu() for _ in range(copies_of(inputs * outputs // 2))]
    limits = thresholds_of(x_BI)
    swept = {
        kind: sweep(kind, [launched(kind, x_BI, one, limits[0.5]) for one in matrices], seconds)
        for kind, matrices in (("kept", by_input), ("codes", coded))
    }
    works: dict[str, list[Callable[[], object]]] = {
        "dense": [partial(linear, x_BI, weight_OI) for weight_OI in dense],
        "planes": [partial(planes.gpu_product, x_BI, [part], None, out_BO) for part in plain],
        "kept default": [partial(inputs_dot, x_BI, weight_IO, limits[0.5]) for weight_IO in by_input],
        "codes default": [partial(codes_inputs_dot, x_BI, codes, limits[0.5]) for codes in coded],
    }
    for share, limit in limits.items():
        for kind, matrices in (("kept", by_input), ("codes", coded)):
            best = next(iter(swept[kind]))
            works[f"{kind} {share}"] = [partial(launched(kind, x_BI, one, limit), best) for one in matrices]
    times = interleaved({own: (graph_of(work), len(work)) for own, work in works.items()}, seconds)
    defaults = {own: round(times.pop(own), 2) for own in ("kept default", "codes default")}
    about = {"errors": errors_of(x_BI, by_input[0], coded[0]), "default_us": defaults}
    launches = {kind: {str(list(sizes)): us for sizes, us in found.items()} for kind, found in swept.items()}
    row = row_of(name, shape, times)
    return row | {"bandwidth": bandwidths(row, times, bytes_per_s)} | about | {"launches": launches}


def launched(kind: str, x_BI: Tensor, matrix: Any, limit: Tensor) -> Callable[[tuple[int, ...]], Tensor]:
    """Return a product as a function of its launch."""
    from niwaki.kernels.triton.inputs import InputsLaunch, Levels, codes_dot_triton, inputs_dot_triton

    if kind == "kept":
        return lambda sizes: inputs_dot_triton(x_BI, matrix, limit, None, None, InputsLaunch(*sizes))
    levels = Levels(*matrix.levels_by_nibble, matrix.centre)
    call = x_BI, matrix.codes_IB, levels, GROUP, limit, None, None, matrix.outputs
    return lambda sizes: codes_dot_triton(*call, InputsLaunch(*sizes))


def sweep(
    kind: str, products: list[Callable[[tuple[int, ...]], Tensor]], seconds: float
) -> dict[tuple[int, ...], float]:
    """Return the microseconds of all launches, best first."""
    graphs = {
        str(list(sizes)): (graph_of([partial(product, sizes) for product in products]), len(products))
        for sizes in tiles_of(kind)
    }
    times = interleaved(graphs, seconds)
    found = {sizes: round(times[str(list(sizes))], 2) for sizes in tiles_of(kind)}
    return dict(sorted(found.items(), key=lambda item: item[1]))


def tiles_of(kind: str) -> list[tuple[int, int, int, int, int, int]]:
    """Return the launches that a sweep tries."""
    return TILES if kind == "kept" else CODE_TILES


def errors_of(x_BI: Tensor, weight_IO: Tensor, codes: InputCodes) -> dict[str, float]:
    """Return the errors of both products at a share of a half against float64."""
    limit = thresholds_of(x_BI)[0.5]
    masked_BI = torch.where(kept_inputs(x_BI, limit).mask_BI, x_BI.double(), 0.0)
    found = {
        "kept": (inputs_dot(x_BI, weight_IO, limit), weight_IO.double()),
        "codes": (codes_inputs_dot(x_BI, codes, limit), codes.decode().double()),
    }
    wanted = {own: masked_BI @ exact_IO for own, (_, exact_IO) in found.items()}
    return {own: float(f"{(y_BO - wanted[own]).norm() / wanted[own].norm():.1e}") for own, (y_BO, _) in found.items()}


def compile_launch(kind: str, sizes: tuple[int, ...]) -> None:
    """Compile a launch into Triton's cache on the disk."""
    x_BI, limit = torch.randn(1, 4096, device="cuda").bfloat16(), torch.zeros(1, device="cuda")
    make = random_weights if kind == "kept" else random_codes
    launched(kind, x_BI, make(4096, 4096, "cuda"), limit)(sizes)


def compile_all() -> None:
    """Compile the launches in several processes."""
    wanted = {
        (kind, (*sizes[:3], min(sizes[3], 2), *sizes[4:])) for kind in ("kept", "codes") for sizes in tiles_of(kind)
    }
    with multiprocessing.get_context("spawn").Pool(COMPILERS) as pool:
        pool.starmap(compile_launch, sorted(wanted), chunksize=1)


def main() -> None:
    """Measure every shape and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=40, help="of every product on a CPU")
    parser.add_argument("--seconds", type=float, default=0.6, help="of a shape on a GPU")
    parser.add_argument("--threads", type=int, nargs="+", default=list(THREADS))
    parser.add_argument("--matrices", nargs="+", default=list(SMALL))
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    about: dict[str, Any] = {"what": __doc__.splitlines()[0], **provenance(args.device)}
    with torch.inference_mode():
        if args.device == "cpu":
            for threads in args.threads:
                rows += measure_cpus(threads, args.matrices, args.rounds)
        else:
            require_gpu(parser)
            compile_all()
            about["copy_gb_s"] = round((bytes_per_s := bandwidth()) / 1e9)
            shapes = [("7B", name, LARGE[name]) for name in LARGE] + [("1.1B", name, SMALL[name]) for name in FEW]
            for model, name, shape in shapes:
                rows.append({"model": model} | measure_gpu(name, shape, args.seconds, bytes_per_s))
    args.out.write_text(json.dumps(about | {"products": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
