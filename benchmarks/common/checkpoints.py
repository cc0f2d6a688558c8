"""Random checkpoints in the shapes of known models, and a calibration text that every Python has."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import torch
import transformers
from safetensors.torch import save_file

from niwaki.cli.demo import sapling

VOCABULARY = 32000


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama."""

    name: str
    hidden: int
    middle: int
    heads: int
    key_value_heads: int
    blocks: int

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """Return rows and columns of every matrix of a block."""
        narrow = self.hidden // self.heads * self.key_value_heads
        return {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (narrow, self.hidden),
            "self_attn.v_proj": (narrow, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.middle, self.hidden),
            "mlp.up_proj": (self.middle, self.hidden),
            "mlp.down_proj": (self.hidden, self.middle),
        }

    @property
    def block_weights(self) -> int:
        """Return the weights of a block."""
        return sum(rows * columns for rows, columns in self.matrices.values())


SHAPES = {
    "7b": Shape("Llama-2-7B", 4096, 11008, 32, 32, 32),
    "70b": Shape("Llama-2-70B", 8192, 28672, 64, 8, 80),
}


def make_checkpoint(folder: Path, blocks: int, device: str, shape: Shape = SHAPES["7b"]) -> None:
    """Write a sharded random checkpoint with the sapling's tokenizer, whose ids all lie inside the vocabulary."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    config = transformers.LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.middle,
        num_hidden_layers=blocks,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        vocab_size=VOCABULARY,
        max_position_embeddings=4096,
        dtype="bfloat16",
        bos_token_id=0,
        eos_token_id=0,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(sapling() / name, folder / name)
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator, device=device) * 0.02).to(torch.bfloat16).cpu()

    weight_map = {}

    def save(number: int, tensors: dict[str, torch.Tensor]) -> None:
        shard = f"model-{number:05d}-of-{blocks + 1:05d}.safetensors"
        save_file(tensors, folder / shard, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, shard))

    ones = torch.ones(shape.hidden, dtype=torch.bfloat16)
    for index in range(blocks):
        prefix = f"model.layers.{index}."
        tensors = {f"{prefix}{name}.weight": normal(*size) for name, size in shape.matrices.items()}
        norms = ("input_layernorm", "post_attention_layernorm")
        save(index + 1, tensors | {f"{prefix}{n}.weight": ones.clone() for n in norms})
    save(
        blocks + 1,
        {
            "model.embed_tokens.weight": normal(VOCABULARY, shape.hidden),
            "lm_head.weight": normal(VOCABULARY, shape.hidden),
            "model.norm.weight": ones.clone(),
        },
    )
    index_file = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_file))


def write_topics(path: Path, times: int = 1) -> None:
    """Write the topics of Python's help as a calibration text, some times over."""
    path.write_text("".join(json.dumps({"text": topics[name]}) + "\n" for _ in range(times) for name in sorted(topics)))
