"""Products of a few tokens with some rows or columns of a matrix, for layers that skip units.

A unit is `width` neighbouring rows: 1 for neurons, the size of a head for heads. `units_K` (int32 or int64) holds the
kept units in any order. The device reads it, so a captured CUDA graph sees later writes; K is fixed. Only kept weights
are read. Sums are in float32; results have the dtype of the inputs. Kept columns come in chunks of some width. Single
columns lie too close together for reads of only some of them, so `runtime.contextual.compact` copies them.

Cost on a GPU: the bytes of the kept weights over the memory bandwidth (`triton.rows`). The torch code here copies the
kept weights first. It serves CPUs and is the reference of the tests.

Legend: B tokens (1 to 8), O rows, I columns, K kept units, R kept rows or columns: K · width.

    h_BR = rows_gate(x_BI, gate_OI, up_OI, units_K, "silu")
    y_BO = columns_dot(context_BR, output_OI, heads_K, width=128)
"""

import torch
from torch import Tensor
from torch.nn import functional

from niwaki.kernels.types import ACTIVATIONS


def rows_dot(
    x_BI: Tensor,
    weight_OI: Tensor,
    units_K: Tensor,
    bias_O: Tensor | None = None,
    *,
    width: int = 1,
    out: Tensor | None = None,
) -> Tensor:
    """Return y[b, r] = W[row r] · x[b] + bias[row r] for the rows of the kept units, in the order of units: [B, R]."""
    if x_BI.is_cuda:
        from niwaki.kernels.triton import rows as triton_rows

        return triton_rows.rows_dot(x_BI, weight_OI, units_K, bias_O, width=width, out=out)
    rows_R = rows_of(units_K, width)
    return _into(_product(x_BI, weight_OI[rows_R], None if bias_O is None else bias_O[rows_R]), x_BI, out)


def rows_gate(
    x_BI: Tensor,
    gate_OI: Tensor,
    up_OI: Tensor,
    units_K: Tensor,
    activation: str,
    *,
    width: int = 1,
    out: Tensor | None = None,
) -> Tensor:
    """Return h[b, r] = act(gate[row r] · x[b]) · (up[row r] · x[b]): [B, R]. `activation` is one of `ACTIVATIONS`."""
    if x_BI.is_cuda:
        from niwaki.kernels.triton import rows as triton_rows

        return triton_rows.rows_gate(x_BI, gate_OI, up_OI, units_K, activation, width=width, out=out)
    rows_R = rows_of(units_K, width)
    gated_BR = _activated(_product(x_BI, gate_OI[rows_R]), activation)
    return _into(gated_BR * _product(x_BI, up_OI[rows_R]), x_BI, out)


def columns_dot(
    x_BR: Tensor,
    weight_OI: Tensor,
    units_K: Tensor,
    width: int,
    bias_O: Tensor | None = None,
    extra_BO: Tensor | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Return y[b, o] = Σ_r W[o, column r] · x[b, r] + bias[o] + extra[b, o] for the kept columns: [B, O]."""
    if x_BR.is_cuda:
        from niwaki.kernels.triton import rows as triton_rows

        return triton_rows.columns_dot(x_BR, weight_OI, units_K, width, bias_O, extra_BO, out=out)
    y_BO = _product(x_BR, weight_OI[:, rows_of(units_K, width)], bias_O)
    return _into(y_BO if extra_BO is None else y_BO + extra_BO.float(), x_BR, out)


def rows_of(units_K: Tensor, width: int) -> Tensor:
    """Return the rows [R] of the units, int64."""
    return (units_K.long()[:, None] * width + torch.arange(width, device=units_K.device)).flatten()


def _product(x_BI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    return functional.linear(x_BI.float(), weight_OI.float(), None if bias_O is None else bias_O.float())


def _activated(x_BR: Tensor, activation: str) -> Tensor:
    assert activation in ACTIVATIONS, f"expected one of {ACTIVATIONS}, got {activation!r}"
    if activation == "silu":
        return functional.silu(x_BR)
    if activation == "relu":
        return functional.relu(x_BR)
    return functional.gelu(x_BR, approximate="tanh" if activation == "gelu_tanh" else "none")


def _into(y_BO: Tensor, like: Tensor, out: Tensor | None) -> Tensor:
    return y_BO.to(like.dtype) if out is None else out.copy_(y_BO)


# Operators are opaque to torch.compile, which would otherwise trace into the launches.


def _rows_dot(x_BI: Tensor, weight_OI: Tensor, units_K: Tensor, bias_O: Tensor | None, width: int) -> Tensor:
    return rows_dot(x_BI, weight_OI, units_K, bias_O, width=width)


def _columns_dot(x_BR: Tensor, weight_OI: Tensor, units_K: Tensor, bias_O: Tensor | None, width: int) -> Tensor:
    return columns_dot(x_BR, weight_OI, units_K, width, bias_O)


def _rows_gate(x_BI: Tensor, gate_OI: Tensor, up_OI: Tensor, units_K: Tensor, activation: str, width: int) -> Tensor:
    return rows_gate(x_BI, gate_OI, up_OI, units_K, activation, width=width)


rows_dot_op = torch.library.custom_op("niwaki::rows_dot", _rows_dot, mutates_args=())
columns_dot_op = torch.library.custom_op("niwaki::columns_dot", _columns_dot, mutates_args=())
rows_gate_op = torch.library.custom_op("niwaki::rows_gate", _rows_gate, mutates_args=())


@rows_dot_op.register_fake
def _(x_BI: Tensor, weight_OI: Tensor, units_K: Tensor, bias_O: Tensor | None, width: int) -> Tensor:
    return x_BI.new_empty(len(x_BI), len(units_K) * width)


@columns_dot_op.register_fake
def _(x_BR: Tensor, weight_OI: Tensor, units_K: Tensor, bias_O: Tensor | None, width: int) -> Tensor:
    return x_BR.new_empty(len(x_BR), len(weight_OI))


@rows_gate_op.register_fake
def _(x_BI: Tensor, gate_OI: Tensor, up_OI: Tensor, units_K: Tensor, activation: str, width: int) -> Tensor:
    return x_BI.new_empty(len(x_BI), len(units_K) * width)
