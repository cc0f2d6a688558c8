"""Configs of smaller decoders, found and proved by building the models that they describe.

Families name the fields of widths and depth differently, and keep lists with one item per block. The names come from
the config class: its own names of the common attributes first, then any field that changes the width. No list of
families is consulted. A config is right if its model has the shape. A trial block of that model must also compute what
the full-size block with zeros computes (see `block_trial`). Norms over all heads or neurons fail this test.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from niwaki.config.targets import Kind, PrunableUnit
from niwaki.errors import InputError
from niwaki.formats.quantized import WEIGHT
from niwaki.model.anatomy import Anatomy, Linear
from niwaki.model.block_trial import TrialModel, differing_argument, differing_attribute, same

NEURON_FIELDS = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")
DEPTH_FIELDS = ("num_hidden_layers", "n_layer", "num_layers")
HEAD_FIELDS = ("num_attention_heads", "num_key_value_heads")
Values = dict[str, Any]
Counts = Mapping[Kind, int]


def axis_of(linear: Linear, unit: PrunableUnit) -> tuple[int, int]:
    """Return the dimension of a stored matrix along which the groups of its unit lie, and its size."""
    consumes = linear.name == unit.consumer
    return int(consumes != linear.transposed), linear.columns if consumes else linear.rows


def group_indices(unit: PrunableUnit, groups: Sequence[int], size: int) -> Tensor:
    """Return the rows or columns of `groups` in a matrix that has `size` of them."""
    width = size // unit.count
    return (torch.tensor(groups, dtype=torch.int64)[:, None] * width + torch.arange(width)).view(-1)


class PrunedConfigs:
    """Configs of smaller models of one family, from `source`, the content of its config.json."""

    def __init__(
        self, anatomy: Anatomy, units: Mapping[Kind, PrunableUnit], config: Any, source: Mapping[str, Any]
    ) -> None:
        self.anatomy, self.units, self.source = anatomy, units, source
        self.config = config
        text = config.get_text_config()
        nested = [name for name, value in vars(config).items() if value is text and isinstance(source.get(name), dict)]
        self.nested = None if text is config or not nested else nested[0]
        self.text: Values = dict(source if self.nested is None else source[self.nested])
        self.every: Values = text.to_dict()  # also the fields that config.json leaves to the defaults of the class
        self.names: Mapping[str, str] = getattr(text, "attribute_map", {})
        self.followers: dict[Kind, dict[str, int]] = {}
        self._found: dict[Any, Values | InputError] = {}
        self._reasons: dict[str, str] = {}
        self._fields: dict[str, str] = {}

    def find(
        self, counts: Counts, dropped: Sequence[int] = (), also: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return the content of config.json for a model with these numbers of groups and without some blocks.

        `also` are further fields. Raises InputError, with the tensor at fault, if no config describes that model.
        """
        if not also and not dropped and counts == self._full_counts:
            return dict(self.source)
        key = (*sorted(counts.items()), tuple(dropped), repr(also))
        if key not in self._found:
            try:
                self._found[key] = self._search(counts, dropped, also or {})
            except InputError as error:
                self._found[key] = error
            self._note(counts, dropped, self._found[key])
        found = self._found[key]
        if isinstance(found, InputError):
            raise found
        return found

    def _note(self, counts: Counts, dropped: Sequence[int], found: Values | InputError) -> None:
        """Keep the reason of the first failure of each kind of change, until another of that kind succeeds."""
        changed = [kind for kind in self.units if counts[kind] != self.units[kind].count] + ["blocks"] * bool(dropped)
        for kind in changed if len(changed) == 1 else ():
            if isinstance(found, InputError):
                self._reasons.setdefault(kind, str(found))
            else:
                self._reasons[kind] = ""

    @property
    def problems(self) -> list[str]:
        """Return why no config holds fewer heads, neurons or blocks, as far as a search has asked."""
        return [reason for reason in self._reasons.values() if reason]

    def _search(self, counts: Counts, dropped: Sequence[int], also: Mapping[str, Any]) -> Values:
        changed = [kind for kind in self.units if counts[kind] != self.units[kind].count]
        if len(changed) + bool(dropped) > 1:  # each change is tried alone, then only shapes are left to compare
            for kind in changed:
                self.find({**self._full_counts, kind: counts[kind]})
            if dropped:
                self.find(self._full_counts, dropped)
        of_shape = of_trial = ""
        for candidate in self._candidates(counts, dropped, also):
            model, found = self._shaped(candidate, counts, len(self.anatomy.blocks) - len(dropped))
            of_shape = of_shape or found
            if model is None:
                continue
            found = self._trial_problem(model, counts, changed, dropped)
            if not found:
                return self._whole(candidate)
            of_trial = of_trial or found
        fields = [self.names.get(name, name) for name in (*HEAD_FIELDS, *NEURON_FIELDS)]
        said = " and ".join(dict.fromkeys(name for name in fields if name in self.every))
        what = f"{counts['neurons']} neurons and {counts['heads']} groups of heads"
        gone = f" without blocks {', '.join(map(str, dropped))}" if dropped else ""
        raise InputError(
            f"{said} in a config of type {self.text.get('model_type')} cannot express {what}{gone} "
            f"({of_trial or of_shape})" + self._advice(changed, dropped)
        )

    def _advice(self, changed: Sequence[Kind], dropped: Sequence[int]) -> str:
        if dropped or any(self.uneven_problem(kind) for kind in changed):
            return ""
        return (
            ": widths that niwaki stores itself can (--allocation searched), and for Llama-like models their export "
            "--to gguf"
        )

    def uneven_problem(self, kind: Kind) -> str:
        """Return why blocks cannot keep different numbers of groups of a kind in niwaki's own form; empty if they can.

        niwaki gives single linear layers a shape of their own, and nothing else in the block.
        """
        key = f"uneven {kind}"
        if key not in self._fields:
            self._fields[key] = self._uneven_problem(kind)
        return self._fields[key]

    def _uneven_problem(self, kind: Kind) -> str:
        unit = self.units[kind]
        if unit.count == 1:
            return ""
        count = unit.count - unit.count // 2
        shapes = {}
        for name in (*unit.producers, unit.consumer):
            linear = self._linears[name]
            size = [linear.rows, linear.columns]
            along = int(name == unit.consumer)
            size[along] = size[along] // unit.count * count
            shapes[f"{self.anatomy.path}.0.{name}"] = size
        try:
            narrow = TrialModel.of(self.config, self._tuple_size, shapes)
        except InputError as error:
            return str(error)
        return self._trial(narrow, kind, count)

    @cached_property
    def identity_problem(self) -> str:
        """Return why a block whose attention and dense layer give zeros changes its input; empty if it does not."""
        silent, zeros = dict(self._weights), {}
        for unit in self.units.values():
            name = self._linears[unit.consumer].parameter
            zeros[name] = True, self._linears[unit.consumer].columns
            bias = name.removesuffix(WEIGHT) + ".bias"
            if bias in silent:
                silent[bias] = torch.zeros_like(silent[bias])
        if same(self._one.run(0, silent, zeros), self._one.input()):
            return ""
        linears = {linear.parameter for linear in self._linears.values()}
        rest = [name for name in self._weights if name not in linears and not name.endswith(".bias")]
        return (
            "a block does more than add its attention and its dense layer to what it gets"
            f" ({', '.join(rest[-2:]) or 'no parameter takes part in it'})"
        )

    @cached_property
    def biases(self) -> tuple[Values, frozenset[str], str]:
        """Return the fields that give every consumer a bias, the names of all biases they add, and why there are none.

        Parameters beside the biases of the matrices of a block are not accepted.
        """
        own = set(self._weights)
        missing = {bias for unit in self.units.values() if (bias := f"{unit.consumer}.bias") not in own}
        fields: Values = {}
        for name in sorted(
            (name for name, value in self.every.items() if value is False or value is None),
            key=lambda name: ("bias" not in name, name),
        ):
            if not missing:
                break
            added = self._added_biases({name: True})
            if added & missing:
                fields[name] = True
                missing -= added
        if missing:
            kind = self.text.get("model_type")
            return (
                {},
                frozenset(),
                f"no field of a config of type {kind} gives {min(missing).removesuffix('.bias')} a bias",
            )
        if not fields:
            return {}, frozenset(), ""
        added = self._added_biases(fields)
        changed = {**self.text, **fields}
        model = self._shallow(changed) or self._open(self._whole(changed))
        zeros = {name: torch.zeros(model.parameters(0)[name].shape) for name in added}
        if not added or not same(model.run(0, {**self._weights, **zeros}), self._dense_output):
            return {}, frozenset(), f"{', '.join(fields)} change more than the biases of a block"
        return fields, added, ""

    def _added_biases(self, fields: Values) -> frozenset[str]:
        """Return the parameters that fields add to a block if they are biases of its matrices and nothing else."""
        try:
            changed = {**self.text, **fields}
            model = self._shallow(changed) or self._open(self._whole(changed))
        except Exception:  # any library may refuse such a value
            return frozenset()
        inside = f"{self.anatomy.path}."
        outer = [{n for n, _ in m.skeleton.named_parameters() if not n.startswith(inside)} for m in (model, self._one)]
        added = frozenset(model.parameters(0)) - set(self._weights)
        known = {f"{name}.bias" for name in self._linears}
        same_rest = all(
            name in model.parameters(0) and model.parameters(0)[name].shape == weight.shape
            for name, weight in self._weights.items()
        )
        return added if outer[0] == outer[1] and added <= known and same_rest else frozenset()

    def _candidates(self, counts: Counts, dropped: Sequence[int], also: Mapping[str, Any]) -> Iterator[Values]:
        """Yield contents of the config that may have this shape, the likeliest first.

        A Llama whose number of heads does not divide its width may be a Mistral without a window: the same model.
        """
        base: Values = {**also}
        if counts["neurons"] != self.units["neurons"].count:
            base[self._neuron_field(counts["neurons"])] = counts["neurons"]
        lists: list[Values] = [{}]
        if dropped:
            base[self._depth_field()] = len(self.anatomy.blocks) - len(dropped)
            kept = [index for index in range(len(self.anatomy.blocks)) if index not in dropped]
            lists = [self._shorter_lists(source, kept) for source in (self.text, self.every)]
        heads: list[Values] = [{}]
        if counts["heads"] != self.units["heads"].count:
            heads = list(self._head_fields(counts["heads"]))
        plain = self.text.get("model_type") == "llama" and not any(
            {**self.text, **also}.get(name) for name in ("attention_bias", "mlp_bias")
        )
        for shorter in lists[: 1 + (len(lists) > 1 and lists[0] != lists[1])]:
            for fewer in heads:
                changed = {**self.text, **base, **shorter, **fewer}
                yield changed
                if plain:
                    twin = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None}
                    yield changed | twin

    def _head_fields(self, heads: int) -> Iterator[Values]:
        groups = self.units["heads"].count
        known = [self.names.get(name, name) for name in HEAD_FIELDS]
        fewer = {name: self.every[name] // groups * heads for name in known if self.every.get(name)}
        total = self.every.get(known[0]) or groups
        width = self._linears[self.units["heads"].consumer].columns // total
        head_dim = self.names.get("head_dim", "head_dim")
        stated = {head_dim: self.every.get(head_dim) or width}
        others = [
            {name: value // groups * heads}
            for name, value in self.every.items()
            if name not in fewer and isinstance(value, int) and value in (total, groups) and name != head_dim
        ]
        for other in ({}, *others):
            if not self.every.get(head_dim):
                yield {**fewer, **other}
            yield {**fewer, **other, **stated}

    def _shorter_lists(self, source: Values, kept: Sequence[int]) -> Values:
        """Return the lists of a config with one item per block, without the items of the dropped ones."""
        count, found = len(self.anatomy.blocks), {}
        for name, value in source.items():
            items = _per_block(value, count)
            if items is not None:
                found[name] = [items[index] for index in kept]
                if items is not value:  # pairs of a pattern and how often it repeats
                    found[name] = [[[item], 1] for item in found[name]]
        return found

    def _neuron_field(self, neurons: int) -> str:
        """Return the field that changes the number of neurons, and nothing else in the shape of a block."""
        if "neurons" not in self._fields:
            full = self.units["neurons"].count
            known = [self.names.get("intermediate_size", "intermediate_size"), *NEURON_FIELDS]
            stated = [name for name in known if self.every.get(name) == full]
            equal = [name for name, value in self.every.items() if value == full and not isinstance(value, bool)]
            unset = [name for name in (*known, *self.every) if name in self.every and self.every[name] is None]
            for name in dict.fromkeys((*stated, *equal, *unset)):
                counts: Counts = {**self._full_counts, "neurons": neurons}
                if self._shaped({**self.text, name: neurons}, counts, len(self.anatomy.blocks))[0]:
                    self._fields["neurons"] = name
                    break
            else:
                raise InputError(
                    f"config.json says {full} neurons in none of {', '.join(dict.fromkeys(known))} or another field, "
                    "so it cannot say another number: use a method that leaves the neurons as they are"
                )
        return self._fields["neurons"]

    def _depth_field(self) -> str:
        if "blocks" not in self._fields:
            count = len(self.anatomy.blocks)
            known = [self.names.get("num_hidden_layers", "num_hidden_layers"), *DEPTH_FIELDS]
            equal = [name for name, value in self.every.items() if value == count and not isinstance(value, bool)]
            kept = list(range(count - 1))
            for name in dict.fromkeys((*(name for name in known if name in equal), *equal)):
                changed = {**self.text, **self._shorter_lists(self.every, kept), name: count - 1}
                if self._shaped(changed, self._full_counts, count - 1)[0]:
                    self._fields["blocks"] = name
                    break
            else:
                raise InputError(
                    f"config.json says {count} blocks in none of {', '.join(dict.fromkeys(known))}, so it cannot say "
                    "another number: use a method that leaves the blocks as they are"
                )
        return self._fields["blocks"]

    def _whole(self, text: Values) -> Values:
        return text if self.nested is None else {**self.source, self.nested: text}

    def _shaped(self, text: Values, counts: Counts, blocks: int) -> tuple[TrialModel | None, str]:
        """Return the model of a config if it has these widths and this many blocks, else the reason why not.

        If all blocks stay, one of them is enough, as far as the config can say so.
        """
        model = None
        if blocks == len(self.anatomy.blocks) and (model := self._shallow(text)) is not None:
            blocks = 1
        try:
            model = model or self._open(self._whole(text))
        except Exception as error:  # configs are validated by several libraries
            return None, " ".join(str(error).split())[:200]
        if len(model.blocks) != blocks:
            return None, f"it would have {len(model.blocks)} blocks"
        built = model.parameters(0)
        for kind, unit in self.units.items():
            for name in (*unit.producers, unit.consumer):
                linear = self._linears[name]
                along, size = axis_of(linear, unit)
                own = built.get(linear.parameter)
                if own is None or own.shape[along] != size // unit.count * counts[kind]:
                    has = "none" if own is None else own.shape[along]
                    return None, f"{name} would have {has} of {size} {kind} rows or columns"
        return model, ""

    def _shallow(self, text: Values) -> TrialModel | None:
        """Return the first block of a config as a model of its own, None if no field asks for it."""
        count = len(self.anatomy.blocks)
        for name in (self.names.get("num_hidden_layers", "num_hidden_layers"), *DEPTH_FIELDS):
            if self.every.get(name) == count:
                try:
                    model = self._open(
                        self._whole({**text, **self._shorter_lists({**self.every, **text}, [0]), name: 1})
                    )
                except Exception:  # the whole model says why
                    return None
                return model if len(model.blocks) == 1 else None
        return None

    def _trial_problem(self, model: TrialModel, counts: Counts, changed: Sequence[Kind], dropped: Sequence[int]) -> str:
        """Return why a model of the right shape is not the smaller one; several changes were tried one by one."""
        if len(changed) + bool(dropped) != 1:
            return ""
        return self._drop_problem(model, dropped) if dropped else self._trial(model, changed[0], counts[changed[0]])

    def _trial(self, model: TrialModel, kind: Kind, count: int) -> str:
        """Return why the first block of a narrower model does not compute what the full one with zeros does.

        The last groups of the kind stay. What is cut beside the matrices is kept in `followers`.
        """
        unit = self.units[kind]
        axes = self._axes(unit)
        cut, followers = {}, {}
        for name, built in model.parameters(0).items():
            if name not in self._weights:
                return f"{name} is new"
            weight = self._weights[name]
            along = axes.get(name)
            if along is None and built.shape != weight.shape:
                differing = [d for d, (a, b) in enumerate(zip(weight.shape, built.shape, strict=False)) if a != b]
                if len(differing) != 1 or weight.shape[differing[0]] % unit.count:
                    return f"{name} would have the shape {list(built.shape)}"
                along = followers[name] = differing[0]
            if along is not None:
                width = weight.shape[along] // unit.count * count
                weight = weight.narrow(along, weight.shape[along] - width, width)
            if weight.shape != built.shape:
                return f"{name} would have the shape {list(built.shape)}"
            cut[name] = weight
        if lost := sorted(set(self._weights) - set(cut)):
            return f"{lost[0]} has no place in it"
        try:
            found = model.run(0, cut)
        except Exception:  # any model code may fail
            return self._mixing(kind, followers)
        if not same(found, self._one.run(0, self._weights, self._zeros(unit, unit.count - count))):
            return self._mixing(kind, followers)
        self.followers[kind] = followers
        return ""

    def _mixing(self, kind: Kind, followers: Mapping[str, int]) -> str:
        """Return the reason that a block without some groups computes something else, with a tensor if one is seen."""
        unit, matrices = self.units[kind], {linear.parameter for linear in self._linears.values()}
        known = matrices | {f"{name}.bias" for name in self._linears}
        widths = {self._weights[name].shape[along] for name, along in self._axes(unit).items()}
        parent = unit.consumer.rpartition(".")[0]
        inside = [name for name in self._weights if name not in known and parent and name.startswith(f"{parent}.")]
        if named := [*followers, *(name for name in inside if set(self._weights[name].shape) & widths)]:
            return f"{named[0]} takes all {kind} together, so those that stay would come out different"
        beside = f" ({inside[0]} goes with them)" if inside else ""
        return f"{unit.consumer} without some {kind} gets other inputs than in the full block{beside}"

    def _drop_problem(self, model: TrialModel, dropped: Sequence[int]) -> str:
        """Return why the blocks that stay would compute something else at their new places, or a dropped one counts."""
        if self.identity_problem:
            return self.identity_problem
        kept = [index for index in range(len(self.anatomy.blocks)) if index not in dropped]
        for place, index in enumerate(kept):
            before, after = self._full, model
            differing = differing_attribute(before.blocks[index], after.blocks[place], index, place)
            differing = differing or differing_argument(before.calls[index], after.calls[place])
            if differing:
                return f"block {index} would become block {place}, and its {differing} would change"
        moved = [(place, index) for place, index in enumerate(kept) if place != index]
        for place, index in moved[:1]:
            if not same(model.run(place, self._weights), self._full.run(index, self._weights)):
                return f"block {index} would become block {place}, and what it computes depends on its number"
        return ""

    def _zeros(self, unit: PrunableUnit, gone: int) -> dict[str, tuple[bool, int]]:
        """Return the inputs and outputs that are zero without the first groups of a unit, as the walk leaves them."""
        zeros = {}
        for name in (*unit.producers, unit.consumer):
            linear, reads = self._linears[name], name == unit.consumer
            zeros[linear.parameter] = reads, (linear.columns if reads else linear.rows) // unit.count * gone
        return zeros

    def _axes(self, unit: PrunableUnit) -> dict[str, int]:
        """Return the dimension of the groups in every matrix of a unit and every bias of a producer."""
        axes = {}
        for name in (*unit.producers, unit.consumer):
            linear = self._linears[name]
            axes[linear.parameter] = axis_of(linear, unit)[0]
            if name != unit.consumer and f"{name}.bias" in self._weights:
                axes[f"{name}.bias"] = 0
        return axes

    def _open(self, values: Mapping[str, Any]) -> TrialModel:
        from transformers import AutoConfig

        given = copy.deepcopy(dict(values))
        given.pop("quantization_config", None)
        config: Any = AutoConfig.for_model(given.pop("model_type"), **given)
        return TrialModel.of(config, self._tuple_size)

    @property
    def _linears(self) -> Mapping[str, Linear]:
        return self.anatomy.blocks[0].linears

    @property
    def _tuple_size(self) -> int | None:
        return self.anatomy.blocks[0].tuple_size

    @property
    def _full_counts(self) -> dict[Kind, int]:
        return {kind: unit.count for kind, unit in self.units.items()}

    @cached_property
    def _full(self) -> TrialModel:
        return TrialModel.of(self.config, self._tuple_size)

    @cached_property
    def _one(self) -> TrialModel:
        return self._shallow(self.text) or self._full

    @cached_property
    def _weights(self) -> dict[str, Tensor]:
        return self._one.random_weights()

    @cached_property
    def _dense_output(self) -> Tensor:
        return self._one.run(0, self._weights)


def _per_block(value: Any, count: int) -> list[Any] | None:
    """Return the items of a list with one per block, also of pairs [pattern, repeats] that spell such a list."""
    if not isinstance(value, list) or not value:
        return None
    if all(isinstance(p, list) and len(p) == 2 and isinstance(p[0], list) and isinstance(p[1], int) for p in value):
        items = [item for pattern, repeats in value for item in pattern * repeats]
        return items if len(items) == count else None
    return value if len(value) == count else None
