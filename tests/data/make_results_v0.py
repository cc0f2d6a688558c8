"""The commands that wrote results_v0: small results of the version before the modules moved.

    git worktree add ../old c05be80
    PYTHONPATH=../old/src python tests/data/make_results_v0.py /tmp/v0

It needs that commit, in a shell where `import niwaki` finds it, and writes into a new folder. A short name keeps the
paths inside the records short. The folder, renamed to results_v0, is a fixture: later versions must read it.
"""

import contextlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")
os.environ.update(HF_HUB_DISABLE_PROGRESS_BARS="1", TOKENIZERS_PARALLELISM="false", COLUMNS="200")

import torch
import transformers
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel

COMMIT = "c05be80"
VOCABULARY = 128
WRITTEN_S = 1_767_225_600  # when the model is said to be written: a resume looks at it
CALIBRATED = "--calibration text.jsonl --samples 8 --seq-len 32 --device cpu"
RESULTS = {
    "pruned": "--method sparsegpt --target 2:4 --pack none",
    "packed": "--method sparsegpt+gptq --target 2:4+4bit --pack auto --set gptq.group=32",
    "quantized": "--method gptq --target 4bit --set group=32 --ends 4bit",
    "shaped": "--method comp --target 0.3 --set try_blocks=1 --set try_heads=1",
    "shadowed": "--method shadow --target 0.5",
    "chained": "--method comp+gptq --target 0.25+4bit --set gptq.group=8",
}
QUALITY = "--data held.jsonl --tasks tasks.jsonl --seq-len 32 --device cpu"
GATE = "max_perplexity_ratio: 1.0e+9\nmax_kl: 1.0e-9\nmax_bytes_ratio: 2.0\n"
WORK = "--batch 1,2 --prompt 8 --new 3 --context 8 --rounds 1 --seconds 1 --threads 1 --device cpu"
PLAN = (
    "--method sparsegpt+gptq --target 2:4+4bit --pack auto --set gptq.group=32 --gpu h100 --price-per-hour 2.5 "
    "--tokens-per-day 1000000"
)
KILLED = """
import os, signal, niwaki
def stop(event, **fields):
    if event == "saved" and fields["part"] == "block-00000":
        os.kill(os.getpid(), signal.SIGKILL)
calibration = {"files": ("text.jsonl",), "samples": 8, "seq_len": 32}
recipe = {"method": "sparsegpt", "target": "2:4", "calibration": calibration, "device": "cpu"}
niwaki.compress("dense", "unfinished", **recipe, report=stop)
"""
README = f"""# Results of commit {COMMIT}

`make_results_v0.py`, beside this folder, wrote all of it with that commit. The model is random, so no number is good.

- `dense`: the model; `text.jsonl`, `held.jsonl`, `tasks.jsonl`, `gate.yaml`: what the commands read.
"""


def niwaki_command(*arguments: str, code: int = 0) -> str:
    """Call `niwaki ARGUMENTS` in this process and return its output."""
    from niwaki.cli import main as niwaki

    sys.argv, out, messages, found = ["niwaki", *arguments], io.StringIO(), io.StringIO(), 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(messages):
            niwaki()
    except SystemExit as stopped:
        found = int(stopped.code or 0)
    if found != code:
        raise RuntimeError(f"niwaki {' '.join(arguments)}: {found}\n{out.getvalue()}{messages.getvalue()}")
    return out.getvalue()


def words() -> list[str]:
    """Make up the words of a small language."""
    return [
        first + second for first in "bdfgklmnprst" for second in ("a", "e", "i", "o", "u", "ai", "au", "en", "or", "is")
    ]


def write_dense(folder: Path) -> None:
    """Write a random Llama with a vocabulary of whole words."""
    names = ["<s>", "<unk>", ".", *words()][:VOCABULARY]
    tokenizer = Tokenizer(WordLevel({name: number for number, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>", unk_token="<unk>"
    ).save_pretrained(folder)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_((torch.randn(parameter.shape, generator=generator) * 0.2).to(parameter.dtype))
    model.save_pretrained(folder)
    os.utime(folder / "model.safetensors", (WRITTEN_S, WRITTEN_S))


def write_texts() -> None:
    """Write what the commands read."""
    chance = random.Random(0)

    def sentence() -> str:
        return " ".join(words()[int(chance.random() * 100)] for _ in range(12)) + " ."

    for name, documents in (("text", 24), ("held", 24)):
        rows = [json.dumps({"text": " ".join(sentence() for _ in range(3))}) for _ in range(documents)]
        Path(f"{name}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    pairs = [[[context, " " + sentence()] for _ in range(2)] for context in (sentence() for _ in range(12))]
    rows = [json.dumps({"pairs": pair, "gold": number % 2}) for number, pair in enumerate(pairs)]
    Path("tasks.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    Path("gate.yaml").write_text(GATE, encoding="utf-8")


def write_results() -> list[str]:
    """Write every result, and what the commands said of it; return lines for the README."""
    lines = []
    expected = Path("expected")
    expected.mkdir()
    for name, flags in RESULTS.items():
        niwaki_command("compress", "dense", name, *flags.split(), *CALIBRATED.split())
        lines.append(f"- `{name}`: `niwaki compress dense {name} {flags} {CALIBRATED}`")
        told = niwaki_command("inspect", name, "--json")
        (expected / f"{name}-inspect.json").write_text(told, encoding="utf-8")
        if name != "shadowed":  # it runs in parts
            place = expected / f"{name}-evaluate.json"
            niwaki_command("evaluate", name, "--reference", "dense", *QUALITY.split(), "--json", str(place))
        text = niwaki_command("generate", name, "ba de fi go ku .", "--max-new-tokens", "8", "--device", "cpu")
        (expected / f"{name}-generate.txt").write_text(text, encoding="utf-8")
    lines.append(f"- `expected/`: `niwaki inspect NAME --json`, `niwaki evaluate NAME --reference dense {QUALITY}`")
    lines.append("  and `niwaki generate NAME 'ba de fi go ku .' --max-new-tokens 8` of each.")
    return lines


def write_reports() -> list[str]:
    """Compare, measure and plan; return lines for the README."""
    compare = f"compare dense pruned packed {QUALITY.replace('32', '16')} --rounds 0 --gate gate.yaml --report report"
    bench = f"bench dense packed quantized {WORK} --json bench.json"
    plan = f"plan dense {PLAN} {CALIBRATED.removesuffix(' --device cpu')} --json"
    niwaki_command(*compare.split(), code=1)
    for name in ("compare.json", "junit.xml"):
        shutil.copy(Path("report") / name, name)
    shutil.rmtree("report")
    niwaki_command(*bench.split())
    Path("plan.json").write_text(niwaki_command(*plan.split()), encoding="utf-8")
    ended = subprocess.run([sys.executable, "-c", KILLED], capture_output=True, check=False)
    assert ended.returncode == -signal.SIGKILL and not Path("unfinished").exists()
    return [
        f"- `compare.json`, `junit.xml`: `niwaki {compare}` (exit code 1: one gate fails)",
        f"- `bench.json`: `niwaki {bench}`",
        f"- `plan.json`: `niwaki {plan}`",
        f"- `unfinished.partial`: `niwaki compress dense unfinished --method sparsegpt --target 2:4 {CALIBRATED}`,",
        f"  killed when its first block was safe. A resume needs `touch -d @{WRITTEN_S} dense/model.safetensors`, one",
        f"  thread, torch {torch.__version__} and transformers {transformers.__version__}; else it is refused.",
    ]


def main() -> None:
    """Write everything into the new folder that the command line names."""
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True)
    os.chdir(folder)
    write_dense(Path("dense"))
    write_texts()
    lines = write_results() + write_reports()
    Path("README.md").write_text(README + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
