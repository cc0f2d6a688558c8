"""Products with kept rows and columns on a GPU against cuBLAS: full matrices, and copies of what is kept. 7B shapes.

    python -m benchmarks.kernels.rows_gemv --out benchmarks/results/kernels/rows-gemv-h100.json
    python -m benchmarks.kernels.rows_gemv --check
    python -m benchmarks.kernels.rows_gemv --tiles --kernels rows_dot rows_gate

A CUDA graph runs many products one after another, each with weights and kept units of its own. Together these are
larger than the caches. All graphs are replayed in turns, in one run. `dense_us`: torch's linear with the full matrices
(of `rows_gate` two, the activation and the product, as transformers runs them). `compact_us`: the same with copies of
the kept weights, made before. `share_of_bandwidth` counts kept weights, against a copy. `--tiles` times some tiles of
every kernel at half of the units. `--check` compares odd and full shapes with float64. Weights are random and made on
the device. Kernels are first compiled by several processes at once.
"""

import argparse
import json
import multiprocessing
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.common.devices import require_gpu
from benchmarks.common.gpu_timing import bandwidth, copies_of, graph_of, interleaved
from benchmarks.common.provenance import provenance
from niwaki.kernels.rows import rows_of
from niwaki.kernels.triton import rows as triton_rows
from niwaki.kernels.triton.rows import GemvLaunch
from niwaki.kernels.types import ACTIVATIONS

HIDDEN, NEURONS, HEADS, HEAD = 4096, 11008, 32, 128
KEEP = [0.3, 0.5, 0.7, 1.0]
TOKENS = [1, 4, 8]
COMPILERS = 12  # processes
DTYPES = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}  # and the errors they may make


class Product(NamedTuple):
    """A kernel at one shape: `units` of `width` rows or columns, `matrices` of them, the other side `others` wide."""

    kernel: str
    units: int = NEURONS
    width: int = 1
    matrices: int = 1
    others: int = HIDDEN

    @property
    def sums(self) -> bool:
        """Return whether kept units are inputs."""
        return self.kernel == "columns_dot"

    def weights(self, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
        """Return matrices as the kernel takes them."""
        shape = [self.units * self.width, self.others]
        shape = shape[::-1] if self.kernel == "columns_dot" else shape
        return [(torch.randn(shape, device="cuda") / 50).to(dtype) for _ in range(self.matrices)]

    def kept(self, keep: float, dtype: torch.dtype = torch.int64) -> Tensor:
        """Return random units in random order."""
        count = max(1, round(keep * self.units))
        return torch.randperm(self.units, device="cuda")[:count].to(dtype)

    def inputs(self, tokens: int, kept: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Return random inputs of a product with `kept` units."""
        return torch.randn(tokens, kept * self.width if self.sums else self.others, device="cuda").to(dtype)


PRODUCTS = {
    "rows_dot": Product("rows_dot"),
    "rows_dot_heads": Product("rows_dot", HEADS, HEAD),
    "rows_gate": Product("rows_gate", matrices=2),
    "columns_dot": Product("columns_dot", HEADS, HEAD),
}
CANDIDATES = {
    "rows_dot": [(1, 1024, 4), (2, 1024, 4), (4, 1024, 4), (8, 1024, 4), (2, 2048, 8), (4, 512, 2), (8, 256, 1)],
    "rows_gate": [(1, 1024, 4), (2, 1024, 4), (4, 1024, 4), (1, 2048, 8), (2, 512, 2), (4, 512, 2), (4, 256, 1)],
    "columns_dot": [(1, 1024, 4), (2, 1024, 4), (4, 1024, 4), (8, 1024, 4), (2, 2048, 8), (4, 512, 2), (8, 256, 1)],
}  # fmt: skip


def multiply(
    product: Product,
    weights: list[Tensor],
    units_K: Tensor,
    x_BI: Tensor,
    out: Tensor | None = None,
    launch: GemvLaunch | None = None,
    activation: str = "silu",
) -> Tensor:
    """Run the kernel."""
    width = product.width
    if product.kernel == "rows_dot":
        return triton_rows.rows_dot(x_BI, *weights, units_K, width=width, out=out, launch=launch)
    if product.kernel == "rows_gate":
        return triton_rows.rows_gate(x_BI, *weights, units_K, activation, width=width, out=out, launch=launch)
    return triton_rows.columns_dot(x_BI, *weights, units_K, width, out=out, launch=launch)


def linear(product: Product, weights: list[Tensor], x_BI: Tensor, activation: str = "silu") -> Tensor:
    """Compute the product by torch with all given weights, which are laid out [outputs, inputs]."""
    if product.kernel == "rows_gate":
        gate_BO, up_BO = (functional.linear(x_BI, weight_OI) for weight_OI in weights)
        return activated(gate_BO, activation) * up_BO
    return functional.linear(x_BI, weights[0])


def activated(x_BO: Tensor, activation: str) -> Tensor:
    """Apply an activation by its name."""
    if activation == "gelu_tanh":
        return functional.gelu(x_BO, approximate="tanh")
    return getattr(functional, activation)(x_BO)


def compacted(product: Product, weights: list[Tensor], units_K: Tensor) -> list[Tensor]:
    """Copy the kept weights, as torch's linear takes them."""
    rows_R = rows_of(units_K, product.width)
    if product.kernel == "columns_dot":
        return [weight_OI[:, rows_R].contiguous() for weight_OI in weights]
    return [weight[rows_R] for weight in weights]


def relative_error(
    found: Tensor, product: Product, weights: list[Tensor], units_K: Tensor, x_BI: Tensor, activation: str = "silu"
) -> float:
    """Return the error against a float64 product of at least the smallest normal number. NaN is infinitely wrong."""
    small = [weight.double() for weight in compacted(product, weights, units_K)]
    expected = linear(product, small, x_BI.double(), activation)
    size = expected.norm().clamp(min=torch.finfo(found.dtype).smallest_normal)
    error = float((found.double() - expected).norm() / size)
    return error if error == error else float("inf")


def poisoned(product: Product, tokens: int, kept: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return an output full of NaN."""
    outputs = product.others if product.sums else kept * product.width
    return {"out": torch.full((tokens, outputs), float("nan"), device="cuda", dtype=dtype)}


# Units, width, other side, tokens: odd everything, one of everything, several tiles, and the full shapes.
ODD = [(17, 1, 40, 1), (1, 1, 1, 1), (9, 6, 300, 3), (333, 1, 1030, 8), (40, 8, 777, 5), (11, 80, 264, 2)]


def check() -> None:
    """Check all kernels, dtypes and dtypes of indices in buffers of NaN, equal results of equal runs, and graphs."""
    cases = [
        (kernel, sizes, dtype) for kernel in ("rows_dot", "rows_gate", "columns_dot")
        for sizes in ODD for dtype in DTYPES
    ]  # fmt: skip
    wrong = 0
    with multiprocessing.get_context("spawn").Pool(COMPILERS) as pool:
        for line in pool.imap(check_case, cases):
            wrong += "WRONG" in line
            print(line, flush=True)
    for name, product in PRODUCTS.items():
        for tokens in TOKENS:
            line = check_graph(product, tokens)
            wrong += "WRONG" in line
            print(name, line, flush=True)
    print("all right" if not wrong else f"{wrong} WRONG", flush=True)


def check_case(given: tuple[str, tuple[int, int, int, int], torch.dtype]) -> str:
    """Return the largest error over activations and dtypes of indices."""
    kernel, (units, width, others, tokens), dtype = given
    product = Product(kernel, units, width, 2 if kernel == "rows_gate" else 1, others)
    torch.manual_seed(units)
    weights, worst = product.weights(dtype), 0.0
    for number, activation in enumerate(ACTIVATIONS if kernel == "rows_gate" else ("silu", "relu")):
        for keep in (0.4, 1.0):
            units_K = product.kept(keep, (torch.int32, torch.int64)[number % 2])
            x_BI = product.inputs(tokens, len(units_K), dtype)
            found = [
                multiply(product, weights, units_K, x_BI, activation=activation,
                         **poisoned(product, tokens, len(units_K), dtype)) for _ in range(2)
            ]  # fmt: skip
            assert torch.equal(*found) or found[0].isnan().any(), "not deterministic"
            worst = max(worst, relative_error(found[0], product, weights, units_K, x_BI, activation))
    verdict = "right" if worst < DTYPES[dtype] else "WRONG"
    return f"{verdict} {worst:.1e} {kernel}, {units} units of {width}, {others} wide, {tokens} tokens, {dtype}"


def check_graph(product: Product, tokens: int) -> str:
    """Check that a captured product reads units and inputs that are written later, and allocates nothing."""
    weights, units_K = product.weights(), product.kept(0.5)
    x_BI = product.inputs(tokens, len(units_K))
    buffers = poisoned(product, tokens, len(units_K), torch.bfloat16)
    replay = graph_of([partial(multiply, product, weights, units_K, x_BI, **buffers)])
    worst = 0.0
    for _ in range(3):
        units_K.copy_(product.kept(0.5))
        x_BI.copy_(product.inputs(tokens, len(units_K)))
        for buffer in buffers.values():
            buffer.fill_(float("nan"))
        replay()
        worst = max(worst, relative_error(buffers["out"], product, weights, units_K, x_BI))
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    multiply(product, weights, units_K, x_BI, **buffers)
    allocated = torch.cuda.memory_stats()["allocation.all.allocated"] - before
    verdict = "right" if worst < DTYPES[torch.bfloat16] and not allocated else "WRONG"
    return f"{verdict} {worst:.1e} in a graph, {tokens} tokens, {allocated} allocations"


def kept_bytes(product: Product, keep: float) -> int:
    """Return the bytes of the kept weights."""
    return 2 * product.matrices * max(1, round(keep * product.units)) * product.width * product.others


def works_of(
    product: Product, sets: list[list[Tensor]], units: list[Tensor], x_BI: Tensor, tiles: GemvLaunch | None = None
) -> list[Callable[[], object]]:
    """Return runs of the kernel on every set of weights, with given buffers."""
    buffers = poisoned(product, len(x_BI), len(units[0]), x_BI.dtype)
    return [
        partial(multiply, product, weights, units_K, x_BI, **buffers, launch=tiles)
        for weights, units_K in zip(sets, units, strict=True)
    ]


def measure(name: str, keeps: list[float], counts: list[int], seconds: float, bytes_per_s: float) -> Iterable[dict]:
    """Yield the rows of the result for one kernel."""
    product = PRODUCTS[name]
    every = [product.weights() for _ in range(copies_of(kept_bytes(product, min(keeps))))]
    for keep in keeps:
        nbytes = kept_bytes(product, keep)
        sets = every[: copies_of(nbytes)]
        units = [product.kept(keep) for _ in sets]
        small = [compacted(product, weights, units_K) for weights, units_K in zip(sets, units, strict=True)]
        for tokens in counts:
            x_BI = product.inputs(tokens, len(units[0]))
            wide_BI = product.inputs(tokens, product.units)
            works = {
                "rows": works_of(product, sets, units, x_BI),
                "dense": [partial(linear, product, weights, wide_BI) for weights in sets],
                "compact": [partial(linear, product, weights, x_BI) for weights in small],
            }
            times = interleaved({key: (graph_of(work), len(work)) for key, work in works.items()}, seconds)
            error = relative_error(multiply(product, sets[0], units[0], x_BI), product, sets[0], units[0], x_BI)
            yield {
                "kernel": name, "units": product.units, "width": product.width, "others": product.others,
                "keep": keep, "tokens": tokens, "bytes": nbytes, "sets": len(sets),
                "us": round(times["rows"], 2), "dense_us": round(times["dense"], 2),
                "compact_us": round(times["compact"], 2), "floor_us": round(nbytes / bytes_per_s * 1e6, 2),
                "speedup": round(times["dense"] / times["rows"], 2),
                "share_of_bandwidth": round(nbytes / bytes_per_s / times["rows"] * 1e6, 3),
                "compact_share_of_bandwidth": round(nbytes / bytes_per_s / times["compact"] * 1e6, 3),
                "relative_error": float(f"{error:.2e}"),
            }  # fmt: skip


def candidates(name: str) -> list[GemvLaunch]:
    """Return the tiles that a sweep tries."""
    return [GemvLaunch(*sizes) for sizes in CANDIDATES[PRODUCTS[name].kernel]]


def sweep(name: str, keep: float, counts: list[int], seconds: float, bytes_per_s: float) -> Iterable[dict]:
    """Yield the times of all tiles, best first."""
    product = PRODUCTS[name]
    nbytes = kept_bytes(product, keep)
    sets = [product.weights() for _ in range(copies_of(nbytes))]
    units = [product.kept(keep) for _ in sets]
    for tokens in counts:
        x_BI = product.inputs(tokens, len(units[0]))
        runs = {}
        for tiles in candidates(name):
            works = works_of(product, sets, units, x_BI, tiles)
            runs[str(tuple(tiles))] = (graph_of(works), len(works))
        times = interleaved(runs, seconds)
        best = sorted(times, key=times.__getitem__)
        yield {
            "kernel": name, "keep": keep, "tokens": tokens,
            "us": {tiles: round(times[tiles], 2) for tiles in best},
            "share_of_bandwidth": {tiles: round(nbytes / bytes_per_s / times[tiles] * 1e6, 3) for tiles in best},
        }  # fmt: skip


def compile_one(given: tuple[str, int, GemvLaunch | None]) -> None:
    """Compile a kernel into Triton's cache on the disk."""
    name, tokens, tiles = given
    product = PRODUCTS[name]._replace(units=16)
    units_K = product.kept(0.5)
    multiply(product, product.weights(), units_K, product.inputs(tokens, len(units_K)), launch=tiles)


def compile_all(args: argparse.Namespace) -> None:
    """Compile all kernels of a run in several processes."""
    wanted = [
        (name, tokens, tiles) for name in args.kernels for tokens in args.tokens
        for tiles in (candidates(name) if args.tiles else [None])
    ]  # fmt: skip
    begin = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(min(COMPILERS, len(wanted))) as pool:
        pool.map(compile_one, wanted, chunksize=1)
    print(f"compiled in {time.perf_counter() - begin:.0f} s", flush=True)


def main() -> None:
    """Measure, check or sweep, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--kernels", nargs="+", default=list(PRODUCTS), choices=list(PRODUCTS))
    parser.add_argument("--keep", type=float, nargs="+", default=KEEP)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--seconds", type=float, default=0.2, help="of measuring per row of the result")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--tiles", action="store_true")
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
        for name in args.kernels:
            if args.tiles:
                found = sweep(name, 0.5, args.tokens, args.seconds * 2, bytes_per_s)
            else:
                found = measure(name, args.keep, args.tokens, args.seconds, bytes_per_s)
            for row in found:
                print(row, flush=True)
                rows.append(row)
    if args.out:
        args.out.write_text(json.dumps(about_run(bytes_per_s) | {"rows": rows}, indent=1) + "\n")


def about_run(bytes_per_s: float) -> dict[str, Any]:
    """Return the head of a result: its title, provenance and bandwidth."""
    return {
        "what": "products with kept rows and columns against torch's bf16 linear, interleaved, median microseconds",
        **provenance("cuda"),
        "copy_gb_s": round(bytes_per_s / 1e9),
    }


if __name__ == "__main__":
    main()
