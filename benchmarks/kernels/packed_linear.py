"""Packed layers against torch's dense bf16: speed, share of the bandwidth, and on a GPU parity and kernel configs.

    python -m benchmarks.kernels.packed_linear --out benchmarks/results/kernels/packed-linear-cpu.json [--threads 1 2]
    python -m benchmarks.kernels.packed_linear --sparse --out benchmarks/results/kernels/sparse-linear-cpu.json
    python -m benchmarks.kernels.packed_linear --device cuda --out benchmarks/results/kernels/packed-linear-h100.json
    python -m benchmarks.kernels.packed_linear --device cuda --check
    python -m benchmarks.kernels.packed_linear --device cuda --sweep --shapes 4096x4096 --tokens 1

CPU: random codes, or zeros with --sparse. Every call reads another copy of its weights, because the layers of a model
are not in the caches either. The copies fill COLD_BYTES. Bandwidth is that of the sum of a large float32 tensor with
the same threads in the same run.

GPU: a CUDA graph runs many copies of a layer one after another. Their weights together are larger than the caches. All
graphs are replayed in turns, in one run. Above the limit of the few-token kernel, decoding the matrix is also timed
alone (`decode_us`). Its share of the bandwidth counts codes read and weights written. `--sweep` times configs: up to 4
tokens of the kernel for few tokens, above that of the kernel for tensor cores. The planes are random and made on the
device. Kernels are first compiled by several processes at once.
"""

import argparse
import itertools
import json
import multiprocessing
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import cpu_timing
from benchmarks.common.devices import add_device, parse_for_device
from benchmarks.common.gpu_timing import bandwidth, copies_of, graph_of, interleaved, relative_error
from benchmarks.common.provenance import provenance
from benchmarks.common.random_layers import FREE, LAYERS, packed_layer, random_layer, sparse_layers
from niwaki.formats.quantized import QuantizedColumns, stored_tensors
from niwaki.kernels.planes import MAX_CORE_TOKENS, decode, gpu_product, reaches
from niwaki.kernels.types import TileLaunch
from niwaki.runtime.linear import PackedLinear

SHAPES = ["4096x4096", "11008x4096", "4096x11008", "8192x8192", "28672x8192", "8192x28672"]
DEFAULTS = {
    "cpu": {"shapes": SHAPES[:3], "tokens": [1]},
    "cuda": {"shapes": SHAPES, "tokens": [1, 4, 16, 512]},
}
FEW = [TileLaunch(*sizes) for sizes in [(2, 2), (4, 1), (4, 2), (4, 4), (8, 1), (8, 2), (8, 4), (16, 1)]]
COMPILERS = 12  # processes
DTYPES = {torch.bfloat16: 1e-2, torch.float16: 1e-2, torch.float32: 1e-3}  # and the errors they may make


def measure_cpu(args: argparse.Namespace) -> list[dict]:
    """Return the rows of the result on the CPU."""
    rows_out = []
    for shape in args.shapes:
        rows, columns = (int(size) for size in shape.split("x"))
        dense = nn.Linear(columns, rows, bias=False, dtype=torch.bfloat16, device="cpu")
        if args.sparse:
            layers: dict[str, nn.Module] = {**sparse_layers(rows, columns)}
        else:
            layers = {"1.6 bit": packed_layer(rows, columns, 0.2), "4 bit": packed_layer(rows, columns, 1.0)}
        for tokens, threads in itertools.product(args.tokens, args.threads):
            x = torch.randn(tokens, columns).bfloat16()
            torch.set_num_threads(threads)
            bytes_per_s = cpu_timing.bandwidth()
            with torch.inference_mode():
                works = {name: cpu_timing.in_turns(layer, x) for name, layer in {**layers, "dense": dense}.items()}
                times = cpu_timing.interleaved(works, args.rounds)
            for name, layer in layers.items():
                nbytes = sum(buffer.nbytes for buffer in layer.buffers())
                rows_out.append(
                    {
                        "layer": name,
                        "shape": [rows, columns],
                        "tokens": tokens,
                        "threads": threads,
                        "bytes": nbytes,
                        "dense_bytes": dense.weight.nbytes,
                        "ms": round(times[name] * 1e3, 3),
                        "dense_ms": round(times["dense"] * 1e3, 3),
                        "speedup": round(times["dense"] / times[name], 2),
                        "bandwidth_gb_s": round(bytes_per_s / 1e9, 1),
                        "share_of_bandwidth": round(nbytes / bytes_per_s / times[name], 2),
                    }
                )
                print(rows_out[-1], flush=True)
    return rows_out


def exact_layer(parts: list[QuantizedColumns], rows: int, columns: int, bias: bool) -> PackedLinear:
    """Return a layer of given parts on the GPU."""
    layer = PackedLinear(rows, columns, {"parts": [part.describe() for part in parts]}, bias)
    layer.load_state_dict(stored_tensors(parts, columns) | ({"bias": torch.randn(rows)} if bias else {}))
    return layer.cuda()


CASES = [
    (1, 8, 1, "free", 0, False), (5, 7, 4, "midrise", 0, False), (31, 40, 2, "affine", 32, False),
    (33, 200, 3, "symmetric", 64, True), (70, 1000, 4, "symmetric", 128, False), (1000, 333, 8, "affine", 8, False),
    (256, 4096, 4, "midrise", 0, True), (4099, 1027, 1, "midrise", 0, True), (64, 2048, 4, "affine", 128, True),
    (129, 512, 8, "affine", 128, False), (96, 520, 4, "free", 24, True), (2048, 5000, 1, "free", 0, False),
    (45, 340, 4, "affine", 12, True),
]  # fmt: skip


def check() -> None:
    """Check odd shapes, all widths and grids, all dtypes, poisoned outputs, equal results of equal runs."""
    with multiprocessing.get_context("spawn").Pool(COMPILERS) as pool:
        for lines in pool.imap(check_case, [(case, dtype) for case in CASES for dtype in DTYPES]):
            print(lines, flush=True)


def check_case(given: tuple[Any, torch.dtype]) -> str:
    """Return the largest error of a layer over numbers of tokens. Decoded matrices have none."""
    (rows, columns, bits, grid, group, mixed), dtype = given
    generator = torch.Generator().manual_seed(rows)
    layer, weight_OI = odd_layer(rows, columns, bits, grid, group, mixed, generator)
    check_decoded(layer, weight_OI.to(dtype))
    worst = 0.0
    for tokens in (1, 2, 3, 4, 5, 8, 12, 13, 17, 512):
        x_NI = torch.randn(tokens, columns, generator=generator).to("cuda", dtype)
        found_NO = layer(x_NI)
        assert torch.equal(found_NO, layer(x_NI)), "not deterministic"
        if all(reaches(x_NI, about["group"], about["columns"]) for about in layer.described):
            assert torch.equal(found_NO, poisoned(layer, x_NI)), "the layer and its kernel differ"
        worst = max(worst, relative_error(found_NO, x_NI, weight_OI))
    verdict = "right" if worst < DTYPES[dtype] else "WRONG"
    return f"{verdict} {worst:.1e} {rows}x{columns}, {bits} bit, {grid}, groups {group}, mixed {mixed}, {dtype}"


def check_decoded(layer: PackedLinear, weight_OI: Tensor) -> None:
    """Check every weight exactly, all rows and all but the first tile, in buffers that were filled with NaN."""
    from niwaki.kernels.triton.decode import decode_planes

    prepared = layer._prepare()
    expected_OI = weight_OI if prepared.order_I is None else weight_OI[:, prepared.order_I]
    for first in range(0, min(len(weight_OI), 33), 32):
        out_RI = torch.full_like(expected_OI[first:], float("nan"))
        decode_planes(prepared.parts, len(weight_OI), first, out_RI)
        assert torch.equal(out_RI, expected_OI[first:]), "decoded wrongly"


def poisoned(layer: PackedLinear, x_NI: Tensor) -> Tensor:
    """Return the result of the kernel in a buffer that was filled with NaN."""
    out_NO = x_NI.new_full((len(x_NI), layer.out_features), float("nan"))
    gpu_product(x_NI, layer._prepare().parts, None, out_NO)
    return out_NO


def odd_layer(
    rows: int, columns: int, bits: int, grid: str, group: int, mixed: bool, generator: torch.Generator
) -> tuple[PackedLinear, Tensor]:
    """Return a layer of one part, or of two with 1-bit columns in the second, and its matrix."""
    order_I = torch.randperm(columns, generator=generator) if mixed else torch.arange(columns)
    own = columns // 3 + 1 if mixed else columns
    parts = []
    for columns_C, here, about, width in [(order_I[:own], bits, grid, group), (order_I[own:], 1, "free", 0)]:
        if not len(columns_C):
            continue
        width = min(width or len(columns_C), len(columns_C))
        groups = -(-len(columns_C) // width)
        code = torch.randint(0, 2**here, (rows, len(columns_C)), generator=generator, dtype=torch.uint8)
        scale = (torch.rand(rows, groups, generator=generator) + 0.1).half()
        offset = torch.randn(rows, groups, generator=generator).half() if about == FREE else None
        zero = torch.randint(0, 2**here, (rows, groups), generator=generator, dtype=torch.uint8)
        parts.append(QuantizedColumns(columns_C.sort().values, here, about, width, code, scale, offset,
                          zero if about == "affine" else None))  # fmt: skip
    layer = exact_layer(parts, rows, columns, bias=False)
    return layer, layer.weight_OI(torch.float32)


def layers_of(name: str, rows: int, columns: int) -> list[PackedLinear]:
    """Return copies with weights of their own that fill more than the cache."""
    first = random_layer(name, rows, columns)
    more = copies_of(sum(buffer.nbytes for buffer in first.buffers())) - 1
    return [first, *(random_layer(name, rows, columns) for _ in range(more))]


def measure_gpu(shape: str, names: list[str], counts: list[int], seconds: float, bytes_per_s: float) -> list[dict]:
    """Return the rows of the result for one shape."""
    rows, columns = (int(size) for size in shape.split("x"))
    dense = [torch.randn(rows, columns, device="cuda").bfloat16() for _ in range(copies_of(rows * columns * 2))]
    packed = {name: layers_of(name, rows, columns) for name in names}
    found = []
    for tokens in counts:
        x_NI = torch.randn(tokens, columns, device="cuda", dtype=torch.bfloat16)
        works: dict[str, list[Callable[[], object]]] = {
            name: [partial(layer, x_NI) for layer in layers] for name, layers in packed.items()
        }
        works["dense"] = [partial(nn.functional.linear, x_NI, weight_OI) for weight_OI in dense]
        if tokens > MAX_CORE_TOKENS:
            works |= {f"decode {name}": decoders(layers) for name, layers in packed.items()}
        times = interleaved({name: (graph_of(work), len(work)) for name, work in works.items()}, seconds)
        for name, layers in packed.items():
            nbytes = sum(buffer.nbytes for buffer in layers[0].buffers())
            error = relative_error(layers[0](x_NI), x_NI, layers[0].weight_OI(torch.float32))
            found.append({
                "layer": name, "shape": [rows, columns], "tokens": tokens, "bytes": nbytes,
                "us": round(times[name], 2), "dense_us": round(times["dense"], 2),
                "speedup": round(times["dense"] / times[name], 2),
                "share_of_bandwidth": round(nbytes / bytes_per_s / times[name] * 1e6, 3),
                "dense_share_of_bandwidth": round(2 * rows * columns / bytes_per_s / times["dense"] * 1e6, 3),
                "relative_error": float(f"{error:.2e}"),
            })  # fmt: skip
            if tokens > MAX_CORE_TOKENS:
                moved_s = (nbytes + 2 * rows * columns) / bytes_per_s
                found[-1]["decode_us"] = round(times[f"decode {name}"], 2)
                found[-1]["decode_share_of_bandwidth"] = round(moved_s / times[f"decode {name}"] * 1e6, 3)
            print(found[-1], flush=True)
    return found


def decoders(layers: list[PackedLinear]) -> list[Callable[[], object]]:
    """Return works that decode whole matrices to bf16."""
    sizes = [(layer._prepare().parts, layer.out_features) for layer in layers]
    return [partial(decode, parts, rows, 0, rows, torch.bfloat16) for parts, rows in sizes]


def swept(tokens: int) -> tuple[Callable[..., None], list]:
    """Return the kernel for a number of tokens, and its configs."""
    from niwaki.kernels.triton import dot as triton_dot
    from niwaki.kernels.triton import planes as triton_planes

    some = [triton_dot.PlaneDotLaunch(warps, stages) for warps in (1, 2, 4) for stages in (1, 2, 3)]
    return (triton_planes.fma_product, FEW) if tokens <= 4 else (triton_dot.core_product, some)


def sweep(shape: str, names: list[str], counts: list[int], seconds: float) -> list[dict]:
    """Return the times of every config, and print them best first."""
    rows, columns = (int(size) for size in shape.split("x"))
    found = []
    for name in names:
        layers = layers_of(name, rows, columns)
        for tokens in counts:
            x_NI = torch.randn(tokens, columns, device="cuda", dtype=torch.bfloat16)
            out_NO = x_NI.new_empty(tokens, rows)
            runs = {}
            kernel, configs = swept(tokens)
            for config in configs:
                works = [partial(kernel, x_NI, layer._prepare().parts, None, out_NO, config) for layer in layers]
                runs[str(tuple(config))] = (graph_of(works), len(works))
            times = interleaved(runs, seconds)
            best = sorted(times, key=times.__getitem__)
            print(f"{shape} {name} n={tokens}:", *(f"{config} {times[config]:.2f}" for config in best), flush=True)
            found.append({"shape": [rows, columns], "layer": name, "tokens": tokens, "us": times})
    return found


def compile_one(given: tuple[str, int, int, Any]) -> None:
    """Compile the kernel for these columns into Triton's cache on the disk: the layer's own, or one of a sweep."""
    name, columns, tokens, config = given
    layer = random_layer(name, 32, columns)
    x_NI = torch.randn(tokens, columns, device="cuda", dtype=torch.bfloat16)
    if config is None:
        layer(x_NI)
    else:
        swept(tokens)[0](x_NI, layer._prepare().parts, None, x_NI.new_empty(tokens, 32), config)


def compile_all(args: argparse.Namespace) -> None:
    """Compile all kernels of a run in several processes."""
    columns = {int(shape.split("x")[1]) for shape in args.shapes}
    configs = {tokens: swept(tokens)[1] if args.sweep else [None] for tokens in args.tokens}
    wanted = [
        (*case, config) for case in itertools.product(args.layers, columns, args.tokens) for config in configs[case[2]]
    ]
    begin = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(min(COMPILERS, len(wanted))) as pool:
        pool.map(compile_one, wanted, chunksize=1)
    print(f"compiled in {time.perf_counter() - begin:.0f} s", flush=True)


def main() -> None:
    """Measure, check or sweep, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_device(parser)
    parser.add_argument("--out", type=Path, help="required on a CPU")
    parser.add_argument("--shapes", nargs="+", metavar="ROWSxCOLUMNS")
    parser.add_argument("--tokens", type=int, nargs="+")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="CPU only")
    parser.add_argument("--rounds", type=int, default=40, help="CPU only")
    parser.add_argument("--sparse", action="store_true", help="pruned layers instead of quantized ones, CPU only")
    parser.add_argument("--layers", nargs="+", default=LAYERS, choices=LAYERS, help="GPU only")
    parser.add_argument("--seconds", type=float, default=0.5, help="per shape and number of tokens, GPU only")
    parser.add_argument("--check", action="store_true", help="GPU only")
    parser.add_argument("--sweep", action="store_true", help="GPU only")
    args = parse_for_device(parser, DEFAULTS)
    if args.device == "cuda":
        run_gpu(args)
        return
    if args.out is None:
        parser.error("the following arguments are required: --out")
    if args.check or args.sweep:
        parser.error("--check and --sweep need --device cuda")
    rows = measure_cpu(args)
    counts = " ".join(map(str, args.tokens))
    result = {
        "what": f"{counts} token(s), packed layers against torch's bf16 linear, interleaved, median seconds",
        **provenance("cpu"),
        "rows": rows,
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")


def run_gpu(args: argparse.Namespace) -> None:
    """Measure, check or sweep on a GPU, and write the result."""
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
                rows += sweep(shape, args.layers, args.tokens, args.seconds)
            else:
                rows += measure_gpu(shape, args.layers, args.tokens, args.seconds, bytes_per_s)
    if args.out:
        args.out.write_text(json.dumps(about_run(bytes_per_s) | {"rows": rows}, indent=1) + "\n")


def about_run(bytes_per_s: float) -> dict[str, Any]:
    """Return the head of a result: its title, provenance and bandwidth."""
    return {
        "what": "packed layers against torch's bf16 linear, interleaved, median microseconds a layer",
        **provenance("cuda"),
        "copy_gb_s": round(bytes_per_s / 1e9),
    }


if __name__ == "__main__":
    main()
