"""Sites where the basis of a decoder can change: what reads and writes the residual stream, heads, and neurons.

Which norm feeds which matrix is found in a short forward: a matrix reads the norm whose output is its input. A matrix
that reads none, and puts out as many channels as the stream has, writes to the stream. No list of families is read.

    sites = find_sites(model, decoder, ids_BT, residual=True)
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from niwaki.errors import ArchitectureError
from niwaki.formats.quantized import WEIGHT
from niwaki.model.decoder import Decoder
from niwaki.model.prunable import block_units

TOLERANCE = 1e-3  # relative error of a norm in another basis, in float32


@dataclass(frozen=True)
class BlockSites:
    """Names of the modules of a block: the norms with the matrices that read them, and those that write to the stream.

    `values` and `output` are the matrices of the values and after attention, of `width` channels per head.
    """

    readers: Mapping[str, Sequence[str]]
    writers: Sequence[str]
    values: str = ""
    output: str = ""
    width: int = 0
    producers: Sequence[str] = ()
    consumer: str = ""


@dataclass(frozen=True)
class Sites:
    """Sites of a model: blocks, final norm, embeddings and head."""

    blocks: Sequence[BlockSites]
    final: str
    embeddings: str
    head: str

    def norms(self) -> dict[str, Sequence[str]]:
        """Return every norm with the matrices that read it, the head included."""
        found = {norm: names for block in self.blocks for norm, names in block.readers.items()}
        return {**found, self.final: [self.head]}


def find_sites(model: Any, decoder: Decoder, ids_BT: Tensor, *, residual: bool) -> Sites:
    """Find what reads and writes the stream by one forward. Raises ArchitectureError for what cannot turn."""
    path = decoder.path
    names = {module: name for name, module in model.named_modules()}
    embeddings, head = names[model.get_input_embeddings()], names[model.get_output_embeddings()]
    inputs, sources = _observed(model, ids_BT)
    width = model.get_input_embeddings().weight.shape[1]
    blocks = []
    for index, block in enumerate(decoder.anatomy.blocks):
        prefix = decoder.anatomy.prefix(index)
        readers: dict[str, list[str]] = {}
        writers = []
        for parameter, tensor in model.get_submodule(f"{path}.{index}").named_parameters():
            name = f"{prefix}{parameter.removesuffix(WEIGHT)}"
            if tensor.dim() < 2:
                continue
            if name not in inputs:
                if residual:
                    raise ArchitectureError(
                        f"{prefix}{parameter} does not belong to a plain matrix, so it cannot turn: use --residual none"
                    )
                continue
            if source := sources.get(inputs[name]):
                readers.setdefault(source, []).append(name)
            elif tensor.shape[0] == width:
                writers.append(name)
        blocks.append(_with_units(BlockSites(readers, writers), decoder, index, block, model))
    final = sources.get(inputs.get(head, 0), "")
    if residual and not final:
        raise ArchitectureError(f"{head} does not read a norm directly, so its input cannot turn: use --residual none")
    sites = Sites(blocks, final, embeddings, head)
    if residual:
        for norm in sites.norms():
            _check_norm(norm, model.get_submodule(norm), width)
    return sites


def _observed(model: Any, ids_BT: Tensor) -> tuple[dict[str, int], dict[int, str]]:
    """Return the address of the input of every linear module that ran, and the module that put out each address."""
    inputs: dict[str, int] = {}
    sources: dict[int, str] = {}
    alive: list[Tensor] = []

    def watch(name: str) -> Callable[..., None]:
        def seen(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            given = args[0] if args and isinstance(args[0], Tensor) else None
            if isinstance(module, nn.Linear) and given is not None:
                inputs[name] = given.data_ptr()
                alive.append(given)
            elif isinstance(output, Tensor) and not isinstance(module, nn.Embedding):
                if given is not None and output.data_ptr() != given.data_ptr():
                    sources[output.data_ptr()] = name
                alive.append(output)

        return seen

    leaves = [(name, module) for name, module in model.named_modules() if not any(True for _ in module.children())]
    hooks = [module.register_forward_hook(watch(name)) for name, module in leaves]
    try:
        model(ids_BT, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    activations = {name for name, module in leaves if not list(module.parameters()) and _elementwise(module)}
    return inputs, {address: name for address, name in sources.items() if name not in activations}


def _elementwise(module: nn.Module) -> bool:
    """Return whether a module without parameters acts on every channel alone, as activations and dropout do."""
    x = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    try:
        changed = x.clone()
        changed[:, 0] += 1
        return torch.equal(module(x)[:, 1:], module(changed)[:, 1:])
    except Exception:  # a module that does not take one tensor of any width, such as rotary positions, feeds no matrix
        return True


def _with_units(sites: BlockSites, decoder: Decoder, index: int, block: Any, model: Any) -> BlockSites:
    """Add the heads and neurons of a block, if it has such units."""
    prefix = decoder.anatomy.prefix(index)
    try:
        units = block_units(block, decoder.model.config)
    except ArchitectureError:
        return sites
    heads, neurons = units["heads"], units["neurons"]
    text = decoder.model.config.get_text_config()
    columns = block.linears[heads.consumer].columns
    width = getattr(text, "head_dim", None) or columns // text.num_attention_heads
    values = [name for name in heads.producers if name.rpartition(".")[2].startswith("v")]
    plain = all(isinstance(model.get_submodule(prefix + n), nn.Linear) for n in (*neurons.producers, neurons.consumer))
    return BlockSites(
        sites.readers,
        sites.writers,
        prefix + values[0] if len(values) == 1 else "",
        prefix + heads.consumer,
        width,
        [prefix + name for name in neurons.producers] if plain else (),
        prefix + neurons.consumer if plain else "",
    )


def _check_norm(name: str, norm: nn.Module, width: int) -> None:
    """Raise ArchitectureError unless a norm without its gain commutes with a rotation."""
    kept = dict(norm.named_parameters(recurse=False))
    if any(tensor.shape != (width,) for tensor in kept.values()) or kept.keys() - {"weight"}:
        extra = ", ".join(sorted(kept.keys() - {"weight"})) or "a gain of another width"
        raise ArchitectureError(f"{name} ({type(norm).__name__}) has {extra}, which does not turn: use --residual none")
    generator, like = torch.Generator().manual_seed(0), next(iter(kept.values()), torch.zeros(0))
    x_ND = torch.randn(4, width, generator=generator).add_(0.5).to(like)
    turn_DD = torch.linalg.qr(torch.randn(width, width, generator=generator))[0].to(like)
    with _plain(norm):
        error = float((norm(x_ND @ turn_DD) - norm(x_ND) @ turn_DD).norm() / norm(x_ND).norm())
    if not error < TOLERANCE:
        raise ArchitectureError(
            f"{name} ({type(norm).__name__}) depends on the basis, as a norm that subtracts the mean does: "
            "use --residual none"
        )


@contextmanager
def _plain(norm: nn.Module) -> Iterator[None]:
    """Set the gain of a norm to 1 for a while."""
    held = {name: tensor.clone() for name, tensor in norm.named_parameters(recurse=False)}
    set_plain(norm)
    try:
        yield
    finally:
        for name, tensor in norm.named_parameters(recurse=False):
            tensor.data.copy_(held[name])


@torch.no_grad()
def set_plain(norm: nn.Module) -> Tensor | None:
    """Set the gain of a norm to 1 and return what it was."""
    weight = getattr(norm, "weight", None)
    if weight is None:
        return None
    offset = _gain_offset(norm)
    gain_D: Tensor = weight + offset
    weight.fill_(1.0 - offset)
    return gain_D


@torch.no_grad()
def divide_gain(norm: Any, scale_D: Tensor) -> None:
    """Divide the output of a norm by scales: its gain, and its bias if it has one."""
    offset = _gain_offset(norm)
    norm.weight.copy_((norm.weight + offset) / scale_D - offset)
    if getattr(norm, "bias", None) is not None:
        norm.bias.div_(scale_D)


def _gain_offset(norm: Any) -> float:
    """Return what a norm adds to its weight: some families store gain − 1."""
    was_D, bias_D = norm.weight.clone(), getattr(norm, "bias", None)
    x_1D = torch.linspace(1, 2, len(was_D), device=was_D.device, dtype=was_D.dtype)[None]
    norm.weight.zero_()
    varies = bool((norm(x_1D) - (0 if bias_D is None else bias_D)).abs().max() > 0)
    norm.weight.copy_(was_D)
    return 1.0 if varies else 0.0


@torch.no_grad()
def linear_producer(model: Any, block: BlockSites, ids_BT: Tensor) -> str:
    """Return the matrix before the neurons whose output passes through no curve, empty if there is none.

    Twice its output is twice the input of the consumer.
    """
    seen: list[Tensor] = []
    consumer = model.get_submodule(block.consumer)
    hook = consumer.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    try:
        model.base_model(ids_BT, use_cache=False)
        for name in block.producers:
            producer = model.get_submodule(name)
            double = producer.register_forward_hook(lambda module, args, output: output * 2)
            try:
                model.base_model(ids_BT, use_cache=False)
            finally:
                double.remove()
            if torch.allclose(seen[-1], seen[0] * 2, rtol=1e-3, atol=1e-6 * float(seen[0].abs().max())):
                return name
    finally:
        hook.remove()
    return ""
