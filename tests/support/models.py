"""Small blocks, models, tokenizers and texts."""

import json
import shutil
import sys
from pathlib import Path
from pydoc_data.topics import topics
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from torch import Tensor, nn

from niwaki.cli.app import main
from niwaki.cli.demo import sapling
from niwaki.data.call_arguments import Windows
from niwaki.data.hidden_states import Activations
from niwaki.data.statistics import Needs, Statistics
from niwaki.data.stream import CalibrationData
from niwaki.methods.method import Method
from niwaki.model.anatomy import BlockAnatomy, Linear
from niwaki.model.block_calls import Call
from niwaki.model.decoder import Block
from support.families import build

CPU = torch.device("cpu")


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Return (exit code, stdout, stderr) of `niwaki ARGUMENTS`."""
    sys.argv = ["niwaki", *map(str, arguments)]
    with pytest.raises(SystemExit) as stopped:
        main()
        raise SystemExit(0)
    printed = capsys.readouterr()
    return int(stopped.value.code or 0), printed.out, printed.err


class Warnings:
    """Report that keeps the messages of the warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def __call__(self, event: str, **fields: Any) -> None:
        """Take one event."""
        if event == "warning":
            self.warnings.append(str(fields["message"]))


class _Independent(nn.Module):
    """Independent matrices; the forward pass applies the first."""

    def forward(self, x: Tensor) -> Tensor:
        first: Tensor = next(self.children())(x)
        return first


class FixedStream:
    """Fake stream at one block: windows [S, T, I] with the outputs of the first matrix."""

    def __init__(self, block: Block, x_STI: Tensor) -> None:
        self.hidden = Activations(x_STI, "ram", CPU)
        self.outputs = Activations(block.module(x_STI), "ram", CPU)

    def __len__(self) -> int:
        return len(self.hidden)

    def call(self, windows: Windows, index: int) -> Call:
        return Call((), {})


def calibration_of(block: Block, x_NI: Tensor, needs: Needs) -> CalibrationData:
    """Return the calibration data of `block` with `x_NI` as the input of all its matrices, 8 windows at most."""
    statistics = {name: statistics_of(x_NI, needs) for name in block.linears}
    if not len(x_NI):
        return CalibrationData(statistics)
    windows = next((count for count in range(8, 0, -1) if len(x_NI) % count == 0), 1)
    stream: Any = FixedStream(block, x_NI.reshape(windows, -1, x_NI.shape[1]))
    dense: Any = SimpleNamespace(hidden=stream.outputs)
    generator = torch.Generator().manual_seed(1)
    gradients = {name: torch.rand(block.weight(name).shape, generator=generator) for name in block.linears}
    return CalibrationData(statistics, stream, dense, gradients=gradients if needs.gradient else {})


def make_block(weights: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> Block:
    """Return a block of independent matrices, one group each."""
    module = _Independent()
    linears = {}
    for name, weight_OI in weights.items():
        part = nn.Linear(weight_OI.shape[1], weight_OI.shape[0], bias=False)
        part.weight = nn.Parameter(weight_OI.clone(), requires_grad=False)
        module.add_module(name, part)
        linears[name] = Linear(name, f"{name}.weight", None, False, *weight_OI.shape, name)
    storage = {f"{name}.weight": dtype for name in weights}
    return Block(0, module, BlockAnatomy(linears, {}, None), {}, storage)


def statistics_of(x_NI: Tensor, needs: Needs) -> Statistics:
    """Return statistics after one batch of inputs, or after no batch if it is empty."""
    found = Statistics(needs)
    if len(x_NI):
        found.add(x_NI)
    return found


def correlated_inputs(tokens: int, columns: int, seed: int = 0) -> Tensor:
    """Return inputs [N, I] whose features are correlated and differ in scale, as activations do."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    scale = torch.rand(columns, generator=generator) * 2 + 0.1
    return torch.randn(tokens, columns, generator=generator) @ mix * scale


def run_method(module: Any, weight_OI: Tensor, x_NI: Tensor, target: Any, **options: Any) -> Tensor:
    """Return the matrix [O, I] that a method, or its module, makes of `weight_OI` for inputs `x_NI`."""
    method = module if isinstance(module, Method) else module.METHOD
    block = make_block({"m": weight_OI})
    config = method.config(**options)
    calib = calibration_of(block, x_NI, method.needs(config))
    packed = method.compress(block, calib, {"m": target}, config, torch.Generator())
    assert torch.equal(block.weight("m"), weight_OI), "a method must not change its input"
    result: Tensor = packed["m"].decode(torch.float32)
    return result


def tiny_llama(folder: Path, *, blocks: int = 3, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """Save a random Llama with the sapling's tokenizer to `folder`, and return it."""
    settings: dict[str, Any] = {
        "vocab_size": 4096,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": blocks,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": 0,
        "eos_token_id": 0,
        **changes,
    }
    build(transformers.LlamaConfig(**settings), dtype).save_pretrained(folder)
    add_tokenizer(folder)
    return folder


def add_tokenizer(folder: Path) -> None:
    """Copy the sapling's tokenizer into the folder of a model."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(sapling() / name, folder / name)


def add_bos(
    folder: Path, *, itself: bool = True, tokens: tuple[str, ...] = ("<bos>",), named: bool = True
) -> list[int]:
    """Give a tokenizer new tokens for the beginning of a text, and return their ids.

    `itself`: the tokenizer puts them before every text. `named`: the first one is its bos token.
    """
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(list(tokens))
    ids = [tokenizer.token_to_id(token) for token in tokens]
    if itself:
        special = list(zip(tokens, ids, strict=True))
        tokenizer.post_processor = TemplateProcessing(single=" ".join([*tokens, "$A"]), special_tokens=special)
    tokenizer.save(str(folder / "tokenizer.json"))
    path = folder / "tokenizer_config.json"
    described = json.loads(path.read_text(encoding="utf-8"))
    described["bos_token"] = tokens[0] if named else None
    path.write_text(json.dumps(described), encoding="utf-8")
    return ids


def blind_without_bos(folder: Path, **changes: Any) -> int:
    """Save a Llama that expects one wrong token unless it attends to the bos token 4096, and return that id.

    Every token of text points to axis 0, which the head reads as the wrong token. The first head attends to the bos
    token, whose value takes axis 0 away. Then all other tokens are equally likely.
    """
    wrong, bos = 7, 4096
    settings = {"vocab_size": 4160, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    settings |= {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 64}
    config = transformers.LlamaConfig(**{**settings, "bos_token_id": bos, "eos_token_id": 0, **changes})
    model = build(config, torch.float32)
    layer = model.model.layers[0]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for norm in (layer.input_layernorm, layer.post_attention_layernorm, model.model.norm):
            norm.weight.fill_(1.0)
        model.model.embed_tokens.weight[:, :2] = 1.0  # the second axis is what asks for the bos token
        model.model.embed_tokens.weight[bos, :3] = torch.tensor([0.0, 0.0, 1.0])
        layer.self_attn.q_proj.weight[3, 1] = 4.0  # a dimension that rotary positions hardly turn
        layer.self_attn.k_proj.weight[3, 2] = 4.0
        layer.self_attn.v_proj.weight[0, 2] = 1.1 * 32**-0.5  # a little more than axis 0 holds
        layer.self_attn.o_proj.weight[0, 0] = -1.0
        model.lm_head.weight[wrong, 0] = 10.0
    model.save_pretrained(folder)
    add_tokenizer(folder)
    return bos


def tokenizer_like(pre: str) -> Tokenizer:
    """Return the sapling's tokenizer with a pre-tokenizer of llama.cpp."""
    from niwaki.exporters.gguf_vocabulary import PRE_TOKENIZERS

    described = json.loads((sapling() / "tokenizer.json").read_text(encoding="utf-8"))
    described["model"]["ignore_merges"] = PRE_TOKENIZERS[pre][0]
    tokenizer = Tokenizer.from_str(json.dumps(described))
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[pre][1]
    return tokenizer


def write_sentencepiece(folder: Path, tokens: int) -> None:
    """Write a vocabulary as SentencePiece trains it for a Llama: characters, byte fallback, ▁ for a space."""
    base = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    learner = Tokenizer(BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    learner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    words = pre_tokenizers.Split("▁", "merged_with_next")  # else the texts would be learned whole
    learner.pre_tokenizer = words
    learner.train_from_iterator(
        sorted(topics.values())[:40], BpeTrainer(vocab_size=tokens, special_tokens=base, show_progress=False)
    )
    described = json.loads(learner.to_str())
    described["added_tokens"] = described["added_tokens"][:3]
    described["pre_tokenizer"] = None
    described["post_processor"] = json.loads(
        TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)]).__getstate__()
    )
    (folder / "tokenizer.json").write_text(json.dumps(described), encoding="utf-8")
    names = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(names), encoding="utf-8")


def write_texts(path: Path, count: int = 3, first: int = 0) -> Path:
    """Write a .jsonl of Python help topics, and return its path."""
    names = sorted(topics)[first : first + count]
    path.write_text("".join(json.dumps({"text": topics[name]}) + "\n" for name in names), encoding="utf-8")
    return path


def weights_of(folder: Path) -> dict[str, Tensor]:
    """Return all tensors of a folder by name."""
    from niwaki.model.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(folder)
    return checkpoint.read(checkpoint.tensors)


def file_bytes(folder: Path) -> dict[str, bytes]:
    """Return the contents of every file that identifies a result.

    run.json, events.jsonl and the model card hold times, so they are left out.
    """
    skipped = {"run.json", "events.jsonl", "README.md"}
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in skipped
    }


def header_only(folder: Path, config: Any, shard_bytes: int = 10 * 2**30) -> Path:
    """Write a bf16 checkpoint of `config` as sparse files: headers without content, and return its folder."""
    with torch.device("meta"):
        model: Any = transformers.AutoModelForCausalLM.from_config(config)
    config.save_pretrained(folder)
    shards: list[dict[str, Any]] = [{}]
    filled = 0
    for name, tensor in model.state_dict().items():
        nbytes = 2 * tensor.numel()
        if filled + nbytes > shard_bytes and shards[-1]:
            shards.append({})
            filled = 0
        place = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [filled, filled + nbytes]}
        shards[-1][name] = place
        filled += nbytes
    weight_map = {}
    for number, shard in enumerate(shards):
        header = json.dumps(shard).encode()
        header += b" " * (-len(header) % 8)
        with (folder / f"part-{number}.safetensors").open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(8 + len(header) + max(place["data_offsets"][1] for place in shard.values()))
        weight_map |= dict.fromkeys(shard, f"part-{number}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder
