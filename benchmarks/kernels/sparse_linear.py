"""Pruned layers on a GPU against cuBLAS in bf16: speed, share of the bandwidth, parity, kernel tiles.

    python -m benchmarks.kernels.sparse_linear --out benchmarks/results/kernels/sparse-linear-h100.json
    python -m benchmarks.kernels.sparse_linear --check
    python -m benchmarks.kernels.sparse_linear --sweep few --shapes 4096x4096 --tokens 1 2 4

Layers: `bitmap` (half zeros, values in bf16), `two_four` (in bf16), `tiles` (two_four of 4-bit codes in groups of 128).
Ways: `few` (multiply-adds), `dot` (tensor cores), `decoded` (the matrix made dense, then cuBLAS). For two_four also
`cusparselt` (sparse tensor cores, from a second form of the matrix that torch makes).

A CUDA graph runs many copies of a layer one after another. Their weights together are larger than the caches. All ways
of all layers are replayed in turns, in one run. Every result is compared with the product in float64, and decoded
matrices with the record's own `decode`. Weights are random and made on the device. `--sweep` times tiles of one way and
prints the best. `--check` tries odd shapes, every kind of value, poisoned outputs.
"""

import argparse
import contextlib
import itertools
import json
import multiprocessing
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.common.devices import require_gpu
from benchmarks.common.gpu_timing import bandwidth, copies_of, graph_of, interleaved, relative_error
from benchmarks.common.provenance import provenance
from niwaki.formats.sparse import SLACK_BYTES, Sparse
from niwaki.formats.sparse_tiles import Tiled
from niwaki.kernels.sparse_gpu import cores_reach, gpu_record
from niwaki.kernels.triton import (
    sparse as triton_sparse,
)
from niwaki.kernels.triton import (
    sparse_dot as triton_sparse_dot,
)
from niwaki.kernels.triton import (
    sparse_tiles as triton_sparse_tiles,
)
from niwaki.kernels.triton import (
    sparse_tiles_dot as triton_sparse_tiles_dot,
)
from niwaki.kernels.types import GpuRecord, TileLaunch

SHAPES = ["4096x4096", "11008x4096", "4096x11008", "8192x8192", "28672x8192"]
LAYERS = ["bitmap", "two_four", "tiles"]
TOKENS = [1, 2, 4, 8, 16, 64, 512, 2048]
FEW, DOT, DECODED, SEMI = "few", "dot", "decoded", "cusparselt"
MOST = {FEW: 16, DOT: 512}  # tokens that a way is timed for
LEAST = {DECODED: 16, SEMI: 8}
FEW_TILES = [triton_sparse.SparseLaunch(*t) for t in itertools.product((1, 2, 4, 8), (2, 4, 8)) if t != (8, 2)]
DOT_TILES = [
    triton_sparse_dot.SparseDotLaunch(*t)
    for t in itertools.product((16, 32, 64), (16, 32, 64, 128), (2, 4, 8), (2, 3, 4))
    if 8 <= t[0] * t[1] / t[2] / 16 <= 32
]
TILES_FEW = [TileLaunch(*t) for t in itertools.product((2, 4, 8, 16), (1, 2, 4))]
TILES_DOT = [triton_sparse_dot.SparseDotLaunch(32, *t, 1) for t in itertools.product((8, 16), (2, 4, 8, 16))]
Works = dict[tuple[str, str], list[Callable[[], object]]]
COMPILERS = 14  # processes
LIMIT = 1e-2  # of relative errors in bf16


class Layer(NamedTuple):
    """A matrix as it is stored and as the kernels take it."""

    stored: Sparse | Tiled
    record: GpuRecord

    @property
    def nbytes(self) -> int:
        """Return the bytes of the stored tensors."""
        return sum(tensor.nbytes for tensor in self.stored.tensors().values())


def layer_of(stored: Sparse | Tiled) -> Layer:
    """Return a layer of a stored matrix."""
    if isinstance(stored, Tiled):
        about = (stored.size, stored.columns, stored.group, "two_four_tiles", "int4")
        return Layer(stored, gpu_record(*about, stored.metadata_TBR, stored.values_TFR, None, stored.scale_GO))
    about = (len(stored.metadata_OB), stored.columns, stored.group, stored.layout, stored.values)
    tensors = (stored.metadata_OB, stored.values_N, stored.starts_O, stored.scale_OG)
    return Layer(stored, gpu_record(*about, *tensors))


def random_layer(name: str, rows: int, columns: int) -> Layer:
    """Return random places and values of about ±0.02, made on the device. Shapes are whole tiles and groups."""
    with torch.device("cuda"):
        if name == "bitmap":
            places = torch.randint(0, 256, (rows, columns // 8), dtype=torch.uint8)
            byte, bit = torch.arange(256), torch.arange(8)
            counts = ((byte[:, None] >> bit) & 1).sum(1).to(torch.int32)
            counts_O = torch.cat([counts[some.int()].sum(1) for some in places.split(1024)])
            starts = (counts_O.cumsum(0) - counts_O).to(torch.int32)
            values = _values(int(counts_O.sum()))
            return layer_of(Sparse(columns, "bitmap", "bfloat16", 0, places, values, starts))
        pairs = torch.tensor([4, 8, 12, 9, 13, 14], dtype=torch.uint8)  # the lower index first
        if name == "two_four":
            low, high = (pairs[torch.randint(0, 6, (rows, columns // 8))] for _ in range(2))
            return layer_of(Sparse(columns, name, "bfloat16", 0, low | (high << 4), _values(rows * columns // 2)))
        fours = torch.randint(0, 256, (rows // 32, columns // 4, 32), dtype=torch.uint8)
        picked = pairs[torch.randint(0, 6, (rows // 32, columns // 4, 16, 2))]  # of rows r and 16 + r
        low, high = picked & 3, picked >> 2
        keys = torch.stack([low[..., 0] | (low[..., 1] << 2), high[..., 0] | (high[..., 1] << 2)], -1).flatten(2)
        places = keys[:, ::2] | (keys[:, 1::2] << 4)
        scale = (0.003 * (0.5 + torch.rand(columns // 128, rows))).half().view(torch.int16)
        return layer_of(Tiled(rows, columns, 128, places, fours, scale))


def _values(count: int) -> Tensor:
    values = (torch.randn(count) * 0.02).bfloat16().view(torch.uint8)
    return functional.pad(values, (0, SLACK_BYTES))


def decoded(record: GpuRecord, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Return the dense matrix of a record."""
    out_OI = torch.empty(record.rows, record.columns, dtype=dtype, device="cuda")
    triton_sparse_dot.decode(record, 0, out_OI)
    return out_OI


def multiply(way: str, layer: Layer, x_NI: Tensor, out_NO: Tensor, tiles: Any = None) -> Tensor:
    """Compute the product in one way. The kernels write `out_NO`."""
    if way == DECODED:
        return functional.linear(x_NI, decoded(layer.record))
    tiled = layer.record.layout == "two_four_tiles"
    few = triton_sparse_tiles if tiled else triton_sparse
    some = triton_sparse_tiles_dot if tiled else triton_sparse_dot
    kernel: Any = few.fma_product if way == FEW else some.core_product
    kernel(x_NI, layer.record, None, out_NO, tiles)
    return out_NO


def ways(name: str, tokens: int) -> list[str]:
    """Return the ways that are timed for a number of tokens."""
    every = (FEW, DECODED) if name == "bitmap" else (FEW, DOT, DECODED)
    return [w for w in every if LEAST.get(w, 0) <= tokens <= MOST.get(w, tokens)]


def semi_structured(weight_OI: Tensor) -> Any:
    """Return torch's own form of a 2:4 matrix."""
    from torch.sparse import SparseSemiStructuredTensorCUSPARSELT

    return SparseSemiStructuredTensorCUSPARSELT.from_dense(weight_OI)


def captured_works(works: Works) -> tuple[Works, dict[str, tuple[Callable[[], None], int]]]:
    """Return the works that run, and a graph of each. Print the others."""
    found, runs = {}, {}
    for key, work in works.items():
        try:
            runs[" ".join(key)] = (graph_of(work), len(work))
            found[key] = work
        except Exception as problem:
            print("left out", *key, str(problem).splitlines()[0][:120], flush=True)
            torch.cuda.synchronize()
    return found, runs


def measure(shape: str, names: list[str], counts: list[int], seconds: float, bytes_per_s: float) -> list[dict]:
    """Return the rows of the result for one shape."""
    rows, columns = (int(size) for size in shape.split("x"))
    dense = [torch.randn(rows, columns, device="cuda").bfloat16() for _ in range(copies_of(rows * columns * 2))]
    layers = {name: layers_of(name, rows, columns) for name in names}
    exact = {}
    for name, (first, *_) in layers.items():
        exact[name] = first.stored.decode()
        assert torch.equal(decoded(first.record, torch.float32), exact[name]), f"{name} is decoded wrongly"
    semi = []
    if "two_four" in names:
        matrices = [layer.record for layer in layers["two_four"]]
        semi = [semi_structured(decoded(record)) for record in matrices[: copies_of(rows * columns * 9 // 8)]]
    found = []
    for tokens in counts:
        x_NI = torch.randn(tokens, columns, device="cuda", dtype=torch.bfloat16)
        out_NO = x_NI.new_empty(tokens, rows)
        works: Works = {
            (name, way): [partial(multiply, way, layer, x_NI, out_NO) for layer in some]
            for name, some in layers.items() for way in ways(name, tokens)
        }  # fmt: skip
        works["dense", ""] = [partial(functional.linear, x_NI, weight_OI) for weight_OI in dense]
        if semi and tokens >= LEAST[SEMI]:
            works["two_four", SEMI] = [partial(functional.linear, x_NI, weight) for weight in semi]
        works, runs = captured_works(works)
        times = interleaved(runs, seconds)
        line = f"{shape:>11} n={tokens:<4} dense {times['dense ']:.1f}"
        for (name, way), work in works.items():
            if name == "dense":
                continue
            us, nbytes = times[f"{name} {way}"], layers[name][0].nbytes
            out_NO.fill_(float("nan"))
            error = relative_error(work[0](), x_NI, exact[name])
            found.append({
                "layer": name, "way": way, "shape": [rows, columns], "tokens": tokens, "bytes": nbytes,
                "us": round(us, 2), "dense_us": round(times["dense "], 2), "speedup": round(times["dense "] / us, 3),
                "share_of_bandwidth": round(nbytes / bytes_per_s / us * 1e6, 3),
                "dense_share_of_bandwidth": round(2 * rows * columns / bytes_per_s / times["dense "] * 1e6, 3),
                "relative_error": float(f"{error:.1e}"),
            })  # fmt: skip
            wrong = "" if error < LIMIT else f" WRONG {error:.1e}"
            share = f" {found[-1]['share_of_bandwidth']:.0%}" if tokens <= 16 else ""
            line += f" | {name} {way} {us:.1f} x{found[-1]['speedup']:.2f}{share}{wrong}"
        print(line, flush=True)
    return found


def layers_of(name: str, rows: int, columns: int) -> list[Layer]:
    """Return copies with weights of their own that fill more than the cache."""
    first = random_layer(name, rows, columns)
    return [first, *(random_layer(name, rows, columns) for _ in range(copies_of(first.nbytes) - 1))]


def candidates(name: str, way: str) -> list[Any]:
    """Return the tiles that a sweep tries."""
    if name == "tiles":
        return TILES_FEW if way == FEW else TILES_DOT
    return FEW_TILES if way == FEW else DOT_TILES


def sweep(shape: str, names: list[str], way: str, counts: list[int], seconds: float) -> list[dict]:
    """Return the times of all tiles, and print them best first."""
    rows, columns = (int(size) for size in shape.split("x"))
    found = []
    for name in names:
        if way == DOT and name == "bitmap":
            continue
        layers = layers_of(name, rows, columns)
        for tokens in counts:
            x_NI = torch.randn(tokens, columns, device="cuda", dtype=torch.bfloat16)
            out_NO = x_NI.new_empty(tokens, rows)
            runs = {}
            for tiles in candidates(name, way):
                works = [partial(multiply, way, layer, x_NI, out_NO, tiles) for layer in layers]
                try:
                    runs[",".join(map(str, tiles))] = (graph_of(works), len(works))
                except Exception as problem:  # shared memory or registers that do not suffice
                    print("left out", name, tiles, type(problem).__name__, flush=True)
            times = interleaved(runs, seconds)
            best = sorted(times, key=times.__getitem__)
            shown = " ".join(f"({tiles}) {times[tiles]:.2f}" for tiles in best[:6])
            print(f"{shape} {name} {way} n={tokens}: {shown} … {times[best[-1]]:.1f}", flush=True)
            found.append({"shape": [rows, columns], "layer": name, "way": way, "tokens": tokens, "us": times})
    return found


def check() -> None:
    """Check odd shapes, all kinds of value, inputs of all dtypes, poisoned outputs, equal results of equal runs."""
    shapes = [(5, 7, 8), (33, 200, 8), (70, 1000, 64), (129, 1028, 128)]
    kinds = list(itertools.product(("bitmap", "two_four"), ("bfloat16", "float16", "float32", "int8", "int4")))
    with multiprocessing.get_context("spawn").Pool(COMPILERS) as pool:
        wanted = [(shape, *kind) for shape in shapes for kind in kinds]
        wanted += [(shape, "tiles", "int4") for shape in [(1, 32, 32), (70, 384, 128), (1000, 4096, 128)]]
        lines = pool.map(check_case, wanted, chunksize=1)
    for line in lines:
        if not line.startswith("right"):
            print(line)
    print(f"{sum(line.startswith('right') for line in lines)} of {len(lines)} cases right")


def check_case(given: tuple[tuple[int, int, int], str, str]) -> str:
    """Return the largest error of a record over numbers of tokens, dtypes and ways. Decoded matrices have none."""
    (rows, columns, group), layout, kind = given
    generator = torch.Generator().manual_seed(rows)
    stored = odd_record(rows, columns, group, layout, kind, generator)
    layer, exact_OI = layer_of(stored), stored.decode()
    worst, limits = 0.0, {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}
    for dtype, limit in limits.items():
        if dtype == torch.float16 and columns != 1000:
            continue
        if not torch.equal(decoded(layer.record, dtype), exact_OI.to(dtype)):
            return f"WRONG decoded {given} {dtype}"
        for tokens in (1, 3, 8, 17):
            x_NI = torch.randn(tokens, columns, generator=generator).to("cuda", dtype)
            for way in (FEW, DOT):
                if way == DOT and not cores_reach(x_NI, layer.record):
                    continue
                outs = [torch.full((tokens, rows), float("nan"), dtype=dtype, device="cuda") for _ in range(2)]
                for out in outs:
                    multiply(way, layer, x_NI, out)
                error = relative_error(outs[0], x_NI, exact_OI)
                if not torch.equal(*outs) or error > limit:
                    return f"WRONG {error:.1e} {given} {way} {tokens} {dtype}"
                worst = max(worst, error)
    return f"right {worst:.1e} {given}"


def odd_record(
    rows: int, columns: int, group: int, layout: str, kind: str, generator: torch.Generator
) -> Sparse | Tiled:
    """Return a matrix with empty rows on the device. Codes have scales per group."""
    from niwaki.formats.quantized import QuantizedColumns

    score = torch.rand(rows, columns, generator=generator)
    keep = score < 0.5
    if layout != "bitmap":
        padded = functional.pad(score, (0, -columns % 4)).view(rows, -1, 4)
        keep = (padded >= padded.topk(2, dim=2).values[..., 1:]).view(rows, -1)[:, :columns]
    keep[rows // 2] = rows == 1
    name = "two_four" if layout == "tiles" else layout
    if kind in ("int4", "int8"):
        bits = 4 if kind == "int4" else 8
        code = torch.randint(0, 2**bits, (rows, columns), generator=generator, dtype=torch.uint8)
        code = torch.where(keep, code, torch.tensor(2 ** (bits - 1), dtype=torch.uint8))
        scale = (torch.rand(rows, -(-columns // group), generator=generator) + 0.1).half()
        part = QuantizedColumns(torch.arange(columns), bits, "symmetric", group, code, scale)
        found = Sparse.encode_codes(part, layout=name)
    else:
        weight = torch.where(keep, torch.randn(rows, columns, generator=generator), 0.0)
        found = Sparse.encode(weight, getattr(torch, kind), name)
    stored = Tiled.encode(found) if layout == "tiles" else found
    moved = {key: tensor.cuda() for key, tensor in stored.tensors().items()}
    return type(stored).read(moved, stored.describe())


def compile_one(given: tuple[str, str, int, int, Any]) -> None:
    """Compile a kernel into Triton's cache on the disk."""
    name, way, columns, tokens, tiles = given
    x_NI = torch.randn(tokens, columns, device="cuda", dtype=torch.bfloat16)
    layer = random_layer(name, 64, columns)
    with contextlib.suppress(Exception):  # printed when it is timed
        multiply(way, layer, x_NI, x_NI.new_empty(tokens, 64), tiles)


def kernel_of(tokens: int) -> tuple[int, ...]:
    """Return the key of a compiled kernel: blocks of tokens, and the ways that are timed."""
    power = 1 << (tokens - 1).bit_length()
    return (
        min(power, 8),
        min(max(power, 16), 64),
        sum(tokens >= n for n in LEAST.values()),
        tokens > MOST[FEW],
        tokens > MOST[DOT],
    )


def compile_all(args: argparse.Namespace) -> None:
    """Compile all kernels of a run in several processes."""
    columns = {int(shape.split("x")[1]) for shape in args.shapes}
    wanted: list[tuple[str, str, int, int, Any]] = []
    for name, width, tokens in itertools.product(args.layers, columns, args.tokens):
        tokens = args.tokens[[kernel_of(t) for t in args.tokens].index(kernel_of(tokens))]
        if args.sweep and (args.sweep, name) != (DOT, "bitmap"):
            wanted += [(name, args.sweep, width, tokens, tiles) for tiles in candidates(name, args.sweep)]
        elif not args.sweep:
            wanted += [(name, way, width, tokens, None) for way in ways(name, tokens)]
    wanted = list(dict.fromkeys(wanted))
    begin = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(min(COMPILERS, len(wanted))) as pool:
        pool.map(compile_one, wanted, chunksize=1)
    print(f"compiled {len(wanted)} in {time.perf_counter() - begin:.0f} s", flush=True)


def main() -> None:
    """Measure, check or sweep, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--layers", nargs="+", default=LAYERS, choices=LAYERS)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--seconds", type=float, default=0.4, help="of measuring per shape and number of tokens")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--sweep", choices=[FEW, DOT])
    args = parser.parse_args()
    require_gpu(parser)
    if args.check:
        check()
        return
    compile_all(args)
    bytes_per_s = bandwidth()
    print(f"copy bandwidth {bytes_per_s / 1e9:.0f} GB/s", flush=True)
    rows: list[dict] = []
    with torch.inference_mode():
        for shape in args.shapes:
            if args.sweep:
                rows += sweep(shape, args.layers, args.sweep, args.tokens, args.seconds)
            else:
                rows += measure(shape, args.layers, args.tokens, args.seconds, bytes_per_s)
    if args.out:
        args.out.write_text(json.dumps(about_run(bytes_per_s) | {"rows": rows}, indent=1) + "\n")


def about_run(bytes_per_s: float) -> dict[str, Any]:
    """Return the head of a result: its title, provenance and bandwidth."""
    return {
        "what": "pruned layers against torch's bf16 linear, interleaved, median microseconds a layer",
        **provenance("cuda"),
        "copy_gb_s": round(bytes_per_s / 1e9),
    }


if __name__ == "__main__":
    main()
