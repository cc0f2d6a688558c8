"""What a comparison is given: checked before anything runs, and the prompts that are continued.

prompts.txt                 a prompt a line
prompts.jsonl               {"prompt": text} a line
"""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from niwaki.config.sources import check_sources
from niwaki.data.texts import load_tokenizer
from niwaki.errors import CalibrationError, InputError
from niwaki.measure.compare.scoring import Material
from niwaki.measure.schema import Settings
from niwaki.model.decoder import Decoder

PROMPTS, FIRST_TOKENS = 5, 32  # without a file: so many documents, continued behind so many tokens
_SAMPLE = "The quick brown fox, 1234 + 5678 = déjà vu? 日本語\n\tdef f(x): return x"


def check_sources_of(
    candidates: Sequence[str], data: Sequence[str], tasks: Sequence[str], *, rounds: int, **counts: int | None
) -> None:
    """Refuses what can be refused without reading a model."""
    if not candidates:
        raise InputError("nothing to compare: give at least one candidate beside the dense model")
    if len(set(candidates)) < len(candidates):
        raise InputError("a candidate is given twice: every folder once")
    if not data and not tasks:
        raise InputError("nothing to compare on: give --data FILE or --tasks FILE")
    for files, option in ((data, "--data"), (tasks, "--tasks")):
        if len(set(files)) < len(files):
            raise InputError(f"{option}: a file is given twice")
    least = {"seq_len": 4, "max_tokens": 4, "limit": 1}
    for name, value in [*counts.items()]:
        if value is not None and value < least[name]:
            raise InputError(f"{name} must be at least {least[name]}, got {value}")
    if rounds < 0:
        raise InputError(f"rounds must be at least 0, got {rounds}")
    check_sources(data)


def same_tokenizer(folders: Sequence[Path]) -> Any:
    """The tokenizer of all models. Raises InputError where one cuts text otherwise: nothing would be paired."""
    first, *others = (load_tokenizer(folder) for folder in folders)
    for folder, other in zip(folders[1:], others, strict=True):
        differs = [
            what
            for what, same in (
                ("vocabulary", other.get_vocab() == first.get_vocab()),
                ("end token", other.eos_token_id == first.eos_token_id),
                ("cutting", _cut(other) == _cut(first)),
            )
            if not same
        ]
        if differs:
            raise InputError(
                f"{folder} has another tokenizer than {folders[0]} (its {differs[0]} differs): "
                "tokens of one cannot be paired with those of the other; compare models of one family"
            )
    return first


def command_of(sources: Sequence[str], settings: Settings, *, gate: object, report: object, lang: str) -> str:
    """The command line that repeats a comparison and its report, every setting resolved."""
    named = {"gate": gate, "report": report, "lang": lang if report else None, **settings.model_dump()}
    words = ["niwaki", "compare", *sources]
    for name, value in named.items():
        for one in value if isinstance(value, tuple) else [] if value is None else [value]:
            words += [f"--{name.replace('_', '-')}", str(one)]
    return shlex.join(words)


def read_prompts(settings: Settings, tokenizer: Any, decoders: Sequence[Decoder]) -> list[list[int]]:
    """The prompts of the file, if one is given. Raises CalibrationError naming the line that is none, or too long."""
    if settings.prompts is None:
        return []
    path = Path(settings.prompts)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"cannot read the prompts {path}: {error}") from error
    room = min((d.positions for d in decoders if d.positions is not None), default=None)
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        text = _prompt_of(line, f"{path}:{number}") if path.suffix == ".jsonl" else line
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if room is not None and len(ids) + settings.new_tokens > room:
            raise CalibrationError(
                f"{path}:{number}: {len(ids)} tokens and {settings.new_tokens} new ones exceed the {room} positions"
            )
        found.append(ids)
    if not found:
        raise CalibrationError(f"{path} holds no prompts: expected one a line")
    return found


def first_prompts(material: Material, tokenizer: Any, settings: Settings) -> list[list[int]]:
    """The first tokens of the first documents, or contexts of the first questions where there is no text."""
    found: list[list[int]] = []
    tokens = min(FIRST_TOKENS, settings.prompt_tokens)
    for text in material.texts[:1]:
        ids, owners = text.ids_ST.flatten().tolist(), text.owners_ST.flatten().tolist()
        starts = [place for place, owner in enumerate(owners) if place == 0 or owners[place - 1] != owner]
        for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
            found.append(ids[start : min(end, start + tokens)])
    for items in material.items.values():
        contexts = dict.fromkeys(item.pairs[item.gold][0] for item in items)
        cut = (tokenizer(one, add_special_tokens=False, verbose=False)["input_ids"] for one in contexts if one)
        found += [ids[-tokens:] for ids in cut] if not found else []
    return found[:PROMPTS]


def speed_prompt(material: Material, tokenizer: Any, tokens: int) -> list[int]:
    """The first tokens of what is given, from the beginning again if it is short."""
    ids = [token for text in material.texts for token in text.ids_ST.flatten()[:tokens].tolist()]
    for items in material.items.values():
        for item in items[:tokens]:
            ids += tokenizer("".join(item.pairs[0]), add_special_tokens=False, verbose=False)["input_ids"]
    return (ids * (tokens // len(ids) + 1))[:tokens]


def _cut(tokenizer: Any) -> list[int]:
    found: list[int] = tokenizer(_SAMPLE, add_special_tokens=False)["input_ids"]
    return found


def _prompt_of(line: str, where: str) -> str:
    try:
        row = json.loads(line)
        if isinstance(row["prompt"], str) and row["prompt"]:
            return str(row["prompt"])
    except (ValueError, KeyError, TypeError):
        pass
    raise CalibrationError(f'{where}: expected {{"prompt": text}}')
