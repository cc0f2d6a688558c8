"""The command `niwaki evaluate`, and its tables."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from niwaki.cli.options import (
    Bos,
    Data,
    Device,
    Dtype,
    Field,
    LogitBytes,
    MaxQuestions,
    MaxTokens,
    Model,
    SeqLen,
    Shots,
    Tasks,
    check_bos,
    check_inputs,
    check_output_file,
    console,
    error_console,
    print_line,
)
from niwaki.cli.tables import print_table

LM_EVAL_HELP = "Tasks of lm-evaluation-harness: arc_easy,hellaswag. Needs niwaki\\[lm-eval]. Repeatable."


def evaluate(
    model: Model,
    data: Data = None,
    tasks: Tasks = None,
    lm_eval: Annotated[list[str] | None, typer.Option("--lm-eval", help=LM_EVAL_HELP)] = None,
    include_path: Annotated[Path | None, typer.Option(help="Folder of your own task YAML files for --lm-eval.")] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(help="Examples in each prompt of --lm-eval. Without it: the number of the task.")
    ] = None,
    shots: Shots = 0,
    seed: Annotated[int, typer.Option(help="Seed of the examples of --shots.")] = 0,
    reference: Annotated[
        str | None, typer.Option(help="Dense model to compare with: adds KL and top-1 agreement.")
    ] = None,
    seq_len: SeqLen = 1024,
    bos: Bos = "auto",
    max_tokens: MaxTokens = None,
    limit: MaxQuestions = None,
    field: Field = "text",
    device: Device = "auto",
    dtype: Dtype = "auto",
    logit_bytes: LogitBytes = None,
    json_: Annotated[Path | None, typer.Option("--json", help="Write the result to this file.")] = None,
    update_card: Annotated[
        bool,
        typer.Option("--update-card", help="Write the numbers into the model card of MODEL, a result of niwaki."),
    ] = False,
) -> None:
    """Measure perplexity, distance to a reference, and tasks."""
    check_output_file("--json", json_)
    check_inputs(*filter(None, (model, reference)), data=data, tasks=tasks, device=device)
    from niwaki.measure.report.evaluation_card import check_card, put_evaluation

    if update_card:
        check_card(Path(model))
    from niwaki.cli.progress import Display
    from niwaki.measure.evaluate.evaluation import evaluate as run
    from niwaki.model.files import write_text

    harness: dict[str, Any] = {"lm_eval": lm_eval or (), "include_path": include_path, "num_fewshot": num_fewshot}
    windows: dict[str, Any] = {"seq_len": seq_len, "max_tokens": max_tokens, "limit": limit, "field": field}
    windows |= {"bos": check_bos(bos), "shots": shots, "seed": seed}
    with Display(error_console) as display:
        result = run(
            model, data=data or (), tasks=tasks or (), reference=reference, device=device, dtype=dtype,
            logit_bytes=logit_bytes, report=display, **harness, **windows,
        )  # fmt: skip
    print_scores(console, result)
    if json_ is not None:
        write_text(json_, json.dumps(result, indent=2) + "\n")
    if update_card:
        put_evaluation(Path(model), result)


def print_scores(to: Console, result: dict[str, Any]) -> None:
    """Print the result of `niwaki.evaluate`: a table of texts, one of tasks, and one of lm_eval."""
    from niwaki.measure.report.evaluation_card import after_examples

    compared = result["reference"] is not None
    rows = []
    for path, tokens in result["tokens"].items():
        row = [path, f"{tokens:,}", f"{result['perplexity'][path]:.3f}"]
        if compared:
            dense = result["reference_perplexity"][path]
            ratio = result["perplexity"][path] / dense
            row += [f"{dense:.3f}", f"{ratio:.3f}", f"{result['kl'][path]:.4f}"]
            row.append(f"{result['top1_agreement'][path]:.2%}")
        rows.append(row)
    if rows:
        more = ["dense", "ratio", "KL", "top-1"] if compared else []
        print_table(to, ["data", "tokens", "perplexity", *more], rows)
    rows = []
    for path, scores in result["tasks"].items():
        row = [path + after_examples(result.get("shots", 0)), str(scores["items"]), *_accuracies(scores)]
        rows.append([*row, *(_accuracies(scores["reference"]) if compared else [])])
    if rows:
        more = ["dense", "normalised"] if compared else []
        print_table(to, ["task", "items", "accuracy", "normalised", *more], rows)
    if "lm_eval" in result:
        _print_harness(to, result["lm_eval"])


def _print_harness(to: Console, scores: dict[str, Any]) -> None:
    """Print one row per task and metric, with the names of lm_eval."""
    from niwaki.measure.report.evaluation_card import harness_metrics, harness_value

    dense = scores.get("reference", {}).get("results")
    rows = []
    for task, metrics in scores["results"].items():
        for metric in harness_metrics(metrics):
            values = [metrics] if dense is None else [metrics, dense[task]]
            rows.append([task, metric.removesuffix(",none"), *(harness_value(one, metric) for one in values)])
    print_table(to, ["lm_eval task", "metric", "value", *([] if dense is None else ["dense"])], rows)
    if counted := scores.get("contextual"):
        print_line(
            f"{counted['sparse_tokens']:,} tokens were scored with a part of the weights, {counted['dense_tokens']:,} "
            f"and {counted['context_tokens']:,} of contexts with all of them",
            to,
        )


def _accuracies(scores: dict[str, Any]) -> list[str]:
    texts = []
    for name in ("accuracy", "accuracy_norm"):
        error = scores[f"{name}_stderr"]
        texts.append(f"{scores[name]:.3f}" + ("" if error is None else f" ± {error:.3f}"))
    return texts
