"""Recipes: their fields, their validation, their file, and the options of methods.

A recipe is YAML with the fields of `Recipe`. Options of the command line override it. run.json keeps the resolved copy.

    method: sparsegpt
    target: "2:4"
    calibration: {files: [mine.jsonl], samples: 64, seq_len: 512}
    options: {damping_frac: 0.02}
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from niwaki.config.presets import names_bits, with_preset
from niwaki.config.sources import SELF, parse_mix
from niwaki.config.targets import WRITTEN_TARGETS_HELP, parse_blocks, parse_bytes, parse_keep_blocks
from niwaki.errors import InputError, TargetError, unknown

BosPolicy = Literal["auto", "on", "off"]
BOS_POLICIES: tuple[BosPolicy, ...] = get_args(BosPolicy)
BOS_HELP = "Beginning-of-text token of every window: auto follows the tokenizer, on puts its bos token, off none."
MIX_HELP = (
    "Other sources of text with their share of the windows, SOURCE:SHARE; self is text that the dense model writes: "
    "self:0.5."
)
HELD_OUT_HELP = (
    "Text that decides which state of a block learning keeps, in place of an eighth of the calibration windows, all of "
    "which are then learned: a source as in the calibration or the mix, or self."
)
MISSING = "{} is missing: give one, for example --method sparsegpt --target 2:4 (see `niwaki methods`)"
RENAMED_FIELDS = {"ends": "embeddings"}  # of a recipe, by their names in version 0.1
ADDED_FIELDS = ("blocks", "drop_unused", "expert_tokens", "logit_bytes", "rotate")  # since version 0.1
RENAMED_OPTIONS = {"stand_in": "mean_fill", "trial_windows": "candidate_windows", "trust": "shrinkage"}  # of methods
RENAMED_PREFIXES = {"most_": "max_", "least_": "min_"}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Calibration(_Strict):
    """Calibration text of a method. Without files the model samples its own text."""

    files: Annotated[
        tuple[str, ...], "Files of text or rows, or data sets; without any, the model writes its own text."
    ] = ()
    field: Annotated[str, "Field of a row that holds its text."] = "text"
    samples: Annotated[int, "Number of windows."] = Field(default=128, ge=1)
    seq_len: Annotated[int, "Tokens per window."] = Field(default=2048, ge=2)
    bos: Annotated[BosPolicy, BOS_HELP] = "auto"
    mix: Annotated[tuple[str, ...], MIX_HELP] = ()
    held_out: Annotated[str | None, HELD_OUT_HELP] = None

    @property
    def writes_text(self) -> bool:
        """Return whether the model writes some or all of the text itself."""
        return SELF in parse_mix(self.mix, self.files) or not (self.files or self.mix) or self.held_out == SELF

    @property
    def held_windows(self) -> int:
        """Return the number of windows of `held_out`: as many as would be held out of the calibration."""
        return 0 if self.held_out is None else max(1, self.samples // 8)

    @field_validator("mix", mode="before")
    @classmethod
    def _entries(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value


class Recipe(_Strict):
    """Request of a compression: all fields that decide the bytes of a result, and how to compute them."""

    method: Annotated[str, "A method, or several joined by +, in the order in which they run."]
    target: Annotated[str | None, WRITTEN_TARGETS_HELP] = None
    target_bytes: Annotated[int | None, "Bytes of all compressed matrices together, instead of a target."] = None
    blocks: Annotated[
        tuple[int, ...] | None, "Blocks that are compressed, such as 8-23 or 0,3,5-7; the others stay as they are."
    ] = None
    keep_blocks: Annotated[
        Literal["auto"] | tuple[int, ...], "Blocks that stay at 4 bits: their numbers, auto or none."
    ] = ()
    allocation: Annotated[
        str, "How the target is shared out between the blocks; auto takes the best one known for the method."
    ] = "auto"
    calibration: Annotated[Calibration, "Text that the method sees."] = Calibration()
    options: Annotated[dict[str, Any], "Options of the method; in a chain, method.option."] = {}
    pack: Annotated[
        Literal["auto", "codes", "none"],
        "What is stored as codes: quantized weights (codes), nonzeros too where that is smaller (auto), or none.",
    ] = "codes"
    embeddings: Annotated[
        Literal["none", "4bit", "8bit"], "Codes of the embeddings and the LM head; they do not count in the target."
    ] = "none"
    expert_tokens: Annotated[
        int, "Tokens of the other experts that count beside the own ones of each expert of a mixture; 0 for none."
    ] = Field(default=0, ge=0)
    rotate: Annotated[
        Literal["none", "heads", "all", "auto"],
        "Basis that loses less: of heads and neurons (heads; auto where it can) or of all, which unties the head.",
    ] = "none"
    drop_unused: Annotated[bool, "Leave out tensors that the model does not read, instead of copying them."] = False
    seed: Annotated[int, "Seed of every random number."] = 0
    device: Annotated[str, "Device that computes: auto, cpu, cuda or cuda:N."] = "auto"
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], "Type that blocks compute in; auto takes the checkpoint's."
    ] = "auto"
    batch_tokens: Annotated[int | None, "Tokens of one forward of a block."] = Field(default=None, ge=1)
    activation_bytes: Annotated[int | None, "Bytes of hidden states that stay in memory; the rest goes to disk."] = (
        Field(default=None, ge=0)
    )
    logit_bytes: Annotated[int | None, "Bytes of logits that are made at once, 256 MiB if not given."] = Field(
        default=None, ge=1
    )

    def dump(self) -> dict[str, Any]:
        """Return the fields as JSON has them; those that came after version 0.1 only if they differ from the default.

        So old records and old fingerprints stay what they were.
        """
        content = self.model_dump(mode="json")
        added = {name for name in ADDED_FIELDS if getattr(self, name) == type(self).model_fields[name].default}
        for name, default in (("bos", "auto"), ("mix", []), ("held_out", None)):
            if content["calibration"][name] == default:
                del content["calibration"][name]
        return {name: value for name, value in content.items() if name not in added}

    @field_validator("target", mode="before")
    @classmethod
    def _target_text(cls, value: Any) -> Any:
        return _target_text(value)

    @field_validator("target_bytes", mode="before")
    @classmethod
    def _bytes_of(cls, value: Any) -> Any:
        return parse_bytes(value) if isinstance(value, str) else value

    @field_validator("blocks", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return parse_blocks(value)

    @field_validator("keep_blocks", mode="before")
    @classmethod
    def _blocks_of(cls, value: Any) -> Any:
        return parse_keep_blocks(value)


def load_recipe(path: str | Path) -> dict[str, Any]:
    """Read the fields of a recipe file without validation. Raises InputError for anything but a YAML mapping."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read the recipe {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a mapping with at least method and target")
    content = current_fields(content)
    _require_known(content, f" in {path}")
    if not isinstance(content.get("options") or {}, dict):
        raise InputError(f"{path}: options: expected a mapping, got {content['options']!r}")
    return content


def make_recipe(values: dict[str, Any]) -> Recipe:
    """Validate a recipe and fill in its preset. Raises InputError with one line for the first problem."""
    values = current_fields(values)
    values = with_preset(values | {"target": _target_text(values.get("target"))})
    _require_known(values)
    targets = [name for name in ("target", "target_bytes") if values.get(name) is not None]
    if len(targets) > 1:
        raise TargetError(
            f"target {values['target']} and target_bytes {values['target_bytes']} are two budgets: give one of them"
        )
    has_target = bool(targets) or names_bits(values.get("options"))  # `recipe_stages` asks the method
    for name, given in (("method", values.get("method") is not None), ("target", has_target)):
        if not given:
            raise InputError(MISSING.format(name))
    try:
        return Recipe(**{**values, "calibration": calibration_fields(values.get("calibration"))})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InputError(f"recipe: {where}: {first['msg']} (got {first['input']!r})") from error


def as_files(given: str | Path | Iterable[str | Path]) -> tuple[str, ...]:
    """Return one file, or several, as a tuple of the texts that the caller wrote."""
    return (str(given),) if isinstance(given, str | Path) else tuple(map(str, given))


def calibration_fields(given: Any) -> dict[str, Any]:
    """Return the `calibration` of a recipe as a mapping. It may also be one file, a list of files or nothing."""
    if given is None:
        return {}
    if isinstance(given, Calibration):
        return given.model_dump()
    if isinstance(given, str | Path | list | tuple):
        given = {"files": given}
    if not isinstance(given, dict):
        raise InputError(f"calibration: expected files or a mapping with files, samples, seq_len; got {given!r}")
    files = given.get("files", ())
    return {**given, "files": as_files(files)} if isinstance(files, str | Path | list | tuple) else given


@dataclass(frozen=True)
class OptionField:
    """Option of a method, as its Config declares it: `group: Annotated[int, "Columns that share a scale."] = 128`."""

    name: str
    kind: type
    default: Any
    explanation: str


def option_fields(config_class: type) -> list[OptionField]:
    """Return the options that a dataclass declares, in its order."""
    kinds, explained = get_type_hints(config_class), explanations(config_class)
    return [
        OptionField(entry.name, kinds[entry.name], entry.default, explained.get(entry.name, ""))
        for entry in fields(config_class)
    ]


def explanations(config_class: type) -> dict[str, str]:
    """Return the explanation of every field that has one: the text in its `Annotated[type, "text"]`."""
    return {
        name: text
        for name, hint in get_type_hints(config_class, include_extras=True).items()
        if get_origin(hint) is Annotated
        for text in hint.__metadata__
        if isinstance(text, str)
    }


def make_options(config_class: type, options: dict[str, Any], method: str) -> Any:
    """Make the frozen config of a method from `--set` texts or recipe values.

    Raises InputError for a wrong name or type.
    """
    known = {option.name: option for option in option_fields(config_class)}
    values: dict[str, Any] = {}
    for given, value in options.items():
        name = given if given in known else current_name(given)
        if not known:
            raise InputError(f"{method} has no options, got {name!r}")
        if name not in known:
            raise InputError(unknown(f"option of {method}", name, known))
        values[name] = _coerce(value, known[name].kind, f"{method} option {name}")
    try:
        return config_class(**values)
    except ValueError as error:
        raise InputError(f"{method}: {error}") from error


def current_name(name: str) -> str:
    """Return the present name of an option that an earlier version called `name`; old results hold the old name."""
    for old, new in RENAMED_PREFIXES.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return RENAMED_OPTIONS.get(name, name)


def current_fields(values: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a recipe under their present names; files of an earlier version hold the old ones."""
    return {RENAMED_FIELDS.get(name, name): value for name, value in values.items()}


def _require_known(values: dict[str, Any], where: str = "") -> None:
    for name in values:
        if name not in {*Recipe.model_fields, "preset"}:
            raise InputError(unknown("recipe field", str(name), Recipe.model_fields) + where)


def _target_text(value: Any) -> Any:
    """Return a numeric fraction as text.

    Raises TargetError for 124, which YAML 1.1 makes of an unquoted 2:4 (base 60).
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    keep, group = divmod(value, 60)
    if isinstance(value, int) and 0 < keep < group:
        raise TargetError(
            f'target {value}: YAML reads an unquoted {keep}:{group} as this number: quote it, target: "{keep}:{group}"'
        )
    return str(value)


def _coerce(value: Any, kind: Any, what: str) -> Any:
    if kind is bool:
        if isinstance(value, bool):
            return value
        if str(value).lower() in {"true", "false"}:
            return str(value).lower() == "true"
        raise InputError(f"{what}: expected true or false, got {value!r}")
    try:
        if kind is int and float(value) != int(float(value)):
            raise ValueError
        return kind(value)
    except (TypeError, ValueError) as error:
        raise InputError(f"{what}: expected {kind.__name__}, got {value!r}") from error
