"""ARB-LLM, form RC: signs with a scale for every row and one for every column, fitted in turn.

Source: Li et al., "ARB-LLM: Alternating Refined Binarizations for Large Language Models" (ICLR 2025), ARB-RC with the
column-group bitmap (CGB). Blocks of columns, salient columns and the compensation between blocks are those of BiLLM
(see `shared.binary`); there is no mean. Inside a block:

1. The salient columns and the others are each split by magnitude (CGB). So there are four regions, and every region has
   its own scales.
2. A region of other columns is ŵ_ij = r_i·c_j·s_ij, s = sign(w). With the signs fixed, `iterations` times
   r_i = Σ_j |w_ij|·c_j / Σ_j c_j², then c_j = Σ_i |w_ij|·r_i / Σ_i r_i². Both are least squares over the region, so the
   error never rises.
3. A region of salient columns has a second term of the same form for the error of the first. Each term is refitted to
   the error of the other one, and both signs become those of the nearest of the four levels.

Two choices are not verified against released code. The refit of the second order in the RC form (step 3) follows the
paper's rules for the second order without column scales. The search for the split measures the error of plain row
scales.

True bits:

- A weight takes a sign and a group; in salient columns also a second sign.
- A row of a block takes 2 scales for the regions of others, and 4 for the salient ones.
- A column takes 2 scales; a salient one 2 more.

Wide matrices take 2.75 bits, and up to 0.4 for their salient columns. The paper's 1.1 bits leave out groups and scales.
The target is a ceiling: a block has at most `salient` salient columns, or fewer if the target has no room for them.
The file holds decoded weights.

Cost: two forwards, one Gram matrix and factor per group of matrices, about 260 trial binarizations of every weight.

    niwaki compress MODEL OUT --method arb --target 3bit --calibration mine.txt --seq-len 512
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from niwaki.config.targets import Bits, Target
from niwaki.data.statistics import Needs
from niwaki.data.stream import CalibrationData
from niwaki.formats.packed import Packed
from niwaki.formats.quantized import SCALE_DTYPE, pack_codes, unpack_codes
from niwaki.methods.cost import Scope, Work, gram_factors, sweeps
from niwaki.methods.method import WalkMethod
from niwaki.methods.shared.binary import (
    check_reach,
    choose_salient,
    factors,
    half,
    signs,
    split_by_size,
    sweep_blocks,
    trials,
    with_true_size,
)
from niwaki.methods.shared.column_sweep import check_damping
from niwaki.model.decoder import Block


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of ARB-LLM."""

    block: Annotated[int, "Columns that share row scales."] = 128
    salient: Annotated[int, "Max salient columns per block."] = 50
    iterations: Annotated[int, "Times that the scales are refitted."] = 15
    damping_frac: Annotated[float, "A share of the mean diagonal of XᵀX, added to the diagonal (λ)."] = 0.01

    def __post_init__(self) -> None:
        if self.block < 1 or self.salient < 0 or self.iterations < 0:
            raise ValueError("expected block ≥ 1, salient ≥ 0 and iterations ≥ 0")
        check_damping(self.damping_frac)


@dataclass(frozen=True)
class RegionScales:
    """Scales of one term of a region: row [O] and column [C], zero where the region has no weight."""

    row_O: Tensor
    column_C: Tensor

    @property
    def size_OC(self) -> Tensor:
        """Return the value [O, C] of a positive sign."""
        return self.row_O[:, None] * self.column_C

    @property
    def halved(self) -> "RegionScales":
        """Return the scales as they are stored, in float16."""
        return RegionScales(half(self.row_O), half(self.column_C))


@dataclass(frozen=True)
class CodedBlock:
    """Coded block of columns. `group_OC`: the region of a weight in its kind of column (set: large weights).

    `row_6O`: scales of the others' two regions, then of the salient ones' first and second terms. `column_2C`: scales
    of the (first) term by group; `second_OK` and `column_2K`: signs and column scales of the salient columns' second.
    """

    salient_C: Tensor
    sign_OC: Tensor
    group_OC: Tensor
    second_OK: Tensor
    row_6O: Tensor
    column_2C: Tensor
    column_2K: Tensor

    def values(self) -> Tensor:
        """Return the weights [O, C]."""
        rows = self.row_6O[:, :, None]
        row_OC = torch.where(
            self.salient_C,
            torch.where(self.group_OC, rows[3], rows[2]),
            torch.where(self.group_OC, rows[1], rows[0]),
        )
        values_OC = signs(self.sign_OC) * (row_OC * torch.where(self.group_OC, self.column_2C[1], self.column_2C[0]))
        group_OK = self.group_OC[:, self.salient_C]
        row_OK = torch.where(group_OK, rows[5], rows[4])
        values_OC[:, self.salient_C] += signs(self.second_OK) * (
            row_OK * torch.where(group_OK, self.column_2K[1], self.column_2K[0])
        )
        return values_OC


def needs(config: Config) -> Needs:
    """Ask for Gram matrices of the inputs."""
    return Needs(gram=True)


def stored_bytes(name: str, rows: int, columns: int, target: Target, config: Config) -> None:
    """Return None: the file holds decoded weights. Raise TargetError if the target has no room for the true bits."""
    _max_salient(name, rows, columns, target, config)


def cost(scope: Scope, config: Config) -> Work:
    """Count the work of BiLLM, and the refits of every region."""
    refits = Work(passed=16 * config.iterations * scope.weights)
    return gram_factors(scope) + sweeps(scope, config.block) + trials(scope, config.block, config.salient) + refits


@torch.no_grad()
def compress(
    block: Block,
    calib: CalibrationData,
    targets: Mapping[str, Target],
    config: Config,
    generator: torch.Generator,
) -> dict[str, Packed]:
    """Code one block of columns after another, matrix by matrix."""
    max_salient = {}
    for name, target in targets.items():
        rows, columns = block.weight(name).shape
        max_salient[name] = _max_salient(name, rows, columns, target, config)
    packed = {}
    for name, upper_II, note in factors(block, calib.statistics, list(targets), config.damping_frac):
        weight_OI, count = block.weight(name).float(), max_salient[name]

        def encode(weight_OC: Tensor, upper_C: Tensor, count: int = count) -> tuple[CodedBlock, Tensor]:
            coded = _encode(weight_OC, weight_OC.square().sum(0) / upper_C.square(), count, config.iterations)
            return coded, coded.values()

        coded = sweep_blocks(weight_OI, upper_II, config.block, encode)
        tensors = stored(coded)
        detail = {"salient_columns": sum(int(columns.salient_C.sum()) for columns in coded)}
        packed[name] = with_true_size(
            decode(tensors, len(weight_OI), weight_OI.shape[1], config.block), tensors, note, detail
        )
    return packed


def _encode(weight_OC: Tensor, score_C: Tensor, max_salient: int, iterations: int) -> CodedBlock:
    """Return the codes of one block."""
    salient_C = choose_salient(weight_OC, score_C, max_salient, mean=False)
    salient_OC = salient_C.expand_as(weight_OC)
    large_OC = split_by_size(weight_OC, ~salient_OC, mean=False)
    large_salient_OC = split_by_size(weight_OC, salient_OC, mean=False, orders=2)
    once = [
        refine(weight_OC, keep_OC, iterations).halved for keep_OC in (~salient_OC & ~large_OC, ~salient_OC & large_OC)
    ]
    sign_OC = weight_OC >= 0
    second_OC = torch.zeros_like(sign_OC)
    twice = []
    for keep_OC in (salient_OC & ~large_salient_OC, salient_OC & large_salient_OC):
        first, second = refine_twice(weight_OC, keep_OC, iterations)
        twice.append((first.halved, second.halved))
        one_OC, two_OC = nearest_signs(weight_OC, *twice[-1])
        sign_OC, second_OC = torch.where(keep_OC, one_OC, sign_OC), torch.where(keep_OC, two_OC, second_OC)
    firsts, seconds = zip(*twice, strict=True)
    return CodedBlock(
        salient_C,
        sign_OC,
        large_OC | large_salient_OC,
        second_OC[:, salient_C],
        torch.stack([term.row_O for term in (*once, *firsts, *seconds)]),
        torch.stack([torch.where(salient_C, firsts[g].column_C, once[g].column_C) for g in (0, 1)]),
        torch.stack([seconds[g].column_C[salient_C] for g in (0, 1)]),
    )


def refine(weight_OC: Tensor, keep_OC: Tensor, iterations: int) -> RegionScales:
    """Fit the scales of one region for the signs of its weights."""
    return _refit_from_start(weight_OC.abs() * keep_OC, keep_OC.float(), iterations)


def refine_twice(weight_OC: Tensor, keep_OC: Tensor, iterations: int) -> tuple[RegionScales, RegionScales]:
    """Fit both terms of a region in turn, each to the error of the other; each round chooses both signs again."""
    kept_OC = keep_OC.float()
    first = _refit_from_start(weight_OC.abs() * kept_OC, kept_OC, iterations)
    left_OC = weight_OC - signs(weight_OC >= 0) * first.size_OC
    second = _refit_from_start(left_OC.abs() * kept_OC, kept_OC, iterations)
    for _ in range(iterations):
        one_OC, two_OC = (signs(bits) for bits in nearest_signs(weight_OC, first, second))
        first = _refit((weight_OC - two_OC * second.size_OC) * one_OC * kept_OC, kept_OC, first)
        second = _refit((weight_OC - one_OC * first.size_OC) * two_OC * kept_OC, kept_OC, second)
    return first, second


def nearest_signs(weight_OC: Tensor, first: RegionScales, second: RegionScales) -> tuple[Tensor, Tensor]:
    """Return both signs (set: positive) of the nearest of the four levels ±first ± second."""
    up_OC, down_OC = weight_OC - first.size_OC, weight_OC + first.size_OC
    reach_OC = second.size_OC.abs()
    positive_OC = (up_OC.abs() - reach_OC).abs() <= (down_OC.abs() - reach_OC).abs()
    left_OC = torch.where(positive_OC, up_OC, down_OC)
    return positive_OC, (left_OC >= 0) == (second.size_OC >= 0)


def _refit_from_start(size_OC: Tensor, kept_OC: Tensor, iterations: int) -> RegionScales:
    """Fit row means, then column means of the quotient, then do `iterations` of refits."""
    row_O = size_OC.sum(1) / kept_OC.sum(1).clamp_min(1)
    relative_OC = torch.where(row_O[:, None] > 0, size_OC / row_O[:, None], 0.0)
    term = RegionScales(row_O, relative_OC.sum(0) / kept_OC.sum(0).clamp_min(1))
    for _ in range(iterations):
        term = _refit(size_OC, kept_OC, term)
    return term


def _refit(signed_OC: Tensor, kept_OC: Tensor, term: RegionScales) -> RegionScales:
    """Fit rows, then columns by least squares; `signed_OC` = w·s, zero outside the region."""
    row_O = _quotient(signed_OC @ term.column_C, kept_OC @ term.column_C.square())
    return RegionScales(row_O, _quotient(row_O @ signed_OC, row_O.square() @ kept_OC))


def _quotient(above: Tensor, below: Tensor) -> Tensor:
    """Return above / below; zero for a row or column without weights."""
    return torch.where(below > 0, above / below, 0.0)


def stored(coded: Sequence[CodedBlock]) -> dict[str, Tensor]:
    """Return the tensors of a file: bits of weights and columns, row scales [6, B, O], column scales [2, I].

    B is the number of blocks. Only the K salient columns have second terms: signs [O, K], column scales [2, K].
    """

    def joined(parts: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(parts), dim=1)

    return {
        "sign": pack_codes(joined([c.sign_OC for c in coded]), 1),
        "group": pack_codes(joined([c.group_OC for c in coded]), 1),
        "salient": pack_codes(torch.cat([c.salient_C for c in coded]), 1),
        "second": pack_codes(joined([c.second_OK for c in coded]), 1),
        "row_scale": torch.stack([c.row_6O for c in coded], 1).to(SCALE_DTYPE),
        "column_scale": joined([c.column_2C for c in coded]).to(SCALE_DTYPE),
        "second_column_scale": joined([c.column_2K for c in coded]).to(SCALE_DTYPE),
    }


def decode(tensors: Mapping[str, Tensor], rows: int, columns: int, block: int) -> Tensor:
    """Decode the matrix [rows, columns] from the tensors of `stored`."""

    def bits(name: str, width: int) -> Tensor:
        return unpack_codes(tensors[name], rows * width).view(rows, width).bool()

    salient_I = unpack_codes(tensors["salient"], columns).bool()
    count = int(salient_I.sum())
    salients = salient_I.split(block)
    counts = [int(salient_C.sum()) for salient_C in salients]
    coded = map(
        CodedBlock,
        salients,
        bits("sign", columns).split(block, 1),
        bits("group", columns).split(block, 1),
        bits("second", count).split(counts, 1),
        tensors["row_scale"].float().unbind(1),
        tensors["column_scale"].float().split(block, 1),
        tensors["second_column_scale"].float().split(counts, 1),
    )
    return torch.cat([c.values() for c in coded], 1)


def _max_salient(name: str, rows: int, columns: int, target: Target, config: Config) -> int:
    """Return the max salient columns per block within the target. Raise TargetError if it has no room even for none."""
    assert isinstance(target, Bits)
    check_reach(name, rows, columns, _stored_bytes(rows, columns, 0, config), target)
    blocks = -(-columns // config.block)
    fitting = [
        count
        for count in range(min(config.salient, columns, config.block) + 1)
        if _stored_bytes(rows, columns, min(columns, count * blocks), config) <= target.bytes_in(rows, columns)
    ]
    return fitting[-1]


def _stored_bytes(rows: int, columns: int, salient: int, config: Config) -> int:
    """Return the bytes of `stored` for a matrix of this shape with `salient` salient columns in all."""
    planes = 2 * -(-rows * columns // 8) + -(-columns // 8) + -(-rows * salient // 8)
    return planes + 2 * (6 * rows * -(-columns // config.block) + 2 * columns + 2 * salient)


METHOD = WalkMethod(
    doc=__doc__,
    paper="Li et al. 2025, ARB-LLM",
    accepts=(Bits,),
    config=Config,
    needs=needs,
    compress=compress,
    cost=cost,
    stored_bytes=stored_bytes,
)
