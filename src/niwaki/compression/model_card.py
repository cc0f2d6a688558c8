"""The model card of a result: what it is, what it cost, how to make it again."""

import shlex
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData

from niwaki.compression.run import shaping_of
from niwaki.config.recipe import asks_for_bits

# Between these lines `niwaki evaluate` and `niwaki compare --update-card` write their numbers (see `measured`).
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
| true bits a weight in embeddings and head | {ends} |
| bytes of the weight files | {bytes:,} (before: {bytes_before:,}) |
| calibration | {calibration} |
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
_EXPORTED = {
    "compressed-tensors": """{packed} of the matrices are stored as codes, in the format `{format}` of {to}, which
transformers reads after `pip install {to}`.""",
    "gguf": """One GGUF file with vocabulary ({format}), which llama.cpp runs: `llama-cli -m model.gguf`.""",
    "onnx": """An ONNX graph ({format}) from tokens and their mask to logits, with room for any batch and length and no
cache of keys and values: `onnxruntime.InferenceSession("model.onnx")`. The tokenizer lies beside it.""",
}
_PLAIN_BODY = """---
{metadata}
---

# {name}, {to}

`{name}` written by niwaki {version}: {bytes:,} bytes. {storage}

The full record is in `niwaki/run.json`.
"""


def export_card(record: dict[str, Any]) -> str:
    """The card of an export: that of the compression, or a short one for a model that niwaki did not compress."""
    if "recipe" in record:
        return model_card(record)
    found = record["export"]
    metadata = ModelCardData(
        library_name=_library(record), pipeline_tag="text-generation", tags=["niwaki", found["to"]]
    )
    return _PLAIN_BODY.format(
        metadata=metadata.to_yaml(),
        name=Path(record["model"]["source"]).name,
        to=found["to"],
        version=found["niwaki"],
        bytes=found["bytes"],
        storage=_EXPORTED[found["to"]].format_map(found),
    )


def _library(record: dict[str, Any]) -> str:
    to: str = record.get("export", {}).get("to", "")
    return to if to in ("gguf", "onnx") else "transformers"


def model_card(record: dict[str, Any]) -> str:
    """Markdown with YAML metadata, from the content of run.json."""
    recipe, calibration = record["recipe"], record["calibration"]
    exported = record.get("export")
    result = record["result"] | (exported or {})  # the bytes and bits of an export are its own
    source = Path(record["model"]["source"]).name
    hub_id, revision = _hub_source(record["model"]["source"])
    # eval_results stays empty on purpose: nothing was evaluated here.
    metadata = ModelCardData(
        base_model=hub_id,
        library_name=_library(record),
        pipeline_tag="text-generation",
        tags=["niwaki", *_kinds(result), recipe["method"]] + ([exported["to"]] if exported else []),
    )
    windows = calibration["windows"]
    target = recipe["target"] or f"{recipe['target_bytes']:,} bytes"
    kept = record.get("allocation", {}).get("kept_blocks")
    shaped = shaping_of(record)
    return _BODY.format(
        metadata=metadata.to_yaml(),
        name=f"{hub_id or source}, {recipe['method']} {target}",
        source=hub_id or source,
        base=f"`{source}`, a local folder"
        if hub_id is None
        else f"[{hub_id}](https://huggingface.co/{hub_id}) at `{revision}`",
        begin=BEGIN,
        end=END,
        unmeasured=UNMEASURED,
        version=record["niwaki"],
        method=recipe["method"],
        target=target + (f", blocks {', '.join(map(str, kept))} kept at 4 bits" if kept else ""),
        matrices=result["matrices"],
        zeros="" if asks_for_bits(record) else f"| measured zeros in them | {result['zeros_frac']:.4%} |\n",
        bits=result["bits"],
        ends=f"{result['ends_bits']:.3f}" if "ends_bits" in result else "as they were",
        storage=_storage(record).format_map(
            result
            | {"removed": shaped.get("removed_frac", 0)}
            | {"left": "codes of the weights that are left" if _coded(result) else "weights that are left"}
        ),
        bytes=result["bytes"],
        bytes_before=record["model"]["bytes"],
        calibration="none" if windows is None else f"{windows[0]} windows of {windows[1]} tokens",
        seed=recipe["seed"],
        seconds=record["seconds"],
        device=record["device"],
        command="\n    ".join(_made_with(record)),
    )


def _hub_source(folder: str) -> tuple[str | None, str]:
    """Hub id and revision of a folder in the hub's cache (models--org--name/snapshots/revision), None of others."""
    *_, cached, snapshots, revision = ("", "", *Path(folder).parts)
    kind, *name = cached.split("--")
    return ("/".join(name), revision) if kind == "models" and name and snapshots == "snapshots" else (None, "")


def _sparse(result: dict[str, Any]) -> int:
    """How many matrices are stored as nonzeros."""
    return sum(result.get("sparse", {}).values())


def _coded(result: dict[str, Any]) -> int:
    """How many of those hold codes."""
    from niwaki.formats.sparse import CODES  # torch: a card that cannot be written is refused before

    return sum(count for kind, count in result.get("sparse_values", {}).items() if kind in CODES)


def _kinds(result: dict[str, Any]) -> list[str]:
    sparse, coded = _sparse(result), _coded(result)
    quantized = result["packed"] > sparse or coded > 0
    return ["quantized"] * quantized + ["pruned"] * (coded > 0 or not quantized)


def _storage(record: dict[str, Any]) -> str:
    """What a reader has to know of the files."""
    if exported := record.get("export"):
        return _EXPORTED[exported["to"]]
    if "predictor" in record["result"]:
        return _CONTEXTUAL
    if packed := record["result"]["packed"]:
        return _PACKED if packed > _sparse(record["result"]) else _SPARSE
    shaped = shaping_of(record)
    if not shaped.get("cut"):
        return _DENSE
    even = not isinstance(shaped["shape"]["neurons"], list)
    return _SMALLER if even else _WIDTHS


def _made_with(record: dict[str, Any]) -> list[str]:
    """The command line, or the recipe of a call from Python, without the folders of the machine it ran on."""
    if exported := record.get("export"):
        compressed = {name: value for name, value in record.items() if name != "export"}
        return [*_made_with(compressed), _export_command(exported)]
    program, *arguments = record["command"]
    if Path(program).stem in ("niwaki", "cli") and arguments:
        return [shlex.join(["niwaki", *map(without_folders, arguments)])]
    recipe = record["recipe"]
    given = {**recipe["calibration"], "files": [without_folders(file) for file in recipe["calibration"]["files"]]}
    return yaml.safe_dump({**recipe, "calibration": given}, sort_keys=False).splitlines()


def _export_command(exported: dict[str, Any]) -> str:
    chosen = f" --type {exported['type']}" if "type" in exported else ""
    return f"niwaki export OUT DEST --to {exported['to']}{chosen}"


def without_folders(argument: str) -> str:
    """The last component of a path; hub names (org/name) and everything else stay as they are."""
    flag, sign, value = argument.partition("=") if argument.startswith("-") else ("", "", argument)
    path = Path(value).expanduser()
    hub_name = value.count("/") == 1 and not value.startswith((".", "/", "~")) and not path.parent.is_dir()
    return flag + sign + (value if hub_name else path.name or value)
