"""Decoding speed of packed layers against torch's dense bf16, interleaved in one run, and their share of the bandwidth.

    python -m benchmarks.kernels.packed_linear --out benchmarks/results/kernels/packed-linear-cpu.json [--threads 1 2]

Random codes, or zeros with --sparse; one token at a time, or as many as asked for. Every call reads another copy of its
weights, of which there are as many as fill COLD_BYTES: a model's layers are not in the caches either. Bandwidth is that
of summing a large float32 tensor with the same threads in the same run.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from copy import deepcopy
from itertools import cycle
from pathlib import Path

import torch

from benchmarks.common.provenance import provenance
from niwaki.formats.quantized import QuantizedColumns, stored_tensors
from niwaki.formats.sparse import Sparse
from niwaki.formats.sparse_tiles import Tiled
from niwaki.runtime.linear import PackedLinear
from niwaki.runtime.sparse_linear import SparseLinear

COLD_BYTES = 256 * 2**20
SHAPES = [(4096, 4096), (11008, 4096), (4096, 11008)]


def packed(rows: int, columns: int, salient_frac: float) -> PackedLinear:
    """`salient_frac` of the columns at 4 bits, the rest at 1 bit, one scale a row each."""
    generator = torch.Generator().manual_seed(0)
    count = round(salient_frac * columns / 8) * 8
    order_I = torch.randperm(columns, generator=generator)
    parts = []
    for columns_C, bits, grid in ((order_I[:count], 4, "midrise"), (order_I[count:], 1, "free")):
        if not len(columns_C):
            continue
        code_OC = torch.randint(0, 2**bits, (rows, len(columns_C)), generator=generator, dtype=torch.uint8)
        scale_OG = (torch.rand(rows, 1, generator=generator) * 0.01 + 0.01).half()
        offset_OG = torch.randn(rows, 1, generator=generator).half() * 0.01 if grid == "free" else None
        columns_C = columns_C.sort().values
        parts.append(QuantizedColumns(columns_C, bits, grid, len(columns_C), code_OC, scale_OG, offset_OG))
    layer = PackedLinear(rows, columns, {"parts": [part.describe() for part in parts]}, bias=False)
    layer.load_state_dict(stored_tensors(parts, columns))
    return layer


def sparse(rows: int, columns: int) -> dict[str, SparseLinear]:
    """Half zeros anywhere, and two of four, in bfloat16 and as 4-bit codes in groups of 128."""
    generator = torch.Generator().manual_seed(0)
    weight_OI = torch.randn(rows, columns, generator=generator).bfloat16()
    score_OGM = torch.rand(rows, columns // 4, 4, generator=generator)
    zero = weight_OI.new_zeros(())
    keep_OI = (score_OGM >= score_OGM.topk(2, dim=2).values[..., 1:]).view(rows, columns)
    code_OI = torch.where(keep_OI, torch.randint(0, 16, (rows, columns), generator=generator), 8).to(torch.uint8)
    scale_OG = (torch.rand(rows, columns // 128, generator=generator) * 0.01 + 0.01).half()
    codes = Sparse.encode_codes(
        QuantizedColumns(torch.arange(columns), 4, "symmetric", 128, code_OI, scale_OG), keep_OI, layout="two_four"
    )
    tiled = None if codes is None else Tiled.encode(codes)
    assert tiled is not None
    records: dict[str, Sparse | Tiled] = {
        "bitmap 50%": Sparse.encode(torch.where(score_OGM.view(rows, columns) < 0.5, weight_OI, zero), layout="bitmap"),
        "2:4": Sparse.encode(torch.where(keep_OI, weight_OI, zero), layout="two_four"),
        "2:4 + 4 bit": tiled,
    }
    found = {}
    for name, record in records.items():
        found[name] = SparseLinear(rows, columns, record.describe(), bias=False)
        found[name].load_state_dict(record.tensors())
    return found


def bandwidth() -> float:
    """Bytes a second of reading memory, at its best: a limit."""
    numbers = torch.ones(64 * 2**20)
    times = []
    for _ in range(7):
        begin = time.perf_counter()
        numbers.sum()
        times.append(time.perf_counter() - begin)
    return numbers.nbytes / min(times)


def in_turns(layer: torch.nn.Module, x: torch.Tensor) -> Callable[[], object]:
    """A call of copies of the layer, one after the other."""
    nbytes = sum(tensor.nbytes for tensor in layer.state_dict().values())
    copies = cycle([layer, *(deepcopy(layer) for _ in range(COLD_BYTES // nbytes))])
    return lambda: next(copies)(x)


def interleaved(works: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each, measured in turns."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            begin = time.perf_counter()
            work()
            times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(found) for name, found in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=1)
    parser.add_argument("--sparse", action="store_true", help="pruned layers instead of quantized ones")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, type=lambda text: tuple(map(int, text.split("x"))))
    args = parser.parse_args()
    rows_out = []
    for rows, columns in args.shapes:
        dense = torch.nn.Linear(columns, rows, bias=False, dtype=torch.bfloat16, device="cpu")
        if args.sparse:
            layers: dict[str, torch.nn.Module] = {**sparse(rows, columns)}
        else:
            layers = {"1.6 bit": packed(rows, columns, 0.2), "4 bit": packed(rows, columns, 1.0)}
        x = torch.randn(args.tokens, columns).bfloat16()
        for threads in args.threads:
            torch.set_num_threads(threads)
            bytes_per_s = bandwidth()
            with torch.inference_mode():
                works = {name: in_turns(layer, x) for name, layer in {**layers, "dense": dense}.items()}
                times = interleaved(works, args.rounds)
            for name, layer in layers.items():
                nbytes = sum(buffer.nbytes for buffer in layer.buffers())
                rows_out.append({
                    "layer": name, "shape": [rows, columns], "tokens": args.tokens, "threads": threads, "bytes": nbytes,
                    "dense_bytes": dense.weight.nbytes, "ms": round(times[name] * 1e3, 3),
                    "dense_ms": round(times["dense"] * 1e3, 3), "speedup": round(times["dense"] / times[name], 2),
                    "bandwidth_gb_s": round(bytes_per_s / 1e9, 1),
                    "share_of_bandwidth": round(nbytes / bytes_per_s / times[name], 2),
                })
                print(rows_out[-1], flush=True)
    result = {
        "what": f"{args.tokens} token(s), packed layers against torch's bf16 linear, interleaved, median seconds",
        **provenance("cpu"),
        "rows": rows_out,
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
