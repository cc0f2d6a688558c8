"""Test 12: products with packed matrices against their decoded ones, on every path of this processor and in torch."""

import sys
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import niwaki.kernels
from niwaki.formats.packed import PackedTensors
from niwaki.kernels.cpu_module import cpu_module
from niwaki.kernels.planes import _compiled_arguments
from niwaki.runtime.chunked_matmul import decode_rows
from niwaki.runtime.linear import PackedLinear
from niwaki.runtime.sparse_linear import SparseLinear
from support.bit_planes import cpu_planes_of, quantized_matrix
from support.slow_decode import slow_decode
from support.sparse_records import record_of, tiled
from tests.system.reliability.commands import Row

NAMES = {1: "portable", 2: "AVX2", 3: "AVX-512", 4: "AVX-512 BF16", 5: "GFNI"}
SHAPES = [(1, 8), (3, 7), (5, 36), (33, 40), (70, 200), (96, 256), (64, 1000), (31, 333)]
GRIDS = [(1, "free"), (1, "midrise"), (2, "affine"), (3, "symmetric"), (4, "midrise"), (4, "affine"), (8, "affine")]
VALUES = ["float32", "bfloat16", "float16", "int8", "int4"]
TOKENS = [1, 3, 16, 17, 50]
LIMITS = {torch.float32: 1e-3, torch.bfloat16: 1e-2}
LONG = 200  # columns from which the error counts against the result; before, against what is added up


def _records() -> Iterator[tuple[str, Any, PackedTensors]]:
    """Yield names, records and their packed tensors."""
    for rows, columns in SHAPES:
        for bits, grid in GRIDS:
            for mixed in (False, True):
                if mixed and columns < 32:
                    continue
                parts = quantized_matrix(rows, columns, bits, grid, 32 if columns > 64 else columns, mixed)
                name = f"{rows} × {columns}, {bits} bits {grid}{', mixed' * mixed}"
                yield name, parts, PackedTensors.of_codes(parts, (rows, columns))
        for layout in ("bitmap", "two_four"):
            for kind in VALUES:
                record = record_of(rows, columns, kind, layout)
                yield f"{rows} × {columns}, {layout} of {kind}", record, PackedTensors.of_nonzeros(record)
    for rows, columns in ((32, 64), (96, 256), (64, 512)):
        yield f"{rows} × {columns}, tiles", (found := tiled(rows, columns, 32)), PackedTensors.of_nonzeros(found)


def _layer(packed: PackedTensors) -> nn.Module:
    rows, columns = packed.description["shape"]
    given = packed.description
    layer: nn.Module
    layer = PackedLinear(rows, columns, given, False) if "parts" in given else SparseLinear(rows, columns, given, False)
    layer.load_state_dict(packed.tensors)
    return layer


class Errors:
    """Largest errors by what was compared, and what was beyond its limit."""

    def __init__(self) -> None:
        self.largest: dict[str, float] = defaultdict(float)
        self.count: Counter[str] = Counter()
        self.beyond: list[str] = []

    def add(self, what: str, name: str, found: Tensor, x: Tensor, weight: Tensor, limit: float) -> None:
        """Compare `found` with x Wᵀ in float64."""
        exact = x.double() @ weight.T
        size = exact.norm() if weight.shape[1] >= LONG else (x.double().abs() @ weight.abs().T).norm()
        error = float((found.double() - exact).norm() / (size + 1e-30))
        self.count[what] += 1
        self.largest[what] = max(self.largest[what], error)
        if not error <= limit:
            self.beyond.append(f"{what}, {name}: {error:.2g}")


def packed() -> Row:
    """Run test 12: layers as they are used, then every path, then torch alone."""
    errors, compiled = Errors(), cpu_module()
    assert compiled is not None
    with poisoned():
        for name, record, tensors in _records():
            weight, layer = _weight(tensors), _layer(tensors)
            _layers(errors, "layers", name, layer, weight)
            _paths(errors, compiled, name, record, layer, weight)
        with without_kernels():
            for name, _, tensors in _records():
                _layers(errors, "torch alone", name, _layer(tensors), _weight(tensors))
    paths = [NAMES[path] for path in NAMES if compiled.supported(path)]
    worst = {kind: max(value for what, value in errors.largest.items() if kind in what) for kind in ("float32", "bf16")}
    return {
        "what": f"{len(SHAPES)} shapes, bit planes, bitmaps, two-four, tiles; outputs begin as NaN; "
        f"{', '.join(paths)} and torch without kernels",
        "reached": f"{errors.count.total():,} products: relative error at most {worst['float32']:.1e} in float32 and "
        f"{worst['bf16']:.1e} in bf16, {len(errors.beyond)} beyond the limits; paths: {', '.join(paths)}, torch",
        "figure": {"products": dict(errors.count), "largest_error": {what: float(f"{value:.3g}") for what, value in
                                                                     errors.largest.items()},
                   "beyond": errors.beyond[:20], "paths": paths},
        "passed": not errors.beyond and len(paths) > 1,
        **({} if len(paths) == len(NAMES) else {"not_run": "paths that this processor lacks"}),
    }  # fmt: skip


def _weight(packed: PackedTensors) -> Tensor:
    return torch.from_numpy(slow_decode(packed)[0])


def _layers(errors: Errors, what: str, name: str, layer: nn.Module, weight: Tensor) -> None:
    """Compare a layer in both dtypes."""
    for dtype, limit in LIMITS.items():
        layer.to(dtype)
        for tokens in TOKENS:
            x = torch.randn(tokens, weight.shape[1], generator=torch.Generator().manual_seed(tokens)).to(dtype)
            kind = "bf16" if dtype == torch.bfloat16 else "float32"
            errors.add(f"{what}, {kind}", name, layer(x), x, weight, limit)
    layer.float()


def _paths(errors: Errors, compiled: Any, name: str, record: Any, layer: Any, weight: Tensor) -> None:
    """Compare the kernels of each instruction set, and the rows that each decodes."""
    rows, columns = weight.shape
    for path in (path for path in NAMES if compiled.supported(path)):
        x = torch.randn(2, columns, generator=torch.Generator().manual_seed(9))
        if isinstance(record, list):
            out = torch.zeros(2, rows)
            if not all(part.group >= len(part.columns_C) or part.group % 32 == 0 for part in record) or path > 3:
                continue  # such groups are decoded by torch
            _planes(compiled, record, x, out, path)
        else:
            prepared = layer._prepare()
            out = torch.full((2, rows), torch.nan)
            prepared.multiply(x.data_ptr(), out.data_ptr(), 2, False, 1, path)
            decoded = torch.full((rows + 1, columns), torch.nan)
            decode_rows(prepared, 0, decoded[:-1], path)
            eye = torch.eye(columns)
            errors.add(f"decoded by {NAMES[path]}, float32", name, decoded[:-1].T, eye, weight, 1e-3)
            if not decoded[-1].isnan().all():
                errors.beyond.append(f"{NAMES[path]}, {name}: written beyond the last row")
        errors.add(f"{NAMES[path]}, float32", name, out, x, weight, 1e-3)


def _planes(compiled: Any, record: Any, x: Tensor, out: Tensor, path: int) -> None:
    for given in cpu_planes_of(record):
        compiled.plane_product(*_compiled_arguments(given), x.numpy(), out.numpy(), 1, path)


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill every new output with NaN, so that what is not written is seen."""
    real = torch.Tensor.new_empty

    def new_empty(self: Tensor, *size: Any, **more: Any) -> Tensor:
        made = real(self, *size, **more)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    torch.Tensor.new_empty = new_empty  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        torch.Tensor.new_empty = real  # type: ignore[method-assign]


@contextmanager
def without_kernels() -> Iterator[None]:
    """Run as where the package was installed without a compiler."""
    name = "niwaki.kernels._cpu"
    before, sys.modules[name] = sys.modules[name], None  # type: ignore[assignment]
    del niwaki.kernels._cpu
    cpu_module.cache_clear()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert cpu_module() is None
            yield
    finally:
        sys.modules[name] = niwaki.kernels._cpu = before
        cpu_module.cache_clear()
