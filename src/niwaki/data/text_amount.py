"""Amount of text that a calibration takes and its files hold, as far as that can be told before torch is loaded.

transformers takes seconds to load, and its tokenizer with it. The tokens of a small text are counted here by the
package tokenizers alone. A large one holds at most a few tokens for each of its bytes. Both only refuse what is
certainly too little. A text that passes is counted again by the tokenizer of the model (`data.texts`).

    check_amount(calibration, read_json(folder / "config.json"), folder)
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from niwaki.config.events import Event, Report, silent
from niwaki.config.recipe import Calibration
from niwaki.config.sources import SELF, SUFFIXES, parse_mix
from niwaki.data.chat import NO_TOKENIZER
from niwaki.data.documents import DIALOGUES, Documents
from niwaki.errors import CalibrationError

POSITIONS = "max_position_embeddings"
COUNTED_BYTES = 2**20  # of text, which takes half a second
BYTE_TOKENS = 2  # of one byte, at most: a normalizer may write more characters than it reads
MARGIN = 1.25  # of a count: the class of a tokenizer may split a text differently from its file
BYTE_LEVEL_MARGIN = 1.02  # of one that splits bytes
BEGINNING = 4  # tokens that may begin every window
LEAST_POSITIONS = 512  # of a model that does not say how many it has
_POSITIONS = re.compile(r"\w*(position|ctx|seq|context|max_len)\w*")


def split_windows(given: Calibration) -> dict[tuple[str, ...], int]:
    """Return the windows that each source of a calibration gives: the entries of a mix, then all files together.

    No files stand for the model itself. Raises CalibrationError for fewer windows than a mix has sources.
    """
    shares = parse_mix(given.mix, given.files)
    left: int = given.samples
    found: dict[tuple[str, ...], int] = {}
    for source, share in shares.items():
        count = min(left, max(1, round(share * given.samples)))
        if not count:
            raise CalibrationError(f"{given.samples} windows are too few for the mix {', '.join(given.mix)}")
        left -= count
        found[(source,)] = count
    if left or not shares:
        found[given.files] = left
    return found


def fit_seq_len(seq_len: int, default: int, positions: int | None, whose: str, report: Report = silent) -> int:
    """Return the length of windows that fits the `positions` of a model (None: any length).

    The `default` is lowered to the positions, with a warning. Raises CalibrationError for another length that is too
    long.
    """
    if positions is None or seq_len <= positions:
        return seq_len
    if seq_len != default:
        raise CalibrationError(
            f"seq_len {seq_len} is longer than the {positions} positions of {whose}: pass --seq-len {positions} or less"
        )
    message = f"windows of {positions} tokens: the default of {default} is longer than the positions of {whose}"
    report(Event.WARNING, message=message)
    return positions


def check_amount(given: Calibration, config: Mapping[str, Any], folder: Path) -> None:
    """Raise CalibrationError if files of a calibration certainly hold less than it takes, or no text at all.

    `config` is the content of config.json in the `folder` of the model.
    """
    if not (given.files or given.mix):
        return
    seq_len = least_seq_len(given.seq_len, config)
    for files, windows in split_windows(given).items():
        if files not in ((), (SELF,)):
            _check_files(files, given.field, windows, seq_len, folder)


def least_seq_len(seq_len: int, config: Mapping[str, Any]) -> int:
    """Return the tokens of a window, or fewer where config.json does not say how long a window can be."""
    default = Calibration().seq_len
    text = config.get("text_config")
    parts = [config, *([text] if isinstance(text, Mapping) else [])]
    whole = {name: value for part in parts for name, value in part.items() if type(value) is int and value > 0}
    if POSITIONS in whole:
        return fit_seq_len(seq_len, default, whole[POSITIONS], "the model")
    if seq_len != default:
        return seq_len
    return min([seq_len, *([v for name, v in whole.items() if _POSITIONS.fullmatch(name)] or [LEAST_POSITIONS])])


def _check_files(files: Sequence[str], field: str, windows: int, seq_len: int, folder: Path) -> None:
    """Raise CalibrationError if text files certainly hold less than these windows."""
    paths = [Path(file) for file in files]
    if not all(path.is_file() and path.suffix.lower() in SUFFIXES for path in paths):
        return  # a data set, whose size is not known here
    needed = windows * max(seq_len - BEGINNING, 1)
    nbytes = sum(path.stat().st_size for path in paths)
    text = f"{windows} windows × {seq_len} need {windows * seq_len:,}: add text, or lower --samples or --seq-len"
    if any(path.suffix.lower() == ".parquet" for path in paths):
        return  # compressed
    if nbytes > COUNTED_BYTES:
        if needed > BYTE_TOKENS * nbytes and not any(map(_may_hold_dialogues, paths)):
            raise CalibrationError(f"calibration holds at most {BYTE_TOKENS * nbytes:,} tokens, {text}")
        return
    if (tokenizer := _tokenizer(folder)) is None:
        return  # its loader says what is wrong
    documents, count, held = Documents(files, field), 0, 0
    try:
        for document in documents:
            count += 1
            held += len(tokenizer.encode(document.text, add_special_tokens=False).ids) + 1  # and an end token
            if held >= needed:
                return
    except CalibrationError as error:
        if NO_TOKENIZER in str(error):
            return  # the chat template decides
        raise
    if any(NO_TOKENIZER in reasons for reasons in documents.skipped.values()):
        return
    margin = BYTE_LEVEL_MARGIN if "ByteLevel" in str(tokenizer.pre_tokenizer) else MARGIN
    if needed > held * margin:
        raise CalibrationError(f"calibration holds {held:,} tokens in {count} documents, {text}")


def _tokenizer(folder: Path) -> Any:
    """Return the tokenizer of the file tokenizer.json, None if there is none that can be read."""
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception:  # the package raises no narrower one; the loader of transformers says what is wrong
        return None


def _may_hold_dialogues(path: Path) -> bool:
    """Return whether a file names dialogues near its beginning: a template may write more than they hold."""
    with path.open("rb") as file:
        head = file.read(2**16)
    return any(f'"{name}"'.encode() in head for name in DIALOGUES)
