"""Sizes of a decoder and of what a recipe leaves of it in the file, from headers and configs alone.

The bytes of a file follow from the shapes. The method that stores codes counts them (`stored_bytes`). Weights with
zeros in place keep their size, and packed nonzeros take their values and positions.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from niwaki.compression.bit_allocation import KEPT_BITS
from niwaki.compression.embeddings import GROUPS, WIDTHS, embeddings_to_pack
from niwaki.compression.resolve import ResolvedStage
from niwaki.config.recipe import Recipe
from niwaki.config.targets import NM, Bits, KeepUnits, PrunedBits, Target
from niwaki.formats.quantized import WEIGHT
from niwaki.formats.sparse import CODES, LAYOUTS, sparse_bytes
from niwaki.formats.sparse_tiles import fits_tiles, tile_bytes
from niwaki.methods.cost import FLOAT_BYTES, Scope
from niwaki.methods.registry import Step
from niwaki.methods.shared.rounding import uniform_bytes
from niwaki.model.checkpoint import STORED_DTYPES
from niwaki.model.decoder import Decoder
from niwaki.model.prunable import PrunedShape, ShapeSpace
from niwaki.model.shards import TensorInfo
from niwaki.runtime.contextual.places import find_places
from niwaki.runtime.contextual.units import find_layout

TENSOR_HEADER = 80  # bytes of the entry of a tensor in the header of its file, without its name
FILE_HEADER = 48
CODE_TENSORS = 3  # per matrix of codes: planes, scales, offsets or zero codes


@dataclass(frozen=True)
class Matrix:
    """One matrix of a block. `dense_reason`: see `Decoder`. `reach`: the share of the tokens that it sees.

    `packed_bytes`: those of a matrix that the checkpoint holds packed.
    """

    name: str
    rows: int
    columns: int
    group: str
    itemsize: int
    dense_reason: str
    reach: float
    packed_bytes: int | None = None

    @property
    def dense_bytes(self) -> int:
        """Return the bytes in the checkpoint."""
        return self.packed_bytes if self.packed_bytes is not None else self.rows * self.columns * self.itemsize


@dataclass(frozen=True)
class BlockSizes:
    """Sizes of a block: its matrices, the bytes of everything else in its file, the number of its tensors."""

    matrices: tuple[Matrix, ...]
    other_bytes: int
    tensors: int

    @property
    def weights(self) -> int:
        """Return the number of weights in all matrices."""
        return sum(matrix.rows * matrix.columns for matrix in self.matrices)

    @property
    def dense_bytes(self) -> int:
        """Return the bytes of the block in the checkpoint."""
        return self.other_bytes + sum(matrix.dense_bytes for matrix in self.matrices)

    @property
    def reach(self) -> float:
        """Return the share of the weights that a token is multiplied with."""
        return sum(m.rows * m.columns * m.reach for m in self.matrices) / max(self.weights, 1)

    def scope(self, windows: int, tokens: int) -> Scope:
        """Return the block as `niwaki.methods.cost` counts it."""
        groups: dict[str, list[tuple[int, int]]] = {}
        for matrix in self.matrices:
            groups.setdefault(matrix.group, []).append((matrix.rows, matrix.columns))
        return Scope(tuple(tuple(group) for group in groups.values()), windows, tokens, self.reach)


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of a decoder: its blocks, and the bytes and weights of embeddings, head and the rest outside them.

    `unread_bytes`: tensors of the file that no module reads. `tower_bytes`: modules that text alone does not run.
    """

    blocks: tuple[BlockSizes, ...]
    hidden: int
    embeddings_bytes: int
    embeddings_weights: int
    head_bytes: int
    file_bytes: int
    unread_bytes: int
    tower_bytes: int

    @property
    def weights(self) -> int:
        """Return the number of weights in the matrices of all blocks."""
        return sum(block.weights for block in self.blocks)

    @property
    def matrix_bits(self) -> float:
        """Return the bits a weight of these matrices in the checkpoint."""
        return 8 * sum(m.dense_bytes for block in self.blocks for m in block.matrices) / max(self.weights, 1)


@dataclass(frozen=True)
class DenseSizes:
    """Matrices that can only be stored dense: their bytes, those of their packed form, their numbers by reason."""

    nbytes: int = 0
    packed_bytes: int = 0
    reasons: Mapping[str, int] = field(default_factory=dict)

    def message(self, matrices: int) -> str:
        """Return a warning for a model with this number of `matrices`."""
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.reasons.items())
        return (
            f"{sum(self.reasons.values())} of {matrices} matrices have no packed form ({reasons}): they take "
            f"{self.nbytes / 1e6:,.1f} MB, packed they would take {self.packed_bytes / 1e6:,.1f} MB"
        )

    def record(self) -> dict[str, Any]:
        """Return the field `dense` of a plan."""
        return {"bytes": self.nbytes, "packed_bytes": self.packed_bytes, "reasons": dict(self.reasons)}


@dataclass(frozen=True)
class StoredSizes:
    """Sizes of a result: bytes of the weight files, bits a weight in the blocks, and bytes read per token."""

    file_bytes: int
    matrix_bits: float
    read_bytes: float
    largest_block_bytes: int
    dense: DenseSizes = DenseSizes()


def sizes_of(decoder: Decoder) -> ModelSizes:
    """Return the sizes of a decoder.

    A config that names its experts differently counts as if every token met all of them.
    """
    tensors = decoder.checkpoint.tensors
    text = decoder.checkpoint.config.get_text_config()
    experts = getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None) or 1
    share = (getattr(text, "num_experts_per_tok", None) or experts) / experts
    blocks = []
    for index, anatomy in enumerate(decoder.anatomy.blocks):
        names = decoder.disk_names(index)
        itemsize = _itemsize([tensors[name] for name in names])
        packed = {name: tensors[own + WEIGHT].nbytes for name, own in decoder.packed_matrices(index).items()}
        matrices = tuple(
            Matrix(
                linear.name, linear.rows, linear.columns, linear.group, itemsize,
                decoder.dense_reason(index, linear.name), 1.0 if linear.expert is None else share,
                packed.get(linear.name),
            )
            for linear in anatomy.linears.values()
        )  # fmt: skip
        total = sum(tensors[name].nbytes for name in names)
        blocks.append(BlockSizes(matrices, total - sum(m.dense_bytes for m in matrices), len(names)))
    ends = [tensors[name] for name in decoder.disk_names(None)]
    head = sum(tensors[names[0]].nbytes for names in list(decoder.embedding_matrices().values())[-1:] if names)
    return ModelSizes(
        tuple(blocks), decoder.hidden_size, sum(end.nbytes for end in ends),
        sum(end.nbytes for end in ends) // itemsize, head, decoder.checkpoint.nbytes,
        decoder.unread.nbytes, sum(towers_record(decoder).values()),
    )  # fmt: skip


def _itemsize(infos: Sequence[TensorInfo]) -> int:
    """Return the bytes of an element in the dtype with the most bytes; a tower may have another one than the text."""
    totals: Counter[str] = Counter()
    for info in infos:
        totals[info.dtype] += info.nbytes
    ((dtype, _),) = totals.most_common(1)
    return STORED_DTYPES[dtype].itemsize


def towers_record(decoder: Decoder) -> dict[str, int]:
    """Return the bytes of each tower by the name of its module."""
    found = dict.fromkeys(decoder.anatomy.idle, 0)
    for name in decoder.tower_names:
        parameter = decoder.names.parameters[name]
        tower = next(tower for tower in found if parameter.startswith(f"{tower}."))
        found[tower] += decoder.checkpoint.tensors[name].nbytes
    return found


def stored_sizes(decoder: Decoder, model: ModelSizes, stage: ResolvedStage) -> StoredSizes:
    """Return the sizes of the files of a result. Raises TargetError for a matrix that cannot meet the target."""
    steps, target, recipe = stage.steps, stage.target, stage.recipe
    files, matrices, read, largest = 0, 0, 0.0, 0
    known: dict[tuple[int, int], int | None] = {}  # experts are many, and alike
    dense_bytes, packed_bytes, reasons = 0, 0, Counter[str]()
    by_need = recipe.allocation == "sensitivity" and _has_room(stage, steps[-1], target)
    for index, block in enumerate(model.blocks):
        total, more = block.other_bytes, 0
        met: float = block.other_bytes
        left = recipe.blocks is not None and index not in recipe.blocks
        for matrix in block.matrices:
            if left:
                total, matrices = total + matrix.dense_bytes, matrices + matrix.dense_bytes
                met += matrix.dense_bytes * matrix.reach
                continue
            key = matrix.rows, matrix.columns
            if key not in known:
                full = f"{decoder.anatomy.prefix(index)}{matrix.name}"
                known[key] = _packed_bytes(full, matrix, steps[-1], target, recipe, by_need)
            packed_size = known[key]
            nbytes = matrix.dense_bytes if packed_size is None or matrix.dense_reason else packed_size
            if packed_size is not None and matrix.dense_reason:
                dense_bytes, packed_bytes = dense_bytes + nbytes, packed_bytes + packed_size
                reasons[matrix.dense_reason] += 1
            more += 0 if nbytes == matrix.dense_bytes else CODE_TENSORS - 1
            total += nbytes
            matrices += nbytes
            met += nbytes * matrix.reach
        files += total + _header(decoder.disk_names(index), more)
        read += met
        largest = max(largest, total)
    packed = _packed_embeddings(decoder, recipe, target)
    files += model.embeddings_bytes - packed[0] + packed[1] + _header(decoder.disk_names(None), packed[2])
    copied = [*decoder.tower_names, *(() if recipe.drop_unused else decoder.unread.names)]
    files += sum(decoder.checkpoint.tensors[name].nbytes for name in copied) + (_header(copied) if copied else 0)
    head = model.head_bytes if not packed[0] else model.head_bytes * packed[1] / packed[0]
    dense = DenseSizes(dense_bytes, packed_bytes, dict(reasons))
    return StoredSizes(files, 8 * matrices / max(model.weights, 1), read + head, largest, dense)


def _has_room(stage: ResolvedStage, step: Step, target: Target) -> bool:
    """Return whether bits can move between matrices, as in `spread_bits`: above the minimum of all, below four bits."""
    assert isinstance(target, Bits), "fractional methods meet nothing else"
    matrices = [linear for block in stage.anatomy.blocks for linear in block.linears.values()]
    least = sum(m.rows * m.columns * step.min_bits(m.rows, m.columns) for m in matrices)
    return least < target.bits * stage.anatomy.weights and target.bits < KEPT_BITS


def _packed_bytes(name: str, matrix: Matrix, step: Step, target: Target, recipe: Recipe, by_need: bool) -> int | None:
    """Return the bytes of the packed form that the recipe takes for a matrix, None if it takes the dense one."""
    if recipe.pack == "none":
        return None
    own = target
    if by_need and isinstance(target, Bits):  # the others compensate for what the smallest need
        own = Bits(max(target.bits, step.min_bits(matrix.rows, matrix.columns)))
    nbytes = step.stored_bytes(name, matrix.rows, matrix.columns, own)
    if recipe.pack == "auto" and isinstance(target, PrunedBits) and nbytes is not None:
        nbytes = min(nbytes, _coded_bytes(matrix, target, step.group or matrix.columns) or nbytes)
    if nbytes is None and recipe.pack == "auto":
        nbytes = _nonzero_bytes(matrix, target)
    return nbytes


def _nonzero_bytes(matrix: Matrix, target: Target) -> int | None:
    """Return the bytes of a pruned matrix as packed nonzeros, None if that is not smaller."""
    nbytes = _places_and_values(matrix, target, 8 * matrix.itemsize)
    return nbytes if nbytes < matrix.dense_bytes else None


def _coded_bytes(matrix: Matrix, target: PrunedBits, group: int) -> int | None:
    """Return the bytes of a pruned matrix of codes, None without such a form; no kept weight rounds to zero."""
    bits = int(target.bits.bits)
    if bits not in CODES.values() or (group < matrix.columns and group % 8):
        return None
    if bits == 4 and _fits_two_four(target.zeros) and fits_tiles(matrix.columns, group):
        return tile_bytes(matrix.rows, matrix.columns, group)
    return _places_and_values(matrix, target.zeros, bits) + 2 * matrix.rows * -(-matrix.columns // group)


def _places_and_values(matrix: Matrix, zeros: Target, bits: int) -> int:
    count = matrix.rows * matrix.columns - zeros.zeros_in(matrix.rows, matrix.columns)
    layouts = LAYOUTS if _fits_two_four(zeros) else LAYOUTS[:1]
    return min(sparse_bytes(matrix.rows, matrix.columns, count, bits, name) for name in layouts)


def _fits_two_four(zeros: Target) -> bool:
    return isinstance(zeros, NM) and zeros.group == 4 and zeros.keep <= 2 and zeros.zeros_frac is None


def _header(names: Sequence[str], more: int = 0) -> int:
    """Return the bytes of the header of a shard: an entry for each of `names`, and for `more` tensors of codes."""
    long = sum(len(name) for name in names) / max(len(names), 1)
    return FILE_HEADER + round((len(names) + more) * (TENSOR_HEADER - 12 + long))


def _packed_embeddings(decoder: Decoder, recipe: Recipe, target: Target) -> tuple[int, int, int]:
    """Return the bytes of embeddings and head before and after they become codes, and how many more tensors they are.

    Return zeros if they stay.
    """
    if recipe.embeddings == "none":
        return 0, 0, 0
    before = after = more = 0
    for module, names in embeddings_to_pack(recipe, target, decoder).items():
        rows, columns = decoder.checkpoint.tensors[names[0]].shape
        group = next(group for group in GROUPS if columns % group == 0)
        before += sum(decoder.checkpoint.tensors[name].nbytes for name in names)
        after += uniform_bytes(module + WEIGHT, rows, columns, WIDTHS[recipe.embeddings], group, symmetric=False)
        more += CODE_TENSORS - len(names)
    return before, after, more


def shaped_sizes(model: ModelSizes, space: ShapeSpace, shape: PrunedShape) -> ModelSizes:
    """Return the sizes of what a shape leaves of the blocks."""
    blocks, targets = [], space.targets(shape, True)
    for index, block in enumerate(model.blocks):
        if index in shape.dropped:
            continue
        matrices = []
        for matrix in block.matrices:
            keep = targets[index][matrix.name]
            assert isinstance(keep, KeepUnits)
            along = "columns" if matrix.name == keep.unit.consumer else "rows"
            width = getattr(matrix, along) // keep.unit.count * keep.count
            matrices.append(replace(matrix, **{along: width}))
        blocks.append(replace(block, matrices=tuple(matrices)))
    gone = sum(b.dense_bytes for b in model.blocks) - sum(b.dense_bytes for b in blocks)
    return replace(model, blocks=tuple(blocks), file_bytes=model.file_bytes - gone)


def beside_bytes(decoder: Decoder, stage: ResolvedStage) -> int:
    """Return the bytes of the predictor of a contextual method."""
    step = stage.steps[0]
    if step.config.unit == "inputs":
        places = find_places(decoder.anatomy)
        scales = sum(place.inputs for place in places) if step.config.score == "weighted" else 0
        return FLOAT_BYTES * (len(places) + scales)
    layout = find_layout(decoder.anatomy, decoder.model, step.config.neuron_width)
    channels = decoder.anatomy.blocks[0].linears[layout.units["heads"].consumer].columns
    return step.contextual_method.beside_bytes(layout, channels, stage.windows, step.config, decoder.anatomy.weights)
