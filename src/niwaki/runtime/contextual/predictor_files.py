"""Files of a learned predictor or of thresholds, beside the weights that they were learned from.

    OUT/niwaki/shadow.safetensors     its tensors
    OUT/niwaki/shadow.json            format 1: units, rule, features, runtime settings
                                      format 2: places and their shares, runtime settings

The weights do not change: without niwaki the folder is the dense model.

Legend: P places.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors.torch import load_file
from torch import Tensor

from niwaki.config.recipe import current_name
from niwaki.config.targets import Kind
from niwaki.errors import CheckpointError, faults_of, format_problem
from niwaki.model.files import write_shard, write_text
from niwaki.runtime.contextual.places import Place, skipped_frac
from niwaki.runtime.contextual.predictor import Predictor
from niwaki.runtime.contextual.selection import Rule
from niwaki.runtime.contextual.units import KINDS, UnitLayout, read_layout

TENSORS, ABOUT = "niwaki/shadow.safetensors", "niwaki/shadow.json"
FORMAT, INPUT_FORMAT = 1, 2  # of units chosen for a prompt, and of inputs chosen for a token
AGAIN = "download the result again, or compress again"
_AnyAbout = TypeVar("_AnyAbout", bound=BaseModel)

_Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
_Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
_Bound = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Stored(BaseModel):
    """Base of what the file of settings holds: no unknown field, no converted type."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class _Unit(_Stored):
    kind: Kind
    consumer: Annotated[str, Field(min_length=1)]
    producers: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)]
    count: _Count


class _Layout(_Stored):
    blocks: Annotated[int, Field(ge=1, le=2**20)]
    width: _Count
    weights: dict[Kind, Annotated[int, Field(ge=1)]]
    units: dict[Kind, _Unit]


class _Rule(_Stored):
    skip_frac: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
    scope: Literal["local", "global"] = "local"
    floor_frac: _Share = 0.1


class _Running(_Stored):
    refresh_tokens: Annotated[int, Field(ge=0)] = 0
    min_prompt: Annotated[int, Field(ge=0)] = 0
    max_kept_frac: _Bound = 0
    batch: Literal["union", "shared"] = "union"
    mean_fill: Annotated[float, Field(allow_inf_nan=False)] = 0
    max_deviation: _Bound = 0
    min_margin: Annotated[float, Field(allow_inf_nan=False)] = 0


class _Place(_Stored):
    block: Annotated[int, Field(ge=0, le=2**20)]
    names: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)]
    inputs: _Count
    outputs: _Count
    share: _Share


class _InputAbout(_Stored):
    format: int
    skip_frac: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
    places: Annotated[list[_Place], Field(min_length=1)]
    running: _Running


class _About(_Stored):
    format: int
    features: list[Literal["last", "mean", "prompt"]]
    layout: _Layout
    rule: _Rule
    running: _Running


@dataclass(frozen=True)
class Running:
    """Runtime settings of a predictor.

    `refresh_tokens`: tokens between two choices of the units; 0 means one choice, after the prompt. `min_prompt`: the
    tokens that a choice needs. `max_kept_frac`: the share of the weights above which a batch runs dense. `batch`:
    sequences run the `union` of their neurons, or `shared` ones. `mean_fill`: the share of a skipped neuron's mean
    activation in the prompt that replaces it. A prompt runs dense above `max_deviation` (0: no limit), or if the margin
    of its mask is below `min_margin`.
    """

    refresh_tokens: int = 0
    min_prompt: int = 16
    max_kept_frac: float = 0.85
    batch: str = "union"
    mean_fill: float = 0.5
    max_deviation: float = 0.0
    min_margin: float = 0.0


@dataclass(frozen=True)
class Shadow:
    """Predictor of a model with its units, selection rule and runtime settings."""

    predictor: Predictor
    layout: UnitLayout
    rule: Rule
    running: Running
    what: ClassVar[str] = "heads and neurons"

    @property
    def weights(self) -> int:
        """Return the number of weights that can be skipped."""
        return self.layout.blocks * sum(self.layout.weights.values())

    def tensors(self) -> dict[str, Tensor]:
        """Return what is stored beside the weights."""
        return self.predictor.tensors()


@dataclass(frozen=True)
class InputShadow:
    """Thresholds of the inputs of a model, by place, with the runtime settings.

    `shares`: the share of the inputs of a place that lay below its threshold when it was set. `skip_frac`: that of the
    weights of all places. `scale_N` multiplies the sizes of the inputs of all places, one after another.
    """

    places: tuple[Place, ...]
    shares: tuple[float, ...]
    threshold_P: Tensor
    running: Running
    scale_N: Tensor | None = None
    what: ClassVar[str] = "the weights, by inputs"

    @property
    def weights(self) -> int:
        """Return the number of weights that can be skipped."""
        return sum(place.weights for place in self.places)

    @property
    def skip_frac(self) -> float:
        """Return the share of the weights that is not read."""
        return skipped_frac(self.places, self.shares)

    def tensors(self) -> dict[str, Tensor]:
        """Return what is stored beside the weights."""
        own = {"threshold_P": self.threshold_P} | ({} if self.scale_N is None else {"scale_N": self.scale_N})
        return {name: tensor.cpu().contiguous() for name, tensor in own.items()}

    @property
    def limits(self) -> list[Tensor]:
        """Return the size that an input needs, by place: of one element, or of one for every input."""
        limits = list(self.threshold_P.split(1))
        if self.scale_N is None:
            return limits
        scales = self.scale_N.split([place.inputs for place in self.places])
        return [limit_1 / scale_I for limit_1, scale_I in zip(limits, scales, strict=True)]


def write_shadow(folder: Path, shadow: Shadow | InputShadow) -> str:
    """Write both files below `folder`; return the SHA-256 of the tensors."""
    write_about(folder, shadow)
    return write_shard(folder / TENSORS, shadow.tensors())


def write_about(folder: Path, shadow: Shadow | InputShadow) -> None:
    """Write the file of the settings."""
    if isinstance(shadow, InputShadow):
        places = zip(shadow.places, shadow.shares, strict=True)
        about = {
            "format": INPUT_FORMAT,
            "skip_frac": shadow.skip_frac,
            "places": [vars(place) | {"names": list(place.names), "share": share} for place, share in places],
            "running": asdict(shadow.running),
        }
    else:
        about = {
            "format": FORMAT,
            "features": list(shadow.predictor.features),
            "layout": shadow.layout.describe(),
            "rule": asdict(shadow.rule),
            "running": asdict(shadow.running),
        }
    (folder / ABOUT).parent.mkdir(parents=True, exist_ok=True)
    write_text(folder / ABOUT, json.dumps(about, indent=2) + "\n")


def read_running(fields: Mapping[str, Any]) -> Running:
    """Return the running settings of a stored record, whose fields may have the names of an earlier version."""
    return Running(**{current_name(name): value for name, value in fields.items()})


def has_shadow(folder: Path) -> bool:
    """Return whether a predictor is beside the weights."""
    return (folder / ABOUT).is_file()


def read_shadow(folder: Path) -> Shadow | InputShadow:
    """Read what `write_shadow` wrote.

    Raises CheckpointError if it is incomplete or of another format. Also for a field or a tensor that a predictor of
    these units cannot have.
    """
    with faults_of(f"{folder / ABOUT} and its tensors are not complete", "compress again"):
        about: Mapping[str, Any] = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        if problem := format_problem(about["format"], (FORMAT, INPUT_FORMAT)):
            raise CheckpointError(f"{folder / ABOUT} {problem}")
        if about["format"] == INPUT_FORMAT:
            return _read_inputs(folder, about)
        _check_about(folder / ABOUT, about)
        layout, rule, running = read_layout(about["layout"]), Rule(**about["rule"]), read_running(about["running"])
        tensors = load_file(folder / TENSORS)
        _check_tensors(folder / TENSORS, tensors, layout, bool(about["features"]))
        predictor = Predictor(tuple(about["features"]), layout.blocks * layout.count("heads"), **tensors)
    return Shadow(predictor, layout, rule, running)


def _read_inputs(folder: Path, about: Mapping[str, Any]) -> InputShadow:
    """Read thresholds of inputs. Raises CheckpointError for what they cannot be."""
    found = _validated(_InputAbout, folder / ABOUT, about)
    places = tuple(Place(one.block, tuple(one.names), one.inputs, one.outputs) for one in found.places)
    names = [(place.block, name) for place in places for name in place.names]
    if len(set(names)) != len(names):
        raise CheckpointError(f"{folder / ABOUT}: places name a matrix twice; {AGAIN}")
    tensors = load_file(folder / TENSORS)
    scaled = {"scale_N": (sum(place.inputs for place in places),)} if "scale_N" in tensors else {}
    _check_shapes(folder / TENSORS, tensors, {"threshold_P": (len(places),), **scaled})
    if bool((tensors["threshold_P"] < 0).any()):
        raise CheckpointError(f"{folder / TENSORS}: threshold_P holds negative values; {AGAIN}")
    if scaled and bool((tensors["scale_N"] <= 0).any()):
        raise CheckpointError(f"{folder / TENSORS}: scale_N holds values that are not positive: they divide; {AGAIN}")
    shares = tuple(one.share for one in found.places)
    running = read_running(about["running"])
    return InputShadow(places, shares, tensors["threshold_P"], running, tensors.get("scale_N"))


def _validated(kind: type[_AnyAbout], path: Path, about: Mapping[str, Any]) -> _AnyAbout:
    """Return the settings. Raise CheckpointError with the field that is unknown, missing, or out of its range."""
    try:
        return kind.model_validate(about)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"{path}: {field}: {first['msg']}; {AGAIN}") from error


def _check_about(path: Path, about: Mapping[str, Any]) -> None:
    """Raise CheckpointError with the field that is unknown, missing, or out of its range."""
    renamed = {**about, "running": {current_name(name): value for name, value in dict(about["running"]).items()}}
    layout = _validated(_About, path, renamed).layout
    if set(layout.units) != set(KINDS) or set(layout.weights) != set(KINDS):
        raise CheckpointError(f"{path}: layout has not the units {' and '.join(KINDS)}; {AGAIN}")
    if wrong := [kind for kind, unit in layout.units.items() if unit.kind != kind]:
        raise CheckpointError(f"{path}: layout.units.{wrong[0]}.kind is {layout.units[wrong[0]].kind}; {AGAIN}")
    if (count := layout.units["neurons"].count) % layout.width:
        raise CheckpointError(f"{path}: layout.width {layout.width} does not divide {count} neurons; {AGAIN}")
    if len(set(about["features"])) != len(about["features"]):
        raise CheckpointError(f"{path}: features repeats a name; {AGAIN}")


def _check_tensors(path: Path, tensors: Mapping[str, Tensor], layout: UnitLayout, learned: bool) -> None:
    """Raise CheckpointError with the tensor that is missing, or that has not the shape or values of a predictor."""
    units = layout.size
    features = tensors["center_F"].numel() if learned and "center_F" in tensors else 0
    rank = tensors["out_RU"].shape[0] if learned and "out_RU" in tensors and tensors["out_RU"].dim() else 0
    shapes = {
        "prior_U": (units,), "typical_U": (units,), "trust_K2": (2, 2), "center_F": (features,),
        "scale_F": (features,), "into_FR": (features, rank), "out_RU": (rank, units if learned else 0),
    }  # fmt: skip
    _check_shapes(path, tensors, shapes)
    if not bool((tensors["typical_U"] > 0).all()):
        raise CheckpointError(f"{path}: typical_U holds values that are not positive: they divide; {AGAIN}")


def _check_shapes(path: Path, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise CheckpointError with the tensor that is missing, unknown, or has not the shape or values."""
    if unknown := sorted(tensors.keys() ^ shapes.keys()):
        raise CheckpointError(f"{path}: {unknown[0]} is {'unknown' if unknown[0] in tensors else 'missing'}; {AGAIN}")
    for name, shape in shapes.items():
        own = tensors[name]
        if own.dtype != torch.float32 or tuple(own.shape) != shape:
            found = f"{str(own.dtype).removeprefix('torch.')} {list(own.shape)}"
            raise CheckpointError(f"{path}: {name} is {found}: expected float32 {list(shape)}; {AGAIN}")
        if not bool(own.isfinite().all()):
            raise CheckpointError(f"{path}: {name} holds NaN or infinite values: expected finite ones; {AGAIN}")
