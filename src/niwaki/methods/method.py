"""Declaration of a compression method: what every method module states in its `METHOD`.

There are three kinds. A `WalkMethod` replaces the matrices of one block after another. A `ShapeMethod` removes blocks,
heads and neurons; the job chooses the shape first. A `ContextualMethod` keeps the weights and learns which units an
input needs. Fields with a default are optional.

    METHOD = WalkMethod(doc=__doc__, paper="none (a control)", accepts=(Sparsity, NM), config=Config, needs=needs,
                        compress=compress)
"""

from __future__ import annotations  # names and chains are checked before torch is loaded

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, ClassVar

from niwaki.methods.cost import Scope, Work, masks

if TYPE_CHECKING:
    import torch

    from niwaki.config.targets import Kind, PrunableUnit, Target
    from niwaki.data.statistics import Needs, Statistics
    from niwaki.data.stream import CalibrationData
    from niwaki.formats.packed import Packed
    from niwaki.model.decoder import Block
    from niwaki.model.prunable import BlockInfo, ShapeSearch, ShapeSpace
    from niwaki.runtime.contextual.predictor import Predictor
    from niwaki.runtime.contextual.selection import Rule, Variant
    from niwaki.runtime.contextual.traces import Traces
    from niwaki.runtime.contextual.units import UnitLayout


class MethodKind(StrEnum):
    """Kinds of methods: each has a job of its own."""

    WALK = "walk"  # replaces the matrices of one block after another
    SHAPE = "shape"  # removes blocks, heads and neurons
    CONTEXTUAL = "contextual"  # keeps the weights, learns which units an input needs


def _cost_of_masks(scope: Scope, config: Any) -> Work:
    return masks(scope)


def _stored_as_weights(name: str, rows: int, columns: int, target: Target, config: Any) -> None:
    return None


def _without_groups(config: Any) -> int:
    return 0


def _a_target_decides(rows: int, columns: int, config: Any) -> None:
    return None


def _needs_nothing(config: Any) -> Needs:
    from niwaki.data.statistics import Needs

    return Needs()


def _never(config: Any) -> bool:
    return False


def _as_given(config: Any, space: ShapeSpace) -> tuple[Any, str]:
    return config, ""


def _no_info(
    block: Block, statistics: Mapping[str, Statistics], units: Mapping[Kind, PrunableUnit], config: Any
) -> None:
    return None


def _no_records(
    block: Block, calib: CalibrationData, targets: Mapping[str, Target], config: Any, generator: torch.Generator
) -> dict[str, Packed]:
    return {}


@dataclass(frozen=True, kw_only=True)
class Method:
    """Fields that all kinds share.

    `doc` is the docstring of the module and `paper` its source. `accepts` are the types of target it meets. `config` is
    a frozen dataclass of its options. `needs(config)` is what the walk collects. `continues`: it can follow another
    method in a chain.

    `compress(block, calibration, targets, config, generator)` returns new records of every matrix in `targets`. It does
    not change the block. `cost(scope, config)` counts its work on one block (see `niwaki.methods.cost`).

    `stored_bytes(name, rows, columns, target, config)` is the size of one matrix as codes, None for one stored as
    weights. It raises TargetError for a target that the matrix cannot meet.
    """

    kind: ClassVar[MethodKind]

    doc: str
    paper: str
    accepts: tuple[type[Target], ...]
    config: type
    needs: Callable[[Any], Needs]
    continues: bool = False
    compress: Callable[[Block, CalibrationData, Mapping[str, Target], Any, torch.Generator], dict[str, Packed]] = (
        _no_records
    )
    cost: Callable[[Scope, Any], Work] = _cost_of_masks
    stored_bytes: Callable[[str, int, int, Target, Any], int | None] = _stored_as_weights


@dataclass(frozen=True, kw_only=True)
class WalkMethod(Method):
    """Method that replaces the matrices of one block after another.

    `group(config)`: columns that share a scale, 0 for the whole row. `masked_options` are the options that a mask of an
    earlier step requires. A method that spends any number of bits states `min_bits(rows, columns, config)`, the min
    bits per weight for a matrix of this shape. `named_bits(rows, columns, config)` are the bits that its options alone
    decide, None if a target does.
    """

    kind = MethodKind.WALK

    group: Callable[[Any], int] = _without_groups
    masked_options: Mapping[str, Any] = field(default_factory=dict)
    min_bits: Callable[[int, int, Any], float] | None = None
    named_bits: Callable[[int, int, Any], float | None] = _a_target_decides


@dataclass(frozen=True, kw_only=True)
class ShapeMethod(Method):
    """Method that removes blocks, heads and neurons.

    `search(space, removed_frac, infos, config)` looks for a shape that removes at least this share of the parameters.
    It yields shapes to evaluate, receives the loss of each, and returns the shape, or None if there is none.

    `info(block, statistics, units, config)` is what `search` needs of a dense block, ready for JSON, from statistics of
    `info_needs(config)`. `multiple(config)`: numbers of neurons are multiples of it, 0 for the default.
    `settle(config, space)` decides what depends on the model, and says in one line what it leaves out.
    `biased(config)`: the matrices that write to the residual stream get biases.
    """

    kind = MethodKind.SHAPE

    search: Callable[[ShapeSpace, float, Sequence[BlockInfo], Any], ShapeSearch]
    info_needs: Callable[[Any], Needs] = _needs_nothing
    info: Callable[[Block, Mapping[str, Statistics], Mapping[Kind, PrunableUnit], Any], Any] = _no_info
    multiple: Callable[[Any], int] = _without_groups
    settle: Callable[[Any, ShapeSpace], tuple[Any, str]] = _as_given
    biased: Callable[[Any], bool] = _never


@dataclass(frozen=True, kw_only=True)
class ContextualMethod(Method):
    """Method that keeps the weights and learns which units an input needs.

    `candidate_rows(windows, config)` are the windows that candidates are evaluated on.
    `choose_criterion(traces, layout, config, skip_frac, decoder_weights, measure)` returns the options with every open
    one decided by the losses that `measure` gives, and these losses.

    `samples(traces, layout, config)` joins the traces of all criteria into what `learn` takes.
    `learn(traces, layout, config, decoder_weights)` returns the predictor and facts for the record.
    `rule(config, skip_frac)` turns scores into the units that run.
    `beside_bytes(layout, channels, windows, config, decoder_weights)` is the size of what is stored beside the weights.
    """

    kind = MethodKind.CONTEXTUAL

    candidate_rows: Callable[[int, Any], range]
    choose_criterion: Callable[
        [Mapping[str, Traces], UnitLayout, Any, float, int, Callable[[Sequence[Variant]], list[float]]],
        tuple[Any, dict[str, Any]],
    ]
    samples: Callable[[Mapping[str, Traces], UnitLayout, Any], Traces]
    learn: Callable[[Traces, UnitLayout, Any, int], tuple[Predictor, dict[str, Any]]]
    rule: Callable[[Any, float], Rule]
    beside_bytes: Callable[[UnitLayout, int, int, Any, int], int]
