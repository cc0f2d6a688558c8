"""Check of the weights of a result: their SHA-256 against that in run.json.

The safetensors format detects a truncated file and a broken header, but not a changed weight.

    checked = check_weights(Path("OUT"))

Cost: every byte is read and hashed once, several files in parallel, about 1.5 GB/s per core.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from niwaki.compression.run_record import RECORD, RUN, read_record
from niwaki.errors import CheckpointError
from niwaki.model.files import file_sha256
from niwaki.runtime.contextual.predictor_files import TENSORS


def check_weights(folder: Path) -> int | None:
    """Check all weight files; return their bytes, or None for a model that niwaki did not make.

    Raises CheckpointError with the first file that is missing, changed, or not in run.json.
    """
    record, path = read_record(folder), folder / RECORD / RUN
    if record is None:
        return None
    known = record.file_hashes
    if known is None:
        raise CheckpointError(f"{path} has no SHA-256 of the weights: expected the record that niwaki wrote")
    there = {file.name for file in folder.glob("*.safetensors")}
    if (folder / TENSORS).is_file():
        there.add(TENSORS)
    if unknown := sorted(there - known.keys()):
        raise CheckpointError(f"{folder / unknown[0]}: {path} has no SHA-256 of it: expected the files of one run")
    if missing := sorted(known.keys() - there):
        raise CheckpointError(f"{folder} misses {missing[0]}, which {path} names: copy the whole folder again")
    files = {name: folder / name for name in sorted(there)}
    with ThreadPoolExecutor(min(os.cpu_count() or 1, len(files) or 1)) as pool:
        for name, sha256 in zip(files, pool.map(file_sha256, files.values()), strict=True):
            if sha256 != known[name]:
                raise CheckpointError(
                    f"{folder / name} is not the file that niwaki wrote: expected SHA-256 {known[name][:12]}…, got "
                    f"{sha256[:12]}…; copy it again, or compress again"
                )
    return sum(file.stat().st_size for file in files.values())
