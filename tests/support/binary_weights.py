"""Weights with dominant columns, and one-bit records of them."""

from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from niwaki.config.targets import Bits
from niwaki.formats.packed import Packed
from niwaki.methods.shared.column_sweep import inverse_factor
from niwaki.methods.shared.rounding import groups_of, round_by_sweep
from support.models import calibration_of, correlated_inputs, make_block

Array = NDArray[np.float64]


def random(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Return normal weights with a deviation of 0.02."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02


def wide() -> tuple[torch.Tensor, torch.Tensor]:
    """Return weights with columns of different sizes, and a few dominant inputs, as in a language model."""
    weight = random(96, 256) * (1 + random(96, 256, seed=7).abs() * 50) * (25 * random(1, 256, seed=5)).exp()
    x = correlated_inputs(600, 256)
    x[:, torch.randperm(256, generator=torch.Generator().manual_seed(1))[:20]] *= 4
    return weight, x


def output_error(found: torch.Tensor, weight: torch.Tensor, x: torch.Tensor) -> float:
    """Return the relative squared error of the outputs for inputs `x`."""
    return float((x @ (found - weight).T).square().sum() / (x @ weight.T).square().sum())


def one_bit_error(weight: torch.Tensor, x: torch.Tensor) -> float:
    """Return the output error of the plain error-compensated sweep with one bit and a mean for 128 columns."""
    upper, _ = inverse_factor(x.T @ x, 0.01)
    return output_error(
        round_by_sweep(weight, upper, groups_of(0, weight.shape[1], 1, "free", 128), False).values_OI, weight, x
    )


def record(module: Any, weight: torch.Tensor, x: torch.Tensor, bits: float = 8, **options: Any) -> Packed:
    """Return the record that a method makes of one matrix."""
    config = module.Config(**options)
    block = make_block({"m": weight})
    calib = calibration_of(block, x, module.needs(config))
    found: Packed = module.compress(block, calib, {"m": Bits(bits)}, config, torch.Generator())["m"]
    return found


def record_and_tensors(
    monkeypatch: pytest.MonkeyPatch, module: ModuleType, weight: torch.Tensor, x: torch.Tensor, **options: Any
) -> tuple[Packed, dict[str, Array]]:
    """Return a record, and the tensors that it was decoded from."""
    caught: dict[str, torch.Tensor] = {}
    with_true_size = module.with_true_size

    def catch(weight_OI: torch.Tensor, tensors: dict[str, torch.Tensor], *rest: Any) -> Packed:
        caught.update(tensors)
        found: Packed = with_true_size(weight_OI, tensors, *rest)
        return found

    monkeypatch.setattr(module, "with_true_size", catch)
    packed = record(module, weight, x, **options)
    assert packed.detail["method_bytes"] == sum(tensor.nbytes for tensor in caught.values())
    assert packed.detail["method_bits"] == 8 * packed.detail["method_bytes"] / weight.numel()
    return packed, {name: tensor.numpy() for name, tensor in caught.items()}


def bits_of(planes: NDArray[np.uint8], *shape: int) -> NDArray[np.bool_]:
    """Unpack one bit plane with numpy instead of niwaki."""
    found: NDArray[np.uint8] = np.unpackbits(planes.reshape(-1), bitorder="little")[: int(np.prod(shape))]
    return found.reshape(shape).astype(bool)


def binarised(values: list[float], mean: bool) -> tuple[float, float, list[float]]:
    """Return μ, α and the levels of one row, by the formulas."""
    mu = sum(values) / len(values) if mean and values else 0.0
    alpha = sum(abs(v - mu) for v in values) / len(values) if values else 0.0
    return mu, alpha, [mu + (alpha if v >= mu else -alpha) for v in values]
