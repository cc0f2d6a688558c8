"""Sources of models, texts and tasks, and early refusal of mistakes before anything is read.

This module needs neither torch nor transformers, so a misspelt path is refused at once.

    check_sources(["mine.jsonl"])
    model_folder("MODEL")
"""

from collections.abc import Sequence
from pathlib import Path

from niwaki.errors import CalibrationError, CheckpointError

SUFFIXES = (".txt", ".jsonl", ".parquet")


def model_folder(model: str) -> Path | None:
    """Return the local folder of a model, or None for a hub id. Raises CheckpointError if it is neither."""
    path = Path(model).expanduser()
    if not path.is_dir():
        if path.exists() or model.startswith((".", "/", "~")) or model.count("/") != 1:
            raise CheckpointError(f"no model folder at {model}: expected a local folder or a hub id such as org/name")
        return None
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path} has no config.json: expected a Hugging Face model folder")
    return path


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


def check_tasks(files: Sequence[str]) -> None:
    """Raise CalibrationError for a task file that does not exist."""
    for file in files:
        if not Path(file).is_file():
            raise CalibrationError(f"no such task file: {file}")
