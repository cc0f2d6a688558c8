"""The inputs of the proof, and the command line called in this process.

The models are cut from the sapling or built from a seed. The texts come from a seeded generator and a fixed list of
words, so every machine and every Python writes the same ones. All paths that a command sees are relative to one
temporary folder, so no record holds the name of a place.
"""

import contextlib
import importlib
import io
import json
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

import niwaki

TEXT = """
a about above after again air all along always among and animal answer apple are around ask autumn away baby back bad
bag ball bank be bear because bed before begin behind below best better between big bird black blue boat body bone
book both bottom box boy bread break bridge bright bring brother brown build but buy by call can car carry castle cat
catch chair change child circle city clean clear clock close cloud coat cold come cook corn could country cow cross
cry cup cut dance dark day deep did dinner do dog door down draw dream drink drive dry duck ear early earth east eat
egg eight eleven empty end enough evening every eye face fall family far farm fast father feel few field find fire
first fish five floor flower fly food foot for forest four fox friend from fruit full game garden gate girl give glass
go gold good grass great green ground grow hair half hand happy hard has hat have he head hear heart heavy help her
here high hill him his hold hole home hope horse hot hour house how hundred ice if in into is island it jump just keep
kind king kitchen know lake land large last late laugh leaf learn left leg letter light like line lion listen little
live long look lost loud love low make man many map market milk mind money month moon more morning mother mountain
mouse mouth move much music must name near neck need nest never new next night nine no noise north nose not nothing
now number of off often old on once one only open or orange other our out over own page paint paper park part path
people picture pig plant play point pond poor pull push put queen question quick quiet rain read ready red rest rice
rich ride right ring river road rock roof room round run sad said same sand save say school sea second see seed seven
shall she sheep ship shoe shop short should show side silver sing sister sit six skin sky sleep slow small smile snow
so soft some son song soon sound south speak spring stand star start stay step stone stop story street strong such
summer sun sure sweet swim table take talk tall teach tell ten than that the their them then there these they thing
think this three through time to today together too top town train travel tree true try turn twelve two under until up
us use very village voice wait walk wall want warm was wash watch water way we wear week well went were west wet what
wheel when where which white who why wide wild will wind window winter wish with woman wood word work world would
write year yellow yes yet you young your
"""
WORDS = TEXT.split()

SHORT_BLOCKS = 3  # of the sapling, in most cases
FAMILY = {
    "vocab_size": 4096,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}
GROUPED = {**FAMILY, "num_key_value_heads": 2, "intermediate_size": 48, "head_dim": 8}


def sapling() -> Path:
    """Return the folder of the model that lies in the package."""
    package = Path(niwaki.__file__).parent
    found = sorted(package.rglob("sapling/model.safetensors"))
    assert len(found) == 1, f"expected one sapling below {package}, got {found}"
    return found[0].parent


def sentence(chance: random.Random) -> str:
    """Write one sentence of words drawn at random."""
    words = [WORDS[int(chance.random() * len(WORDS))] for _ in range(4 + int(chance.random() * 12))]
    return " ".join(words).capitalize() + "."


def write_texts(path: Path, seed: int, documents: int, sentences: int) -> None:
    """Write a .jsonl of documents, half of them in the domain `a` and half in `b`."""
    chance = random.Random(seed)
    rows = [
        {"text": " ".join(sentence(chance) for _ in range(sentences)), "domain": "ab"[number % 2]}
        for number in range(documents)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_tasks(path: Path, seed: int, questions: int) -> None:
    """Write questions with two answers each."""
    chance = random.Random(seed)
    rows = []
    for number in range(questions):
        context = sentence(chance)
        rows.append({"pairs": [[context, " " + sentence(chance)] for _ in range(2)], "gold": number % 2})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_short(folder: Path, blocks: int) -> None:
    """Write the sapling with its first blocks alone."""
    source = sapling()
    shutil.copytree(source, folder)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config["num_hidden_layers"] = blocks
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    tensors = load_file(source / "model.safetensors")
    gone = [f"model.layers.{index}." for index in range(blocks, 100)]
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(tuple(gone))}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def families() -> dict[str, Any]:
    """Return the configs of architectures that differ from the sapling's."""
    return {
        "llama-wide": transformers.LlamaConfig(**{**GROUPED, "hidden_size": 64}, tie_word_embeddings=False),
        "llama-untied": transformers.LlamaConfig(**GROUPED, tie_word_embeddings=False),
        "qwen2": transformers.Qwen2Config(**GROUPED),
        "gemma2": transformers.Gemma2Config(**GROUPED, sliding_window=6),
        "phi3": transformers.Phi3Config(**{name: GROUPED[name] for name in GROUPED if name != "head_dim"}),
        "opt": transformers.OPTConfig(**FAMILY, ffn_dim=48, word_embed_proj_dim=32),
        "gpt2": transformers.GPT2Config(
            vocab_size=4096, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0
        ),
        "gpt_neox": transformers.GPTNeoXConfig(**FAMILY, intermediate_size=48),
        "bloom": transformers.BloomConfig(
            vocab_size=4096, hidden_size=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0
        ),
        "mixtral": transformers.MixtralConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2),
    }


def write_family(folder: Path, config: Any) -> None:
    """Write a model of random weights with the sapling's tokenizer."""
    torch.manual_seed(0)
    model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(sapling() / name, folder / name)


def model(name: str) -> str:
    """Return the folder of a model in the working folder, written at its first use."""
    folder = Path("models") / name
    if not folder.exists():
        folder.parent.mkdir(exist_ok=True)
        if name == "sapling":
            shutil.copytree(sapling(), folder)
        elif name.startswith("short"):
            write_short(folder, int(name.removeprefix("short") or SHORT_BLOCKS))
        else:
            write_family(folder, families()[name])
    return str(folder)


def write_world() -> None:
    """Write the texts, the questions, the gates and the recipe into the working folder."""
    write_texts(Path("calibration.jsonl"), 1, 60, 12)
    write_texts(Path("held.jsonl"), 2, 60, 3)
    write_tasks(Path("tasks.jsonl"), 3, 24)
    Path("loose.yaml").write_text("max_perplexity_ratio: 1.0e+9\nmax_bytes_ratio: 2.0\n", encoding="utf-8")
    Path("strict.yaml").write_text("max_perplexity_ratio: 0.001\nmax_kl: 1.0e-9\n", encoding="utf-8")
    Path("recipe.yaml").write_text(
        'method: sparsegpt\ntarget: "2:4"\nseed: 7\noptions: {damping_frac: 0.02}\n'
        "calibration: {files: [calibration.jsonl], samples: 6, seq_len: 32}\n",
        encoding="utf-8",
    )


def entry() -> Any:
    """Return the module with `main` and `app`, the entry of the command line, wherever it is."""
    outer = importlib.import_module("niwaki.cli")
    return importlib.import_module("niwaki.cli.app") if hasattr(outer, "__path__") else outer


def command(*arguments: object) -> tuple[int, str, str]:
    """Call `niwaki ARGUMENTS` in this process and return its exit code, its output and its messages."""
    before, out, messages = sys.argv, io.StringIO(), io.StringIO()
    sys.argv = ["niwaki", *map(str, arguments)]
    code = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(messages):
            entry().main()
    except SystemExit as stopped:
        code = stopped.code if isinstance(stopped.code, int) else int(stopped.code is not None)
    finally:
        sys.argv = before
    return code, out.getvalue(), messages.getvalue()


def passed(*arguments: object, code: int = 0) -> str:
    """Call `niwaki ARGUMENTS`, demand an exit code and return the output."""
    found, out, messages = command(*arguments)
    if found != code:
        raise RuntimeError(f"niwaki {' '.join(map(str, arguments))}: exit code {found}, expected {code}: {messages}")
    return out


def child_command(*arguments: object) -> list[str]:
    """Return the line that starts `niwaki ARGUMENTS` in a process of its own."""
    return [sys.executable, "-c", f"from {entry().__name__} import main; main()", *map(str, arguments)]
