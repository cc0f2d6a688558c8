"""Trained forms of compressed matrices: what of each is learned, and how it goes back to its stored form.

A pruned matrix keeps its zeros, because their gradient is zero. So 2:4 stays 2:4. A smaller matrix is learned as it is.
Of a matrix of codes the codes, scales and offsets are learned (`recovery.codes`), of one that a trellis codes its
paths, scales and levels.

The mode `weights` learns a number per weight. `low-rank` learns a product of two thin matrices per matrix. It
is added to the weights or to the latent numbers, and merges in the end. `scales` learns only scales, offsets and zero
points. Norms and biases are learned in all modes.

    trained = prepare(model, skeleton, mode="weights", rank=16, seed=0, pruned=True)
    trained.groups      # parameters with the size of their step
    trained.plain()     # new weights by parameter

Legend: O outputs, I inputs, E experts, R rank.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from niwaki.compression.recovery.codes import LOW_RANK_SPEED, CodesLinear, Learned, LowRank, Mode
from niwaki.errors import ArchitectureError, NumericalError
from niwaki.formats.packed import PackedTensors
from niwaki.formats.sparse import CODES, VALUES, Sparse
from niwaki.model.decoder import Decoder
from niwaki.runtime.linear import PackedLinear, ReadableLinear
from niwaki.runtime.sparse_linear import SparseLinear
from niwaki.runtime.trellis_linear import TrellisLinear

NORM = "norm"


@dataclass
class Trained:
    """Learned parts of a model: parameters, plain weights by name, and packed modules by name."""

    learned: list[Learned] = field(default_factory=list)
    weights: dict[str, "_Plain"] = field(default_factory=dict)
    modules: dict[str, "CodesLinear | _Nonzeros"] = field(default_factory=dict)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters."""
        return [one.parameter for one in self.learned]

    @property
    def groups(self) -> dict[float, list[nn.Parameter]]:
        """Return the parameters by the size of their step: a power of two near the size of the weights."""
        found: dict[float, list[nn.Parameter]] = {}
        for one in self.learned:
            found.setdefault(2.0 ** round(math.log2(max(one.size, 1e-6))), []).append(one.parameter)
        return found

    def mask_gradients(self) -> None:
        """Set the gradient of pruned weights to zero."""
        for one in self.learned:
            if one.keep is not None and one.parameter.grad is not None:
                one.parameter.grad.mul_(one.keep)

    @torch.no_grad()
    def clamp(self) -> None:
        """Keep latent numbers near the codes."""
        for module in self.modules.values():
            if isinstance(module, CodesLinear):
                module.clamp()

    def search(self) -> None:
        """Search codes that do not follow from latent weights in every forward."""
        for module in self.modules.values():
            if isinstance(module, CodesLinear):
                module.search()

    @torch.no_grad()
    def settle(self, dtypes: Mapping[str, torch.dtype]) -> None:
        """Merge thin matrices, and round all plain weights as the file stores them."""
        nonzeros = [
            (one.plain, VALUES[one.about["values"]]) for one in self.modules.values() if isinstance(one, _Nonzeros)
        ]
        for one, dtype in [*((one, dtypes[name]) for name, one in self.weights.items()), *nonzeros]:
            weight = one.weight().to(dtype)
            if parametrize.is_parametrized(one.module, one.name):
                parametrize.remove_parametrizations(one.module, one.name, leave_parametrized=False)
            one.module.get_parameter(one.name).copy_(weight)

    def plain(self, dtypes: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
        """Return the new weights by parameter in the dtype of the file, on the CPU. Raises NumericalError."""
        found = {}
        for name, one in self.weights.items():
            weight = one.weight().detach().to(dtypes[name]).cpu()
            if not weight.isfinite().all():
                raise NumericalError(f"{name} is not finite after training: lower the rate")
            if one.keep is not None and bool(weight[~one.keep.cpu()].any()):
                raise NumericalError(f"{name}: training would change which weights are zero")
            found[name] = weight
        return found

    def packed(self) -> dict[str, PackedTensors]:
        """Return the new records of packed modules by name, on the CPU."""
        return {name: module.packed() for name, module in self.modules.items()}


@dataclass(frozen=True)
class _Plain:
    """A weight of the model that is learned: where it is, and which of its numbers are not zero."""

    module: nn.Module
    name: str
    keep: Tensor | None = None

    def weight(self) -> Tensor:
        """Return the weight, with what was learned in it."""
        weight: Tensor = getattr(self.module, self.name)
        return weight


@dataclass(frozen=True)
class _Nonzeros:
    """A matrix that the file stores as nonzeros, learned as a plain one."""

    plain: _Plain
    about: Mapping[str, Any]

    def packed(self) -> PackedTensors:
        """Return the nonzeros in the layout that they had. Weights that became zero take no room in a bitmap."""
        weight_OI, stored = self.plain.weight().detach(), self.about
        if self.plain.keep is not None:
            weight_OI = weight_OI * self.plain.keep
        record = Sparse.encode(weight_OI, VALUES[stored["values"]], stored["layout"])
        return PackedTensors.of_nonzeros(record)


def prepare(model: Any, skeleton: Decoder, *, mode: Mode, rank: int, seed: int, pruned: bool) -> Trained:
    """Freeze a model, replace its packed modules, and return what is learned. `pruned`: a code of zero stays one."""
    model.requires_grad_(False)
    generator, trained = torch.Generator().manual_seed(seed), Trained()
    anatomy = skeleton.anatomy
    names = {
        anatomy.prefix(index) + linear.parameter
        for index, block in enumerate(anatomy.blocks)
        for linear in block.linears.values()
    }
    for name, module in list(model.named_modules()):
        if isinstance(module, ReadableLinear):
            _replace_packed(model, name, module, f"{name}.weight" in names, (mode, rank, generator, pruned), trained)
    for name in sorted(names & {name for name, _ in model.named_parameters()}):
        place, _, leaf = name.rpartition(".")
        if place not in trained.modules:
            _learn_plain(model.get_submodule(place), leaf, name, mode, rank, generator, trained)
    _learn_vectors(model, skeleton, names, trained)
    if not trained.learned:
        raise ArchitectureError("nothing in this model can be learned")
    return trained


def _replace_packed(
    model: Any, name: str, module: ReadableLinear, learn: bool, how: tuple[Mode, int, torch.Generator, bool],
    trained: Trained,
) -> None:  # fmt: skip
    """Replace a packed module by one that autograd passes."""
    mode, rank, generator, pruned = how
    stored: Mapping[str, Any] = module.described["sparse"] if isinstance(module, SparseLinear) else {}
    codes = not stored or stored["values"] in CODES
    new: nn.Module
    if learn and codes:
        assert isinstance(module, PackedLinear | SparseLinear | TrellisLinear)
        new = CodesLinear(module, mode, rank, generator, pruned)
        trained.modules[name] = new
        trained.learned += new.learned()
    else:
        weight_OI = module.weight
        with torch.device("meta"):
            new = nn.Linear(module.in_features, module.out_features, bias=False)
        new.weight = nn.Parameter(weight_OI, requires_grad=False)
        new.bias = module.bias  # type: ignore[assignment]
        if learn:
            one = _learn_plain(new, "weight", "", mode, rank, generator, trained)
            trained.modules[name] = _Nonzeros(one, stored)
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, new)


def _learn_plain(
    module: nn.Module, leaf: str, name: str, mode: Mode, rank: int, generator: torch.Generator, trained: Trained
) -> _Plain:
    """Learn a weight of a module in place, with its zeros kept. Mode `scales` leaves it as it is."""
    parameter = module.get_parameter(leaf)
    zeros = parameter == 0
    keep = ~zeros if bool(zeros.any()) else None
    size = float(parameter.detach().float().norm()) / max(1, int((~zeros).sum())) ** 0.5
    one = _Plain(module, leaf, keep)
    if mode == "weights":
        learned = nn.Parameter(parameter.detach().float())
        module._parameters[leaf] = learned
        trained.learned.append(Learned(learned, size, keep))
    elif mode == "low-rank":
        added = LowRank(parameter, rank, size, generator, masked=keep is not None)
        parametrize.register_parametrization(module, leaf, added, unsafe=True)
        trained.learned += [Learned(added.A, LOW_RANK_SPEED), Learned(added.B, LOW_RANK_SPEED)]
    if name and mode != "scales":
        trained.weights[name] = one
    return one


def _learn_vectors(model: Any, skeleton: Decoder, names: set[str], trained: Trained) -> None:
    """Learn norms of the decoder and biases of its matrices."""
    biases = {name.removesuffix("weight") + "bias" for name in names}
    idle = tuple(f"{name}." for name in skeleton.anatomy.idle)
    for name, parameter in list(model.named_parameters()):
        place, _, leaf = name.rpartition(".")
        module = model.get_submodule(place)
        norm = NORM in type(module).__name__.lower() and parameter.dim() == 1
        if (name in biases or norm) and not name.startswith(idle) and name not in trained.weights:
            learned = nn.Parameter(parameter.detach().float())
            module._parameters[leaf] = learned
            size = float(learned.detach().square().mean().sqrt())
            trained.learned.append(Learned(learned, size or 1e-2))
            trained.weights[name] = _Plain(module, leaf)
