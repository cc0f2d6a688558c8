"""Tensors of a checkpoint that its model has no place for, and how a result keeps them.

Examples are layers beyond `num_hidden_layers`, as multi-token prediction stores them, the towers of a wrapper, and
buffers of old versions. They have no part in any computation. A result keeps them byte for byte, of any dtype, under
their names. If blocks are removed, the layers after them move down with their numbers, and what belongs to a removed
block goes with it.

    unread = Unread.of(decoder.names, decoder.checkpoint, decoder.path)
    unread.groups["model.layers.4"]
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open

from niwaki.model.checkpoint import Checkpoint, cut_to_shards
from niwaki.model.files import write_text
from niwaki.model.hf import WeightNames
from niwaki.model.shards import INDEX, SINGLE, UNREAD

SHOWN_GROUPS = 6


class Group(NamedTuple):
    """Number and bytes of the tensors below one prefix."""

    tensors: int
    bytes: int


@dataclass(frozen=True)
class Unread:
    """Tensors that the model does not read: their names, and their numbers and bytes by prefix.

    `lists` are the prefixes that the list of blocks has on the disk.
    """

    names: tuple[str, ...]
    groups: dict[str, Group]
    lists: tuple[str, ...]

    @classmethod
    def of(cls, names: WeightNames, checkpoint: Checkpoint, path: str) -> "Unread":
        """Return what a model with the blocks at `path` does not read of `checkpoint`."""
        last = re.escape(path.rpartition(".")[2])
        found = (re.match(rf"((?:.*?\.)?{last})\.\d+\.", name) for name in names.below(f"{path}."))
        lists = tuple(sorted({match[1] for match in found if match}))
        split = [name.split(".") for name in names.parameters]
        read = {".".join(parts[:count]) for parts in split for count in range(1, len(parts))}
        groups: dict[str, Group] = {}
        for name in names.unread:
            group = _group(name, read, lists)
            before = groups.get(group, Group(0, 0))
            groups[group] = Group(before.tensors + 1, before.bytes + checkpoint.tensors[name].nbytes)
        return cls(names.unread, groups, lists)

    @property
    def nbytes(self) -> int:
        """Return the bytes of all of them."""
        return sum(group.bytes for group in self.groups.values())

    def renamed(self, names: Sequence[str], dropped: Sequence[int]) -> dict[str, str]:
        """Return new name → name of the tensors `names` after the blocks `dropped` are gone."""
        kept = {}
        for name in names:
            place = _place(name, self.lists)
            if place is None:
                kept[name] = name
            elif place[1] not in dropped:
                begin, index, rest = place
                kept[f"{begin}.{index - sum(gone < index for gone in dropped)}.{rest}"] = name
        return kept

    def record(self, *, kept: bool) -> dict[str, Any]:
        """Return the field `unread` of run.json."""
        groups = {name: group._asdict() for name, group in self.groups.items()}
        return {"kept": kept, "tensors": len(self.names), "bytes": self.nbytes, "groups": groups}

    def message(self, *, dropped: bool) -> str:
        """Return a warning that names the largest groups with their bytes."""
        largest = sorted(self.groups.items(), key=lambda item: -item[1].bytes)
        named = [
            f"{name} ({group.tensors} tensors, {size_text(group.bytes)})" for name, group in largest[:SHOWN_GROUPS]
        ]
        if len(largest) > SHOWN_GROUPS:
            named.append(f"{len(largest) - SHOWN_GROUPS} more groups")
        way = "left out as --drop-unused asks" if dropped else "copied unchanged (--drop-unused leaves them out)"
        count = f"{len(self.names)} tensors" if len(self.names) > 1 else "1 tensor"
        size = size_text(self.nbytes)
        return f"{count} of the file ({size}) have no place in the model and are {way}: {', '.join(named)}"


def unread_note(count: int) -> str:
    """Return the note of an export that has no place for `count` tensors."""
    what = f"{count} tensors" if count > 1 else "1 tensor"
    return f"{what} of the checkpoint that its model does not read are left out"


def append_unread(checkpoint: Checkpoint, names: Sequence[str], folder: Path) -> None:
    """Copy the tensors `names` of `checkpoint` into further shards of the model in `folder`, and into its index."""
    if not names:
        return
    index, single = folder / INDEX, folder / SINGLE
    if index.is_file():
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    else:
        first = "model-00001-of-00001.safetensors"  # transformers reads SINGLE alone if it is there
        single.rename(folder / first)
        with safe_open(folder / first, framework="pt") as file:
            weight_map = dict.fromkeys(file.keys(), first)
    for number, part in enumerate(cut_to_shards(names, checkpoint.tensors), start=1):
        shard = f"{UNREAD}{number:05d}.safetensors"
        checkpoint.copy({name: name for name in part}, folder / shard)
        weight_map |= dict.fromkeys(part, shard)
    total = sum((folder / shard).stat().st_size for shard in set(weight_map.values()))
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_text(index, json.dumps(content, indent=2) + "\n")


def _group(name: str, read: set[str], lists: Sequence[str]) -> str:
    """Return the shortest prefix that no read tensor has; the number of a block of the model is `*`."""
    parts = name.split(".")
    count = next((count for count in range(1, len(parts)) if ".".join(parts[:count]) not in read), len(parts))
    group = ".".join(parts[:count])
    place = _place(name, lists)
    if place is None or len(place[0].split(".")) + 1 >= count:
        return group
    return group.replace(f"{place[0]}.{place[1]}.", f"{place[0]}.*.", 1)


def _place(name: str, lists: Sequence[str]) -> tuple[str, int, str] | None:
    """Return list, number and rest of a name below a list of blocks, None for any other name."""
    for begin in lists:
        if match := re.fullmatch(rf"{re.escape(begin)}\.(\d+)\.(.+)", name):
            return begin, int(match[1]), match[2]
    return None


def size_text(nbytes: int) -> str:
    """Return bytes as MB or GB."""
    return f"{nbytes / 1e6:,.1f} MB" if nbytes < 1e9 else f"{nbytes / 1e9:,.2f} GB"
