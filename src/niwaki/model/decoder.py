"""A decoder read from a checkpoint block by block. Only loaded blocks take memory.

The outer modules (embeddings, final norm, LM head) run through the forward of the model itself, with stubs in place of
its blocks. So positions, masks, scaling and soft caps are never implemented again.

Legend: B windows in a batch, T tokens, D hidden size, O outputs, I inputs, V vocabulary.

    decoder = Decoder(Checkpoint.open("MODEL"), torch.device("cpu"))
    x_BTD, calls = decoder.embed(ids_BT)
    for index in range(len(decoder)):
        block = decoder.load(index)
        x_BTD = block.run(calls[index], x_BTD)
        block.release()
    logits_BTV = decoder.logits(ids_BT, x_BTD)
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from niwaki.config.targets import format_blocks
from niwaki.errors import CheckpointError
from niwaki.formats.packed import PackedTensors
from niwaki.formats.quantized import WEIGHT
from niwaki.model.anatomy import (
    BlockAnatomy,
    Linear,
    discover,
    find_blocks,
    outer_modules,
    shared_names,
)
from niwaki.model.block_calls import Call, record_calls, stubbed
from niwaki.model.checkpoint import TIE, Checkpoint
from niwaki.model.complete import check_complete, check_dtypes
from niwaki.model.config_file import config_faults
from niwaki.model.device import return_free_memory, to_host
from niwaki.model.gguf_source import gguf_source
from niwaki.model.hf import (
    build_skeleton,
    fill,
    materialize_buffers,
    resize,
    split_converted,
    weight_names,
)
from niwaki.model.kept import Kept
from niwaki.model.logits import position_slices, vocabulary_of
from niwaki.model.matmul_observer import MatmulObserver, Pointers, Slice
from niwaki.model.unread import Unread


@dataclass
class BlockResult:
    """Changes of one block by names inside the block: the way of new weights to the disk.

    The walk fills it while it replaces the matrices. `Decoder.disk_tensors` turns it into the tensors of a file.
    New values of weights and biases are `parameters`. The biases that the checkpoint does not have are also in `added`.
    The stored form of packed matrices is `packed`.
    """

    parameters: dict[str, Tensor] = field(default_factory=dict)
    added: set[str] = field(default_factory=set)
    packed: dict[str, PackedTensors] = field(default_factory=dict)


@dataclass
class Block:
    """One decoder layer on the compute device.

    Its tensors as in the checkpoint, by names on disk, are `stored`. Its changes are `result`. Matrices in `packable`
    can be stored packed. `following`: the blocks after this one, as far as the walk holds them.
    """

    index: int
    module: nn.Module
    anatomy: BlockAnatomy
    stored: dict[str, Tensor]
    storage_dtypes: dict[str, torch.dtype]
    packable: frozenset[str] = frozenset()
    result: BlockResult = field(default_factory=BlockResult)
    following: Sequence["Block"] = ()

    @property
    def linears(self) -> dict[str, Linear]:
        """Return the matrices of the block by name."""
        return self.anatomy.linears

    def weight(self, name: str) -> Tensor:
        """Return the matrix `name` as an [O, I] view in the compute dtype."""
        linear = self.linears[name]
        return linear.view(self.module.get_parameter(linear.parameter))

    def storage_dtype(self, name: str) -> torch.dtype:
        """Return the dtype of the matrix `name` in the checkpoint."""
        return self.storage_dtypes[self.linears[name].parameter]

    def assign(self, name: str, weight_OI: Tensor) -> None:
        """Replace the matrix `name`, rounded to its storage dtype: the block runs with the weights that are saved."""
        with torch.no_grad():
            self.weight(name).copy_(weight_OI.to(self.storage_dtype(name)))
        self._changed(self.linears[name].parameter)

    def silence(self, name: str) -> None:
        """Set the bias beside the matrix `name` to zero, if it has one."""
        bias = self._bias(name)
        if bias in dict(self.module.named_parameters()):
            with torch.no_grad():
                self.module.get_parameter(bias).zero_()
            self._changed(bias)

    def add_bias(self, name: str, bias_O: Tensor) -> None:
        """Add to the bias beside the matrix `name`. A missing bias begins at zero and is noted in `result.added`."""
        bias, weight = self._bias(name), self.weight(name)
        part: Any = self.module.get_submodule(bias.rpartition(".")[0])
        if part.bias is None:
            part.bias = nn.Parameter(weight.new_zeros(len(bias_O)), requires_grad=False)
            self.result.added.add(bias)
        with torch.no_grad():
            part.bias.copy_((part.bias + bias_O).to(self.storage_dtype(name)))
        self._changed(bias)

    def _changed(self, parameter: str) -> None:
        self.result.parameters[parameter] = self.module.get_parameter(parameter).detach()

    def _bias(self, name: str) -> str:
        return f"{self.linears[name].parameter.removesuffix(WEIGHT)}.bias"

    def run(self, call: Call, x_BTD: Tensor, seen: Callable[[str, Tensor], None] | None = None) -> Tensor:
        """Run one forward, differentiable if `x_BTD` is. `seen(name, input)` is called for each matrix in use."""
        if seen is None:
            with torch.set_grad_enabled(x_BTD.requires_grad):
                return call(self.module, x_BTD)
        names = {self._observed_name(linear): linear.name for linear in self.linears.values()}

        def observe(observed: str, x: Tensor, _transposed: bool) -> None:
            if observed in names:
                seen(names[observed], x)

        pointers: Pointers = {}
        for linear in self.linears.values():
            weight_OI = self.weight(linear.name)
            shape = weight_OI.T.shape if linear.transposed else weight_OI.shape
            pointers[weight_OI.data_ptr()] = Slice(self._observed_name(linear), shape)
        with torch.set_grad_enabled(x_BTD.requires_grad), MatmulObserver(pointers, observe):
            return call(self.module, x_BTD)

    def release(self) -> None:
        """Free the weights. The module returns to the meta device, without added biases."""
        for bias in self.result.added:
            setattr(self.module.get_submodule(bias.rpartition(".")[0]), "bias", None)  # noqa: B010 (typed as a tensor)
        self.module.to("meta")
        self.stored.clear()
        self.result = BlockResult()
        return_free_memory()

    @staticmethod
    def _observed_name(linear: Linear) -> str:
        return linear.parameter if linear.expert is None else f"{linear.parameter}[{linear.expert}]"


def open_decoder(
    model: str | Path, device: torch.device, dtype: torch.dtype | None = None, *, logit_bytes: int | None = None,
    linked_to: Path | None = None, blocks: Collection[int] | None = None,
) -> "Decoder":  # fmt: skip
    """Return the decoder of a checkpoint. Raises CheckpointError if weights that must be plain are packed or quantized.

    Those of `blocks` must be plain, by default all weights of the model. `linked_to` is the folder that links in
    `model` may lead to (see `Checkpoint.open`).
    """
    checkpoint = Checkpoint.open(model, linked_to)
    decoder = Decoder(checkpoint, device, dtype, logit_bytes=logit_bytes)
    if checkpoint.packed:
        _require_plain(decoder, blocks)
    return decoder


def _require_plain(decoder: "Decoder", blocks: Collection[int] | None) -> None:
    """Raise CheckpointError if a matrix of `blocks` is packed already; None means every weight of the model."""
    every = range(len(decoder))
    packed = [index for index in every if decoder.packed_matrices(index)]
    wrong = [index for index in packed if blocks is None or index in blocks]
    plain = [index for index in every if index not in packed]
    if not wrong and blocks is not None:
        return
    if not plain:
        decoder.checkpoint.require_plain()
    where = f"in blocks {format_blocks(wrong)}" if wrong else "in its embeddings"
    raise CheckpointError(
        f"{decoder.checkpoint.folder} is already packed or quantized {where}: choose from the other blocks with blocks "
        f"(--blocks {format_blocks(plain)}), or start from the dense checkpoint"
    )


class Decoder:
    """A causal language model read from disk one block at a time.

    The compute dtype is float32 on the CPU and the dtype of the checkpoint elsewhere. `logit_bytes` is the budget of
    `model.logits` for one slice of logits.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        dtype: torch.dtype | None = None,
        *,
        logit_bytes: int | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        self.device = device
        self.logit_bytes = logit_bytes
        self.dtype = dtype or (torch.float32 if device.type == "cpu" else checkpoint.dtype)
        with config_faults(checkpoint.folder):
            self.model = build_skeleton(checkpoint.config, self.dtype)
            resize(self.model, checkpoint.shapes)
            self.anatomy = discover(self.model)
            self.path, self._blocks = find_blocks(self.model)
            self._shared = shared_names(self.path, self._blocks)
            self.names = weight_names(self.model, checkpoint.tensors)
            self.kept = Kept.of(self.anatomy, self.names, checkpoint)
            self.unread = Unread.of(self.names, checkpoint, self.path)
            check_dtypes(checkpoint, self.model, self.names, set(self.tower_names))
            check_complete(checkpoint, self.model, self.names)
        self._outer_loaded = False

    def __len__(self) -> int:
        return len(self._blocks)

    @property
    def hidden_size(self) -> int:
        """Return D, the width of the residual stream."""
        return int(self.checkpoint.config.get_text_config().hidden_size)

    @property
    def positions(self) -> int | None:
        """Return the longest window of the model in tokens, or None if its config does not say."""
        value = getattr(self.checkpoint.config.get_text_config(), "max_position_embeddings", None)
        return None if value is None else int(value)

    @property
    def tower_names(self) -> list[str]:
        """Return the names on disk of the tensors of towers, which text alone does not run."""
        idle = tuple(f"{name}." for name in self.anatomy.idle)
        return [name for name, parameter in self.names.parameters.items() if parameter.startswith(idle)]

    def warnings(self, *, drop_unused: bool) -> list[str]:
        """Return what a user should know of the file: tensors without a place, and a head that the config denies."""
        found = [self.unread.message(dropped=drop_unused)] if self.unread.names else []
        if gguf := gguf_source(self.checkpoint.folder):
            found.append(f"{gguf['file']} is {gguf['note']} to {gguf['dtype']}, in {self.checkpoint.folder}")
        if head := self.checkpoint.own_head:
            found.append(
                f"{head} differs from the embeddings, although config.json ties them: the head of the file is used, "
                f"and a result says {TIE} false"
            )
        return found

    def disk_names(self, index: int | None) -> list[str]:
        """Return the names on disk of the tensors of block `index`, or outside blocks and towers for None."""
        if index is not None:
            return self.names.below(self.anatomy.prefix(index))
        towers = set(self.tower_names)
        return [name for name in self.names.outside(f"{self.path}.") if name not in towers]

    def parameter(self, name: str, index: int) -> str:
        """Return the parameter name inside block `index` of the tensor `name` on disk, or of an added bias."""
        if name not in self.names.parameters:
            return self.parameter(f"{name.removesuffix('.bias')}{WEIGHT}", index).removesuffix(WEIGHT) + ".bias"
        return self.names.parameters[name].removeprefix(self.anatomy.prefix(index))

    def disk_module(self, index: int, name: str) -> str:
        """Return the name on disk of the module of the packable matrix `name` of block `index`."""
        return self.names.modules[self.anatomy.prefix(index) + name]

    def embedding_matrices(self) -> dict[str, list[str]]:
        """Return the names on disk of the weights of embeddings and LM head, by the name of their module on disk.

        A tied head counts as embeddings.
        """
        names = {module: name for name, module in self.model.named_modules()}
        found: dict[str, list[str]] = {}
        for module in (self.model.get_input_embeddings(), self.model.get_output_embeddings()):
            if module is not None:
                weight = names[module] + WEIGHT
                owner = self.model.all_tied_weights_keys.get(weight, weight).removesuffix(WEIGHT)
                stored = (name for name, target in self.names.parameters.items() if target == weight)
                found.setdefault(self.names.modules.get(owner, owner), []).extend(stored)
        return found

    def load(self, index: int, stored: dict[str, Tensor] | None = None) -> Block:
        """Read block `index` to the device, from `stored` (names on disk) if given, with its added biases.

        This is safe for the next block while another one computes.
        """
        if stored is None:
            stored = self.checkpoint.read(self.disk_names(index), pinned=self.device.type == "cuda")
        added = {name: stored.pop(name) for name in list(stored) if name not in self.names.parameters}
        self._fill(stored)
        module = self._blocks[index]
        self._fill_shared(index, module)
        missing = [name for name, parameter in module.named_parameters() if parameter.is_meta]
        if missing:
            raise CheckpointError(
                f"{self.checkpoint.folder} has no weights for {self.anatomy.prefix(index)}{missing[0]}: "
                "the checkpoint is incomplete or belongs to another architecture"
            )
        materialize_buffers(self.model, module, "cpu")
        module.requires_grad_(False).to(self.device, non_blocking=True)
        prefix = self.anatomy.prefix(index)
        dtypes = {self.names.parameters[name].removeprefix(prefix): tensor.dtype for name, tensor in stored.items()}
        block = Block(index, module, self.anatomy.blocks[index], stored, dtypes, packable=self.packable(index))
        for name, bias_O in added.items():
            block.add_bias(self.parameter(name, index).removesuffix(".bias"), bias_O.to(self.device))
        return block

    def _fill_shared(self, index: int, module: nn.Module) -> None:
        """Read the parameters of a block that the file holds once, in another block."""
        for name, parameter in module.named_parameters():
            others = self._shared.get(self.anatomy.prefix(index) + name, ())
            if not parameter.is_meta or not others:
                continue
            stored = next((disk for disk, found in self.names.parameters.items() if found in others), None)
            if stored is not None and stored not in self.names.converted:
                value = self.checkpoint.read([stored])[stored].to(self.dtype)
                part, _, leaf = name.rpartition(".")
                module.get_submodule(part)._parameters[leaf] = nn.Parameter(value, requires_grad=False)

    def packable(self, index: int) -> frozenset[str]:
        """Return the matrices that are the whole weight of an nn.Linear and lie on disk unconverted, as one tensor."""
        return frozenset(name for name in self.anatomy.blocks[index].linears if not self.dense_reason(index, name))

    def packed_matrices(self, index: int) -> dict[str, str]:
        """Return the matrices of a block that the checkpoint holds packed, with the names of their modules on disk."""
        names = {name: self.names.modules.get(self.anatomy.prefix(index) + name, "") for name in self.packable(index)}
        return {name: module for name, module in names.items() if module in self.checkpoint.packed}

    def dense_reason(self, index: int, name: str) -> str:
        """Return what a matrix is that can only be stored dense; empty for a packable one."""
        linear = self.anatomy.blocks[index].linears[name]
        if linear.expert is not None:
            return "slices of fused experts"
        if linear.transposed:
            return "stored transposed"
        if linear.parameter != name + WEIGHT or not isinstance(self._blocks[index].get_submodule(name), nn.Linear):
            return "outside linear layers"
        return "" if self.anatomy.prefix(index) + name in self.names.modules else "converted when they are loaded"

    def disk_tensors(self, block: Block) -> dict[str, Tensor]:
        """Return all tensors of a block under their names on disk. Unchanged tensors are bit-identical.

        The reverse conversion of transformers splits matrices that its loader fuses (experts).
        """
        prefix = self.anatomy.prefix(block.index)
        tensors, result = dict(block.stored), block.result
        fused: dict[str, Tensor] = {}
        for name, old in block.stored.items():
            parameter = self.names.parameters[name].removeprefix(prefix)
            if parameter not in result.parameters:
                continue
            if (linear_name := parameter.removesuffix(WEIGHT)) in result.packed:
                tensors.pop(name)
                for key, tensor in result.packed[linear_name].tensors.items():
                    tensors[f"{name.removesuffix(WEIGHT)}.{key}"] = to_host(tensor)
                continue
            new = to_host(result.parameters[parameter].to(old.dtype))
            if name in self.names.converted:
                fused[prefix + parameter] = new
            else:
                tensors[name] = new
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # the copies above may still be under way
        if fused:
            tensors.update(split_converted(self.model, fused, tensors))
        return tensors

    def embed(self, ids_BT: Tensor) -> tuple[Tensor, list[Call]]:
        """Return the hidden state [B, T, D] before the first block, and the call of each block for this batch shape."""
        dims = self.anatomy.layout.dims

        def output(index: int, call: Call, hidden: Tensor) -> Any:
            return self.anatomy.blocks[index].wrap(hidden)

        with torch.no_grad():
            self._load_outer_once()
            met = record_calls(self._blocks, lambda: self._run_model(ids_BT), output)
        return met[0][1].movedim(dims, (0, 1)), [replace(call, dims=dims) for call, _ in met]

    def logits(self, ids_BT: Tensor, x_BTD: Tensor) -> Tensor:
        """Return the logits [B, T, V] of the hidden state after the last block. They are differentiable if it is."""
        last = len(self) - 1
        as_passed = x_BTD.movedim((0, 1), self.anatomy.layout.dims)

        def stub(index: int, call: Call, hidden_BTD: Tensor) -> Any:
            return self.anatomy.blocks[index].wrap(as_passed if index == last else hidden_BTD)

        with torch.set_grad_enabled(x_BTD.requires_grad):
            logits: Tensor = self._run_outer(ids_BT, stub).logits
        return logits

    def position_slices(self, count: int) -> list[slice]:
        """Cut `count` positions into slices whose logits fit the budget."""
        return position_slices(count, vocabulary_of(self.model), self.logit_bytes)

    def release_outer(self) -> None:
        """Free embeddings, final norm and LM head."""
        for module in outer_modules(self.model, self.path, self.anatomy.idle):
            for name, parameter in module.named_parameters(recurse=False):
                module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to("meta")
        self._outer_loaded = False

    def _run_outer(self, ids_BT: Tensor, stub: Callable[[int, Call, Tensor], Any]) -> Any:
        self._load_outer_once()
        with stubbed(self._blocks, stub):
            return self._run_model(ids_BT)

    def _run_model(self, ids_BT: Tensor) -> Any:
        return self.model(input_ids=ids_BT.to(self.device), use_cache=False)

    def _load_outer_once(self) -> None:
        if not self._outer_loaded:
            self.load_outer()

    def load_outer(self, stored: dict[str, Tensor] | None = None) -> None:
        """Read embeddings, final norm and LM head to the device, from `stored` (names on disk) if given."""
        stored = self.checkpoint.read(self.disk_names(None)) if stored is None else stored
        self._fill(stored)
        present = {self.names.parameters[name] for name in stored}
        tied = self.model.all_tied_weights_keys
        self.model.tie_weights({*tied, *tied.values()} - present, recompute_mapping=False)
        places = {module: name for name, module in self.model.named_modules()}
        for module in outer_modules(self.model, self.path, self.anatomy.idle):
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.is_meta:
                    raise CheckpointError(f"{self.checkpoint.folder} has no {places[module]}.{name}")
                parameter.data = parameter.data.to(self.device)
            for name, buffer in module.named_buffers(recurse=False):
                if not buffer.is_meta:
                    module._buffers[name] = buffer.to(self.device)
            materialize_buffers(self.model, module, self.device, recurse=False)
        self._outer_loaded = True

    def _fill(self, stored: dict[str, Tensor]) -> None:
        wrong = fill(self.model, stored, self.names.mapping, self.dtype)
        if wrong is not None:
            raise CheckpointError(f"{self.checkpoint.folder}: {wrong} does not fit the model's config")
