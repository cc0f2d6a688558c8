"""Whether the weights of a result are those that niwaki wrote: their SHA-256 against the one in run.json.

safetensors notices a file that is cut or whose header is broken, but not a weight that changed.

    checked = check_weights(Path("OUT"))

Cost: every byte is read and hashed once, files beside each other: about 1.5 GB/s a core.
"""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from niwaki.compression.run import RECORD
from niwaki.errors import CheckpointError
from niwaki.model.files import file_sha256
from niwaki.runtime.contextual.record import TENSORS


def check_weights(folder: Path) -> int | None:
    """Bytes that were compared with run.json; None for a model that niwaki did not make, of which nothing is known.

    Raises CheckpointError naming the first file that is missing, changed, or not in run.json.
    """
    path = folder / RECORD / "run.json"
    if not path.is_file():
        return None
    known = _hashes(path)
    there = {file.name for file in folder.glob("*.safetensors")}
    if (folder / TENSORS).is_file():
        there.add(TENSORS)
    if unknown := sorted(there - known.keys()):
        raise CheckpointError(f"{folder / unknown[0]}: {path} holds no SHA-256 of it: expected the files of one run")
    if missing := sorted(known.keys() - there):
        raise CheckpointError(f"{folder} misses {missing[0]}, which {path} names: copy the whole folder again")
    files = {name: folder / name for name in sorted(there)}
    with ThreadPoolExecutor(min(os.cpu_count() or 1, len(files) or 1)) as pool:
        for name, found in zip(files, pool.map(file_sha256, files.values()), strict=True):
            if found != known[name]:
                raise CheckpointError(
                    f"{folder / name} is not the file that niwaki wrote: expected SHA-256 {known[name][:12]}…, got "
                    f"{found[:12]}…; copy it again, or compress again"
                )
    return sum(file.stat().st_size for file in files.values())


def _hashes(path: Path) -> dict[str, str]:
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return dict(record["export" if "export" in record else "result"]["sha256"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} names no SHA-256 of the weights: expected what niwaki wrote") from error
