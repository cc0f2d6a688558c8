"""Where models, texts and questions may come from: what can only be a mistake is refused before anything is read.

Needs neither torch nor transformers, so that a misspelt path is refused at once.

    check_sources(["mine.jsonl"])
    model_folder("MODEL")
"""

from collections.abc import Sequence
from pathlib import Path

from niwaki.errors import CalibrationError, CheckpointError

SUFFIXES = (".txt", ".jsonl", ".parquet")


def model_folder(model: str) -> Path | None:
    """The local folder of a model, None for what can only be a hub id. Raises CheckpointError for neither."""
    path = Path(model).expanduser()
    if not path.is_dir():
        if path.exists() or model.startswith((".", "/", "~")) or model.count("/") != 1:
            raise CheckpointError(f"no model folder at {model}: expected a local folder or a hub id such as org/name")
        return None
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path} has no config.json: expected a Hugging Face model folder")
    return path


def check_sources(sources: Sequence[str]) -> None:
    """Refuses, without reading or fetching anything, the sources that cannot be texts."""
    for source in sources:
        path = Path(source)
        if path.is_dir() or (path.is_file() and path.suffix.lower() in SUFFIXES):
            continue
        if path.exists():
            raise CalibrationError(f"{source} is no text file: expected {', '.join(SUFFIXES)}")
        # What is left can only be the name of a data set: at most org/name, never a path.
        if path.suffix.lower() in SUFFIXES or source.startswith((".", "/", "~")) or source.count("/") > 1:
            raise CalibrationError(f"no such text file: {source}")


def check_tasks(files: Sequence[str]) -> None:
    """Refuses task files that are not there."""
    for file in files:
        if not Path(file).is_file():
            raise CalibrationError(f"no such task file: {file}")
