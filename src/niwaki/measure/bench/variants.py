"""Variants of a dense model for speed alone: pruned and packed, quantized, narrower, or contextually sparse.

The speed does not depend on the method that selects the weights, so the cheapest method represents all. Masks are by
magnitude, codes by rounding to nearest. The first neurons and heads stay, and the predictor is untrained. One matrix of
every shape is encoded and copied to the others, so that a 7B model is made in seconds. The texts of these models are
worthless; their speed is that of a compressed model.

    bitmap       half of the weights of every matrix zero, values and a bitmap
    2:4          two of four zero, values and 2-bit indices;  2:4+4bit  with codes of 4 bits as values
    4bit         codes in groups of 128, as `gptq` and `rtn` store them
    1.6bit       a fifth of the columns at 4 bits, the others at 1, as `squeeze10` stores them
    structured   a quarter of the parameters of the blocks removed: heads and neurons, or neurons alone
    contextual   half of the heads and neurons skipped for every prompt, by the runtime of `shadow` (`unit=prompt`)
    inputs       half of the inputs of every matrix skipped at every token, by the runtime of `shadow` (`unit=inputs`)

Cost: memory for the variant in addition to the dense model, and one encoding for every shape of matrix.

    VARIANTS["2:4"].make(model, anatomy)

Legend: O outputs, I inputs, U units, F features, R rank.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from niwaki.config.targets import NM, Sparsity
from niwaki.errors import ArchitectureError, InputError, TargetError
from niwaki.formats.packed import Packed, PackedTensors
from niwaki.formats.sparse import Sparse
from niwaki.formats.sparse_tiles import Tiled
from niwaki.measure.bench.models import copy_sharing_tensors
from niwaki.methods import shadow
from niwaki.methods.shared.masks import keep_by_row
from niwaki.methods.shared.rounding import groups_of, nearest
from niwaki.model.anatomy import Anatomy, find_blocks
from niwaki.model.hf import build_skeleton, materialize_buffers
from niwaki.model.prunable import PrunedShape, ShapeSpace
from niwaki.runtime.contextual.attach import attach
from niwaki.runtime.contextual.places import find_places
from niwaki.runtime.contextual.predictor import Predictor
from niwaki.runtime.contextual.predictor_files import InputShadow, Running, Shadow
from niwaki.runtime.contextual.units import find_layout
from niwaki.runtime.trellis_linear import packed_class

GROUPS = (128, 64, 32)  # columns that share a scale; the widest group that divides a matrix is used
SALIENT_BITS, SALIENT_FRAC = 4, 0.2  # of 1.6bit; the other columns have one bit
REMOVED_FRAC, SKIPPED_FRAC = 0.25, 0.5
PROBE_TOKENS = 64  # random tokens that medians are taken from
INPUT_RUNNING: dict[str, Any] = {"mean_fill": 0.0, "min_prompt": 1}


@dataclass(frozen=True)
class VariantModel:
    """A variant in memory, with a remark for readers. `extra_tensors`: tensors that it holds outside its modules."""

    model: Any
    detail: str
    extra_tensors: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Variant:
    """A kind of variant. `make` may share tensors with the dense model; it raises NiwakiError if it is impossible."""

    about: str
    make: Callable[[Any, Anatomy], VariantModel]


def bitmap(weight_OI: Tensor) -> PackedTensors:
    """Zero the smaller half of the weights of every row."""
    keep_OI = keep_by_row(weight_OI.float().abs(), Sparsity(0.5))
    return PackedTensors.of_nonzeros(Sparse.encode(_masked(weight_OI, keep_OI), layout="bitmap"))


def two_four(weight_OI: Tensor) -> PackedTensors:
    """Zero the two smallest of every four weights."""
    keep_OI = keep_by_row(weight_OI.float().abs(), NM(2, 4))
    return PackedTensors.of_nonzeros(Sparse.encode(_masked(weight_OI, keep_OI), layout="two_four"))


def two_four_codes(weight_OI: Tensor) -> PackedTensors:
    """Zero two of four and store 4-bit codes, in the tiles of the kernels if the columns allow it."""
    keep_OI = keep_by_row(weight_OI.float().abs(), NM(2, 4))
    columns = weight_OI.shape[1]
    groups = groups_of(0, columns, 4, "symmetric", _group(columns))
    (part,) = nearest(_masked(weight_OI, keep_OI).float(), groups, clip=False).storable().parts(torch.arange(columns))
    record = Sparse.encode_codes(part, keep_OI, layout="two_four")
    assert record is not None, "symmetric codes of 4 bits in groups of whole bytes"
    return PackedTensors.of_nonzeros(Tiled.encode(record) or record)


def four_bits(weight_OI: Tensor) -> PackedTensors:
    """Round to affine 4-bit codes, with a scale and a zero code for every group."""
    columns = weight_OI.shape[1]
    groups = groups_of(0, columns, 4, "affine", _group(columns))
    return _codes(weight_OI, torch.arange(columns), groups)


def mixed_bits(weight_OI: Tensor) -> PackedTensors:
    """Round a random fifth of the columns to 4 bits, the others to 1 bit; one scale per row for each kind."""
    columns = weight_OI.shape[1]
    count = round(SALIENT_FRAC * columns / 8) * 8
    if not 0 < count < columns:
        raise TargetError(f"1.6bit needs matrices with 20 columns or more, got {columns}")
    order_I = torch.randperm(columns, generator=torch.Generator().manual_seed(0))
    order_I = torch.cat([order_I[:count].sort().values, order_I[count:].sort().values])
    groups = groups_of(0, count, SALIENT_BITS, "midrise", 0) + groups_of(count, columns, 1, "free", 0)
    return _codes(weight_OI[:, order_I], order_I, groups)


def _group(columns: int) -> int:
    group = next((group for group in GROUPS if columns % group == 0), None)
    if group is None:
        raise TargetError(f"4-bit codes need groups of {GROUPS[-1]} to {GROUPS[0]} columns, got {columns} columns")
    return group


def _codes(weight_OI: Tensor, order_I: Tensor, groups: Any) -> PackedTensors:
    record = Packed.codes(nearest(weight_OI.float(), groups, clip=False).storable().parts(order_I))
    return record.packed_codes()


def _masked(weight_OI: Tensor, keep_OI: Tensor) -> Tensor:
    return torch.where(keep_OI, weight_OI, weight_OI.new_zeros(()))


def packed(encode: Callable[[Tensor], PackedTensors]) -> Callable[[Any, Anatomy], VariantModel]:
    """Return a maker of variants that encodes the first matrix of every shape and copies it to the others."""

    def make(model: Any, anatomy: Anatomy) -> VariantModel:
        copied, encoded, dense_count = copy_sharing_tensors(model), dict[tuple[int, int], PackedTensors](), 0
        for index, block in enumerate(anatomy.blocks):
            for matrix in block.linears.values():
                name = anatomy.prefix(index) + matrix.name
                module = _plain_linear(copied, name) if matrix.expert is None and not matrix.transposed else None
                if module is None:
                    dense_count += 1
                    continue
                shape = matrix.rows, matrix.columns
                if shape not in encoded:
                    encoded[shape] = _moved(encode(module.weight.detach().cpu()), module.weight.device)
                _put(copied, name, _layer(module, encoded[shape]))
        if not encoded:
            raise ArchitectureError(
                f"none of the matrices of {type(model).__name__} is the weight of an nn.Linear: its compressed files "
                "hold dense weights, so its speed is that of the dense model"
            )
        return VariantModel(copied, f"{dense_count} matrices outside nn.Linear stay dense" if dense_count else "")

    return make


def _plain_linear(model: nn.Module, name: str) -> nn.Linear | None:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        return None
    return module if isinstance(module, nn.Linear) else None


def _moved(stored: PackedTensors, device: torch.device) -> PackedTensors:
    return PackedTensors({name: tensor.to(device) for name, tensor in stored.tensors.items()}, stored.description)


def _layer(module: nn.Linear, stored: PackedTensors) -> nn.Module:
    """Return a packed layer with a copy of the stored tensors, and with the bias of the dense layer."""
    kind = packed_class(stored.description)
    with torch.device(module.weight.device):
        layer = kind(module.out_features, module.in_features, stored.description, bias=False)
    layer.load_state_dict(dict(stored.tensors))
    layer.bias = module.bias
    return layer


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def structured(model: Any, anatomy: Anatomy) -> VariantModel:
    """Keep the first heads and neurons of every block, and drop a quarter of its parameters."""
    sizes, shape = find_shape(model, anatomy)
    values = dict(sizes.config_for(shape))
    from transformers import AutoConfig

    narrow = build_skeleton(AutoConfig.for_model(values.pop("model_type"), **values), model.dtype)
    full = dict(model.named_parameters(remove_duplicate=False))
    device = next(model.parameters()).device
    materialize_buffers(narrow, narrow, device)
    for name, meta in list(narrow.named_parameters(remove_duplicate=False)):
        own = full[name]
        if own.shape != meta.shape:
            own = nn.Parameter(own[tuple(slice(size) for size in meta.shape)].clone(), requires_grad=False)
        owner, _, leaf = name.rpartition(".")
        narrow.get_submodule(owner)._parameters[leaf] = own
    narrow.config.use_cache = True
    return VariantModel(narrow, f"{sizes.removed_frac(shape):.1%} of the blocks removed: {shape} left")


def find_shape(model: Any, anatomy: Anatomy) -> tuple[ShapeSpace, PrunedShape]:
    """Return the shape with a quarter fewer heads and neurons, or with fewer neurons alone.

    The second is for configs that cannot hold fewer heads. Raises TargetError if neither fits the config.
    """
    sizes = ShapeSpace(anatomy, build_skeleton(model.config, model.dtype), model.config.to_dict())
    for heads in (max(1, sizes.heads * 3 // 4), sizes.heads):
        shape = sizes.fitting(REMOVED_FRAC, heads, (), 0)
        if shape is None:
            continue
        try:
            sizes.config_for(shape)
        except InputError:
            continue
        return sizes, shape
    raise TargetError(f"no width that the config of {type(model).__name__} can hold leaves {1 - REMOVED_FRAC:.0%}")


def contextual(model: Any, anatomy: Anatomy) -> VariantModel:
    """Keep all weights, and attach a predictor that selects half of the units for every prompt."""
    copied = copy_sharing_tensors(model)
    copied.contextual = attach(copied, untrained(copied, anatomy, SKIPPED_FRAC))
    return VariantModel(copied, "", tuple(copied.contextual.shadow.tensors().values()))


def untrained(model: Any, anatomy: Anatomy, skip_frac: float) -> Shadow:
    """Return a predictor of random numbers with the default size and features of `shadow`."""
    layout = find_layout(anatomy, build_skeleton(model.config, torch.float32), 1)
    channels = anatomy.blocks[0].linears[layout.units["heads"].consumer].columns
    config, size = shadow.Config(unit="prompt"), layout.size
    features = sum({"last": channels, "mean": channels, "prompt": size}[name] for name in config.groups)
    rank = max(1, int((config.size_frac * anatomy.weights - 2 * size - 2 * features) // (features + size)))
    generator = torch.Generator().manual_seed(0)
    predictor = Predictor(
        features=config.groups,
        heads=layout.blocks * layout.count("heads"),
        prior_U=torch.rand(size, generator=generator),
        typical_U=torch.ones(size),
        trust_K2=torch.tensor([[0.5, 0.0], [0.5, 0.0]]),
        center_F=torch.zeros(features),
        scale_F=torch.ones(features),
        into_FR=torch.randn(features, rank, generator=generator) * 1e-3,
        out_RU=torch.randn(rank, size, generator=generator) * 1e-2,
    )
    place = next(model.parameters()).device
    return Shadow(predictor.to(place), layout, shadow.rule(config, skip_frac), Running(**config.running))


@torch.no_grad()
def inputs(model: Any, anatomy: Anatomy) -> VariantModel:
    """Keep all weights, and attach thresholds at the median size of the inputs of every place on random tokens."""
    copied = copy_sharing_tensors(model)
    places, blocks, medians = find_places(anatomy), find_blocks(copied)[1], dict[int, Tensor]()
    handles = [
        blocks[place.block]
        .get_submodule(place.names[0])
        .register_forward_pre_hook(
            lambda _, args, index=index: medians.__setitem__(index, args[0][..., 1:, :].abs().float().median())
        )
        for index, place in enumerate(places)
    ]
    generator = torch.Generator().manual_seed(0)
    ids_1T = torch.randint(copied.config.get_text_config().vocab_size, (1, PROBE_TOKENS), generator=generator)
    copied(input_ids=ids_1T.to(copied.device), use_cache=False)
    for handle in handles:
        handle.remove()
    threshold_P = torch.stack([medians[index] for index in range(len(places))])
    shares = (SKIPPED_FRAC,) * len(places)
    copied.contextual = attach(copied, InputShadow(tuple(places), shares, threshold_P, Running(**INPUT_RUNNING)))
    return VariantModel(copied, "", (threshold_P,))


VARIANTS = {
    "bitmap": Variant("50 % zeros, bitmap", packed(bitmap)),
    "2:4": Variant("2:4, indices", packed(two_four)),
    "2:4+4bit": Variant("2:4, 4-bit codes", packed(two_four_codes)),
    "4bit": Variant("4-bit codes", packed(four_bits)),
    "1.6bit": Variant("columns of 4 and 1 bit", packed(mixed_bits)),
    "structured": Variant("25 % narrower", structured),
    "contextual": Variant("50 % skipped by prompt", contextual),
    "inputs": Variant("50 % skipped by input", inputs),
}
