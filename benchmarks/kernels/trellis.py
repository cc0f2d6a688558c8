"""Product of one token with trellis-coded columns beside bit planes of the same bits, on one thread of a CPU or a GPU.

    python -m benchmarks.kernels.trellis --out benchmarks/results/kernels/trellis-cpu.json
    python -m benchmarks.kernels.trellis --device cuda --out benchmarks/results/kernels/trellis-h200.json

Both take turns, each on the next of several copies that no cache holds together. `avx2` is the trellis without
AVX-512; `decoded` is a whole matrix decoded to bfloat16. Times are medians: on a CPU of the seconds of this thread, on
a GPU of replayed graphs, with a dense bfloat16 product beside them.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.gpu_timing import copies_of, graph_of, interleaved
from benchmarks.common.provenance import provenance
from niwaki.formats.quantized import TILE
from niwaki.kernels import planes, trellis
from niwaki.kernels.cpu_module import AVX2, BEST, VBMI, cpu_module
from niwaki.kernels.types import PlanePart, TrellisPart
from niwaki.runtime.chunked_matmul import decode_rows

SHAPES, BITS = ((2048, 2048), (4096, 4096)), (1, 2, 3, 4)
GPU_SHAPES = ((4096, 4096), (11008, 4096))
COLD_BYTES = 64 * 2**20


def trellis_part(rows: int, columns: int, bits: int, device: str = "cpu") -> TrellisPart:
    """Return random rings."""
    rings_TCB = torch.randint(0, 256, (rows // TILE, columns, 4 * bits), dtype=torch.uint8, device=device)
    levels_S = torch.randint(0, 256, (256,), dtype=torch.uint8, device=device)
    return TrellisPart(rings_TCB, levels_S, torch.ones(rows, device=device).half().view(torch.int16), None)


def plane_part(rows: int, columns: int, bits: int, device: str = "cpu") -> PlanePart:
    """Return random bit planes with one scale per row."""
    planes_TKBR = torch.randint(0, 256, (rows // TILE, bits, columns // 8, TILE), dtype=torch.uint8, device=device)
    scale_GO = torch.ones(1, rows, device=device).half().view(torch.int16)
    return PlanePart(planes_TKBR, scale_GO, None, None, None, 2 ** (bits - 1) - 0.5, columns, columns)


def trellis_layer(rows: int, columns: int, bits: int) -> Any:
    """Return random rings as a layer of the kernels."""
    return trellis.prepared_layer([trellis_part(rows, columns, bits)], rows, columns)


def plane_layer(rows: int, columns: int, bits: int) -> Any:
    """Return random bit planes as a layer of the kernels."""
    return planes.prepared_layer([plane_part(rows, columns, bits)], rows, columns)


def copies(make: Callable[..., Any], rows: int, columns: int, bits: int) -> Any:
    """Return an endless row of copies."""
    return cycle([make(rows, columns, bits) for _ in range(1 + COLD_BYTES // (rows * columns * bits // 8))])


def measure(rows: int, columns: int, bits: int, rounds: int) -> dict[str, Any]:
    """Return the median milliseconds of every product."""
    coded, plain = copies(trellis_layer, rows, columns, bits), copies(plane_layer, rows, columns, bits)
    x_NI, out_OI = torch.randn(1, columns), torch.empty(rows, columns, dtype=torch.bfloat16)
    works: dict[str, Callable[[], object]] = {
        "trellis": lambda: trellis.cpu_product(next(coded), x_NI, rows, BEST),
        "planes": lambda: planes.cpu_product(next(plain), x_NI, rows),
        "avx2": lambda: trellis.cpu_product(next(coded), x_NI, rows, AVX2),
        "decoded": lambda: decode_rows(next(coded), 0, out_OI),
    }
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            began = time.thread_time()
            work()
            times[name].append(1000 * (time.thread_time() - began))
    found = {name: round(statistics.median(own), 3) for name, own in times.items()}
    print(rows, columns, bits, found, flush=True)
    return {"rows": rows, "columns": columns, "bits": bits, "ms": found}


def measure_gpu(rows: int, columns: int, bits: int, seconds: float) -> dict[str, Any]:
    """Return the median milliseconds of every product on a GPU."""
    x_NI = torch.randn(1, columns, device="cuda", dtype=torch.bfloat16)
    out_NO = torch.empty(1, rows, device="cuda", dtype=torch.bfloat16)
    out_OI = torch.empty(rows, columns, device="cuda", dtype=torch.bfloat16)
    count, wide = copies_of(rows * columns * bits // 8), copies_of(rows * columns * 2)
    coded = [trellis_part(rows, columns, bits, "cuda") for _ in range(count)]
    plain = [plane_part(rows, columns, bits, "cuda").for_gpu() for _ in range(count)]
    dense = [torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16) for _ in range(wide)]
    from niwaki.kernels.triton.trellis import decode_triton

    works: dict[str, list[Callable[[], object]]] = {
        "trellis": [partial(trellis.trellis_product, x_NI, list(part), None, rows) for part in coded],
        "planes": [partial(planes.gpu_product, x_NI, [part], None, out_NO) for part in plain],
        "dense": [partial(torch.nn.functional.linear, x_NI, weight_OI) for weight_OI in dense],
        "decoded": [partial(decode_triton, [part], rows, 0, out_OI) for part in coded[:2]],
    }
    times = interleaved({name: (graph_of(work), len(work)) for name, work in works.items()}, seconds)
    found = {name: round(own / 1e3, 4) for name, own in times.items()}
    print(rows, columns, bits, found, flush=True)
    return {"rows": rows, "columns": columns, "bits": bits, "ms": found}


def main() -> None:
    """Measure every shape and width, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--seconds", type=float, default=0.5, help="of a shape and width on a GPU")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if args.device == "cuda":
        rows = [measure_gpu(*shape, bits, args.seconds) for shape in GPU_SHAPES for bits in BITS]
        args.out.write_text(json.dumps(provenance("cuda") | {"products": rows}, indent=1) + "\n")
        return
    torch.set_num_threads(1)
    compiled = cpu_module()
    assert compiled is not None and compiled.supported(VBMI), "this compares the path of AVX-512 VBMI"
    rows = [measure(*shape, bits, args.rounds) for shape in SHAPES for bits in BITS]
    args.out.write_text(json.dumps(provenance("cpu") | {"threads": 1, "products": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
