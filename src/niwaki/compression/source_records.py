"""Records of what a run began with: the source model, the calibration windows, and weights that stay as they are.

All are fields of run.json (see `run_record`). Nothing here needs torch.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class Frozen(BaseModel):
    """Frozen record. Unknown fields are kept: methods add their own, and so may a later version."""

    model_config = ConfigDict(frozen=True, extra="allow", protected_namespaces=(), ser_json_inf_nan="constants")

    def dump(self) -> dict[str, Any]:
        """Return the fields that are set, as JSON has them."""
        return self.model_dump(mode="json", exclude_unset=True)


class AdapterRecord(Frozen):
    """Adapter that was merged into the source model: its folder and hashes, and the base, as found and as named."""

    source: str
    base: str
    base_named: str | None = None
    type: str | None = None
    rank: int | None = None
    bytes: int = 0
    sha256: str = ""
    config_sha256: str = ""


class GgufRecord(Frozen):
    """GGUF file that the source was dequantized from. `types`: number of its tensors by quant type."""

    file: str
    bytes: int
    sha256: str
    architecture: str
    types: dict[str, int]
    dtype: str
    note: str


class RotatedRecord(Frozen):
    """Model that the source is in another basis: its folder and bytes, and what was turned for which target."""

    source: str
    bytes: int
    target: str = ""
    residual: str = ""
    heads: str = ""
    seed: int = 0


class ModelRecord(Frozen):
    """Source model: a folder, or a GGUF file with its facts. Of a model of the hub: its id, and the commit read."""

    source: str
    hub_id: str | None = None
    revision: str | None = None
    adapter: AdapterRecord | None = None
    type: str = ""
    bytes: int = 0
    files: dict[str, Any] = {}
    gguf: GgufRecord | None = None
    rotated: RotatedRecord | None = None

    @property
    def dense_bytes(self) -> int:
        """Return the bytes before any change: a basis of its own unties the head, which only adds some."""
        return self.bytes if self.rotated is None else self.rotated.bytes


class CalibrationRecord(Frozen):
    """Calibration windows [samples, tokens], their source and the hash of their tokens; None without windows.

    `bos`: whether every window began with the beginning-of-text token. Records without the field had none. `skipped`:
    rows that could not be used, by source and reason. `revisions`: commits of data sets. `mix`: windows by source.
    `held_out`: windows that learning was judged by.
    """

    source: str = "none"
    windows: list[int] | None = None
    sha256: str | None = None
    bos: Literal["on", "off"] | None = "off"
    skipped: dict[str, dict[str, int]] = {}
    revisions: dict[str, str] = {}
    mix: dict[str, dict[str, Any]] = {}
    held_out: dict[str, Any] = {}


class KeptWeightRecord(Frozen):
    """Weight that stays dense: its reason, the number of the blocks that have it, and its bytes in all of them."""

    reason: str
    blocks: int
    bytes: int


class KeptRecord(Frozen):
    """Weights of two or more dimensions that stay dense, by name in a block. `share`: of the bytes of the blocks."""

    bytes: int
    share: float
    weights: dict[str, KeptWeightRecord] = {}


class UnreadGroup(Frozen):
    """Number and bytes of tensors below one prefix."""

    tensors: int
    bytes: int


class UnreadRecord(Frozen):
    """Tensors of the source that its model has no place for, by prefix. `kept`: the result holds them unchanged."""

    kept: bool
    tensors: int
    bytes: int
    groups: dict[str, UnreadGroup] = {}
