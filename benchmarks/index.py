"""Generator of README.md beside this file: the script, the command and the claim of every committed result.

The results give the commands, claims.yaml the claims, and links to a result the pages. tests/house/test_benchmarks.py
fails when the index is stale.

    python -m benchmarks.index
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
ROOT = HERE.parent
RESULTS = HERE / "results"
FOLDERS = {
    "quality": "Perplexity, agreement and drift of compressed models.",
    "speed": "Time and memory of compressing, of whole models, and of plans.",
    "kernels": "Time of one layer.",
    "serving": "The server and the roll-out.",
}
# Scripts by the names that results of earlier versions record.
SCRIPTS = {
    "compression_speed": "benchmarks.speed.compression_speed",
    "contextual": "benchmarks.quality.contextual",
    "contextual_speed": "benchmarks.speed.contextual_speed",
    "drift": "benchmarks.quality.drift",
    "first_version": "benchmarks.speed.first_version",
    "llamacpp_speed": "benchmarks.speed.llamacpp_speed",
    "memory": "benchmarks.speed.memory",
    "packed_decode": "benchmarks.speed.packed_decode",
    "packed_decode_gpu": "benchmarks.speed.packed_decode --device cuda",
    "packed_linear": "benchmarks.kernels.packed_linear",
    "packed_linear_gpu": "benchmarks.kernels.packed_linear --device cuda",
    "plan": "benchmarks.speed.plan",
    "quality": "benchmarks.quality.quality",
    "recovery": "benchmarks.quality.recovery",
    "rollout_drift": "benchmarks.serving.rollout_drift",
    "rollout_overhead": "benchmarks.serving.rollout_overhead",
    "rollout_real": "tests.system.serving.reach_rollout",
    "rollout_simulated": "benchmarks.serving.rollout_simulated",
    "rows_gemv_gpu": "benchmarks.kernels.rows_gemv",
    "safeguards": "benchmarks.quality.safeguards",
    "scaling": "benchmarks.speed.scaling",
    "serving_batch": "benchmarks.serving.serving_batch",
    "serving_soak": "tests.system.serving.reach_soak",
    "shape_latency": "benchmarks.speed.shape_latency",
    "shape_speed": "benchmarks.speed.shape_speed",
    "shape_speed_gpu": "benchmarks.speed.shape_speed --device cuda",
    "slicegpt": "benchmarks.quality.slicegpt",
    "sparse_linear_gpu": "benchmarks.kernels.sparse_linear",
    "sparse_sizes": "benchmarks.speed.sparse_sizes",
}
# Scripts of results that record no command, or that of another program.
NOT_RECORDED = {
    "quality/ablation-squeeze10-learning-llama-28m.json": "benchmarks.quality.quality",
    "speed/memory-comp-cpu.json": "benchmarks.speed.memory",
    "speed/whole-model-cpu.json": "benchmarks.speed.whole_model",
    "speed/whole-model-h100.json": "benchmarks.speed.whole_model",
}
# Plots that `benchmarks.common.plots` draws. The other plots come from the script of their JSON file.
PLOTS = {
    "quality/drift-llama-28m.svg": "drift",
    "quality/quality-quantized-llama-28m.svg": "quality",
    "quality/quality-structured-llama-28m.svg": "structured",
    "quality/real-model-smollm2-h200.svg": "real",
}
INTRODUCTION = """# Benchmarks

Scripts run as modules from the root of the repository: `python -m benchmarks.speed.memory --help`. Results carry date,
machine, versions and command. `python -m benchmarks.index` writes this page from them. Commands name today's modules,
also those of earlier results. The commands of whole models are built from the settings in their files. MODEL, DATA,
WORK and OUT are folders and files of the person who runs the script.
"""
MORE = {  # arguments of plots that read two files
    "structured": " --latency benchmarks/results/speed/latency-structured-llama-28m.json",
    "real": " --with benchmarks/results/quality/peers-smollm2-h200.json",
}


def modern(command: str) -> str:
    """Return a recorded command with today's modules and places of results."""
    command = re.sub(r"python (?:benchmarks/)?(\w+)\.py", lambda found: f"python -m {SCRIPTS[found[1]]}", command)

    def placed(found: re.Match[str]) -> str:
        """Return the path of a result in its folder of today."""
        paths = [path for folder in FOLDERS if (path := RESULTS / folder / found[1]).is_file()]
        return str(paths[0].relative_to(ROOT)) if paths else found[0]

    return re.sub(r"(?:benchmarks/)?\bresults/([\w.-]+\.(?:json|svg))", placed, command)


def commands_of(name: str) -> list[str]:
    """Return the commands that made a result, with today's modules. An empty list means that none is known."""
    if name in PLOTS:
        more = MORE.get(PLOTS[name], "")
        source = f"benchmarks/results/{name.removesuffix('.svg')}.json"
        return [f"python -m benchmarks.common.plots {PLOTS[name]} {source} benchmarks/results/{name}{more}"]
    found = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    if "settings" in found:
        return [whole_model(found)]
    recorded = found.get("commands") or found.get("command") or []
    return [modern(command) for command in ([recorded] if isinstance(recorded, str) else recorded)]


def whole_model(found: dict[str, Any]) -> str:
    """Return the command of a table of whole models, whose file records the settings instead."""
    settings, shape = found["settings"], found["model"].removesuffix("-shape")
    batches = ",".join(map(str, settings["batches"]))
    return (
        f"python -m benchmarks.speed.whole_model --shape {shape} --device {settings['device']} "
        f"--threads {settings['threads']} --batch {batches} --prompt {settings['prompt_tokens']} "
        f"--new {settings['new_tokens']} --context {settings['context']} --rounds {settings['rounds']} "
        f"--seconds {settings['seconds']:g} --out OUT"
    )


def modules_of(name: str) -> list[str]:
    """Return the modules that made a result."""
    if name in NOT_RECORDED:
        return [NOT_RECORDED[name]]
    if name.endswith(".svg") and name not in PLOTS:
        return modules_of(name.removesuffix(".svg") + ".json")
    return list(dict.fromkeys(re.findall(r"python -m ([\w.]+)", " ".join(commands_of(name)))))


def results(suffix: str = "") -> list[str]:
    """Return the names of all results below benchmarks/results, or of those with a suffix."""
    return sorted(
        path.relative_to(RESULTS).as_posix()
        for path in RESULTS.rglob("*")
        if path.is_file() and path.name.endswith(suffix)
    )


def pages_of(name: str) -> list[str]:
    """Return the pages that link to a result."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [
        page.relative_to(ROOT).as_posix()
        for page in pages
        if f"benchmarks/results/{name})" in page.read_text(encoding="utf-8")
    ]


def scripts() -> Iterator[str]:
    """Yield the modules that can be run: all with a `main`."""
    for folder in (HERE, ROOT / "tests" / "system" / "serving"):
        for path in sorted(folder.rglob("*.py")):
            if path != Path(__file__) and '\nif __name__ == "__main__":' in path.read_text(encoding="utf-8"):
                yield path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")


def claims() -> dict[str, Any]:
    """Return the claims by the names of results."""
    return dict(yaml.safe_load((HERE / "claims.yaml").read_text(encoding="utf-8")))


def rows(folder: str) -> Iterator[str]:
    """Yield the rows of the index for one folder of results."""
    claimed = claims()
    for name in results(".json"):
        if name.startswith(f"{folder}/"):
            used = ", ".join(f"[{m.rpartition('.')[2]}](../{m.replace('.', '/')}.py)" for m in modules_of(name))
            commands = "<br>".join(f"`{command}`" for command in commands_of(name)) or "not recorded"
            pages = ", ".join(f"[{Path(page).stem}](../{page})" for page in pages_of(name))
            yield f"| {used} | {commands} | {_link(name)} | {claimed[name]} In {pages}. |"


def _link(name: str) -> str:
    """Return a link to a result, and to its plot if it has one."""
    plot = f"{name.removesuffix('.json')}.svg"
    return f"[{Path(name).stem}](results/{name})" + (f" ([plot](results/{plot}))" if plot in results(".svg") else "")


def render() -> str:
    """Return the text of the index."""
    parts = [INTRODUCTION]
    for folder, text in FOLDERS.items():
        head = "| script | command | result | claim |\n|---|---|---|---|"
        parts.append("\n".join([f"## {folder}\n\n{text}\n\n{head}", *rows(folder)]) + "\n")
    plots = [f"| [{Path(name).stem}](results/{name}) | `{commands_of(name)[0]}` |" for name in PLOTS]
    parts.append("\n".join(["## Plots\n\n| plot | command |\n|---|---|", *plots]) + "\n")
    used = {module for name in results() for module in modules_of(name)}
    unused = [f"- `python -m {module}`" for module in scripts() if module not in used]
    if unused:
        parts.append("\n".join(["## Scripts without a committed result\n", *unused]) + "\n")
    return "\n".join(parts)


def main() -> None:
    """Write the index."""
    (HERE / "README.md").write_text(render(), encoding="utf-8")


if __name__ == "__main__":
    main()
