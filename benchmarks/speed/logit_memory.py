"""Peak memory of the paths that make logits, for a small model with a vocabulary of 262,144 tokens, on the CPU.

    OMP_NUM_THREADS=1 python -m benchmarks.speed.logit_memory --work WORK \\
        --before OLD/src --out benchmarks/results/speed/logit-memory-cpu.json

Every case is a process of its own. Its peak is the highest RSS, without what was resident after the imports. `--before`
is the folder of an older package, whose cases take the same arguments. Weights are random.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import torch
import transformers

import niwaki
from benchmarks.common.checkpoints import write_topics
from benchmarks.common.cpu_timing import resident_bytes
from benchmarks.common.provenance import provenance
from niwaki.cli.demo import sapling

VOCABULARY = 262144
SEQ_LEN = 512
CASES = ("evaluate", "tasks", "compare", "gblm")


def make_model(folder: Path) -> None:
    """Write a Llama of two blocks with the sapling's tokenizer."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=VOCABULARY,
        max_position_embeddings=1024,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=True,
    )
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((sapling() / name).read_bytes())


def write_questions(path: Path, count: int = 96) -> None:
    """Write questions of four choices from the topics of Python's help."""
    words = [topics[name].split() for name in sorted(topics) if len(topics[name].split()) > 40]
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            own = words[number % len(words)]
            ends = [" " + " ".join(words[(number + 7 * j) % len(words)][20:26]) for j in range(4)]
            file.write(json.dumps({"pairs": [[" ".join(own[:20]), end] for end in ends], "gold": 0}) + "\n")


def run_case(case: str, work: Path) -> None:
    """Run one path, and print the peak."""
    model, text = work / "model", work / "text.jsonl"
    before = resident_bytes()
    if case == "evaluate":
        niwaki.evaluate(model, reference=model, data=text, seq_len=SEQ_LEN, max_tokens=4 * SEQ_LEN, device="cpu")
    elif case == "tasks":
        niwaki.evaluate(model, tasks=work / "questions.jsonl", device="cpu")
    elif case == "compare":
        niwaki.compare(
            model, [work / "other"], data=text, seq_len=SEQ_LEN, max_tokens=4 * SEQ_LEN, rounds=0, device="cpu"
        )
    else:
        niwaki.compress(
            model, work / f"out-{os.getpid()}", method=case, target="0.5", device="cpu",
            calibration={"files": str(text), "samples": 4, "seq_len": SEQ_LEN},
        )  # fmt: skip
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before)


def peak_bytes(case: str, work: Path, source: Path) -> int:
    """Return the peak of a case in a process of its own, with the package in `source`."""
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{source}{os.pathsep}{root}"}
    line = [sys.executable, "-m", "benchmarks.speed.logit_memory", "--work", str(work), "--case", case]
    ended = subprocess.run(line, env=environment, cwd=root, check=True, capture_output=True, text=True)
    return int(ended.stdout.split()[-1])


def main() -> None:
    """Measure all cases with both packages, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--before", type=Path, help="src of an older package")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--case", choices=CASES)
    args = parser.parse_args()
    if args.case:
        run_case(args.case, args.work)
        return
    args.work.mkdir(parents=True, exist_ok=True)
    for name in ("model", "other"):
        make_model(args.work / name)
    write_topics(args.work / "text.jsonl")
    write_questions(args.work / "questions.jsonl")
    sources = {"after": Path(niwaki.__file__).parents[1], **({"before": args.before} if args.before else {})}
    rows = []
    for case in CASES:
        row: dict[str, object] = {"path": case}
        for name, source in sources.items():
            row[f"{name}_peak_gb"] = round(peak_bytes(case, args.work, source) / 1e9, 3)
        rows.append(row)
        print(row, flush=True)
    result = {
        "what": f"peak RSS after the imports, Llama 64 wide, vocabulary {VOCABULARY}, windows of {SEQ_LEN} tokens, "
        "float32; logit_bytes is the default of 256 MiB",
        **provenance("cpu"),
        "threads": torch.get_num_threads(),
        "logits_of_a_window_gb": round(SEQ_LEN * VOCABULARY * 4 / 1e9, 3),
        "peaks": rows,
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
