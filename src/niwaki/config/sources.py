"""Sources of models, texts and tasks, and early refusal of mistakes before anything is read.

This module needs neither torch nor transformers, so a misspelt path is refused at once.

    check_sources(["mine.jsonl"])
    model_folder("MODEL")
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from niwaki.errors import CalibrationError, CheckpointError

GGUF = ".gguf"
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(@\w[\w./-]*)?")
SUFFIXES = (".txt", ".jsonl", ".parquet")
SELF = "self"  # source of text that the model writes itself
ADAPTER = "adapter_config.json"
LINEAGE = "niwaki/merged.json"  # of a model with an adapter merged into it
ROTATED = "niwaki/rotated.json"  # of a model in another basis


def model_folder(model: str) -> Path | None:
    """Return the local folder or GGUF file of a model, or None for a hub id.

    A folder with one GGUF file and no safetensors stands for the file. Raises CheckpointError for anything else.
    """
    path = Path(model).expanduser()
    if path.is_file() and path.suffix.lower() == GGUF:
        return path
    if not path.is_dir():
        if path.exists() or not _HUB_ID.fullmatch(model):
            raise CheckpointError(
                f"no model folder at {model}: expected a local folder, or a hub id such as org/name or "
                "org/name@REVISION (a branch, a tag or a commit)"
            )
        return None
    refuse_adapter(path)
    files = sorted(file for file in path.iterdir() if file.suffix.lower() == GGUF)
    if files and not any(path.glob("*.safetensors")):
        if len(files) > 1:
            raise CheckpointError(f"{path} holds {len(files)} GGUF files: name one, such as {files[0]}")
        return files[0]
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path} has no config.json: expected a Hugging Face model folder")
    return path


def refuse_adapter(folder: Path) -> None:
    """Raise CheckpointError for a folder with an adapter: transformers would apply it, and niwaki reads weights."""
    about = adapter_about(folder)
    if about is None:
        return
    kind = f"{about.get('peft_type', 'of unknown type')}, rank {about.get('r', 'unknown')}"
    way = f"merge it: `niwaki compress {folder} OUT --merge-adapter ...`"
    if holds_weights(folder):
        raise CheckpointError(
            f"{folder} holds an adapter ({ADAPTER}: {kind}) beside its weights: {way}, or move adapter_* out "
            "of the folder if the weights contain it already"
        )
    base = about.get("base_model_name_or_path")
    raise CheckpointError(
        f"{folder} is an adapter ({kind}) for the model {base or 'that its config does not name'} and holds no model "
        f"itself: {way}, or give the base model"
    )


def adapter_about(folder: Path) -> dict[str, Any] | None:
    """Return the adapter_config.json of a folder, None if there is none. Raises CheckpointError if it is not JSON."""
    path = folder / ADAPTER
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): repair it, or move it out of the folder") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object: repair it, or move it out of the folder")
    return content


def holds_weights(folder: Path) -> bool:
    """Return whether a folder holds weights of a model beside those of an adapter."""
    own = (path.name for path in folder.iterdir() if path.suffix in (".safetensors", ".bin"))
    return any(not name.startswith("adapter_") and name != "training_args.bin" for name in own)


def check_sources(sources: Sequence[str]) -> None:
    """Raise CalibrationError for a source that cannot be text. Nothing is read or fetched."""
    for source in sources:
        path = Path(source)
        if path.is_dir() or (path.is_file() and path.suffix.lower() in SUFFIXES):
            continue
        if path.exists():
            raise CalibrationError(f"{source} is not a text file: expected {', '.join(SUFFIXES)}")
        # What is left can only be the name of a data set: at most org/name, never a path.
        if path.suffix.lower() in SUFFIXES or source.startswith((".", "/", "~")) or source.count("/") > 1:
            raise CalibrationError(f"no such text file: {source}")


def parse_mix(entries: Sequence[str], files: Sequence[str]) -> Mapping[str, float]:
    """Return the share of the windows of each source of a mix; what is left is the share of `files`.

    An entry is `SOURCE:SHARE`, such as `self:0.5` or `c4:0.25`. The source is text, or `self`. Raises CalibrationError.
    """
    shares: dict[str, float] = {}
    for entry in entries:
        source, _, text = entry.rpartition(":")
        try:
            share = float(text)
        except ValueError:
            share = 0.0
        if not source or not 0 < share <= 1:
            raise CalibrationError(f"mix {entry!r}: expected SOURCE:SHARE with a share in (0, 1], such as {SELF}:0.5")
        if source in shares or source in files:
            raise CalibrationError(f"mix names {source} twice: expected every source of text once")
        shares[source] = share
    total = sum(shares.values())
    if total > 1 + 1e-9:
        raise CalibrationError(f"the shares of the mix add up to {total:g}: expected 1 at most")
    if not files and shares and total < 1 - 1e-9:
        raise CalibrationError(
            f"the shares of the mix add up to {total:g}, and there is no other text for the rest: give --calibration "
            "FILE, or shares that add up to 1"
        )
    if files and total > 1 - 1e-9:
        raise CalibrationError(f"the mix leaves no window for {files[0]}: expected shares that add up to less than 1")
    check_sources([source for source in shares if source != SELF])
    return shares


def check_held_out(source: str | None, files: Sequence[str]) -> None:
    """Raise CalibrationError for a held-out text that cannot be one, or that may share documents with `files`."""
    if source is None:
        return
    if source in files and len(files) > 1:
        raise CalibrationError(
            f"held_out {source} is one of {len(files)} calibration files, and their documents are mixed: give another "
            "text, or this file alone as calibration and the others in the mix"
        )
    check_sources([] if source == SELF else [source])


def check_tasks(files: Sequence[str]) -> None:
    """Raise CalibrationError for a task file that does not exist."""
    for file in files:
        if not Path(file).is_file():
            raise CalibrationError(f"no such task file: {file}")
