"""Settings of a roll-out: two upstreams, requests that stay on dense, shares of copies and audits, limits of requests.

Options of `niwaki rollout run` and a YAML file of the same fields make one `RolloutSettings`; options win. They hold
no key: a field names the environment variable of the key.

    settings_from({"stable": {"url": "http://127.0.0.1:8001"}, "canary": {"url": "http://127.0.0.1:8002"}})
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import regex
import yaml
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from niwaki.errors import InputError
from niwaki.rollout.decision import Policy


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Upstream(_Frozen):
    """OpenAI-compatible server. `url`: its address without /v1. `model`: the name that replaces the one of clients.

    `key_env`: environment variable of its key. `files`: folder that it serves, which is checked for changes.
    """

    url: str
    model: str | None = None
    key_env: str | None = None
    files: Path | None = None

    @field_validator("url")
    @classmethod
    def _normalized(cls, url: str) -> str:
        if not re.fullmatch(r"https?://[^\s/?#@]+(/[^\s?#]*)?", url):
            raise ValueError("expected an address such as http://127.0.0.1:8001")
        return url.rstrip("/").removesuffix("/v1")


class Important(_Frozen):
    """Rule of requests that stay on dense. All given conditions must hold. `header` is `name: pattern`."""

    header: str | None = None
    model: str | None = None
    prompt: str | None = None
    min_characters: int | None = Field(default=None, ge=1)

    @field_validator("header", "model", "prompt")
    @classmethod
    def _pattern(cls, pattern: str | None) -> str | None:
        try:
            regex.compile(pattern or "")
        except regex.error as error:
            raise ValueError(f"expected a regular expression: {error}") from error
        return pattern

    @model_validator(mode="after")
    def _one_condition(self) -> "Important":
        if all(value is None for value in self.model_dump().values()):
            raise ValueError("expected header, model, prompt or min_characters")
        if self.header is not None and not re.match(r"[\w-]+:", self.header):
            raise ValueError("expected a header as `name: pattern`")
        return self


class TrafficSampling(_Frozen):
    """Shares of requests that are copied to the canary or audited, and how many of each may run at once."""

    model_config = ConfigDict(populate_by_name=True)

    shadow_frac: float = Field(default=0.0, ge=0, le=1)
    audit_frac: float = Field(default=0.1, ge=0, le=1)
    max_shadows: int = Field(default=4, ge=1, validation_alias=AliasChoices("max_shadows", "most_shadows"))
    max_audits: int = Field(default=2, ge=1, validation_alias=AliasChoices("max_audits", "most_audits"))
    keep_texts: bool = False


class RequestLimits(_Frozen):
    """Max bytes of a request, max seconds of its parts, and max open connections: all, and those of one address.

    A streamed canary answer must begin within `canary_first_byte_s`; every other answer within `answer_s`. If the
    canary is late, dense answers. `silence_s` is the longest pause in a stream.
    """

    body_bytes: int = Field(default=2_000_000, ge=1000)
    body_s: float = Field(default=15.0, gt=0)
    connect_s: float = Field(default=5.0, gt=0)
    canary_first_byte_s: float = Field(default=30.0, gt=0)
    answer_s: float = Field(default=300.0, gt=0)
    silence_s: float = Field(default=120.0, gt=0)
    connections: int = Field(default=1000, ge=1)
    connections_per_address: int = Field(default=1000, ge=1)


class RolloutSettings(_Frozen):
    """All settings except the limits of signals. `key_header`: requests with the same value stay on the same side."""

    stable: Upstream
    canary: Upstream
    policy: Policy = Policy()
    important: tuple[Important, ...] = ()
    sampling: TrafficSampling = TrafficSampling()
    bounds: RequestLimits = RequestLimits()
    key_header: str = "x-user"
    chat_template: Path | None = None


def settings_from(values: Mapping[str, Any], path: Path | None = None) -> RolloutSettings:
    """Return the settings of a YAML file, replaced part by part by `values`. Raise InputError for a wrong field."""
    whole = _merge({} if path is None else _read(path), values)
    for side in ("stable", "canary"):
        if not (whole.get(side) or {}).get("url"):
            raise InputError(f"no address of the {side} server: give --{side} http://HOST:PORT")
    try:
        return RolloutSettings(**whole)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise InputError(f"roll-out settings: {where}: {first['msg']} (got {first['input']!r})") from error


def _read(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read the roll-out settings {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected settings, such as stable, canary, policy (docs/rollout.md)")
    return content


def _merge(base: Mapping[str, Any], update: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for name, value in update.items():
        if isinstance(value, Mapping) and isinstance(merged.get(name), Mapping):
            merged[name] = _merge(merged[name], value)
        elif value is not None:
            merged[name] = value
    return merged
