"""Layout of a GGUF file: its tensors, their names, and the widths of each block.

Names come from `gguf.get_tensor_name_map`. Widths are read from the tensors, so blocks may differ.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gguf
import torch
from gguf import MODEL_ARCH
from torch import Tensor

from niwaki.errors import ArchitectureError, CheckpointError, InputError
from niwaki.model.checkpoint import Checkpoint
from niwaki.model.complete import names_of
from niwaki.model.hf import WeightNames, wrapped_parts
from niwaki.model.unread import unread_note

ATTENTION = ("attn_q", "attn_k", "attn_v", "attn_output")
DENSE = ("ffn_gate", "ffn_up", "ffn_down")
FACTORS = "rope_freqs.weight"
STORED = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # names in a checkpoint of these families
HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"


@dataclass(frozen=True)
class Family:
    """A model type as llama.cpp knows it.

    `paired`: the graph rotates neighbouring values together, where transformers rotates halves of a head. `biased`:
    the matrices whose biases the graph adds. `norms`: norms of a block beyond the two that each block has.
    """

    arch: MODEL_ARCH
    paired: bool
    biased: tuple[str, ...]
    norms: tuple[str, ...] = ()


_LLAMA = Family(MODEL_ARCH.LLAMA, True, ATTENTION + DENSE)
FAMILIES: Mapping[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": Family(MODEL_ARCH.QWEN3, False, ATTENTION[:3], ("attn_q_norm", "attn_k_norm")),
}


@dataclass(frozen=True)
class Entry:
    """One tensor of the file: its name in the checkpoint, or its value if it is not stored there.

    With `paired_heads`, rows are interleaved within each of these heads.
    """

    shape: tuple[int, ...]
    source: str = ""
    paired_heads: int = 0
    value: Tensor | None = None

    def read(self, checkpoint: Checkpoint) -> Tensor:
        """Read the tensor in the order of the file."""
        tensor = checkpoint.read([self.source])[self.source] if self.value is None else self.value
        return paired(tensor, self.paired_heads) if self.paired_heads else tensor


@dataclass(frozen=True)
class GgufLayout:
    """Architecture, widths of each block, positions, and all tensors by their GGUF name."""

    arch: MODEL_ARCH
    tensors: dict[str, Entry]
    neurons: tuple[int, ...]
    heads: tuple[int, ...]
    key_heads: tuple[int, ...]
    head_width: int
    context: int
    linear_factor: float
    notes: tuple[str, ...]


def layout_of(checkpoint: Checkpoint) -> GgufLayout:
    """Find the layout of a checkpoint. Raises ArchitectureError for a model without a graph in llama.cpp."""
    config = checkpoint.config
    if towers := wrapped_parts(config):
        raise ArchitectureError(
            f"{checkpoint.folder} is a wrapper of type {config.model_type} ({', '.join(towers)}): niwaki writes GGUF "
            "for decoders alone, and a file of the text part would read no images or sound: use niwaki serve"
        )
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise ArchitectureError(
            f"{checkpoint.folder} is of type {config.model_type}: niwaki writes GGUF for {', '.join(FAMILIES)}"
        )
    if config.hidden_act != "silu":
        raise ArchitectureError(f"llama.cpp computes these blocks with silu, config.json says {config.hidden_act}")
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    linear_factor, factors_R = _rotation(config, width, family)
    names = names_of(checkpoint, complete=False)
    sources = _named(checkpoint, names, family)
    blocks = [_widths(checkpoint, sources, index, width, family) for index in range(config.num_hidden_layers)]
    neurons, heads, key_heads = (tuple(counts) for counts in zip(*blocks, strict=True))
    arch = family.arch if len(set(blocks)) == 1 and heads[0] else _uneven(checkpoint, family, heads)
    tensors = {}
    for name, source in sources.items():
        part, index = _part(name)
        if part.startswith("attn_") and not heads[index]:
            if name.endswith(".bias"):
                raise ArchitectureError(f"{source}: llama.cpp adds no bias where the matrices of attention are gone")
            continue  # the norm before it
        count = {"attn_q": heads, "attn_k": key_heads}.get(part) if family.paired else None
        tensors[name] = Entry(checkpoint.tensors[source].shape, source, count[index] if count else 0)
    if factors_R is not None:
        tensors[FACTORS] = Entry(tuple(factors_R.shape), value=factors_R)
    window = getattr(config, "sliding_window", None)
    context = min(config.max_position_embeddings, window or config.max_position_embeddings)
    notes = [] if context == config.max_position_embeddings else [f"the context is the window of {window} tokens"]
    notes += [unread_note(len(names.unread))] if names.unread else []
    return GgufLayout(arch, tensors, neurons, heads, key_heads, width, context, linear_factor, tuple(notes))


def paired(tensor: Tensor, heads: int) -> Tensor:
    """Interleave rows [H·W, …] whose rotated partners lie half a head apart, so that partners are neighbours."""
    halves: Tensor = tensor.unflatten(0, (heads, 2, -1))
    return halves.transpose(1, 2).flatten(0, 2)


def _named(checkpoint: Checkpoint, weights: WeightNames, family: Family) -> dict[str, str]:
    """Map GGUF names to names in the checkpoint, in the order of the file.

    Raises ArchitectureError for a tensor that the graph does not know, CheckpointError for a missing one.
    """
    config = checkpoint.config
    names = gguf.get_tensor_name_map(family.arch, config.num_hidden_layers)
    found: dict[str, str] = {}
    stored = set(weights.parameters.values())
    for source, parameter in weights.parameters.items():
        if 0 in checkpoint.tensors[source].shape:
            continue  # pruned away
        if parameter == HEAD and config.tie_word_embeddings:
            if EMBEDDINGS in stored:
                continue
            parameter = EMBEDDINGS  # only the head is stored: it is both
        name = names.get_name(parameter, try_suffixes=(".weight", ".bias"))
        if name is None or (name.endswith(".bias") and _part(name)[0] not in family.biased):
            raise ArchitectureError(
                f"llama.cpp's {gguf.MODEL_ARCH_NAMES[family.arch]} has no place for {source} of {checkpoint.folder}"
            )
        found[name] = source
    table = (config.vocab_size, config.hidden_size)
    ends = {"token_embd": table, "output_norm": table[1:]} | ({} if config.tie_word_embeddings else {"output": table})
    for part, expected in ends.items():
        _require(checkpoint, found, part, expected)
    return dict(sorted(found.items(), key=lambda item: _order(item[0])))


def _order(name: str) -> tuple[int, str]:
    index = _part(name)[1]
    return (-1 if name.startswith("token_embd") else 2**31) if index < 0 else index, name


def _part(name: str) -> tuple[str, int]:
    """Split `blk.3.attn_q.weight` into attn_q and 3. A tensor outside the blocks has the index −1."""
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.\w+", name)
    return (match[2], int(match[1])) if match else (name.partition(".")[0], -1)


def _widths(
    checkpoint: Checkpoint, sources: Mapping[str, str], index: int, width: int, family: Family
) -> tuple[int, int, int]:
    """Return neurons, heads and key heads of a block, without heads if its attention is gone.

    Raises CheckpointError for shapes that contradict each other.
    """
    hidden = checkpoint.config.hidden_size
    attends = any(f"blk.{index}.{part}.weight" in sources for part in ATTENTION)
    neurons = _rows(checkpoint, sources, f"blk.{index}.ffn_up")
    wanted = {"ffn_norm": (hidden,), "ffn_gate": (neurons, hidden), "ffn_up": (neurons, hidden)}
    wanted["ffn_down"] = (hidden, neurons)
    rows = key_rows = 0
    if attends:
        rows, key_rows = (_rows(checkpoint, sources, f"blk.{index}.{part}") for part in ATTENTION[:2])
        wanted |= {"attn_norm": (hidden,), "attn_q": (rows, hidden), "attn_k": (key_rows, hidden)}
        wanted |= {"attn_v": (key_rows, hidden), "attn_output": (hidden, rows)}
        wanted |= dict.fromkeys(family.norms, (width,))
    for part, expected in wanted.items():
        _require(checkpoint, sources, f"blk.{index}.{part}", expected)
    heads, key_heads = rows // width, key_rows // width
    if rows % width or key_rows % width or (attends and (not key_heads or heads % key_heads)):
        raise CheckpointError(
            f"block {index}: {rows} and {key_rows} rows of q and k are not heads of {width} in groups"
        )
    return neurons, heads, key_heads


def _rows(checkpoint: Checkpoint, sources: Mapping[str, str], module: str) -> int:
    if f"{module}.weight" not in sources:
        part, index = _part(f"{module}.weight")
        name = (f"model.layers.{index}." if index >= 0 else "") + STORED[part]
        raise CheckpointError(
            f"{checkpoint.folder} lacks {name}.weight: it has no tensor for {module}.weight, which llama.cpp needs"
        )
    return checkpoint.tensors[sources[f"{module}.weight"]].shape[0]


def _require(checkpoint: Checkpoint, sources: Mapping[str, str], module: str, expected: tuple[int, ...]) -> None:
    """Raise CheckpointError unless the weight has this shape, and its bias the length of the first axis."""
    _rows(checkpoint, sources, module)
    for name, wanted in ((f"{module}.weight", expected), (f"{module}.bias", expected[:1])):
        if name in sources and (shape := checkpoint.tensors[sources[name]].shape) != wanted:
            raise CheckpointError(f"{checkpoint.folder}: {sources[name]} has the shape {shape}, expected {wanted}")


def _uneven(checkpoint: Checkpoint, family: Family, heads: tuple[int, ...]) -> MODEL_ARCH:
    """Return the architecture for blocks of different widths. Raises ArchitectureError if there is none."""
    if family.arch is not MODEL_ARCH.LLAMA:
        raise ArchitectureError(
            f"the blocks of {checkpoint.folder} differ in width, which llama.cpp can run for models that compute as a "
            f"Llama does, not for {checkpoint.config.model_type}: compress with --allocation uniform"
        )
    if not heads[0]:
        raise ArchitectureError("llama.cpp reads the width of heads from the first block: it needs its attention")
    return MODEL_ARCH.DECI


def _rotation(config: Any, width: int, family: Family) -> tuple[float, Tensor | None]:
    """Return the factor that divides positions (0 for none), and the factors of single frequencies [W/2].

    Raises InputError for a kind of scaling that the file format cannot express.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise InputError("only a part of each head is rotated, which the graph of llama.cpp does not do")
    if kind == "default":
        return 0.0, None
    if kind == "linear":
        return float(rope["factor"]), None
    if kind == "llama3" and family.paired:
        slowed_R, _ = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
        plain_R = rope["rope_theta"] ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
        return 0.0, (plain_R / slowed_R.double()).float()
    raise InputError(
        f"rope_type {kind} of a {config.model_type} is not exported: default, linear or llama3 (Llama) are"
    )
