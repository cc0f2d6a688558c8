"""Audited texts as the `.jsonl` that `niwaki adapt --data` and `niwaki compare --data` read: one `text` a line.

export(store, Path("recent.jsonl"))
"""

import json
from pathlib import Path

from niwaki.errors import InputError, OutputError
from niwaki.model.files import write_text
from niwaki.rollout.store import Store


def export(store: Store, path: Path, *, overwrite: bool = False) -> int:
    """Writes prompt and answer of every audit with texts, oldest first; returns how many."""
    if path.exists() and not overwrite:
        raise OutputError(f"{path} already exists: choose another file, or replace it with --overwrite")
    if not path.absolute().parent.is_dir():
        raise OutputError(f"cannot write {path}: the folder {path.parent} does not exist")
    audits = store.audits(None)
    kept = [one for one in reversed(audits) if one["texts"]]
    if not kept:
        raise InputError(
            f"{len(audits)} audits, none with its text: texts are kept if the gateway runs with --keep-texts"
        )
    lines = [json.dumps({"text": one["texts"]["prompt"] + one["texts"]["answer"]}, ensure_ascii=False) for one in kept]
    write_text(path, "\n".join(lines) + "\n")
    return len(kept)
