"""PTQ1.61: a fifth of the input columns at four bits, one sign per weight for the others, their scales learned.

Source: "PTQ1.61: Push the Real Limit of Extremely Low-Bit Post-Training Quantization Methods for Large Language Models"
(ACL 2025). Its preprocessing is left out (20,000 steps of LoRA on other text, merged before the quantization).

1. The `salient_frac` of the columns with the largest inputs are rounded to nearest, 4 bits, one range per row.
2. The others become (r₁·r₂ᵀ) ∘ (α·sign(W − μ) + μ). Each row has the mean μ, the scale α = mean |W − μ| and r₁ = 1;
   each column has r₂ = 1.
3. α, r₁ and r₂ of all matrices of a block are learned together, so that its outputs survive. Signs and μ stay.

| | Paper | Here |
| --- | --- | --- |
| Rank of a column | largest activation | L2 norm over the calibration tokens: the statistics hold sums only |
| Loss | MSE − log-cosine | error relative to the token's energy (`block_training`); it weighs all directions alike |
| Output to learn | the dense model's, plus the dense block's on the same inputs | their mean, with the same minimizer |
| Result | last state | state with the lowest held-out error |
| Text | 20 epochs over 128 windows of 2048 tokens | 20 rounds over 64 windows |
| Rate | 5e-4 and 1e-3, AdamW | `rate_frac` of each parameter's size, Adam, a cosine to zero |

True bits follow from the shape alone: 4 bits or 1 bit per weight; 1 bit per column; r₂ for each of the others. To these
each row adds r₁·α, r₁·μ, the 4-bit range and its zero code. Together that is 1.6 plus about 52/I + 14/O bits. The
target must allow for them. The file holds decoded weights.

Cost: two forwards, and `rounds` · `samples` forwards and backwards of a window through the block.

    niwaki compress MODEL OUT --method ptq161 --target 2bit --calibration mine.txt --seq-len 512
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from niwaki.config.targets import Bits, Target
from niwaki.data.statistics import Needs, Statistics
from niwaki.data.stream import CalibrationData
from niwaki.formats.packed import Packed, join_notes
from niwaki.formats.quantized import SCALE_DTYPE, QuantizedColumns, pack_codes, unpack_codes
from niwaki.methods.cost import Scope, Work
from niwaki.methods.method import WalkMethod
from niwaki.methods.shared.best_state import BestState
from niwaki.methods.shared.binary import BINARIZED_UNREACHED, check_reach, fit_row, signs, with_true_size
from niwaki.methods.shared.block_training import Reconstruction, Schedule, take_step, training_batches
from niwaki.methods.shared.learning_options import LearningTarget, check_learning_options, learning_cost, learning_needs
from niwaki.methods.shared.rounding import groups_of, nearest
from niwaki.model.decoder import Block

SALIENT_BITS = 4
KEPT_START = "learning did not lower the held-out block error: the scales it began with were kept"


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of PTQ1.61."""

    salient_frac: Annotated[float, "Share of the columns at 4 bits."] = 0.2
    rounds: Annotated[int, "Rounds of learning; 0 keeps the analytic scales."] = 20
    samples: Annotated[int, "Windows per round."] = 64
    batch: Annotated[int, "Windows per step."] = 2
    rate_frac: Annotated[float, "Length of a step as a share of the RMS of a parameter."] = 0.01
    target: LearningTarget = "both"

    def __post_init__(self) -> None:
        check_learning_options(self.target)
        if not 0 < self.salient_frac < 1:
            raise ValueError(f"salient_frac must lie between 0 and 1, got {self.salient_frac}")
        if self.rounds < 0 or self.samples < 1 or self.batch < 1 or self.rate_frac <= 0:
            raise ValueError("expected rounds ≥ 0, samples and batch ≥ 1, rate_frac > 0")


@dataclass(frozen=True)
class Scales:
    """Scales of a matrix: fixed 4-bit columns; of the N others α [O], r₁ [O] and r₂ [N], with fixed signs and μ."""

    salient: QuantizedColumns
    binary_N: Tensor
    positive_ON: Tensor
    mean_O: Tensor
    alpha_O: Tensor
    row_O: Tensor
    column_N: Tensor

    @classmethod
    def start(cls, weight_OI: Tensor, salient_C: Tensor) -> "Scales":
        """Return the analytic scales; `salient_C` holds the columns of four bits, ascending."""
        picked_I = torch.zeros(weight_OI.shape[1], dtype=torch.bool, device=weight_OI.device)
        picked_I[salient_C] = True
        rounded = nearest(weight_OI[:, salient_C], groups_of(0, len(salient_C), SALIENT_BITS, "affine", 0), clip=False)
        binary_ON = weight_OI[:, ~picked_I]
        mean_O, alpha_O = fit_row(binary_ON, torch.ones_like(binary_ON, dtype=torch.bool), mean=True)
        return cls(
            rounded.storable().parts(salient_C)[0],
            (~picked_I).nonzero().view(-1),
            binary_ON >= mean_O[:, None],
            mean_O,
            alpha_O,
            torch.ones_like(mean_O),
            torch.ones_like(binary_ON[0]),
        )

    def levels(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return r₁·α, r₁·μ and r₂ as stored; gradients pass through the rounding."""
        return _stored(self.row_O * self.alpha_O), _stored(self.row_O * self.mean_O), _stored(self.column_N)

    def dense(self) -> Tensor:
        """Return the matrix [O, I], differentiable in α, r₁ and r₂."""
        return _assemble(self.salient, self.binary_N, self.positive_ON, *self.levels())

    def stored(self) -> dict[str, Tensor]:
        """Return the tensors that a file has to hold."""
        assert self.salient.zero_OG is not None
        columns = len(self.salient.columns_C) + len(self.binary_N)
        picked_I = torch.zeros(columns, dtype=torch.uint8, device=self.binary_N.device)
        picked_I[self.salient.columns_C] = 1
        spread_O, middle_O, column_N = (level.detach().to(SCALE_DTYPE) for level in self.levels())
        return {
            "columns": pack_codes(picked_I, 1),
            "codes": pack_codes(self.salient.code_OC, SALIENT_BITS),
            "scale": self.salient.scale_OG[:, 0],
            "zero": pack_codes(self.salient.zero_OG, SALIENT_BITS),
            "sign": pack_codes(self.positive_ON, 1),
            "level": torch.stack([spread_O, middle_O]),
            "column_scale": column_N,
        }


def needs(config: Config) -> Needs:
    """Ask for norms of the inputs, and for windows and outputs to learn from."""
    return Needs(sqnorm=True) | (learning_needs(config.batch, config.target) if config.rounds else Needs())


def stored_bytes(name: str, rows: int, columns: int, target: Target, config: Config) -> None:
    """Return None: the file holds decoded weights. Raise TargetError if the target has no room for the true bits."""
    check_reach(name, rows, columns, _stored_bytes(rows, columns, config), target)


def cost(scope: Scope, config: Config) -> Work:
    """Count the learning, which is nearly all: every step assembles the whole block, though only scales learn."""
    return learning_cost(scope, config.rounds, config.samples, config.batch, copies=6, passes=24)


def compress(
    block: Block,
    calib: CalibrationData,
    targets: Mapping[str, Target],
    config: Config,
    generator: torch.Generator,
) -> dict[str, Packed]:
    """Choose columns and analytic scales, then learn the scales of the whole block."""
    for name, target in targets.items():
        rows, columns = block.weight(name).shape
        check_reach(name, rows, columns, _stored_bytes(rows, columns, config), target)
    with torch.no_grad():
        scales = {name: _start(block.weight(name).float(), calib.statistics[name], config) for name in targets}
    note, errors = "", {}
    if config.rounds and any(calib.statistics[name].tokens for name in targets):
        best = _learn(Reconstruction(block, calib, config.target, generator), scales, config, generator)
        note = "" if best.improved else KEPT_START
        errors = best.detail
    packed = {}
    for name, own in scales.items():
        tensors = own.stored()
        unreached = "" if calib.statistics[name].tokens else BINARIZED_UNREACHED
        detail = {"salient_columns": len(own.salient.columns_C), **errors}
        weight_OI = decode(tensors, *block.weight(name).shape)
        packed[name] = with_true_size(weight_OI, tensors, join_notes(note, unreached), detail)
    return packed


def _start(weight_OI: Tensor, statistics: Statistics, config: Config) -> Scales:
    """Choose the salient columns by their inputs, or by their weights if no token came, and fit the analytic scales."""
    size_I = statistics.sqnorm_I if statistics.tokens else weight_OI.square().sum(0)
    count = _salient_columns(weight_OI.shape[1], config)
    return Scales.start(weight_OI, size_I.argsort(descending=True, stable=True)[:count].sort().values)


def _learn(task: Reconstruction, scales: Mapping[str, Scales], config: Config, generator: torch.Generator) -> BestState:
    """Train α, r₁ and r₂ in place, and leave them at their lowest held-out error."""
    parameters = [each for own in scales.values() for each in (own.alpha_O, own.row_O, own.column_N)]
    groups: list[dict[str, Any]] = [
        {"params": [each], "size": float(each.square().mean().sqrt())} for each in parameters
    ]
    for parameter in parameters:
        parameter.requires_grad_(True)
    schedule = Schedule.of(config, config.rounds)
    optimizer = schedule.make_optimizer(groups)

    def heldout() -> float:
        with torch.no_grad():
            return task.error({name: own.dense() for name, own in scales.items()})

    best = BestState(parameters, heldout())
    for batch in training_batches(task, schedule, generator):
        matrices = {name: own.dense() for name, own in scales.items()}
        gradients = task.gradients({name: matrix_OI.detach() for name, matrix_OI in matrices.items()}, batch.windows)
        torch.autograd.backward(list(matrices.values()), [gradients[name].float() for name in matrices])
        take_step(optimizer, batch.rate)
        if batch.measure:
            best.offer(heldout())
    best.restore()
    return best


def decode(tensors: Mapping[str, Tensor], rows: int, columns: int) -> Tensor:
    """Decode the matrix [rows, columns] from the tensors of `Scales.stored`."""
    picked_I = unpack_codes(tensors["columns"], columns).bool()
    count = int(picked_I.sum())
    salient = QuantizedColumns(
        columns_C=picked_I.nonzero().view(-1),
        bits=SALIENT_BITS,
        grid="affine",
        group=count,
        code_OC=unpack_codes(tensors["codes"], rows * count).view(rows, count),
        scale_OG=tensors["scale"][:, None],
        zero_OG=unpack_codes(tensors["zero"], rows)[:, None],
    )
    positive_ON = unpack_codes(tensors["sign"], rows * (columns - count)).view(rows, columns - count).bool()
    spread_O, middle_O = tensors["level"].float()
    binary_N = (~picked_I).nonzero().view(-1)
    return _assemble(salient, binary_N, positive_ON, spread_O, middle_O, tensors["column_scale"].float())


def _assemble(
    salient: QuantizedColumns,
    binary_N: Tensor,
    positive_ON: Tensor,
    spread_O: Tensor,
    middle_O: Tensor,
    column_N: Tensor,
) -> Tensor:
    """Return the matrix [O, I] with both kinds of columns in their places."""
    binary_ON = (signs(positive_ON) * spread_O[:, None] + middle_O[:, None]) * column_N
    weight_OI = binary_ON.new_empty(len(positive_ON), len(binary_N) + len(salient.columns_C))
    weight_OI[:, salient.columns_C] = salient.decode()
    weight_OI[:, binary_N] = binary_ON
    return weight_OI


def _stored(values: Tensor) -> Tensor:
    """Round to float16; the gradient is that of the identity."""
    return values + (values.to(SCALE_DTYPE).float() - values).detach()


def _salient_columns(columns: int, config: Config) -> int:
    """Return the number of columns with four bits: at least one, and never all."""
    return min(max(round(config.salient_frac * columns), 1), columns - 1)


def _stored_bytes(rows: int, columns: int, config: Config) -> int:
    """Return the bytes of `Scales.stored` for a matrix of this shape."""
    count = _salient_columns(columns, config)
    planes = SALIENT_BITS * -(-rows * count // 8) + -(-rows * (columns - count) // 8)
    return planes + -(-columns // 8) + SALIENT_BITS * -(-rows // 8) + 2 * (3 * rows + columns - count)


METHOD = WalkMethod(
    doc=__doc__,
    paper="PTQ1.61 (ACL 2025), without preprocessing",
    accepts=(Bits,),
    config=Config,
    needs=needs,
    compress=compress,
    cost=cost,
    stored_bytes=stored_bytes,
)
