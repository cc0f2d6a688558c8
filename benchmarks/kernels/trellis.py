"""Products with trellis-coded columns beside bit planes of the same bits: one token and thread of a CPU, or a GPU.

    python -m benchmarks.kernels.trellis --out benchmarks/results/kernels/trellis-cpu.json
    python -m benchmarks.kernels.trellis --device cuda --out benchmarks/results/kernels/trellis-h200.json

Both take turns, each on the next of several copies that no cache holds together. `avx2` is the trellis without
AVX-512; `decoded` is a whole matrix decoded to bfloat16. Times are medians: on a CPU of the seconds of this thread, on
a GPU of replayed graphs, with a dense bfloat16 product beside them. There, 1, 4, 16 and 32 tokens are measured. At
2.25 bits three quarters of the columns have two bits, and a quarter has three. Every product is compared with a float64
product of the decoded matrix (`error`). `--sweep` also times other launches; kernels are first compiled by several
processes at once.
"""

import argparse
import itertools
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

from benchmarks.common.gpu_timing import copies_of, graph_of, interleaved, relative_error
from benchmarks.common.provenance import provenance
from niwaki.formats.quantized import TILE
from niwaki.formats.trellis import unpack_rings
from niwaki.kernels import planes, trellis
from niwaki.kernels.cpu_module import AVX2, BEST, VBMI, cpu_module
from niwaki.kernels.types import PlanePart, TrellisLaunch, TrellisPart
from niwaki.runtime.chunked_matmul import decode_rows

SHAPES, BITS = ((2048, 2048), (4096, 4096)), (1, 2, 3, 4)
GPU_SHAPES, GPU_BITS, TOKENS = ((4096, 4096), (11008, 4096), (4096, 11008)), (1, 2, 2.25, 3, 4), (1, 4, 16, 32)
COLD_BYTES = 64 * 2**20
COMPILERS = 12  # processes
# Launches of a sweep: multiply-adds for one token and for a few, and tensor cores.
FEW = [
    TrellisLaunch(False, 16, 8),
    TrellisLaunch(False, 16, 8, registers=64),
    TrellisLaunch(False, 16, 16),
    TrellisLaunch(False, 32, 8),
    TrellisLaunch(False, 8, 8),
]
FEW_TOKENS = TrellisLaunch(False, 16, 4)
MANY = [TrellisLaunch(True, 16, 4), TrellisLaunch(True, 16, 8), TrellisLaunch(True, 8, 8, registers=128)]


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


def coded_parts(rows: int, columns: int, bits: float) -> list[TrellisPart]:
    """Return random rings on the GPU: one part, or two parts whose columns lie among each other."""
    if bits in BITS:
        return [trellis_part(rows, columns, int(bits), "cuda")]
    order, wide = torch.randperm(columns, device="cuda").int(), columns * round(100 * bits % 100) // 100
    picked = order[wide:].sort().values, order[:wide].sort().values
    return [
        trellis_part(rows, len(places_C), int(bits) + number, "cuda")._replace(columns_C=places_C)
        for number, places_C in enumerate(picked)
    ]


def plain_parts(rows: int, columns: int, bits: float) -> list[PlanePart]:
    """Return random bit planes on the GPU, with as many columns of every width as the rings."""
    if bits in BITS:
        return [plane_part(rows, columns, int(bits), "cuda").for_gpu()]
    return [
        plane_part(rows, len(part.columns_C), part.bits, "cuda")._replace(columns_C=part.columns_C).for_gpu()
        for part in coded_parts(rows, columns, bits)
        if part.columns_C is not None
    ]


def decoded_weight(parts: list[TrellisPart], rows: int, columns: int) -> torch.Tensor:
    """Return the matrix in float32, by torch alone."""
    weight_OI = torch.empty(rows, columns, device="cuda")
    for part in parts:
        level_UC = part.levels_S.view(torch.int8).float()[unpack_rings(part.rings_TCB).int()]
        places = slice(None) if part.columns_C is None else part.columns_C.long()
        weight_OI[:, places] = level_UC[:rows] * part.scale_O.view(torch.float16).float()[:, None]
    return weight_OI


def launches(tokens: int) -> list[TrellisLaunch]:
    """Return the launches that `--sweep` times."""
    if tokens == 1:
        return FEW
    return [FEW_TOKENS, *MANY] if tokens < 8 else MANY


def named(launch: TrellisLaunch) -> str:
    """Return the name of a launch in the table."""
    limit = "" if launch.registers is None else f" ≤{launch.registers}"
    return f"{'cores' if launch.cores else 'fma'} {launch.warps}×{launch.unroll}{limit}"


def compile_one(given: tuple[int, float, int, TrellisLaunch]) -> None:
    """Compile a kernel into Triton's cache on the disk."""
    from niwaki.kernels.triton.trellis_product import product_triton

    columns, bits, tokens, launch = given
    x_NI = torch.randn(tokens, columns, device="cuda", dtype=torch.bfloat16)
    product_triton(x_NI, coded_parts(32, columns, bits), None, x_NI.new_empty(tokens, 32), launch)


def measure_gpu(rows: int, columns: int, bits: float, seconds: float, sweep: bool) -> list[dict[str, Any]]:
    """Return the median milliseconds of every product on a GPU, by the number of tokens."""
    from niwaki.kernels.triton.trellis_product import decode_triton, product_triton

    count, wide = copies_of(int(rows * columns * bits / 8)), copies_of(rows * columns * 2)
    coded = [coded_parts(rows, columns, bits) for _ in range(count)]
    plain = [plain_parts(rows, columns, bits) for _ in range(count)]
    dense = [torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16) for _ in range(wide)]
    weight_OI, out_OI = decoded_weight(coded[0], rows, columns), torch.empty_like(dense[0])
    found_rows = []
    for tokens in TOKENS:
        x_NI = torch.randn(tokens, columns, device="cuda", dtype=torch.bfloat16)
        out_NO = torch.empty(tokens, rows, device="cuda", dtype=torch.bfloat16)
        works: dict[str, list[Callable[[], object]]] = {
            "trellis": [partial(product_triton, x_NI, parts, None, out_NO) for parts in coded],
            "planes": [partial(planes.gpu_product, x_NI, parts, None, out_NO) for parts in plain],
            "dense": [partial(torch.nn.functional.linear, x_NI, dense_OI) for dense_OI in dense],
        }
        if tokens == 1:
            works["decoded"] = [partial(decode_triton, parts, rows, 0, out_OI) for parts in coded[:2]]
        for launch in launches(tokens) if sweep else []:
            works[named(launch)] = [partial(product_triton, x_NI, parts, None, out_NO, launch) for parts in coded]
        errors = {}
        for name, work in works.items():
            if name not in ("planes", "dense", "decoded"):
                work[0]()
                errors[name] = relative_error(out_NO, x_NI, weight_OI)
        if tokens == 1:
            decode_triton(coded[0], rows, 0, out_OI)
            order = [part.columns_C.long() for part in coded[0] if part.columns_C is not None]
            wanted_OI = weight_OI[:, torch.cat(order)] if order else weight_OI
            errors["decoded"] = float((out_OI.float() - wanted_OI).norm() / wanted_OI.norm())
        times = interleaved({name: (graph_of(work), len(work)) for name, work in works.items()}, seconds)
        found = {name: round(own / 1e3, 4) for name, own in times.items()}
        print(rows, columns, bits, tokens, found, f"error {max(errors.values()):.1e}", flush=True)
        about = {"rows": rows, "columns": columns, "bits": bits, "tokens": tokens}
        found_rows.append({**about, "ms": found, "error": {name: float(f"{own:.1e}") for name, own in errors.items()}})
    return found_rows


def measure_all(seconds: float, sweep: bool) -> list[dict[str, Any]]:
    """Compile what a sweep needs, and measure every shape and width on the GPU."""
    begin = time.perf_counter()
    if sweep:
        wanted = [
            (4096, bits, tokens, launch) for bits in GPU_BITS for tokens in (1, 4, 32) for launch in launches(tokens)
        ]
        with multiprocessing.get_context("spawn").Pool(min(COMPILERS, len(wanted))) as pool:
            pool.map(compile_one, wanted, chunksize=1)
        print(f"compiled in {time.perf_counter() - begin:.0f} s", flush=True)
    found = []
    for (rows, columns), bits in itertools.product(GPU_SHAPES, GPU_BITS):
        found += measure_gpu(rows, columns, bits, seconds, sweep)
    print(f"{time.perf_counter() - begin:.0f} s", flush=True)
    return found


def main() -> None:
    """Measure every shape and width, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--seconds", type=float, default=0.15, help="of a shape, width and number of tokens on a GPU")
    parser.add_argument("--sweep", action="store_true", help="also time other launches on a GPU")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if args.device == "cuda":
        rows = measure_all(args.seconds, args.sweep)
        args.out.write_text(json.dumps(provenance("cuda") | {"products": rows}, indent=1) + "\n")
        return
    torch.set_num_threads(1)
    compiled = cpu_module()
    assert compiled is not None and compiled.supported(VBMI), "this compares the path of AVX-512 VBMI"
    rows = [measure(*shape, bits, args.rounds) for shape in SHAPES for bits in BITS]
    args.out.write_text(json.dumps(provenance("cpu") | {"threads": 1, "products": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
