"""Trellis-coded matrices: the search of the best path, and products as torch operators.

A ring has 32 rows of one column. The state of a row is a byte: K bits of its own, and bits that it shares with the rows
after it (see `formats.trellis`). So each row chooses among the levels of 2^K states, and all 256 levels are in use. The
search is the algorithm of Viterbi. It runs from the last row to the first one. The state of a row continues that
of the next row by bits of its own: s_r = (s_(r+1) · 2^K + b_r) mod 256.

The ring is closed: row 31 continues row 0. A first search around the ring begins half a ring away and is free at both
ends. In its middle is the state that the second search begins and ends with.

Legend: O rows, U rows in whole rings, I columns, C columns of a panel, N rings or tokens, S states, J branches of a
state, G groups of states with the same successors.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from niwaki.formats.trellis import RING, STATES
from niwaki.kernels.cpu_module import as_array, cpu_module
from niwaki.kernels.types import Codebook, Rounded, Start, TrellisPart

MAX_CPU_TOKENS = 16  # with more, the matrix is decoded once: that is exact, and faster
MAX_GPU_TOKENS = 16


def encode(wanted_OI: Tensor, weight_O: Tensor, level_S: Tensor, bits: int) -> Tensor:
    """Return the states [O′, I] uint8 of least Σ weight · (wanted − level)², O′ = O in whole rings. Float32."""
    if wanted_OI.is_cuda:
        from niwaki.kernels.triton.trellis import encode_triton

        return encode_triton(wanted_OI, weight_O, level_S, bits)
    compiled = cpu_module()
    if compiled is None:
        return encode_reference(wanted_OI, weight_O, level_S, bits)
    rows, columns = wanted_OI.shape
    state_OI = torch.empty(-(-rows // RING) * RING, columns, dtype=torch.uint8)
    compiled.trellis_encode(
        wanted_OI.contiguous(),
        weight_O.contiguous(),
        level_S.contiguous(),
        bits,
        state_OI,
        torch.get_num_threads(),
    )
    return state_OI


def encode_reference(wanted_OI: Tensor, weight_O: Tensor, level_S: Tensor, bits: int) -> Tensor:
    """Compute `encode` in torch, on any device and in any float dtype."""
    rows, columns = wanted_OI.shape
    padding = -rows % RING
    wanted_NR = _rings(pad(wanted_OI, (0, 0, 0, padding)))
    weight_NR = _rings(pad(weight_O, (0, padding))[:, None].expand(-1, columns))
    costs_NS = torch.zeros(len(wanted_NR), STATES, dtype=wanted_NR.dtype, device=wanted_NR.device)
    half = [(RING // 2 - 1 - step) % RING for step in range(RING)]
    costs_NS, choices = _walk(costs_NS, wanted_NR, weight_NR, level_S, bits, half)
    state_N = costs_NS.argmin(1)
    for row in reversed(half[RING // 2 :]):
        state_N = _before(choices[row], state_N, bits)
    costs_NS = torch.full_like(costs_NS, torch.inf).scatter_(1, state_N[:, None], 0.0)
    _, choices = _walk(costs_NS, wanted_NR, weight_NR, level_S, bits, list(reversed(range(RING))))
    states = []
    for row in range(RING):
        states.append(state_N)
        state_N = _before(choices[row], state_N, bits)
    state_NR = torch.stack(states, dim=1).to(torch.uint8)
    return state_NR.view(-1, columns, RING).transpose(1, 2).reshape(-1, columns)


def round_columns(
    panel_OC: Tensor, coupling_CC: Tensor, book: Codebook, part_C: Tensor, start: Start | None = None
) -> Rounded:
    """Round column after column to the best path, and return states [U, C] and changes [O, C].

    Every change moves the later columns of the panel: panel −= change · coupling. Without `start` the panel holds the
    wanted values, and a change is new − wanted. With `start` this is coordinate descent, and the panel holds the pull
    on every value. A wanted value is then value + pull / coupling[c, c], and a ring that would miss more stays.
    """
    if panel_OC.is_cuda:
        from niwaki.kernels.triton.trellis import round_triton

        return round_triton(panel_OC, coupling_CC, book, part_C, start)
    return round_columns_reference(panel_OC, coupling_CC, book, part_C, start)


def round_columns_reference(
    panel_OC: Tensor, coupling_CC: Tensor, book: Codebook, part_C: Tensor, start: Start | None = None
) -> Rounded:
    """Compute `round_columns` one search at a time, on any device and in any float dtype."""
    rows, columns = panel_OC.shape
    panel_OC, change_OC = panel_OC.clone(), torch.empty_like(panel_OC)
    state_UC = torch.empty(-(-rows // RING) * RING, columns, dtype=torch.uint8, device=panel_OC.device)
    for k, part in enumerate(part_C.tolist()):
        scale_O, level_S = book.scale_OP[:, part], book.level_PS[part]
        wanted_O = panel_OC[:, k]
        if start is not None:
            wanted_O = start.value_OC[:, k] + wanted_O / coupling_CC[k, k]
        state_U = encode((wanted_O / scale_O)[:, None], scale_O.square(), level_S, book.bits[part])[:, 0]
        new_O = level_S[state_U[:rows].int()] * scale_O
        change_O = new_O - wanted_O
        if start is not None:
            value_O = start.value_OC[:, k]
            better_U = _by_ring((wanted_O - value_O).square() - change_O.square(), len(state_U)) > 0
            change_O = torch.where(better_U[:rows], new_O - value_O, 0.0)
            state_U = torch.where(better_U, state_U, start.state_UC[:, k])
        panel_OC[:, k + 1 :].addr_(change_O, coupling_CC[k, k + 1 :], alpha=-1)
        state_UC[:, k], change_OC[:, k] = state_U, change_O
    return state_UC, change_OC


def _by_ring(values_O: Tensor, padded: int) -> Tensor:
    """Return the sum over the ring of every row [U]."""
    values_U = pad(values_O, (0, padded - len(values_O)))
    return values_U.view(-1, RING).sum(1, keepdim=True).expand(-1, RING).reshape(-1)


def _rings(values_OI: Tensor) -> Tensor:
    """Return values [O, I] as rings [N, 32], the columns of a tile side by side."""
    return values_OI.reshape(-1, RING, values_OI.shape[1]).transpose(1, 2).reshape(-1, RING)


def _walk(
    costs_NS: Tensor, wanted_NR: Tensor, weight_NR: Tensor, level_S: Tensor, bits: int, rows: list[int]
) -> tuple[Tensor, dict[int, Tensor]]:
    """Return the costs of all states after these rows, and by row the branch [N, G] that each group came from."""
    choices = {}
    for row in rows:
        best_NG, choices[row] = costs_NS.view(len(costs_NS), 2**bits, -1).min(1)
        miss_NS = (wanted_NR[:, row, None] - level_S).square() * weight_NR[:, row, None]
        costs_NS = best_NG.repeat_interleave(2**bits, dim=1) + miss_NS
    return costs_NS, choices


def _before(choice_NG: Tensor, state_N: Tensor, bits: int) -> Tensor:
    """Return the states that the states of a row continue."""
    group_N = state_N >> bits
    before_N: Tensor = choice_NG.gather(1, group_N[:, None])[:, 0] * (STATES >> bits) + group_N
    return before_N


def prepared_layer(parts: Sequence[TrellisPart], rows: int, inputs: int) -> Any:
    """Return the parts of a matrix [rows, inputs] as one object of the compiled kernels, for `cpu_product`."""
    compiled = cpu_module()
    assert compiled is not None, "callers check it first"
    layer = compiled.TrellisLayer(rows, inputs)
    for part in parts:
        layer.add(*(as_array(tensor) for tensor in (part.rings_TCB, part.levels_S, part.scale_O[None], part.columns_C)))
    return layer


def cpu_product(layer: Any, x_NI: Tensor, rows: int, path: int = 0) -> Tensor:
    """Return x Wᵀ in the dtype of `x_NI`, with sums in float32. Only addresses of float32 or bfloat16 go to C++."""
    given_NI = (x_NI if x_NI.dtype in (torch.float32, torch.bfloat16) else x_NI.float()).contiguous()
    out_NO = given_NI.new_empty(len(given_NI), rows)
    narrow, threads = given_NI.dtype == torch.bfloat16, torch.get_num_threads()
    layer.multiply(given_NI.data_ptr(), out_NO.data_ptr(), len(given_NI), narrow, threads, path)
    return out_NO.to(x_NI.dtype)


def trellis_product(x_NI: Tensor, tensors: Sequence[Tensor | None], bias_O: Tensor | None, rows: int) -> Tensor:
    """Return x Wᵀ + bias on a GPU. Each of the one or two parts has the four tensors of `TrellisPart`."""
    from niwaki.kernels.triton.trellis_product import product_triton

    out_NO = x_NI.new_empty(len(x_NI), rows)
    product_triton(x_NI.contiguous(), _parts_of(tensors), bias_O, out_NO)
    return out_NO


def trellis_decoded(tensors: Sequence[Tensor | None], rows: int, first: int, last: int, dtype: torch.dtype) -> Tensor:
    """Return rows [first, last) of `rows` on a GPU, the parts side by side; `first` begins a tile."""
    from niwaki.kernels.triton.trellis_product import decode_triton

    out_RI = _empty_rows(tensors, first, last, dtype)
    decode_triton(_parts_of(tensors), rows, first, out_RI)
    return out_RI


def _parts_of(tensors: Sequence[Tensor | None]) -> list[TrellisPart]:
    """Return the parts from the list of their tensors."""
    return [TrellisPart(*tensors[start : start + 4]) for start in range(0, len(tensors), 4)]  # type: ignore[arg-type]


def _empty_rows(tensors: Sequence[Tensor | None], first: int, last: int, dtype: torch.dtype) -> Tensor:
    rings = [tensor for tensor in tensors[::4] if tensor is not None]
    return rings[0].new_empty(last - first, sum(ring_TCB.shape[1] for ring_TCB in rings), dtype=dtype)


trellis_product_op = torch.library.custom_op("niwaki::trellis_product", trellis_product, mutates_args=())


@trellis_product_op.register_fake
def _(x_NI: Tensor, _tensors: object, _bias_O: Tensor | None, rows: int) -> Tensor:
    """Return an empty tensor with shape and dtype of the product."""
    return x_NI.new_empty(len(x_NI), rows)


trellis_decoded_op = torch.library.custom_op("niwaki::trellis_decoded", trellis_decoded, mutates_args=())


@trellis_decoded_op.register_fake
def _(tensors: Sequence[Tensor | None], _rows: int, first: int, last: int, dtype: torch.dtype) -> Tensor:
    """Return an empty tensor with shape and dtype of the rows."""
    return _empty_rows(tensors, first, last, dtype)


def multiply(x_NI: Tensor, parts: Sequence[TrellisPart], bias_O: Tensor | None, rows: int) -> Tensor:
    """Call `trellis_product`, as an operator while a graph is traced."""
    product = trellis_product_op if torch.compiler.is_compiling() else trellis_product
    return product(x_NI, [tensor for part in parts for tensor in part], bias_O, rows)


def decode(parts: Sequence[TrellisPart], rows: int, first: int, last: int, dtype: torch.dtype) -> Tensor:
    """Call `trellis_decoded`, as an operator while a graph is traced."""
    decoded = trellis_decoded_op if torch.compiler.is_compiling() else trellis_decoded
    return decoded([tensor for part in parts for tensor in part], rows, first, last, dtype)
