"""The cases beside compressions: measures, plans, other commands, a killed run, refusals."""

import hashlib
import json
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from unchanged_cases import CALIBRATED, flags_of
from unchanged_reading import Values, folded, numbers, result_values, tensors_hash, under
from unchanged_world import child_command, command, model, passed

import niwaki

TEXTS = "--data held.jsonl --tasks tasks.jsonl --seq-len 64 --max-tokens 1600 --device cpu"
QUALITY = TEXTS.split()
PROMPT = "The old house stands by the river"
LIMIT_S = 300


def result(name: str) -> Path:
    """Return the folder of a compression, made if it is not there."""
    source, flags = flags_of(name)
    out = Path("results") / re.sub(r"\W+", "-", name)
    out.parent.mkdir(exist_ok=True)
    if not out.exists():
        passed("compress", model(source), out, *flags)
    return out


def compressed(name: str) -> Values:
    """Run one compression and read its result."""
    return result_values(result(name))


def read(path: Path) -> Any:
    """Read a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def evaluate_case() -> Values:
    """Evaluate a dense model, and two results beside it."""
    passed("evaluate", model("short"), *QUALITY, "--json", "dense.json")
    found = under("dense", numbers(read(Path("dense.json"))))
    for name in ("sparsegpt 2:4", "gptq 4bit ends"):
        passed("evaluate", result(name), "--reference", model("short"), *QUALITY, "--json", "scores.json")
        found |= under(name, numbers(read(Path("scores.json"))))
    return found


def compared(record: dict[str, Any], whole: bool) -> Values:
    """Read a comparison: its verdicts, and with `whole` its numbers and a hash of its texts."""
    found = {}
    for number, each in enumerate(record["candidates"]):
        verdicts = [f"{verdict['gate']} {verdict['passed']}" for verdict in each["gates"]]
        found |= {f"verdicts/{number}": ", ".join(verdicts), f"gates/{number}": folded(each["gates"])}
        texts = {name: each.pop(name) for name in ("generations", "worst")}
        found |= {f"{name}/{number}": folded(value) for name, value in texts.items()} if whole else {}
    return {**found, **(numbers(record) if whole else {})}


def compare_case(names: tuple[str, ...], rounds: int) -> Values:
    """Compare results with the dense model, pass one gate and fail another, judge again without measuring."""
    outs = [result(name) for name in names]
    report = Path(f"report-{rounds}")
    shared = [*QUALITY, "--rounds", rounds, "--lang", "en"]
    timed = ["--prompt-tokens", 16, "--new-tokens", 8] if rounds else []
    found: Values = {}
    for gate, code in ({"loose": 0} if rounds else {"loose": 0, "strict": 1}).items():
        folder = report / gate
        report.mkdir(exist_ok=True)
        passed(
            "compare", model("short"), *outs, *shared, *timed, "--gate", f"{gate}.yaml", "--report", folder, code=code
        )
        found[f"{gate}/files"] = ", ".join(sorted(path.name for path in folder.iterdir()))
        found |= under(gate, compared(read(folder / "compare.json"), whole=gate == "loose"))
    baseline = report / "loose/compare.json"
    found["gate/strict"] = command("gate", "strict.yaml", "--baseline", baseline)[0]
    found["gate/loose"] = command("gate", "loose.yaml", "--baseline", baseline)[0]
    passed("gate", "new.yaml", "--init", "--baseline", baseline, "--overwrite", "--candidate", outs[0].name)
    if not rounds:  # else the limits hold times
        limits = re.findall(r"^\W*((?:max|min)_\w+): ([\d.e+-]+)", Path("new.yaml").read_text(), re.MULTILINE)
        found |= {f"gate/new/{name}": f"{float(value):.5g}" for name, value in limits}
    return found


def bench_case() -> Values:
    """Measure variants and two results; keep bytes, counts and kernels, no times."""
    outs = [result(name) for name in ("sparsegpt 2:4 pack", "gptq 4bit ends")]
    work = "--batch 1,2 --prompt 16 --new 3 --context 8 --rounds 1 --seconds 1 --threads 1 --device cpu"
    passed("bench", model("short"), *outs, *work.split(), "--json", "bench.json")
    passed("bench", model("short"), "--forms", "bitmap,2:4,2:4+4bit,4bit", *work.split(), "--json", "forms.json")
    found: Values = {}
    for name in ("bench", "forms"):
        record = read(Path(f"{name}.json")) | {"format": 1}  # format 2 calls a form a variant
        found |= under(name, numbers(record))
        for number, row in enumerate(record["rows"]):
            variant = row.get("variant") or row["form"]
            found[f"{name}/rows/{number}/form"] = f"{variant}; {row['reason']}; {row['detail']}"
            kernels = [cell["kernel"] for cell in row["decode"]] + [(row["prefill"] or {}).get("kernel")]
            found[f"{name}/rows/{number}/kernels"] = json.dumps(kernels)
    return found


# The preset `best` before 30 November 2026.
BEST_OF_THEN = "--set wandapp.rounds=15 --set wandapp.batch=8 --set wandapp.rate_frac=0.0075 --set wandapp.kl=0"


def plan_case() -> Values:
    """Plan on a card of the table, where nothing is measured."""
    found: Values = {}
    plans = {
        "sparsegpt 2:4": "--method sparsegpt --target 2:4 --pack auto",
        "gptq 4bit": "--method gptq --target 4bit --ends 4bit",
        "sparsegpt+gptq": "--method sparsegpt+gptq --target 2:4+4bit --pack auto",
        "squeeze10": "--method squeeze10 --target 1.6bit",
        "comp+gptq": "--method comp+gptq --target 0.25+4bit",
        "shadow": "--method shadow --target 0.5 --set unit=prompt --set scope=local",
        "best": f"--preset best --target 2:4 --rotate none {BEST_OF_THEN}",
    }
    money = "--price-per-hour 2.5 --tokens-per-day 50000000 --gpu h100 --json"
    for name, flags in plans.items():
        told = passed("plan", model("sapling"), *flags.split(), *CALIBRATED.split(), *money.split())
        record = json.loads(told)
        del record["money"]  # it holds the time that opening the files took
        found |= under(name, numbers(record))
    return found


def inspect_case() -> Values:
    """Explain results of every kind, and one matrix of each in full."""
    found: Values = {}
    for name in (
        "sparsegpt 2:4",
        "gptq 4bit ends",
        "sparsegpt+gptq 2:4+4bit pack",
        "comp+gptq 0.25+4bit",
        "shadow 0.5",
    ):
        out = result(name)
        told = json.loads(passed("inspect", out, "--json"))
        found |= under(name, numbers(told)) | {f"{name}/kind": f"{told['kind']}, {told['measure']}"}
        code, text, _ = command("inspect", out, "--why", "model.layers.1.mlp.down_proj", "--json")
        found[f"{name}/why"] = code
        found |= under(f"{name}/why", numbers(json.loads(text)) if code == 0 else {})
    return found


def generate_case() -> Values:
    """Continue a prompt with models of every kind; their texts must stay."""
    names = (
        "sparsegpt 2:4 pack",
        "gptq 4bit ends",
        "sparsegpt+gptq 2:4+4bit pack",
        "comp+gptq 0.25+4bit",
        "shadow 0.5",
    )
    places = {"dense": Path(model("short"))} | {name: result(name) for name in names}
    found: Values = {}
    for name, place in places.items():
        found[name] = passed("generate", place, PROMPT, "--max-new-tokens", 12, "--device", "cpu")
    sampled = ("--max-new-tokens", 12, "--temperature", 0.8, "--seed", 5, "--device", "cpu")
    found["dense sampled"] = passed("generate", places["dense"], PROMPT, *sampled)
    return found


def load_case() -> Values:
    """Load models of every kind in Python and hash what they compute."""
    found: Values = {}
    ids = torch.arange(1, 33)[None] * 7 % 4096
    for name in ("sparsegpt 2:4 pack", "sparsegpt 0.5 pack", "gptq 4bit ends", "squeeze10 1.6bit uniform", "comp 0.3"):
        loaded = niwaki.load(result(name), device="cpu")
        with torch.no_grad():
            logits = loaded(input_ids=ids).logits.float()
        found[name] = hashlib.sha256(logits.contiguous().numpy().tobytes()).hexdigest()
        found[f"{name}/mean"] = float(f"{float(logits.abs().mean()):.6g}")
    return found


def python_case() -> Values:
    """Compress by the function: it must write what the command writes."""
    out = Path("by-function")
    calibration = {"files": ("calibration.jsonl",), "samples": 8, "seq_len": 64}
    niwaki.compress(model("short"), out, method="sparsegpt", target="2:4", calibration=calibration, device="cpu")
    same = tensors_hash(out) == tensors_hash(result("sparsegpt 2:4"))
    return {"as the command": same, **result_values(out)}


def recover_case() -> Values:
    """Train a pruned model a little."""
    work = "--data calibration.jsonl --steps 4 --batch 2 --seq-len 32 --device cpu"
    passed("recover", result("sparsegpt 2:4"), "recovered", *work.split())
    record = read(Path("recovered/niwaki/run.json"))
    return {"weights": tensors_hash(Path("recovered")), **under("result", numbers(record["result"]))}


def export_case() -> Values:
    """Write results for other engines."""
    found: Values = {}
    for number, (name, flags) in enumerate([
        ("sparsegpt 2:4", "--to gguf"),
        ("gptq 4bit ends", "--to gguf --type q4_0"),
        ("rtn 8bit", "--to gguf --type q8_0"),
        ("rtn 4bit options", "--to compressed-tensors"),
    ]):  # fmt: skip
        place = Path(f"export-{number}")
        code, _, message = command("export", result(name), place, *flags.split())
        found[f"{name} {flags}"] = code
        if code:
            found[f"{name} {flags}/message"] = message.replace("\n", " ").replace(str(Path.cwd()), "")
            continue
        names = sorted(path.name for path in place.iterdir() if path.is_file())
        found[f"{name} {flags}/files"] = ", ".join(names)
        found[f"{name} {flags}/tensors"] = tensors_hash(place)
        for path in sorted(place.glob("*.gguf")):
            found[f"{name} {flags}/gguf"] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def adapt_case() -> Values:
    """Learn the predictor of a contextual model again."""
    out = Path("adapted")
    shutil.copytree(result("shadow 0.5"), out)
    text = passed("adapt", out, "--data", "calibration.jsonl", "--samples", 8, "--seq-len", 32, "--device", "cpu")
    return {"said": text.replace("\n", " "), "weights": tensors_hash(out)}


def kill_and_resume(name: str, blocks: int) -> Values:
    """Stop a compression by a kill once some of its blocks are safe, go on with it, and compare with a straight run."""
    source, flags = flags_of(name)
    out = Path(f"killed-{blocks}")
    partial = out.with_name(f"{out.name}.partial")
    line = child_command("compress", model(source), out, *flags)
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + LIMIT_S
    while len(list(partial.rglob("block-*.json"))) < blocks and process.poll() is None:
        if time.monotonic() > deadline:
            raise RuntimeError(f"no {blocks} blocks within {LIMIT_S} s")
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    if process.returncode != -signal.SIGKILL or out.exists():
        raise RuntimeError(f"the run ended by itself with {process.returncode}, before it was killed")
    refused = command("compress", model(source), out, *flags, "--resume", "--seed", 99)[0]
    without = command("compress", model(source), out, *flags)[0]
    passed("compress", model(source), out, *flags, "--resume")
    events = [json.loads(row)["event"] for row in (out / "niwaki/events.jsonl").read_text().splitlines()]
    return {
        "same as straight": tensors_hash(out) == tensors_hash(result(name)),
        "other seed refused": refused,
        "no flag refused": without,
        "resume of a finished one": command("compress", model(source), out, *flags, "--resume")[0],
        "starts": events.count("start"),
        **result_values(out),
    }


def refusals_case() -> Values:
    """Return the exit codes of what must be refused, and whether anything was left."""
    short, calibrated = model("short"), CALIBRATED.split()
    wrong = {
        "unknown method": ["compress", short, "x1", "--method", "wandaa", "--target", "0.5"],
        "unknown target": ["compress", short, "x2", "--method", "wanda", "--target", "1.5"],
        "target of another kind": ["compress", short, "x3", "--method", "gptq", "--target", "0.5"],
        "unknown option": ["compress", short, "x4", "--method", "sparsegpt", "--target", "2:4", "--set", "no=1"],
        "no target": ["compress", short, "x5", "--method", "sparsegpt"],
        "two budgets": ["compress", short, "x6", "--method", "squeeze10", "--target", "2bit", "--target-bytes", "1MB"],
        "no model": ["compress", "nowhere", "x7", "--method", "sparsegpt", "--target", "2:4"],
        "no calibration file": [
            "compress",
            short,
            "x8",
            "--preset",
            "fast",
            "--target",
            "2:4",
            "--calibration",
            "no.txt",
        ],
        "out exists": ["compress", short, result("sparsegpt 2:4"), "--preset", "fast", "--target", "2:4", *calibrated],
        "nothing to resume": ["compress", short, "x9", "--preset", "fast", "--target", "2:4", *calibrated, "--resume"],
        "chain order": ["compress", short, "x10", "--method", "rtn+gptq", "--target", "4bit", *calibrated],
        "packed source": ["compress", result("sparsegpt 2:4 pack"), "x11", "--preset", "fast", "--target", "2:4"],
        "nothing to evaluate": ["evaluate", short],
        "no result": ["inspect", short],
        "unknown gate": ["gate", "recipe.yaml", "--baseline", "nowhere.json"],
        "unknown card": ["plan", short, "--preset", "fast", "--target", "2:4", "--gpu", "h1000"],
        "unknown form": ["bench", short, "--forms", "5:3"],
    }
    found: Values = {name: command(*arguments)[0] for name, arguments in wrong.items()}
    found["left"] = ", ".join(sorted(path.name for path in Path().glob("x*")))
    return found


MEASURES: dict[str, Callable[[], Values]] = {
    "measure evaluate": evaluate_case,
    "measure compare": lambda: compare_case(("sparsegpt 2:4", "gptq 4bit ends"), 0),
    "measure compare speed": lambda: compare_case(("sparsegpt+gptq 2:4+4bit pack", "comp 0.3"), 1),
    "measure bench": bench_case,
    "measure plan": plan_case,
    "measure inspect": inspect_case,
    "measure generate": generate_case,
    "measure load": load_case,
    "measure python": python_case,
    "measure recover": recover_case,
    "measure export": export_case,
    "measure adapt": adapt_case,
    "resume sparsegpt 2:4 sapling": lambda: kill_and_resume("sparsegpt 2:4 sapling", 2),
    "resume sparsegpt+gptq pack": lambda: kill_and_resume("sparsegpt+gptq 2:4+4bit pack", 1),
    "refusals": refusals_case,
}
QUICK_MEASURES = ("measure evaluate", "measure plan", "refusals")
COUNTED_MEASURES = ("measure plan", "refusals")  # without sums of measured numbers
