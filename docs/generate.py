"""Generator of the parts of the handbook that come from code and measurements: facts, options, numbers, commands.

A page holds them between two comments, <!-- generated: KIND NAME --> and <!-- end -->. Everything else on it is written
by hand. tests/house/test_handbook.py fails when a page is stale.

    python docs/generate.py
"""

import json
import re
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import typer
from rich.text import Text

from niwaki.cli.app import app
from niwaki.config.presets import PRESETS
from niwaki.config.recipe import option_fields
from niwaki.config.targets import Bits
from niwaki.measure.bench.schema import Cell, Row, read_bench
from niwaki.methods.method import MethodKind
from niwaki.methods.registry import METHODS, get_method, method_names

DOCS = Path(__file__).parent
RESULTS = DOCS.parent / "benchmarks" / "results"
BLOCK = re.compile(r"(<!-- generated: (\w+) ?([\w-]*) -->\n).*?(<!-- end -->)", re.S)
TEXTS = ("reviews", "wikitext2")
TASKS = {"arc": "ARC easy", "boolq": "BoolQ", "hellaswag": "HellaSwag", "piqa": "PIQA"}
Rows = list[list[str]]


def facts(name: str) -> str:
    """Return the facts of a method as a table."""
    method = get_method(name)
    needs = method.needs(method.config())
    data = needs.gram or needs.sqnorm or needs.gradient or needs.windows or method.kind is not MethodKind.WALK
    accepted = " or ".join(f"{kind.words}, `{kind.example}`" for kind in method.accepts)
    if method.kind is MethodKind.SHAPE:
        accepted = "share of the decoder's parameters to remove, `0.3`"
    if method.kind is MethodKind.CONTEXTUAL:
        accepted = "share of the work to skip, `0.5`"
    rows = [
        ["Source", method.paper],
        ["Target", accepted],
        ["Calibration text", "needed" if data else "not needed"],
        ["After another method in a chain", "yes" if method.continues else "no"],
        ["Cost", _cost(method.doc)],
    ]
    return _table(rows[0], rows[1:])


def options(name: str) -> str:
    """Return the options of a method: default, type and the explanation beside the field."""
    declared = option_fields(get_method(name).config)
    if not declared:
        return f"`{name}` has no options.\n"
    rows = [
        [f"`{option.name}`", f"`{option.default}`", f"`{option.kind.__name__}`", option.explanation]
        for option in declared
    ]
    return "Set with `--set name=value`.\n\n" + _table(["option", "default", "type", "meaning"], rows)


def works(name: str) -> str:
    """Return the docstring of a method without title, cost and example: its formulas and every deviation."""
    paragraphs = re.split(r"\n\s*\n", get_method(name).doc.strip())
    kept = [
        re.sub(r"(?<=[:;])\n(?=- |\d+\. )", "\n\n", paragraph)  # Markdown wants a line between text and list
        for paragraph in paragraphs
        if not paragraph.startswith("    ") and not re.match(r"[Cc]ost:", paragraph)
    ]
    return "\n\n".join(kept[1:]).replace("Source:", "**Source:**") + "\n"


def ranking(kind: str) -> str:
    """Return the perplexities of all methods of a kind, reviews / wikitext2."""
    suite = {"zeros": "learned", "bits": "quantized", "shape": "structured"}[kind]
    path = RESULTS / "quality" / f"quality-{suite}-llama-28m.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    if kind == "bits":
        shown = [row for row in found["rows"] if "not learned" not in row["label"] and "30 rounds" not in row["label"]]
        shown = [row for row in shown if "longer" not in row["label"]]
        shown.sort(key=lambda row: row["runs"][0]["bits"])
        rows = [[f"{row['runs'][0]['bits']:.2f}", _name(row, ""), _variant(row), _both(row)] for row in shown]
        table = _table(["true bits", "method", "options", "perplexity"], rows)
    else:
        targets = list(dict.fromkeys(row["target"] for row in found["rows"]))
        at = {(row["label"], row["target"]): _both(row) for row in found["rows"]}
        named = {row["label"]: row for row in found["rows"] if row.get("method") or row.get("preset")}
        rows = [
            [_name(row, label), *(at.get((label, target), "") for target in targets)] for label, row in named.items()
        ]
        table = _table(["method", *targets], rows)
    dense = " / ".join(f"{found['dense'][text]:.1f}" for text in TEXTS)
    return f"llama-28m, reviews / wikitext2, dense {dense} ({_link(path, '..')}):\n\n{table}"


def numbers(name: str) -> str:
    """Return the perplexities of a method from benchmarks/results/quality/quality-*.json, one table per file."""
    parts = []
    for path in sorted(RESULTS.glob("quality/quality-*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        rows = [_quality_row(row) for row in found["rows"] if name in (row.get("method"), row.get("preset"))]
        if rows:
            dense = ["dense", "", "", *(f"{found['dense'][text]:.2f}" for text in TEXTS)]
            seeds = {len(row["runs"]) for row in found["rows"] if name in (row.get("method"), row.get("preset"))}
            of = (
                f"mean ± deviation of {max(seeds)} calibration seeds" if max(seeds) > 1 else "one run, it needs no text"
            )
            title = f"Perplexity of {found['model']}, {of} ({_link(path)}, {found['date']}, {found['device']}):"
            parts.append(title + "\n\n" + _table(["target", "variant", "what is stored", *TEXTS], [dense, *rows]))
    if name in method_names(MethodKind.CONTEXTUAL):
        parts += [_contextual(RESULTS / f"quality/contextual-{model}.json") for model in ("llama-28m", "opt-27m")]
    return "\n".join(parts) or "Not measured by us.\n"


def speed(name: str) -> str:
    """Return the times of a method from benchmarks/results/speed/compression-speed-*.json."""
    rows = []
    for path in sorted(RESULTS.glob("speed/compression-speed-*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        shape = re.search(r"Llama-2-\w+", found["what"])
        assert shape is not None
        at = [shape[0], found["device"], _link(path).replace(path.stem, "JSON", 1)]
        rows += [[*_timed(row), *at] for row in found["rows"] if row["method"] == name]
    if not rows:
        return "The time on large models was not measured.\n"
    head = ["target", "options", "time", "GPU memory", "shape", "device", "source"]
    return "Random weights, 128 windows of 2048 tokens, from opening the checkpoint to the closed result:\n\n" + _table(
        head, rows
    )


def whole_model(where: str) -> str:
    """Return every variant of a whole model from benchmarks/results/speed/whole-model-*.json."""
    path = RESULTS / f"speed/whole-model-{where}.json"
    if not path.is_file():
        return f"The whole model on the {where} is not measured yet.\n"
    found = read_bench(path)
    settings = found.settings
    rows = [[row.variant, *map(_paced, row.columns(settings)), *_weighed(row)] for row in found.rows if not row.reason]
    head = ["variant", *(f"decode ×{batch}" for batch in settings.batches)]
    head += [f"prompt {settings.prompt_tokens}"] if settings.prompt_tokens else []
    head += ["weights", "peak", "of bandwidth", "kernel"]
    device = found.environment.accelerator or f"{found.environment.processor}, {settings.threads} threads"
    title = (
        f"{found.blocks} blocks, {found.parameters / 1e9:.2f} billion random weights in {settings.dtype}, {device}: "
        f"tokens per second and × dense ({_link(path, '..')}, {found.date[:10]}):"
    )
    return f"{title}\n\n{_table(head, rows)}"


def methods(_: str) -> str:
    """Return all methods in one table."""
    rows = []
    for name in METHODS:
        method = get_method(name)
        what = method.doc.split("\n")[0].partition(": ")[2]
        kinds = {"bits" if target is Bits else "zeros" for target in method.accepts}
        kinds = {MethodKind.SHAPE: {"shape"}, MethodKind.CONTEXTUAL: {"input"}}.get(method.kind, kinds)
        rows.append([f"[`{name}`]({name}.md)", " ".join(sorted(kinds)), what])
    return _table(["method", "spends", "meaning"], rows)


def model_types(_: str) -> str:
    """Return all causal model types of transformers by class, from benchmarks/results/quality/model-types.json."""
    path = RESULTS / "quality/model-types.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    rows = found["rows"].items()
    parts = []
    for status, head in (
        ("works", "stays dense"),
        ("works without shape pruning", "why heads, neurons and blocks stay"),
        ("refused", "why"),
    ):
        own = [(name, row) for name, row in rows if row["status"] == status]
        cells = [
            [f"`{name}`", _kept(row["kept_dense"]) if status == "works" else _cut(row["reason"])] for name, row in own
        ]
        title = f"## {status[0].upper()}{status[1:]}: {len(own)} of {len(rows)}"
        parts.append(f"{title}\n\n{_table(['type', head], cells)}")
    source = f"{_link(path, '..')}, transformers {found['versions']['transformers']}, {found['date']}"
    return f"Source: {source}.\n\n" + "\n".join(parts)


def _cut(reason: str, length: int = 240) -> str:
    return reason if len(reason) <= length else f"{reason[:length].rpartition(' ')[0]} …"


def _kept(weights: Mapping[str, str]) -> str:
    """Return the weights that stay dense by reason."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in weights.items():
        by_reason.setdefault(reason, []).append(f"`{name}`")
    return "; ".join(f"{reason}: {', '.join(names)}" for reason, names in by_reason.items())


def presets(_: str) -> str:
    """Return the presets with their methods and options."""
    rows = []
    for name, recipes in PRESETS.items():
        for kind, recipe in recipes.items():
            flags = [f"--rotate {recipe['rotate']}"] if "rotate" in recipe else []
            chosen = " ".join(flags + [f"--set {option}={value}" for option, value in recipe["options"].items()])
            rows.append([f"`{name}`", kind, f"`{recipe['method']}`", f"`{chosen}`"])
    return _table(["preset", "target", "method", "options"], rows)


def commands(_: str) -> str:
    """Return every command with its arguments and its visible options."""
    parts = []
    for name, command in sorted(_leaves(typer.main.get_command(app))):
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        words = [p.name.upper() + "..." * (p.nargs == -1) for p in arguments]
        usage = " ".join(w if p.required else f"[{w}]" for w, p in zip(words, arguments, strict=True))
        parts.append(f"## {name}\n\n{_plain(command.help)}\n\n```text\nniwaki {name} {usage} [OPTIONS]\n```\n")
        rows = [[f"`{p.name.upper()}`", "", _plain(p.help)] for p in arguments]
        rows += [
            _option(p) for p in command.params if p.param_type_name == "option" and p.name != "help" and not p.hidden
        ]
        parts.append(_table(["", "default", "meaning"], rows))
    return "\n".join(parts)


def rollouts(_: str) -> str:
    """Return the ends of simulated roll-outs from benchmarks/results/serving/rollout-simulated.json."""
    found = json.loads((RESULTS / "serving/rollout-simulated.json").read_text(encoding="utf-8"))
    rows = [
        [
            row["canary"],
            ", ".join(f"{how} {count}" for how, count in sorted(row["ends"].items())),
            f"{row['returned_within_two_intervals_frac']:.1%}",
        ]
        for row in found["rows"]
    ]
    return _table(["canary", "ends", "returned within two intervals of the change"], rows)


def reliability(_: str) -> str:
    """Return what was asked and reached, from benchmarks/results/serving/reliability-cpu.json."""
    found = json.loads((RESULTS / "serving/reliability-cpu.json").read_text(encoding="utf-8"))["rows"]
    rows = []
    for number, row in found.items():
        kept = "not run" if row["passed"] is None else "yes" if row["passed"] else "**no**"
        missing = f" Not run: {row['not_run']}." if row.get("not_run") and row["passed"] is not None else ""
        rows.append([number, row["asked"], row["reached"].rstrip(".") + "." + missing, kept])
    return _table(["row", "asked", "reached", "kept"], rows)


def real_ratios(name: str) -> str:
    """Return perplexity over dense of every row of a real model: zeros, then shapes, then bits from many to few."""
    rows = []
    for row in _real_rows(name):
        first, count = row["runs"][0], len(row["runs"])
        bits = "" if first["bits"] >= 16 else f"{statistics.mean(run['bits'] for run in row['runs']):.2f}"
        gone = f"{first['removed_frac']:.0%} gone" if "removed_frac" in first else ""
        ratios = (_digits(row["ratio"][text]) for text in TEXTS)
        rows.append([row["target"], row["label"], bits or gone, *ratios, str(count)])
    return _table(["target", "recipe", "true bits", *TEXTS, "seeds"], rows)


def real_tasks(name: str) -> str:
    """Return the accuracies of every row of a real model that has some, by the number of solved questions before."""
    parts = []
    measured: dict[int, list[tuple[Mapping[str, Any], list[Mapping[str, Any]]]]] = {}
    for row in _real_rows(name):
        for shots in dict.fromkeys(shots for run in row["runs"] for shots in _accuracies(run)):
            found = [_accuracies(run)[shots] for run in row["runs"] if shots in _accuracies(run)]
            measured.setdefault(shots, []).append((row, found))
    for shots, found_rows in sorted(measured.items()):
        names = sorted({task for _, found in found_rows for own in found for task in own})
        dense: dict[int, list[str]] = {}  # by the number of questions
        rows = []
        for row, found in found_rows:
            asked = min(own[names[0]]["questions"] for own in found)
            dense.setdefault(asked, [f"{_percent([found[0][task]['dense']])}" for task in names])
            shown = [_percent([own[task]["accuracy"] for own in found]) for task in names]
            lost = [max(own[task]["loss"][2] - own[task]["loss"][0] for own in found) for task in names]
            rows.append([row["target"], row["label"], str(asked), *shown, f"{100 * max(lost):.0f}", str(len(found))])
        rows = [["", "dense", str(asked), *shown, "", ""] for asked, shown in dense.items()] + rows
        head = ["target", "recipe", "questions", *(TASKS.get(task, task) for task in names), "±", "seeds"]
        title = "Each question alone" if not shots else f"Each question after {shots} solved ones"
        parts.append(f"{title}:\n\n" + _table(head, rows))
    return "\n".join(parts) or "No task is measured.\n"


def _real_rows(name: str) -> list[Mapping[str, Any]]:
    """Return the rows of real-model-NAME.json in the order of the page."""
    found = json.loads((RESULTS / "quality" / f"real-model-{name}.json").read_text(encoding="utf-8"))["rows"]

    def place(row: Mapping[str, Any]) -> tuple[int, float, str, float]:
        first = row["runs"][0]
        kind = 2 if first["bits"] < 16 else 1 if "removed_frac" in first else 0
        return kind, -first["bits"], row["target"], -row["ratio"][TEXTS[0]]["mean"]

    return sorted(found, key=place)


def _accuracies(run: Mapping[str, Any]) -> dict[int, Mapping[str, Any]]:
    """Return the tasks of a run by the number of solved questions before each."""
    more = {int(shots): own for shots, own in run.get("tasks_by_shots", {}).items()}
    return ({0: run["tasks"]} if run["tasks"] else {}) | more


def _percent(values: list[float]) -> str:
    """Return mean and deviation of shares in percent."""
    deviation = f"\u00a0±\u00a0{100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{deviation}"


def _digits(found: Mapping[str, Any]) -> str:
    """Return a ratio with two places, or three digits if it is large, and its deviation likewise."""
    places = 2 if found["mean"] < 10 else 1 if found["mean"] < 100 else 0
    deviation = "" if found["stdev"] is None else f"\u00a0±\u00a0{found['stdev']:.{max(places, 2)}f}"
    return f"{found['mean']:.{places}f}{deviation}"


KINDS = {
    "facts": facts,
    "rollout": rollouts,
    "reliability": reliability,
    "options": options,
    "numbers": numbers,
    "speed": speed,
    "works": works,
    "ranking": ranking,
    "real_ratios": real_ratios,
    "real_tasks": real_tasks,
    "whole_model": whole_model,
    "methods": methods,
    "model_types": model_types,
    "presets": presets,
    "commands": commands,
}


def _leaves(group: Any, before: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every command with its whole name, those of a group after its name."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _leaves(command, f"{before}{name} ")
        else:
            yield before + name, command


def render(text: str) -> str:
    """Return a page with its generated parts written again."""
    return BLOCK.sub(lambda found: f"{found[1]}\n{KINDS[found[2]](found[3])}\n{found[4]}", text)


def pages() -> Iterator[Path]:
    """Return all pages of the handbook."""
    return iter(sorted(DOCS.rglob("*.md")))


def _cost(doc: str) -> str:
    found = re.search(r"(?:^|\s)[Cc]ost:\s(.*?)(?:\n\s*\n|$)", doc, re.S)
    assert found is not None, "tests/house/test_design.py asks every method for its cost"
    text = " ".join(found[1].split())
    return text[0].upper() + text[1:]


def _quality_row(row: Mapping[str, Any]) -> list[str]:
    first = row["runs"][0]
    if "removed_frac" in first:
        stored = f"{first['removed_frac']:.1%} of the decoder gone"
    elif "bits" in first and first["bits"] < 16:
        stored = f"{first['bits']:.2f} true bits"
    else:
        stored = f"{first['zeros_frac']:.1%} zeros"
    return [row["target"], _variant(row), stored, *(_spread(row[text]) for text in TEXTS)]


def _paced(cell: Cell | None) -> str:
    if cell is None:
        return ""
    speed = cell.median_tokens_per_s
    return f"{speed:,.{0 if speed >= 100 else 1}f} ({cell.speedup.value:.2f})"


def _weighed(row: Row) -> list[str]:
    share = row.decode[0].bandwidth_share if row.decode else None
    kernels = dict.fromkeys(cell.kernel for cell in row.cells)
    sizes = ["" if size is None else f"{size / 1e9:.2f}\u00a0GB" for size in (row.weight_bytes, row.peak_bytes)]
    return [*sizes, "" if share is None else f"{share:.0%}", "; ".join(kernels)]


def _timed(row: Mapping[str, Any]) -> list[str]:
    how = "whole" if "extrapolated_s" not in row else "some blocks, extrapolated"
    seconds = row.get("extrapolated_s", row["seconds"])
    return [row["target"], _variant(row), f"{seconds:,.0f} s, {how}", f"{row['peak_device_gb']:.1f} GB"]


def _variant(row: Mapping[str, Any]) -> str:
    given = [f"{name}={value}" for name, value in (row.get("options") or {}).items()]
    given += [f"--allocation {row['allocation']}"] if row.get("allocation") else []
    return f"`{' '.join(given)}`" if given else ""


def _name(row: Mapping[str, Any], label: str) -> str:
    """Return a link to the method, and the rest of its label."""
    if "preset" in row:
        return f"[preset `{row['preset']}`](methods/presets.md)"
    name = row["method"]
    special = label.removeprefix(name).strip(" ,")
    return f"[`{name}`](methods/{name}.md)" + (f" {special}" if special else "")


def _both(row: Mapping[str, Any]) -> str:
    """Return both perplexities; for a shape that missed its target by far also the share that is gone."""
    removed = row["runs"][0].get("removed_frac")
    missed = removed is not None and abs(removed - float(row["target"])) > 0.02
    return " / ".join(f"{row[text]['mean']:.1f}" for text in TEXTS) + (f" ({removed:.0%} gone)" if missed else "")


def _contextual(path: Path) -> str:
    """Return the rows of our method, a static choice and rivals after the shorter prompts."""
    found = json.loads(path.read_text(encoding="utf-8"))
    shown = ("dense", "shadow", "static fisher", "griffin", "dejavu")
    prompt, *_ = found["options"]["prompts"]
    table: dict[tuple[float, str], dict[str, str]] = {}
    for row in found["rows"]:
        if row["label"] in shown and row["prompt"] == prompt:
            told = {"mean": row["perplexity_mean"], "stdev": row["perplexity_sd"] or None}
            table.setdefault((row["target"], row["label"]), {})[row["text"]] = _spread(told)
    rows = [
        [f"{target:g}", label, *(values.get(text, "") for text in TEXTS)]
        for (target, label), values in sorted(table.items(), key=lambda entry: (entry[0][0], shown.index(entry[0][1])))
    ]
    seeds = len(found["options"]["seeds"])
    title = f"Perplexity of {found['model']} after prompts of {prompt} tokens, mean ± deviation of {seeds} seeds"
    return f"{title} ({_link(path)}, {found['date']}, {found['device']}):\n\n" + _table(
        ["skipped", "choice", *TEXTS], rows
    )


def _spread(found: Mapping[str, Any]) -> str:
    return f"{found['mean']:.2f}" + (f"\u00a0±\u00a0{found['stdev']:.2f}" if found["stdev"] is not None else "")


def _option(option: Any) -> list[str]:
    names = ", ".join(f"`{name}`" for name in option.opts)
    text = _plain(option.help)
    shown = re.search(r"\s*\[default: (.*)\]$", text)  # of options that a recipe may set
    if shown is not None:
        return [names, f"`{shown[1]}`" if " " not in shown[1] else shown[1], text[: shown.start()]]
    default = option.default
    said = "required" if option.required else "" if default is None or default is False else f"`{default}`"
    return [names, said, text]


def _plain(text: str | None) -> str:
    return Text.from_markup(" ".join((text or "").split())).plain


def _link(path: Path, up: str = "../..") -> str:
    return f"[{path.stem}]({up}/benchmarks/results/{path.parent.name}/{path.name})"


def _table(head: list[str], rows: Rows) -> str:
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def main() -> None:
    """Write every stale page again and print its name."""
    for path in pages():
        text = path.read_text(encoding="utf-8")
        if (fresh := render(text)) != text:
            path.write_text(fresh, encoding="utf-8")
            print(path.relative_to(DOCS))


if __name__ == "__main__":
    main()
