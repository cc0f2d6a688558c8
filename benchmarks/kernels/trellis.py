"""Product of one token with trellis-coded columns beside bit planes of the same bits, on one thread of a CPU.

    python -m benchmarks.kernels.trellis --out benchmarks/results/kernels/trellis-cpu.json

Both take turns, each on the next of several copies that no cache holds together. `avx2` is the trellis without
AVX-512; `decoded` is a whole matrix decoded to bfloat16. Times are medians of the seconds of this thread.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.provenance import provenance
from niwaki.formats.quantized import TILE
from niwaki.kernels import planes, trellis
from niwaki.kernels.cpu_module import AVX2, BEST, VBMI, cpu_module
from niwaki.kernels.types import PlanePart, TrellisPart
from niwaki.runtime.chunked_matmul import decode_rows

SHAPES, BITS = ((2048, 2048), (4096, 4096)), (1, 2, 3, 4)
COLD_BYTES = 64 * 2**20


def trellis_layer(rows: int, columns: int, bits: int) -> Any:
    """Return random rings as a layer of the kernels."""
    rings_TCB = torch.randint(0, 256, (rows // TILE, columns, 4 * bits), dtype=torch.uint8)
    levels_S = torch.randint(0, 256, (256,), dtype=torch.uint8)
    scale_O = torch.ones(rows).half().view(torch.int16)
    return trellis.prepared_layer([TrellisPart(rings_TCB, levels_S, scale_O, None)], rows, columns)


def plane_layer(rows: int, columns: int, bits: int) -> Any:
    """Return random bit planes with one scale per row as a layer of the kernels."""
    planes_TKBR = torch.randint(0, 256, (rows // TILE, bits, columns // 8, TILE), dtype=torch.uint8)
    scale_GO = torch.ones(1, rows).half().view(torch.int16)
    part = PlanePart(planes_TKBR, scale_GO, None, None, None, 2 ** (bits - 1) - 0.5, columns, columns)
    return planes.prepared_layer([part], rows, columns)


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


def main() -> None:
    """Measure every shape and width, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    compiled = cpu_module()
    assert compiled is not None and compiled.supported(VBMI), "this compares the path of AVX-512 VBMI"
    rows = [measure(*shape, bits, args.rounds) for shape in SHAPES for bits in BITS]
    args.out.write_text(json.dumps(provenance("cpu") | {"threads": 1, "products": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
