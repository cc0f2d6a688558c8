"""Files of weights of a model folder: which ones it has, their headers, and what is refused about them.

transformers and niwaki must take the same files, so a folder in which they would differ is refused. Examples are a
`model.safetensors` beside an index of other files, and a tensor in two shards. An index may also name another shard
than the one with the tensor. A link may only lead to a file of the same folder, or in the cache of the hub to a blob.

    tensors = read_headers(Path("MODEL"))
    tensors["model.norm.weight"].shard
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from niwaki.errors import CheckpointError
from niwaki.model.files import require_content

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SUFFIX = ".safetensors"
UNREAD = "unread-"  # first part of the names of files with tensors that no model reads
LENGTH_BYTES = 8  # of the header of a safetensors file, little-endian
_PICKLES = {".bin", ".pt", ".pth", ".pkl"}


@dataclass(frozen=True)
class TensorInfo:
    """Header of a tensor: its shard, dtype and shape. `nbytes` counts its stored bytes, which begin at `begin`."""

    shard: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    begin: int = 0


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file of a model folder. Raises CheckpointError with one line for anything else."""
    require_content(path, CheckpointError)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)[:160]
        raise CheckpointError(f"{path} cannot be used ({reason}): download it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object: download it again")
    return content


def read_headers(folder: Path, named: object = None, linked_to: Path | None = None) -> dict[str, TensorInfo]:
    """Return the headers of all tensors of a folder by name.

    `named`: the file of weights that config.json names (`transformers_weights`), if it does. Raises CheckpointError for
    a folder that has no weights, whose files disagree, or of which transformers would read another file.
    """
    weight_map = _read_index(folder / INDEX) if (folder / INDEX).is_file() else None
    single = (folder / SINGLE).is_file()
    shards = [SINGLE] if weight_map is None else sorted(set(weight_map.values()))
    if weight_map is None and not single:
        _refuse_without_weights(folder)
    for path in (folder / shard for shard in shards):
        if not path.is_file():
            raise CheckpointError(f"{folder} misses the shard {path.name} that its index lists")
    # transformers reads SINGLE alone if it is there. Files of UNREAD hold nothing that it would read.
    other = next((shard for shard in shards if shard != SINGLE and not shard.startswith(UNREAD)), None)
    if single and (SINGLE not in shards or other):
        raise CheckpointError(
            f"{folder} holds {SINGLE} and an index of other files ({other or shards[0]}): transformers reads the "
            f"first, other readers the index; remove {SINGLE} or {INDEX}"
        )
    if named is not None and named != (SINGLE if single else INDEX):
        raise CheckpointError(
            f"{folder}/config.json names other weights (transformers_weights: {named!r:.80}) than {shards[0]}: remove "
            "the field, or the files that it does not name"
        )
    tensors: dict[str, TensorInfo] = {}
    for shard in shards:
        check_link(folder, folder / shard, linked_to)
        header = read_header(folder / shard)
        if twice := sorted(header.keys() & tensors.keys()):
            name = twice[0]
            raise CheckpointError(
                f"{folder}: {name} is in {tensors[name].shard} and in {shard}, and readers take either: "
                "download the model again"
            )
        tensors |= header
    for name, shard in (weight_map or {}).items():
        if name not in tensors:
            raise CheckpointError(f"{folder}: the index lists {name}, but no shard holds it")
        if tensors[name].shard != shard:
            raise CheckpointError(
                f"{folder}: the index lists {name} in {shard}, but {tensors[name].shard} holds it: download the index "
                "again"
            )
    return tensors


def check_link(folder: Path, path: Path, also: Path | None = None) -> None:
    """Raise CheckpointError if a file of `folder` is a link that leads out of it, and out of `also`.

    In the cache of the hub, `snapshots/REVISION/FILE` links to `blobs/HASH` of the same repository.
    """
    if not path.is_symlink():
        return
    target, home = path.resolve(), folder.resolve()
    allowed = [home, *([also.resolve()] if also else [])]
    allowed += [place.parent.parent / "blobs" for place in allowed if place.parent.name == "snapshots"]
    if not any(place in target.parents for place in allowed):
        raise CheckpointError(
            f"{path} is a link out of its folder ({target}): a model is read from its own folder alone; copy the file "
            "there, or give the folder that holds it"
        )


def hub_commit(folder: Path) -> dict[str, str]:
    """Return {"hub_id": ORG/NAME, "revision": commit} of a folder in the cache of the hub, {} for another folder."""
    *_, repository, snapshots, commit = ("", "", "", *folder.resolve().parts)
    kind, *name = repository.split("--")
    if snapshots != "snapshots" or kind != "models" or not name:
        return {}
    return {"hub_id": "/".join(name), "revision": commit}


def _read_index(path: Path) -> dict[str, str]:
    """Return the shard of every tensor that an index lists."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, Mapping) or not weight_map:
        raise CheckpointError(f"{path} is not a shard index: expected an object with weight_map")
    for name, shard in weight_map.items():
        if not isinstance(shard, str):
            raise CheckpointError(f"{path}: {name} has the shard {shard!r:.80}: expected a file name")
        if Path(shard).name != shard or not shard.endswith(SUFFIX) or "\0" in shard:
            raise CheckpointError(f"{path} names the shard {shard!r}: expected a plain .safetensors file name")
    return dict(weight_map)


def _refuse_without_weights(folder: Path) -> None:
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
    if pickles:
        raise CheckpointError(
            f"{folder} holds only pickled weights ({pickles[0]}), which can run code and are never loaded: "
            "convert them to safetensors (save_pretrained does it)"
        )
    raise CheckpointError(f"{folder} has no {SINGLE} and no {INDEX}")


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Return the headers of the tensors of one file. Raises CheckpointError if it is not complete."""
    try:
        require_content(path, CheckpointError)
        safe_open(path, framework="np").__exit__(None, None, None)  # checks the header and the length, without torch
        with path.open("rb") as file:
            length = int.from_bytes(file.read(LENGTH_BYTES), "little")
            header: dict[str, Any] = json.loads(file.read(length))
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a complete safetensors file ({error})") from error
    found = {}
    for name in sorted(header.keys() - {"__metadata__"}):
        begin, end = (LENGTH_BYTES + length + offset for offset in header[name]["data_offsets"])
        found[name] = TensorInfo(path.name, header[name]["dtype"], tuple(header[name]["shape"]), end - begin, begin)
    return found


def numbered(names: Sequence[str]) -> int:
    """Return the length of the longest numbered list among names of tensors, such as the blocks of a decoder."""
    return max(map(len, numbered_lists(names).values()), default=0)


def numbered_lists(names: Iterable[str]) -> dict[str, set[str]]:
    """Return the numbers of every numbered list among names of tensors, by the name before the number."""
    lists: dict[str, set[str]] = {}
    for name in names:
        parts = name.split(".")
        for place, part in enumerate(parts):
            if part.isdecimal():
                lists.setdefault(".".join(parts[:place]), set()).add(part)
    return lists
