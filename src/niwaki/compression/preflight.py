"""Early refusal of compressions that cannot be done, by config.json, headers and sizes of files alone.

torch and transformers take seconds to load, and a model is built with both. Here neither is loaded: every bound is on
the safe side, and refuses what the whole checks refuse as well (`plan.planner.check_possible`, `resolve`). A model
whose blocks cannot be told from the names of its tensors passes.

    check_early("MODEL", make_recipe(values), Path("OUT"))
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from niwaki.compression.places import beside, check_space
from niwaki.config.devices import check_device, may_have_gpu
from niwaki.config.recipe import Recipe
from niwaki.config.sources import model_folder
from niwaki.config.targets import NM, Bits, PrunedBits, Sparsity, Target, format_blocks, parse_target
from niwaki.data.text_amount import check_amount, least_seq_len
from niwaki.errors import InputError, TargetError
from niwaki.methods.method import MethodKind
from niwaki.methods.registry import method_infos
from niwaki.model.config_file import read_folder, stored_quantization
from niwaki.model.shards import TensorInfo, numbered_lists

CERTAIN = 0.7  # as in the plan
CERTAIN_BYTES = 0.97
SHAPE_MARGIN = 1.3  # of the share that a structured method removes, in bytes
CODE_BITS = 4  # least width of embeddings that become codes
BITS_MARGIN = 0.9  # of a target: what small matrices cannot spend is left over
COMPUTED_BYTES, ID_BYTES = 4, 8  # of a weight on a CPU, of a token
COUNT_MARGIN = 0.9  # of the matrices among the two-dimensional tensors of a block


@dataclass(frozen=True)
class Files:
    """Tensors of a plain decoder by block, and those outside; no blocks if the names show none, or several lists."""

    blocks: Mapping[int, list[TensorInfo]]
    outside: list[TensorInfo]

    @classmethod
    def of(cls, headers: Mapping[str, TensorInfo]) -> "Files":
        """Sort the tensors of a file by the one list of blocks that no other list contains."""
        lists = numbered_lists(headers)
        outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists if other != name)]
        if len(outer) != 1:
            return cls({}, list(headers.values()))
        blocks: dict[int, list[TensorInfo]] = {int(number): [] for number in lists[outer[0]]}
        outside, prefix = [], f"{outer[0]}." if outer[0] else ""
        for name, info in headers.items():
            number = name.removeprefix(prefix).partition(".")[0]
            if name.startswith(prefix) and number.isdecimal():
                blocks[int(number)].append(info)
            else:
                outside.append(info)
        return cls(blocks, outside)

    def weights(self, named: Iterable[int] | None = None) -> int:
        """Return the elements of all matrices of the blocks `named`, by default of all; 0 if not all are matrices."""
        chosen = self.blocks if named is None else set(named) & self.blocks.keys()
        shapes = [info.shape for index in chosen for info in self.blocks[index] if len(info.shape) > 1]
        return sum(map(math.prod, shapes)) if all(len(shape) == 2 for shape in shapes) else 0


def check_early(model: str, recipe: Recipe, out: Path | None, *, reads_text: bool = True, here: bool = True) -> None:
    """Raise what `compress` would raise for too little text, memory, disk or bytes, where that is certain.

    Disk is checked for an `out` of which no earlier run has files. Text is not read without `reads_text`. Memory and
    disk count if the work is done `here`.
    """
    check_device(recipe.device)
    folder = model_folder(model)
    if folder is None or folder.is_file():
        return  # opening it fetches it, or makes it of a GGUF file
    content, headers = read_folder(folder)
    if stored_quantization(folder, content):
        return
    files = Files.of(headers)
    _check_blocks(recipe, files, content.get("num_hidden_layers"))
    if reads_text:
        check_amount(recipe.calibration, content, folder)
    if here and (recipe.device == "cpu" or (recipe.device == "auto" and not may_have_gpu())):
        _check_memory(recipe, content, files)
    if here and out is not None and not any(place.exists() for place in (out, *beside(out))):
        check_space(out, round(CERTAIN_BYTES * _written(recipe, files)) + _spilled(recipe, content))


def _check_blocks(recipe: Recipe, files: Files, layers: object) -> None:
    """Raise TargetError for blocks that do not exist, and for bytes that are not 1 to 8 bits a weight."""
    count = len(files.blocks)
    if count == layers and (missing := [index for index in recipe.blocks or () if index >= count]):
        raise TargetError(f"blocks {format_blocks(missing)}: the model has blocks 0 to {count - 1}")
    weights, nbytes = files.weights(recipe.blocks), recipe.target_bytes
    if nbytes is None or not all(info.fractional_bits for info in method_infos(recipe.method)):
        return  # such methods refuse bytes of any number
    if weights and not COUNT_MARGIN * weights / 8 <= nbytes <= weights:
        raise TargetError(
            f"target_bytes {nbytes:,}: that is {8 * nbytes / weights:.3f} bits for each of {weights:,} weights, "
            f"expected 1 to 8: give {weights // 8:,} to {weights:,} bytes"
        )


def _check_memory(recipe: Recipe, content: Mapping[str, Any], files: Files) -> None:
    """Raise InputError for windows, a block or embeddings that the memory of this machine cannot hold."""
    needed = ID_BYTES * _tokens(recipe, content)
    rows = (content.get("vocab_size"),)
    tables = [info for info in files.outside if files.blocks and info.shape[:1] == rows]
    for tensors in (*files.blocks.values(), tables):
        needed = max(needed, sum(2 * COMPUTED_BYTES * math.prod(info.shape) for info in tensors))
    has = _memory_bytes()
    if CERTAIN * needed > has:
        raise InputError(
            f"the memory of this machine is {has / 1e9:.1f} GB, and more than {needed / 1e9:.1f} GB are needed: use "
            "fewer --samples, a shorter --seq-len, or a larger machine"
        )


def _spilled(recipe: Recipe, content: Mapping[str, Any]) -> int:
    """Return the bytes of the hidden states of all windows, if no memory holds them: they go to the disk."""
    width = content.get("hidden_size")
    states = _tokens(recipe, content) * 2 * width if type(width) is int else 0  # 2 bytes each, at least
    return states if states > _memory_bytes() else 0


def _tokens(recipe: Recipe, content: Mapping[str, Any]) -> int:
    """Return the tokens of all calibration windows; 0 if a method may do without text."""
    given = recipe.calibration
    reads = given.files or given.mix or any(info.reads_text for info in method_infos(recipe.method))
    return given.samples * least_seq_len(given.seq_len, content) if reads else 0


def _memory_bytes() -> int:
    import psutil

    return int(psutil.virtual_memory().total + psutil.swap_memory().total)


def _written(recipe: Recipe, files: Files) -> float:
    """Return bytes that the weights of a result, or of its first stage, take at least."""
    if recipe.rotate != "none":
        return sum(info.nbytes for info in (*_all(files), *files.outside)) * 1.0
    infos = method_infos(recipe.method)
    kind, target = infos[0].kind, None
    if recipe.target is not None:
        first, _, _ = recipe.target.partition("+")
        target = parse_target(first if kind is MethodKind.SHAPE else recipe.target)
    if kind is MethodKind.CONTEXTUAL:
        return 0
    if kind is MethodKind.SHAPE:
        removed = SHAPE_MARGIN * target.zeros_frac if isinstance(target, Sparsity) else 1.0
        return max(0.0, 1 - removed) * sum(info.nbytes for info in _all(files)) + _outside(recipe, files)
    kept = sum(_least(info, recipe, target) for info in _all(files))
    return kept + _outside(recipe, files)


def _all(files: Files) -> list[TensorInfo]:
    return [info for tensors in files.blocks.values() for info in tensors]


def _outside(recipe: Recipe, files: Files) -> float:
    """Return the least bytes of the tensors outside the blocks; of unknown ones nothing, if unread ones are dropped."""
    if recipe.drop_unused or not files.blocks:
        return 0
    codes = recipe.embeddings != "none"
    return sum(
        min(info.nbytes, math.prod(info.shape) * CODE_BITS / 8) if codes and len(info.shape) == 2 else info.nbytes
        for info in files.outside
    )


def _least(info: TensorInfo, recipe: Recipe, target: Target | None) -> float:
    """Return the least bytes of a tensor of a block after the methods of a walk."""
    count = math.prod(info.shape)
    if len(info.shape) < 2 or recipe.pack == "none" or not count:
        return info.nbytes
    kept, width = 1.0, 8 * info.nbytes / count
    zeros = target.zeros if isinstance(target, PrunedBits) else target
    bits = target.bits if isinstance(target, PrunedBits) else target
    if isinstance(zeros, Sparsity):
        kept = 1 - zeros.zeros_frac
    elif isinstance(zeros, NM):
        kept = zeros.keep / zeros.group
    if isinstance(bits, Bits):
        width = min(width, BITS_MARGIN * bits.bits)
    elif target is None:
        width = 1.0
    return count * kept * width / 8
