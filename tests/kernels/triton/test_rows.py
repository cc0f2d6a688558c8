"""Products with kept rows and columns: torch against loops in float64, and Triton, interpreted, against torch."""

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from niwaki.kernels import rows
from niwaki.kernels.rows import rows_of
from niwaki.kernels.types import ACTIVATIONS
from support.bit_planes import relative_error
from support.triton_interpreter import interpreted

# Inputs, outputs, units, width, tokens: no multiples of tiles, one of everything, units of several rows, all of them.
CASES = [(40, 9, 5, 1, 1), (1, 1, 1, 1, 1), (300, 13, 3, 6, 3), (264, 7, 9, 1, 8), (1030, 5, 2, 8, 5)]
LIMITS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}  # the interpreter cuts bfloat16 off
INDICES = (torch.int32, torch.int64)
EXACT = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
    "relu": functional.relu,
}


def drawn(case: tuple[int, int, int, int, int], dtype: torch.dtype, turn: int = 0) -> dict[str, Tensor]:
    """Inputs, matrices of units × width rows (or columns), more than are kept, and kept units in no order."""
    inputs, outputs, units, width, tokens = case
    generator = torch.Generator().manual_seed(inputs + turn)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    every = units + 1 + turn
    return {
        "x_BI": random(tokens, inputs), "a_OI": random(every * width, inputs), "b_OI": random(every * width, inputs),
        "h_BR": random(tokens, units * width),
        "w_ON": random(outputs, every * width), "wide_O": random(every * width), "bias_O": random(outputs),
        "extra_BO": random(tokens, outputs),
        "units_K": torch.randperm(every, generator=generator)[:units].to(INDICES[turn % 2]),
    }  # fmt: skip


def expected(t: dict[str, Tensor], width: int, activation: str = "silu") -> dict[str, Tensor]:
    """Every product in float64, one kept row after another."""
    t = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in t.items()}
    kept = [int(unit) * width + row for unit in t["units_K"] for row in range(width)]
    dots = torch.stack([t["x_BI"] @ t["a_OI"][row] + t["wide_O"][row] for row in kept], 1)
    gates = torch.stack([EXACT[activation](t["x_BI"] @ t["a_OI"][r]) * (t["x_BI"] @ t["b_OI"][r]) for r in kept], 1)
    columns = sum(t["h_BR"][:, place, None] * t["w_ON"][:, row] for place, row in enumerate(kept))
    added = t["bias_O"] + t["extra_BO"]
    return {"dot": dots, "gate": gates, "columns": columns + added}


def test_the_reference_multiplies_kept_rows_only() -> None:
    for case in CASES:
        t, width = drawn(case, torch.float32), case[3]
        for activation in ACTIVATIONS:
            wanted = expected(t, width, activation)
            gate = rows.rows_gate(t["x_BI"], t["a_OI"], t["b_OI"], t["units_K"], activation, width=width)
            assert relative_error(gate, wanted["gate"]) < 1e-5
        columns = t["h_BR"], t["w_ON"], t["units_K"], width, t["bias_O"], t["extra_BO"]
        out_BO = torch.full_like(t["extra_BO"], float("nan"))
        dot = rows.rows_dot(t["x_BI"], t["a_OI"], t["units_K"], t["wide_O"], width=width)
        assert relative_error(dot, wanted["dot"]) < 1e-5
        assert rows.columns_dot(*columns, out=out_BO) is out_BO
        assert relative_error(out_BO, wanted["columns"]) < 1e-5
    assert rows_of(torch.tensor([3, 0]), 2).tolist() == [6, 7, 0, 1]


def test_the_triton_kernels_do_the_same() -> None:
    interpreted("parity", __name__)


def found(t: dict[str, Tensor], width: int, activation: str = "silu", launch: object = None) -> dict[str, Tensor]:
    """Every product by the kernels, in outputs that were filled with NaN."""
    from niwaki.kernels.triton import rows as kernels

    x_BI, h_BR, units_K, extra_BO = t["x_BI"], t["h_BR"], t["units_K"], t["extra_BO"]
    dots, gates, columns = (torch.full_like(like, float("nan")) for like in (h_BR, h_BR, extra_BO))
    bias_O = t["bias_O"]
    kernels.rows_dot(x_BI, t["a_OI"], units_K, t["wide_O"], width=width, out=dots, launch=launch)
    kernels.rows_gate(x_BI, t["a_OI"], t["b_OI"], units_K, activation, width=width, out=gates, launch=launch)
    kernels.columns_dot(h_BR, t["w_ON"], units_K, width, bias_O, extra_BO, out=columns, launch=launch)
    return {"dot": dots, "gate": gates, "columns": columns}


def parity() -> None:
    """All shapes, dtypes, activations and dtypes of indices; some calls twice, to the same bits."""
    for turn, (dtype, limit) in enumerate(LIMITS.items()):
        for number, case in enumerate(CASES):
            t, width = drawn(case, dtype, turn), case[3]
            activation = ACTIVATIONS[(turn + number) % len(ACTIVATIONS)]
            wanted, results = expected(t, width, activation), found(t, width, activation)
            for name, result in results.items():
                assert result.dtype == dtype
                difference = relative_error(result, wanted[name])
                assert difference < limit, (name, case, dtype, difference)
            if number == turn + 1:
                again = found(t, width, activation)
                assert all(torch.equal(result, again[name]) for name, result in results.items())


def test_tiles_change_no_more_than_the_order_of_sums() -> None:
    interpreted("tiles", __name__)


def tiles() -> None:
    """Tiles wider and taller than the matrix; without bias and what is added, without buffers."""
    from niwaki.kernels.triton import rows as kernels

    t, width = drawn(CASES[2], torch.float32), CASES[2][3]
    wanted = expected(t, width)
    for sizes in [(1, 64, 1), (2, 256, 2), (8, 32, 2), (16, 512, 1)]:
        chosen = kernels.GemvLaunch(*sizes)
        for name, result in found(t, width, launch=chosen).items():
            assert relative_error(result, wanted[name]) < 1e-5, (name, sizes)
    bare = kernels.rows_dot(t["x_BI"], t["a_OI"], t["units_K"], width=width)
    assert relative_error(bare, wanted["dot"] - t["wide_O"].double()[rows_of(t["units_K"], width)]) < 1e-5


def test_matrices_that_are_part_of_a_wider_one() -> None:
    interpreted("strides", __name__)


def strides() -> None:
    """Only kept rows and own columns are read: all others are NaN."""
    case = (40, 17, 5, 2, 2)
    t = drawn(case, torch.float32, 1)
    kept = rows_of(t["units_K"], 2)
    for name in ("a_OI", "b_OI", "w_ON"):
        around = torch.full((t[name].shape[0], t[name].shape[1] + 3), float("nan"))
        own = around[:, 1:-2]
        if name == "w_ON":
            own[:, kept] = t[name][:, kept]
        else:
            own[kept] = t[name][kept]
        t[name] = own
    wanted = expected(t, 2)
    for name, result in found(t, 2).items():
        assert relative_error(result, wanted[name]) < 1e-5, name
