"""The command `niwaki evaluate`; `cli` puts it under its name."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from niwaki.cli.options import check_given
from niwaki.errors import InputError

TEXT = "Text: .txt, .jsonl, .parquet or a data set name. Repeatable."
TASKS = 'Multiple choice, JSONL, a line each: {"pairs": [\\[context, continuation], ...], "gold": index}. Repeatable.'
LM_EVAL = "Tasks of lm-evaluation-harness by name, as arc_easy,hellaswag. Needs niwaki\\[lm-eval]. Repeatable."
DEVICE = "auto (CUDA if there is one), cpu, cuda or cuda:N."
DTYPE = "Arithmetic: auto (float32 on the CPU, else as stored), float32, bfloat16 or float16."
CARD = "Write the numbers into the model card of MODEL, a result of niwaki."
console, err_console = Console(), Console(stderr=True)


def evaluate(
    model: Annotated[str, typer.Argument(help="A local model folder or a hub id.", show_default=False)],
    data: Annotated[list[str] | None, typer.Option(help=TEXT)] = None,
    tasks: Annotated[list[str] | None, typer.Option(help=TASKS)] = None,
    lm_eval: Annotated[list[str] | None, typer.Option("--lm-eval", help=LM_EVAL)] = None,
    include_path: Annotated[Path | None, typer.Option(help="Folder of your own task YAML files for --lm-eval.")] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(help="Examples in every prompt of --lm-eval; what the task says if left out.")
    ] = None,
    reference: Annotated[str | None, typer.Option(help="Dense model: adds KL and top-1 agreement.")] = None,
    seq_len: Annotated[int, typer.Option(help="Tokens per window.")] = 1024,
    max_tokens: Annotated[int | None, typer.Option(help="Use the first N tokens of every data file.")] = None,
    limit: Annotated[int | None, typer.Option(help="Use the first N questions of every task.")] = None,
    field: Annotated[str, typer.Option(help="Text field of .jsonl and .parquet rows.")] = "text",
    device: Annotated[str, typer.Option(help=DEVICE)] = "auto",
    dtype: Annotated[str, typer.Option(help=DTYPE)] = "auto",
    json_: Annotated[Path | None, typer.Option("--json", help="Write the result to this file.")] = None,
    update_card: Annotated[bool, typer.Option("--update-card", help=CARD)] = False,
) -> None:
    """Measure perplexity, distance to a reference, and tasks."""
    from niwaki.measure.report.measured import check_card, put_on_card

    if json_ is not None and not json_.parent.is_dir():
        raise InputError(f"--json {json_}: the folder {json_.parent} does not exist")
    if json_ is not None and json_.is_dir():
        raise InputError(f"--json {json_} is a folder: expected a file name")
    check_given(*filter(None, (model, reference)), data=data, tasks=tasks)
    if update_card:
        check_card(Path(model))
    from niwaki.cli.progress import Display
    from niwaki.cli.tables import print_scores
    from niwaki.measure.evaluate.evaluation import evaluate as run
    from niwaki.model.files import write_text

    with Display(err_console) as display:
        result = run(
            model,
            data=data or (),
            tasks=tasks or (),
            lm_eval=lm_eval or (),
            include_path=include_path,
            num_fewshot=num_fewshot,
            reference=reference,
            seq_len=seq_len,
            max_tokens=max_tokens,
            limit=limit,
            field=field,
            device=device,
            dtype=dtype,
            report=display,
        )
    print_scores(console, result)
    if json_ is not None:
        write_text(json_, json.dumps(result, indent=2) + "\n")
    if update_card:
        put_on_card(Path(model), result)
