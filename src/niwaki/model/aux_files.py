"""Files beside the weights that a result copies unchanged.

They are configs, tokenizer, processor, chat templates, licences and usage policies, and the code that an `auto_map`
names. niwaki never runs that code. Weights, adapters, hidden files, records of niwaki and the card of the source are
not copied.

    for path in aux_files(Path("MODEL")): ...
"""

import ast
import json
import re
from collections.abc import Callable
from pathlib import Path

TEMPLATES = "additional_chat_templates"
SUFFIXES = {".json", ".txt", ".model", ".jinja", ".tiktoken", ".md"}
_ESCAPED = re.compile(rb"\\u00(5f|6[1df]|7[045])", re.IGNORECASE)  # a letter of "auto_map", which could hide it
STEMS = ("LICENSE", "LICENCE", "COPYING", "NOTICE", "USE_POLICY", "USAGE_POLICY")


def aux_files(folder: Path, check: Callable[[Path], object] | None = None) -> list[Path]:
    """Return the files of a model that a result copies, in order. `check` sees every file before it is read."""
    found = [path for path in folder.iterdir() if path.is_file() and _is_copied(path.name)]
    return sorted([*found, *(folder / TEMPLATES).glob("*.jinja"), *_code_files(folder, check or Path)])


def _is_copied(name: str) -> bool:
    """Return whether a result copies a file of this name: no weights, adapters, hidden files, or card of the source."""
    upper = name.upper()
    if name.startswith((".", "adapter_")) or name.endswith(".index.json") or upper.startswith("README"):
        return False
    return Path(name).suffix.lower() in SUFFIXES or upper.startswith(STEMS)


def _code_files(folder: Path, check: Callable[[Path], object]) -> list[Path]:
    """Return the Python files that an `auto_map` in `folder` names, and those of the folder that they import."""
    wanted: list[str] = []
    for path in folder.glob("*.json"):
        check(path)
        try:
            written = path.read_bytes()
            if b"auto_map" not in written and not _ESCAPED.search(written):
                continue
            content = json.loads(written.decode("utf-8"))
        except (OSError, ValueError, RecursionError):
            continue  # its reader says what is wrong
        named = content.get("auto_map") if isinstance(content, dict) else None
        values = named.values() if isinstance(named, dict) else [named]
        texts = [one for given in values for one in (given if isinstance(given, list) else [given])]
        # A name with `--` lies in another repository.
        wanted += [text.partition(".")[0] for text in texts if isinstance(text, str) and "--" not in text]
    found: dict[str, Path] = {}
    while wanted:
        name = wanted.pop()
        path = folder / f"{name}.py"
        if name.isidentifier() and name not in found and path.is_file():
            found[name] = path
            check(path)
            wanted += _relative_imports(path)
    return list(found.values())


def _relative_imports(path: Path) -> list[str]:
    """Return the modules of its own folder that a Python file imports. The file is parsed, and not run."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (ValueError, SyntaxError, RecursionError, MemoryError):  # the parser has limits
        return []
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 1]
    return [name for node in imports for name in ([node.module] if node.module else [one.name for one in node.names])]
