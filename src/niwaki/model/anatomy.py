"""Anatomy of a Hugging Face decoder: its blocks, matrices and shared inputs, discovered and not listed.

The model is built on the meta device from its config. The modules outside the blocks (embeddings, norms, LM head) get
empty memory, and one short forward runs through the model. A stub replaces each block and records its call arguments.
The first block of each distinct structure runs under `WeightUses`, which records what every weight of two or more
dimensions does to the activations. The result:

- each matrix, its orientation and, for fused 3-D expert tensors, one matrix per expert;
- the groups of matrices that read the same input (they share statistics);
- the weights that stay dense, each with its reason: routers, gates with one output, weights that several blocks share,
  and weights that no plain product uses (convolutions, lookups, states, biases and norms of two dimensions).

A block weight of two or more dimensions that met no activation is an error that names it. Nothing is skipped silently.
Cost: address space, not memory, and the time of one 8-token forward per structure.

    skeleton = build_skeleton(config, torch.float32)
    anatomy = discover(skeleton)
    anatomy.blocks[0].linears["self_attn.q_proj"]
"""

import copy
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from niwaki.errors import ArchitectureError, NiwakiError
from niwaki.model.block_calls import PROBE_TOKENS, Call, Layout, has_containers, measure_layout, rebuilt, stubbed
from niwaki.model.hf import materialize_buffers, owning_model
from niwaki.model.matmul_observer import MatmulObserver, weight_pointers
from niwaki.model.weight_uses import Use, WeightUses

MAX_PROBES = 16  # of a block whose router sends no token to some experts
ROUTER = "router"
GATE = "gate with one output"
SMALL = "a few coefficients"
TABLE_ENTRIES = 2**20  # of a table, such as one of positions, that call arguments may be made of
MIN_SIDE = 5  # of a matrix: with fewer inputs or outputs it takes no room, and is kept dense
SHARED = "shared by several blocks"


@dataclass(frozen=True)
class Linear:
    """One matrix of a block, with [rows, columns] = [outputs, inputs] in any storage order.

    `expert` is the index into a fused [E, ., .] parameter. If `stacked` is set, the rows of a parameter of two
    dimensions are that many experts. `group` names the first matrix that reads the same input, which may be this one.
    """

    name: str
    parameter: str
    expert: int | None
    transposed: bool
    rows: int
    columns: int
    group: str
    stacked: int | None = None

    def view(self, parameter: Tensor) -> Tensor:
        """Return the matrix as an [O, I] view of its parameter, or of the gradient of the parameter."""
        stack = parameter if self.stacked is None else parameter.unflatten(0, (self.stacked, -1))
        stored = stack if self.expert is None else stack[self.expert]
        return stored.T if self.transposed else stored


@dataclass(frozen=True)
class BlockAnatomy:
    """Structure of one decoder block.

    `kept_dense` gives the reason for every weight of two or more dimensions that stays dense, by parameter. The output
    is a tensor, or a tuple of `tuple_size` with tensors at the places `extras` after the hidden state.
    """

    linears: dict[str, Linear]
    kept_dense: Mapping[str, str]
    tuple_size: int | None
    extras: tuple[int, ...] = ()

    @property
    def groups(self) -> dict[str, tuple[Linear, ...]]:
        """Return the matrices by shared input, keyed by the name of the first one, in the order of the forward pass."""
        found: dict[str, tuple[Linear, ...]] = {}
        for linear in self.linears.values():
            found[linear.group] = (*found.get(linear.group, ()), linear)
        return found

    def sharing(self, names: Container[str]) -> list[list[str]]:
        """Group `names` by shared input, in the order of the forward pass."""
        found = [[linear.name for linear in members if linear.name in names] for members in self.groups.values()]
        return [group for group in found if group]

    @property
    def weights(self) -> int:
        """Return the number of weights in all matrices."""
        return sum(linear.rows * linear.columns for linear in self.linears.values())

    def wrap(self, hidden: Tensor, extra: Tensor | None = None) -> Any:
        """Return `hidden` in the form of the block output: alone, or first in a tuple, `extra` for other tensors."""
        if self.tuple_size is None:
            return hidden
        return (hidden, *(extra if place in self.extras else None for place in range(1, self.tuple_size)))


@dataclass(frozen=True)
class Anatomy:
    """Anatomy of a decoder: `path` names the module list of blocks, `blocks` holds the structure of each.

    `idle` names the modules that do not run on text alone: the towers of a wrapper. `layout` says where the windows of
    a batch lie in what the blocks receive.
    """

    path: str
    blocks: tuple[BlockAnatomy, ...]
    idle: tuple[str, ...] = ()
    layout: Layout = field(default_factory=Layout)

    def prefix(self, index: int) -> str:
        """Return the name prefix of the parameters of one block, with the final dot."""
        return f"{self.path}.{index}."

    @property
    def weights(self) -> int:
        """Return the number of weights in all matrices of all blocks."""
        return sum(block.weights for block in self.blocks)

    def only(self, indices: Container[int]) -> "Anatomy":
        """Return the anatomy with the matrices of these blocks alone; the other blocks have none."""
        blocks = enumerate(self.blocks)
        return replace(self, blocks=tuple(b if i in indices else replace(b, linears={}) for i, b in blocks))


def find_blocks(skeleton: Any) -> tuple[str, nn.ModuleList]:
    """Find the blocks of the decoder: the module list with the most parameters, in a wrapper that of the text model."""
    lists = [(name, module) for name, module in skeleton.named_modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise ArchitectureError(
            f"{type(skeleton).__name__} has no list of blocks: niwaki walks decoders built as a chain of layers"
        )
    if skeleton.config.sub_configs:
        lists = _of_text(skeleton, lists)
    return max(lists, key=lambda found: sum(p.numel() for p in found[1].parameters()))


def _of_text(skeleton: Any, lists: list[tuple[str, nn.ModuleList]]) -> list[tuple[str, nn.ModuleList]]:
    """Return the lists that can be the blocks of the text model, by the configs of the models that own them.

    A tower may be larger than the text model. Raises ArchitectureError if the lists of several models fit.
    """
    text = skeleton.config.get_text_config()
    owners = {name: _owner(skeleton, name) for name, _ in lists}
    of_text = [found for found in lists if type(skeleton.get_submodule(owners[found[0]]).config) is type(text)] or lists
    layers = getattr(text, "num_hidden_layers", None)
    fitting = [found for found in of_text if len(found[1]) == layers] or of_text
    outermost = [found for found in fitting if not any(found[0].startswith(f"{name}.") for name, _ in fitting)]
    if len({owners[name] for name, _ in outermost}) > 1:
        names = ", ".join(f"{name} ({len(module)} layers)" for name, module in outermost)
        raise ArchitectureError(
            f"{type(skeleton).__name__} has several lists of layers, and its config does not say which is the decoder "
            f"of text: {names}"
        )
    return outermost


def _owner(skeleton: Any, name: str) -> str:
    """Return the name of the innermost model of transformers that holds the module `name`."""
    from transformers import PreTrainedModel

    parts = name.split(".")
    while parts and not isinstance(skeleton.get_submodule(".".join(parts)), PreTrainedModel):
        parts.pop()
    return ".".join(parts)


def discover(skeleton: Any) -> Anatomy:
    """Discover the anatomy of a skeleton on the meta device and leave the skeleton there.

    Raises ArchitectureError with the names of weights that no matrix covers.
    """
    path, blocks = find_blocks(skeleton)
    known: dict[Any, BlockAnatomy] = {}
    found: list[BlockAnatomy] = []

    named = shared_names(path, blocks)
    shared = [frozenset(n for n, _ in b.named_parameters() if f"{path}.{i}.{n}" in named) for i, b in enumerate(blocks)]

    def run_dry(index: int, call: Call, hidden_BTD: Tensor) -> None:
        _run_dry(skeleton, blocks[index], call, hidden_BTD)

    def probe(index: int, call: Call, hidden_BTD: Tensor) -> Any:
        module = blocks[index]
        signature = (type(module), shared[index], tuple((name, p.shape) for name, p in module.named_parameters()))
        if signature not in known:
            known[signature] = _probe_block(skeleton, module, f"{path}.{index}", call, hidden_BTD, shared[index])
        if has_containers(call):  # a later block may need what this one hands on
            run_dry(index, call, hidden_BTD)
        found.append(known[signature])
        return found[-1].wrap(hidden_BTD)

    with _observed_forwards(outer_modules(skeleton, path)) as ran, _short_forwards(skeleton, path) as run:
        with stubbed(blocks, probe):
            run(1)
        if len(found) != len(blocks):
            raise ArchitectureError(
                f"{type(skeleton).__name__} has {len(blocks)} blocks and ran {len(found)} in one forward: niwaki walks "
                "decoders that run every block once"
            )
        layout = measure_layout(blocks, run, run_dry, [block.wrap for block in found])
    return Anatomy(path, tuple(found), tuple(_idle_modules(skeleton, path, ran)), layout)


def run_stubbed(skeleton: Any, path: str, blocks: nn.ModuleList, stub: Callable[[int, Call, Tensor], Any]) -> None:
    """Run a short forward of a skeleton on the meta device; `stub(index, call, hidden)` stands in for every block.

    Matrices outside the blocks give zeros. Raises ArchitectureError for a forward that fails.
    """
    with _short_forwards(skeleton, path) as run, stubbed(blocks, stub):
        run(1)


@contextmanager
def _short_forwards(skeleton: Any, path: str) -> Iterator[Callable[..., None]]:
    """Yield `run(count, tokens)`, a forward whose matrices outside the blocks give zeros.

    Raises ArchitectureError for a forward that fails.
    """

    def run(count: int, tokens: int = PROBE_TOKENS) -> None:
        skeleton(input_ids=torch.zeros(count, tokens, dtype=torch.int64), use_cache=False)

    with _empty_outer_modules(skeleton, path) as outer:
        try:
            with torch.no_grad(), MatmulObserver(weight_pointers(outer), lambda name, x, transposed: None, dry=True):
                yield run
        except NiwakiError:
            raise
        except Exception as error:  # any model code may fail on a structure niwaki does not know
            raise ArchitectureError(
                f"{type(skeleton).__name__}: a short forward through its blocks failed "
                f"({type(error).__name__}: {str(error).strip().split(chr(10))[0][:200]})"
            ) from error


@contextmanager
def _observed_forwards(modules: Iterable[nn.Module]) -> Iterator[set[nn.Module]]:
    """Yield the set of `modules` whose forward was called meanwhile."""
    ran: set[nn.Module] = set()
    hooks = [module.register_forward_pre_hook(lambda module, _: ran.add(module)) for module in modules]
    try:
        yield ran
    finally:
        for hook in hooks:
            hook.remove()


def _idle_modules(skeleton: Any, path: str, ran: Container[nn.Module]) -> Iterator[str]:
    """Yield the outermost modules beside the text model that hold parameters and did not run, nor any part of them.

    The text model itself may read parameters of modules without a call, so all of it counts as run.
    """
    text, ends = _owner(skeleton, path), (skeleton.get_input_embeddings(), skeleton.get_output_embeddings())

    def visit(name: str, module: nn.Module) -> Iterator[str]:
        if name == text or (module in ran and not f"{text}.".startswith(f"{name}.")):
            return
        parts = list(module.modules())
        if not any(part in ran or part in ends or part is within for part in parts):
            if next(module.parameters(), None) is not None:
                yield name
            return
        for child_name, child in module.named_children():
            yield from visit(f"{name}.{child_name}", child)

    within = skeleton.get_submodule(text)
    if text:
        for name, child in skeleton.named_children():
            yield from visit(name, child)


def outer_modules(skeleton: nn.Module, path: str, idle: Iterable[str] = ()) -> Iterator[nn.Module]:
    """Yield each module outside the blocks and the `idle` modules."""
    left_out = (f"{path}.", *(f"{name}." for name in idle))
    for name, module in skeleton.named_modules():
        if not f"{name}.".startswith(left_out) or name == path:
            yield module


@contextmanager
def _empty_outer_modules(skeleton: Any, path: str) -> Iterator[Mapping[str, Tensor]]:
    """Yield the parameters outside the blocks, which have memory during the probe."""
    modules = list(outer_modules(skeleton, path))
    held = [(module, dict(module._parameters), dict(module._buffers)) for module in modules]
    for module in modules:
        for name, parameter in module.named_parameters(recurse=False):
            module._parameters[name] = _untouched(parameter)
        for part_name, buffer in module.named_buffers(recurse=False):
            module._buffers[part_name] = torch.zeros_like(buffer, device="cpu")
        if module._buffers:
            owning_model(skeleton, module)._init_weights(module)
    parameters = {
        f"{number}.{n}": p for number, m in enumerate(modules) for n, p in m._parameters.items() if p is not None
    }
    try:
        yield parameters
    finally:
        for module, held_parameters, held_buffers in held:
            module._parameters.update(held_parameters)
            module._buffers.update(held_buffers)


def _untouched(meta: Tensor) -> nn.Parameter:
    """Allocate memory in the shape of a meta parameter. Large ones stay unwritten: a dry observer never reads them."""
    make = torch.zeros if meta.dim() < 2 or meta.numel() <= TABLE_ENTRIES else torch.empty
    return nn.Parameter(make(meta.shape, dtype=meta.dtype, device="cpu"), requires_grad=False)


def shared_names(path: str, blocks: nn.ModuleList) -> dict[str, tuple[str, ...]]:
    """Return for each parameter that several blocks share all its names in the model."""
    names: dict[int, list[str]] = {}
    for index, block in enumerate(blocks):
        for name, parameter in block.named_parameters():
            names.setdefault(id(parameter), []).append(f"{path}.{index}.{name}")
    return {name: tuple(group) for group in names.values() if len(group) > 1 for name in group}


def _probe_block(
    skeleton: Any, meta: nn.Module, where: str, call: Call, hidden_BTD: Tensor, shared: frozenset[str]
) -> BlockAnatomy:
    """Run copies of one block under `WeightUses` and read its structure.

    Tokens take other ways in each run, until every weight was used, or MAX_PROBES were not enough.
    """
    products: dict[str, Use] = {}
    kept_dense = {name: SHARED for name, p in meta.named_parameters() if name in shared and p.dim() >= 2}
    unused: dict[str, Tensor] = {}
    for seed in range(MAX_PROBES):
        module = _with_memory(skeleton, meta)
        parameters = {name: p for name, p in module.named_parameters() if p.dim() >= 2}
        uses = WeightUses(parameters, [hidden_BTD, call.args, call.kwargs], seed)
        with torch.no_grad(), uses:
            args, kwargs = rebuilt((call.args, call.kwargs))
            out = module(hidden_BTD.clone(), *args, **kwargs)
        products = uses.products | products
        matrices = {name.partition("[")[0] for name in products}
        kept_dense = {n: reason for n, reason in uses.others.items() if n not in matrices} | kept_dense
        unused = {n: p for n, p in parameters.items() if n not in matrices and n not in kept_dense}
        if not unused:
            break
    if unused:
        raise ArchitectureError(
            f"{type(skeleton).__name__}: {where} ({type(meta).__name__}) keeps weights that niwaki would have to skip: "
            f"{', '.join(f'{name} {list(p.shape)}' for name, p in unused.items())}. A short forward never used them, "
            "so nothing says what they multiply"
        )
    found = {name: use for name, use in products.items() if name.partition("[")[0] not in kept_dense}
    linears, gates = _read_products(parameters, found)
    if not isinstance(out, tuple | list):
        return BlockAnatomy(linears, gates | kept_dense, None)
    extras = tuple(place for place, part in enumerate(out) if place and isinstance(part, Tensor))
    return BlockAnatomy(linears, gates | kept_dense, len(out), extras)


def _with_memory(skeleton: Any, meta: nn.Module) -> nn.Module:
    """Return a copy of a block on the CPU, with computed buffers and without its stub."""
    module = copy.deepcopy(meta)
    vars(module).pop("forward", None)  # the stub was copied along
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            part._parameters[name] = _untouched(parameter)
    materialize_buffers(owning_model(skeleton, meta), module, "cpu")
    return module


def _run_dry(skeleton: Any, meta: nn.Module, call: Call, hidden_BTD: Tensor) -> None:
    """Run a copy of one block without its products, for what it writes into the containers of the call."""
    module = _with_memory(skeleton, meta)
    parameters = {name: p for name, p in module.named_parameters() if p.dim() >= 2}
    with torch.no_grad(), WeightUses(parameters, [hidden_BTD, call.args, call.kwargs], 0):
        module(hidden_BTD.clone(), *call.args, **call.kwargs)


def _read_products(
    parameters: Mapping[str, Tensor], products: Mapping[str, Use]
) -> tuple[dict[str, Linear], dict[str, str]]:
    """Return the matrices in the order of their products, and the routers and gates, which stay dense."""
    sliced = {observed.partition("[")[0]: use for observed, use in products.items() if "[" in observed}
    stacks = {name: parameters[name].numel() // use.shape.numel() for name, use in sliced.items()}
    leaders: dict[Any, str] = {}
    linears: dict[str, Linear] = {}
    kept_dense: dict[str, str] = {}
    for observed, use in products.items():
        parameter = observed.partition("[")[0]
        rows, columns = use.shape[::-1] if use.transposed else use.shape
        same_input = (use.x.data_ptr(), use.x.numel(), use.version)
        if parameter in stacks:
            if linear_name(parameter, 0) in linears:
                continue  # another expert of a stack already described
            leader, count = leaders.setdefault(same_input, parameter), stacks[parameter]
            stacked = count if parameters[parameter].dim() == 2 else None
            for expert in range(count):
                name, group = linear_name(parameter, expert), linear_name(leader, expert)
                linears[name] = Linear(name, parameter, expert, use.transposed, rows, columns, group, stacked)
        elif _is_router(parameter, rows, stacks):
            kept_dense[parameter] = ROUTER
        elif min(rows, columns) < MIN_SIDE:
            kept_dense[parameter] = GATE if rows == 1 else SMALL
        else:
            leader = leaders.setdefault(same_input, linear_name(parameter, None))
            name = linear_name(parameter, None)
            linears[name] = Linear(name, parameter, None, use.transposed, rows, columns, leader)
    return linears, kept_dense


def linear_name(parameter: str, expert: int | None) -> str:
    """Name a matrix: `mlp.up_proj.weight` → `mlp.up_proj`; expert 3 of `e.down_proj` → `e.3.down_proj`."""
    if expert is None:
        return parameter.removesuffix(".weight")
    module, _, leaf = parameter.rpartition(".")
    return f"{module}.{expert}.{leaf}"


def _is_router(parameter: str, rows: int, stacks: dict[str, int]) -> bool:
    """Return True for a router, which stays exact: one output per expert, in the module that holds the experts."""
    return any(
        rows == experts and parameter.startswith(stack.rpartition(".")[0].rpartition(".")[0] + ".")
        for stack, experts in stacks.items()
    )
