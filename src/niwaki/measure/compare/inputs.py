"""Inputs of a comparison: early checks, the common tokenizer, the command line and the prompts to continue.

prompts.txt                 one prompt per line
prompts.jsonl               {"prompt": text} per line
"""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from niwaki.config.sources import check_sources
from niwaki.data.bos import Bos, find_bos
from niwaki.data.chat import RowError, require_unicode
from niwaki.data.text_files import text_lines
from niwaki.data.texts import load_tokenizer
from niwaki.errors import CalibrationError, InputError
from niwaki.measure.compare.scoring import EvaluationInputs
from niwaki.measure.evaluate.tasks import check_shots
from niwaki.measure.schema import ComparisonSettings
from niwaki.model.decoder import Decoder

DEFAULT_PROMPTS, DEFAULT_PROMPT_TOKENS = 5, 32  # without a file of prompts: documents, and tokens of each
_SAMPLE = "The quick brown fox, 1234 + 5678 = déjà vu? 日本語\n\tdef f(x): return x"


def check_inputs(
    candidates: Sequence[str],
    data: Sequence[str],
    tasks: Sequence[str],
    *,
    rounds: int,
    shots: int,
    **counts: int | None,
) -> None:
    """Check the inputs as far as no model is needed. Raises InputError for the first fault."""
    if not candidates:
        raise InputError("nothing to compare: give at least one candidate after the dense model")
    if len(set(candidates)) < len(candidates):
        raise InputError("a candidate is given twice: give every folder once")
    if not data and not tasks:
        raise InputError("nothing to compare on: give --data FILE or --tasks FILE")
    for files, option in ((data, "--data"), (tasks, "--tasks")):
        if len(set(files)) < len(files):
            raise InputError(f"{option}: a file is given twice")
    min_counts = {"seq_len": 4, "max_tokens": 4, "limit": 1}
    for name, value in counts.items():
        if value is not None and value < min_counts[name]:
            raise InputError(f"{name} must be at least {min_counts[name]}, got {value}")
    check_shots(shots, tasks)
    if rounds < 0:
        raise InputError(f"rounds must be at least 0, got {rounds}")
    check_sources(data)


def shared_tokenizer(folders: Sequence[Path]) -> Any:
    """Return the tokenizer of all models. Raises InputError if one differs: its tokens could not be paired."""
    first, *others = (load_tokenizer(folder) for folder in folders)
    for folder, other in zip(folders[1:], others, strict=True):
        differs = [
            what
            for what, same in (
                ("vocabulary", other.get_vocab() == first.get_vocab()),
                ("end token", other.eos_token_id == first.eos_token_id),
                ("tokenization", _sample_ids(other) == _sample_ids(first)),
            )
            if not same
        ]
        if differs:
            raise InputError(
                f"{folder} has another tokenizer than {folders[0]} (its {differs[0]} differs): "
                "their tokens cannot be paired; compare models of one family"
            )
    return first


def command_line(
    sources: Sequence[str], settings: ComparisonSettings, *, gate: object, report: object, lang: str
) -> str:
    """Return the command line that repeats a comparison and its report, with every setting resolved."""
    named = {"gate": gate, "report": report, "lang": lang if report else None, **settings.model_dump()}
    words = ["niwaki", "compare", *sources]
    for name, value in named.items():
        for one in value if isinstance(value, tuple) else [] if value is None else [value]:
            words += [f"--{name.replace('_', '-')}", str(one)]
    return shlex.join(words)


def read_prompts(settings: ComparisonSettings, tokenizer: Any, decoders: Sequence[Decoder]) -> list[list[int]]:
    """Return the prompts of the file, [] if no file is given.

    Raises CalibrationError with the number of a line that is not a prompt or is too long.
    """
    if settings.prompts is None:
        return []
    path = Path(settings.prompts)
    if not path.is_file():
        raise CalibrationError(f"cannot read the prompts {path}: no such file")
    positions = min((d.positions for d in decoders if d.positions is not None), default=None)
    prompts, bos = [], find_bos(tokenizer, settings.bos)
    for number, line in text_lines(path):
        text = _prompt_of(line, f"{path}:{number}") if path.suffix.lower() == ".jsonl" else line
        ids = bos.encode(tokenizer, text)
        if positions is not None and len(ids) + settings.new_tokens > positions:
            raise CalibrationError(
                f"{path}:{number}: {len(ids)} tokens and {settings.new_tokens} new ones exceed the {positions} "
                "positions"
            )
        prompts.append(ids)
    if not prompts:
        raise CalibrationError(f"{path} holds no prompts: expected one per line")
    return prompts


def first_prompts(inputs: EvaluationInputs, tokenizer: Any, settings: ComparisonSettings) -> list[list[int]]:
    """Return the first tokens of the first documents. Without texts, return the ends of the first contexts."""
    prompts: list[list[int]] = []
    bos = find_bos(tokenizer, settings.bos)
    begin = len(bos.ids)
    tokens = max(min(DEFAULT_PROMPT_TOKENS, settings.prompt_tokens) - begin, 1)
    for text in inputs.texts[:1]:
        ids, owners = (part_ST[:, begin:].flatten().tolist() for part_ST in (text.ids_ST, text.owners_ST))
        starts = [place for place, owner in enumerate(owners) if place == 0 or owners[place - 1] != owner]
        for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
            prompts.append(bos.begin(ids[start : min(end, start + tokens)]))
    for items in inputs.items.values():
        contexts = dict.fromkeys(item.pairs[item.gold][0] for item in items)
        tokenized = (tokenizer(one, add_special_tokens=False, verbose=False)["input_ids"] for one in contexts if one)
        prompts += [bos.begin(bos.strip(ids)[-tokens:]) for ids in tokenized] if not prompts else []
    return prompts[:DEFAULT_PROMPTS]


def speed_prompt(inputs: EvaluationInputs, tokenizer: Any, bos: Bos, tokens: int) -> list[int]:
    """Return the first tokens of the inputs, repeated if there are too few."""
    ids = [token for text in inputs.texts for token in text.ids_ST.flatten()[:tokens].tolist()]
    for items in inputs.items.values():
        for item in items[:tokens]:
            ids += bos.encode(tokenizer, "".join(item.pairs[0]))
    return (ids * (tokens // len(ids) + 1))[:tokens]


def _sample_ids(tokenizer: Any) -> list[int]:
    ids: list[int] = tokenizer(_SAMPLE, add_special_tokens=False)["input_ids"]
    return ids


def _prompt_of(line: str, where: str) -> str:
    try:
        row = json.loads(line)
        if isinstance(row["prompt"], str) and row["prompt"]:
            require_unicode(row["prompt"])
            return str(row["prompt"])
    except RowError as error:
        raise CalibrationError(f"{where}: {error}") from error
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise CalibrationError(f'{where}: expected {{"prompt": text}}')
