"""Model card of a result: its content, its cost, and the command that makes it again."""

import shlex
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData

from niwaki.compression.run_record import ExportRecord, Record, RecoveryRecord, ResultRecord, RunRecord
from niwaki.config.targets import format_blocks

# `niwaki evaluate` and `niwaki compare` with --update-card write between these (niwaki.measure.report.evaluation_card).
BEGIN, END = "<!-- niwaki: measured -->", "<!-- niwaki: end -->"
UNMEASURED = "Not measured while compressing: `niwaki compare` does, and with `--update-card` writes into this place."
_BODY = """---
{metadata}
---

# {name}

`{source}` compressed by niwaki {version}: method `{method}`, target `{target}`.

| | |
|---|---|
| base model | {base} |
| matrices compressed | {matrices} |
{zeros}| true bits a weight in them, scales and all | {bits:.3f} |
{whole}| true bits a weight in embeddings and head | {embeddings} |
| bytes of the weight files | {bytes:,} (before: {bytes_before:,}) |
{copied}| calibration | {calibration} |
| seed | {seed} |
| time | {seconds} s on {device} |

{storage}

## Measured quality

{begin}

{unmeasured}

{end}

## Made with

    {command}

The full record is in `niwaki/run.json`, the error of every matrix in `niwaki/blocks.jsonl`.
"""

_LOADING = """
    import niwaki
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained("this folder")

"""
_DENSE = """Zeros are stored in place: the file is as large and runs as fast as the dense one in engines without a
sparse format."""
_SMALLER = """{removed:.2%} of the parameters of the blocks are gone, and the config says so: any engine that knows the
architecture loads the result, and runs a smaller model."""
_WIDTHS = (
    """{removed:.2%} of the parameters of the blocks are gone, and every block has widths of its own. Loading
it needs niwaki:
"""
    + _LOADING
)
_PACKED = (
    """{packed} of the matrices are stored as codes and stay codes in memory. Loading them needs niwaki:
"""
    + _LOADING
)
_SPARSE = (
    """{packed} of the matrices are stored as the {left} and where they belong, and stay so in memory.
Loading them needs niwaki (`--pack none` writes zeros in place, for other engines):
"""
    + _LOADING
)
_CONTEXTUAL = """The weights are those of the dense model: every engine runs them as such. `niwaki.load("this folder")`
reads a prompt with all of them and writes with those that it needs; the predictor that chooses lies in `niwaki/`."""
_PLAIN_BODY = """---
{metadata}
---

# {name}, {to}

`{name}` written by niwaki {version}: {bytes:,} bytes. {storage}

The full record is in `niwaki/run.json`.
"""


def export_card(record: Record, *, library: str, storage: str) -> str:
    """Return the card of an export: that of the compression, or a short one without a compression.

    `storage` is the text about the files. Fields of the record stand in it in braces.
    """
    if isinstance(record, RunRecord):
        return _card(record, library, storage)
    exported = record.export
    assert exported is not None and record.model is not None, "the record of an export"
    metadata = ModelCardData(library_name=library, pipeline_tag="text-generation", tags=["niwaki", exported.to])
    return _PLAIN_BODY.format(
        metadata=metadata.to_yaml(),
        name=Path(record.model.source).name,
        to=exported.to,
        version=exported.niwaki,
        bytes=exported.bytes,
        storage=storage.format_map(exported.dump()),
    )


def model_card(record: RunRecord) -> str:
    """Return Markdown with YAML metadata for the README of a result."""
    return _card(record, "transformers", _storage_text(record))


def _card(record: RunRecord, library: str, storage: str) -> str:
    recipe, result, exported = record.recipe, record.result, record.export
    source = Path(record.origin.source).name
    hub_id, revision = _hub_source(record.origin.source)
    counted = result.named or result
    # eval_results stays empty on purpose: nothing was evaluated here.
    metadata = ModelCardData(
        base_model=hub_id,
        library_name=library,
        pipeline_tag="text-generation",
        tags=["niwaki", *_kinds(result), recipe.method] + ([exported.to] if exported else []),
    )
    windows, kept = record.calibration.windows, record.allocation.kept_blocks
    target = _target_of(record)
    return _BODY.format(
        metadata=metadata.to_yaml(),
        name=f"{hub_id or source}, {recipe.method} {target}",
        source=hub_id or source,
        base=_base(record, hub_id, revision),
        begin=BEGIN,
        end=END,
        unmeasured=UNMEASURED,
        version=record.niwaki,
        method=recipe.method,
        target=target + (f", blocks {', '.join(map(str, kept))} kept at 4 bits" if kept else ""),
        matrices=_matrices(result),
        zeros="" if record.asks_for_bits else f"| measured zeros in them | {counted.zeros_frac:.4%} |\n",
        bits=exported.bits if exported else counted.bits,
        whole=_whole_row(result) + _earlier_rows(record),
        embeddings="as they were" if result.embeddings_bits is None else f"{result.embeddings_bits:.3f}",
        storage=storage.format_map(_storage_fields(record)),
        bytes=exported.bytes if exported else result.bytes,
        bytes_before=record.origin.dense_bytes,
        calibration="none" if windows is None else f"{windows[0]} windows of {windows[1]} tokens",
        copied=_kept_row(record)
        + _adapter_row(record)
        + _basis_row(record)
        + _tower_rows(record)
        + _unread_row(record),
        seed=recipe.seed,
        seconds=record.seconds,
        device=record.device,
        command="\n    ".join(_made_with(record)),
    )


def _matrices(result: ResultRecord) -> str:
    """Return how many matrices the run compressed, and in which blocks if these were named."""
    named = result.named
    if named is None:
        return str(result.matrices)
    return f"{named.matrices} of {result.matrices}: blocks {format_blocks(named.blocks)}"


def _whole_row(result: ResultRecord) -> str:
    """Return the row about the matrices of all blocks, empty if the run compressed all."""
    if result.named is None:
        return ""
    return f"| in the matrices of all blocks | {result.bits:.3f} bits a weight, {result.zeros_frac:.4%} zeros |\n"


def _earlier_rows(record: RunRecord) -> str:
    """Return a row for each run that made the source, the first one first."""
    rows = []
    for run in record.earlier:
        what = "recovered by training"
        if isinstance(run, RunRecord):
            named = run.recipe.blocks
            where = "all blocks" if named is None else f"blocks {format_blocks(named)}"
            what = f"{where}: `{run.recipe.method}`, `{_target_of(run)}`"
        rows.append(f"| run before this one | {what} |\n")
    return "".join(rows)


def _target_of(record: RunRecord) -> str:
    return record.recipe.target or f"{record.recipe.target_bytes:,} bytes"


def _adapter_row(record: RunRecord) -> str:
    """Return the row about the adapter that was merged, empty without one."""
    adapter = record.model.adapter
    if adapter is None:
        return ""
    base = adapter.base_named if adapter.base_named and adapter.base != adapter.source else Path(adapter.base).name
    kind = f"{adapter.type}, rank {adapter.rank}, SHA-256 {adapter.sha256[:12]}…"
    return f"| adapter merged before | `{Path(adapter.source).name}` ({kind}) into `{without_folders(base)}` |\n"


def _basis_row(record: RunRecord) -> str:
    """Return the row about the basis of the source, empty for a model that was not turned."""
    rotated = record.model.rotated
    if rotated is None:
        return ""
    parts = f"residual {rotated.residual}, heads {rotated.heads}, for {rotated.target}"
    return f"| turned before into another basis | `{Path(rotated.source).name}` ({parts}) |\n"


def _base(record: RunRecord, hub_id: str | None, revision: str) -> str:
    """Return what the card says of the source model."""
    source, gguf = Path(record.origin.source).name, record.origin.gguf
    if gguf is not None:
        return f"`{source}`, a GGUF file, {gguf.note} to {gguf.dtype} (sha256 `{gguf.sha256}`)"
    if hub_id is None:
        return f"`{source}`, a local folder"
    return f"[{hub_id}](https://huggingface.co/{hub_id}) at `{revision}`"


def _tower_rows(record: RunRecord) -> str:
    """Return a row for each tower that was copied."""
    rows = (
        f"| `{name}`, which text alone does not run | {size:,} bytes, copied unchanged |\n"
        for name, size in record.towers.items()
    )
    return "".join(rows)


def _kept_row(record: RunRecord) -> str:
    """Return the row about weights of the blocks that stay dense, empty without any."""
    kept = record.kept_dense
    if kept is None:
        return ""
    names = ", ".join(f"`{name}` ({weight.reason})" for name, weight in kept.weights.items())
    return f"| weights of the blocks that stay dense | {kept.bytes:,} bytes ({kept.share:.2%}): {names} |\n"


def _unread_row(record: RunRecord) -> str:
    """Return the row about tensors that no module reads, empty without any."""
    unread = record.unread
    if unread is None:
        return ""
    names = ", ".join(f"`{name}`" for name in unread.groups)
    way = f"{unread.bytes:,} bytes, {'copied unchanged' if unread.kept else 'left out'}"
    return f"| tensors of the file without a place in the model | {unread.tensors} ({way}): {names} |\n"


def _hub_source(folder: str) -> tuple[str | None, str]:
    """Return hub id and revision of a folder in the hub's cache (models--org--name/snapshots/revision), or None, ""."""
    *_, cached, snapshots, revision = ("", "", *Path(folder).parts)
    kind, *name = cached.split("--")
    return ("/".join(name), revision) if kind == "models" and name and snapshots == "snapshots" else (None, "")


def _coded(result: ResultRecord) -> int:
    """Return how many matrices are stored as nonzeros whose values are codes."""
    from niwaki.formats.sparse import CODES  # torch: a card that cannot be written is refused before

    return sum(count for kind, count in result.sparse_values.items() if kind in CODES)


def _kinds(result: ResultRecord) -> list[str]:
    coded = _coded(result)
    quantized = result.packed > sum(result.sparse.values()) or coded > 0
    return ["quantized"] * quantized + ["pruned"] * (coded > 0 or not quantized)


def _storage_fields(record: RunRecord) -> dict[str, Any]:
    """Return the fields that a text about the files may name."""
    left = "codes of the weights that are left" if _coded(record.result) else "weights that are left"
    fields = record.result.dump() | {"removed": record.shaping.removed_frac if record.shaping else 0, "left": left}
    return fields if record.export is None else fields | record.export.dump()


def _storage_text(record: RunRecord) -> str:
    """Return the text about the files of a result that is not exported."""
    result, shaping = record.result, record.shaping
    if result.predictor is not None:
        return _CONTEXTUAL
    if result.packed:
        return _PACKED if result.packed > sum(result.sparse.values()) else _SPARSE
    if shaping is None or shaping.shape is None or not shaping.cut:
        return _DENSE
    return _WIDTHS if isinstance(shaping.shape.neurons, list) else _SMALLER


def _made_with(record: RunRecord | RecoveryRecord) -> list[str]:
    """Return the command line, or the recipe of a call from Python, without the folders of the machine it ran on.

    The lines of the runs that made the source come first.
    """
    before = record.earlier if isinstance(record, RunRecord) else []
    return [line for run in (*before, record) for line in _own_command(run)]


def _own_command(record: RunRecord | RecoveryRecord) -> list[str]:
    program, *arguments = record.command
    if Path(program).stem in ("niwaki", "cli") and arguments:
        command = [shlex.join(["niwaki", *map(without_folders, arguments)])]
    elif isinstance(record, RecoveryRecord):
        command = yaml.safe_dump({"recover": record.recover}, sort_keys=False).splitlines()
    else:
        recipe = record.recipe.model_dump(mode="json")
        files = [without_folders(file) for file in record.recipe.calibration.files]
        given = {**recipe["calibration"], "files": files}
        command = yaml.safe_dump({**recipe, "calibration": given}, sort_keys=False).splitlines()
    return command if record.export is None else [*command, _export_command(record.export)]


def _export_command(exported: ExportRecord) -> str:
    chosen = "" if exported.type is None else f" --type {exported.type}"
    return f"niwaki export OUT DEST --to {exported.to}{chosen}"


def without_folders(argument: str) -> str:
    """Return the last component of a path; hub names (org/name) and everything else stay as they are."""
    flag, sign, value = argument.partition("=") if argument.startswith("-") else ("", "", argument)
    path = Path(value).expanduser()
    hub_name = value.count("/") == 1 and not value.startswith((".", "/", "~")) and not path.parent.is_dir()
    return flag + sign + (value if hub_name else path.name or value)
