"""Options that several commands share, each declared once, and early checks of their values.

torch takes seconds to load. A wrong name, target or path is refused before that, by the same functions that check it
again where the work is done. An option of a recipe is None unless the user sets it, because the recipe file may set it.

    def plan(model: Model, method: Method = None, seq_len: CalibrationSeqLen = None) -> None: ...
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from niwaki.config.devices import check_device
from niwaki.config.events import Event
from niwaki.config.recipe import (
    BOS_HELP,
    BOS_POLICIES,
    HELD_OUT_HELP,
    MIX_HELP,
    calibration_fields,
    load_recipe,
    make_recipe,
)
from niwaki.config.sources import check_held_out, check_sources, check_tasks, model_folder, parse_mix
from niwaki.config.targets import WRITTEN_TARGETS_HELP, parse_target
from niwaki.errors import InputError, OutputError, unknown
from niwaki.methods.registry import method_infos
from niwaki.model.config_file import read_folder

console = Console()
error_console = Console(stderr=True)

TEXT_HELP = (
    "Text: a .txt, .jsonl or .parquet file, a folder of a data set, its hub id, or c4, wikitext, ultrachat or "
    "fineweb-edu. Repeatable."
)
DEVICE_HELP = "auto (CUDA if there is one), cpu, cuda or cuda:N."
DTYPE_HELP = "Arithmetic: auto (float32 on the CPU, as stored elsewhere), float32, bfloat16 or float16."
STORED_DTYPE_HELP = "Arithmetic: auto (as stored), float32, bfloat16 or float16."
FIELD_HELP = "Field of a row that holds its text. The default also takes dialogues in messages or conversations."
SEQ_LEN_HELP = "Tokens per window."
BOS_ARGUMENT = "auto|on|off"
TASKS_HELP = (
    'Multiple choice, JSONL, one question per line: {"pairs": [\\[context, continuation], ...], "gold": index}. '
    "Repeatable."
)
TARGET_HELP = f"{WRITTEN_TARGETS_HELP} Required here or in the recipe, or --target-bytes."


def recipe_option(text: str, default: object, metavar: str | None = None) -> Any:
    """Return an option that a recipe may set. Its default is None, and its help shows the final default."""
    return typer.Option(help=f"{text} [dim]\\[default: {default}][/]", metavar=metavar)


def hidden_alias(spelling: str) -> Any:
    """Return an option for the old spelling of a renamed one. It works for one more release and `--help` omits it."""
    return typer.Option(spelling, hidden=True)


def first_given(*values: str | None) -> str | None:
    """Return the first value that is not None: the new spelling of an option, then its hidden alias."""
    return next((value for value in values if value is not None), None)


Model = Annotated[
    str,
    typer.Argument(
        help="A local model folder, a GGUF file or a hub id (org/name or org/name@REVISION).", show_default=False
    ),
]
DenseModel = Annotated[
    str, typer.Argument(help="The dense model: a folder, a GGUF file or a hub id.", show_default=False)
]
Device = Annotated[str, typer.Option(help=DEVICE_HELP)]
Dtype = Annotated[str, typer.Option(help=DTYPE_HELP)]
StoredDtype = Annotated[str, typer.Option(help=STORED_DTYPE_HELP)]
Data = Annotated[list[str] | None, typer.Option(help=TEXT_HELP)]
Tasks = Annotated[list[str] | None, typer.Option(help=TASKS_HELP)]
Field = Annotated[str, typer.Option(help=FIELD_HELP)]
LogitBytes = Annotated[
    int | None, recipe_option("Max bytes of logits in float32 that are made at once.", "268435456 (256 MiB)")
]
SeqLen = Annotated[int, typer.Option(help=SEQ_LEN_HELP)]
Bos = Annotated[str, typer.Option(help=BOS_HELP, metavar=BOS_ARGUMENT)]
MaxTokens = Annotated[int | None, typer.Option(help="Use only the first N tokens of each data file.")]
MaxQuestions = Annotated[int | None, typer.Option(help="Use only the first N questions of each task.")]
Shots = Annotated[
    int, typer.Option(help="Solved questions of the same file before each question of --tasks, drawn by --seed.")
]
PrintJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
ApiKeyFile = Annotated[
    Path | None,
    typer.Option(help="File of API keys, one per line. NIWAKI_API_KEYS may hold more, separated by commas."),
]

# The fields of a recipe.
Method = Annotated[
    str | None,
    typer.Option(help="A method (see `niwaki methods`), or a chain such as besa+wandapp. Required without a preset."),
]
Preset = Annotated[str | None, typer.Option(help="fast, balanced or best, in place of a method.")]
Target = Annotated[str | None, typer.Option(help=TARGET_HELP)]
TargetBytes = Annotated[
    str | None,
    typer.Option(help="squeeze10 and trellis: bytes of all matrices together, in place of a target: 1.7GB or 800MiB."),
]
Blocks = Annotated[
    str | None,
    recipe_option(
        "Blocks to compress, such as 8-23 or 0,3,5-7. The others stay byte for byte, and a later run can go on.", "all"
    ),
]
KeepBlocks = Annotated[
    str | None,
    recipe_option(
        "squeeze10 and trellis: blocks that stay at 4 bits while the others compensate: auto, none or 0,7.", "none"
    ),
]
Allocation = Annotated[
    str | None,
    recipe_option(
        "How blocks share the target: uniform, owl (zeros), damage, searched (structured), sensitivity (bits) or auto.",
        "auto",
    ),
]
Calibration = Annotated[list[str] | None, recipe_option(TEXT_HELP, "text that the model writes itself")]
CalibrationField = Annotated[str | None, recipe_option(FIELD_HELP, "text")]
Samples = Annotated[int | None, recipe_option("Number of calibration windows.", 128)]
CalibrationSeqLen = Annotated[int | None, recipe_option(SEQ_LEN_HELP, 2048)]
Mix = Annotated[list[str] | None, recipe_option(f"{MIX_HELP} Repeatable.", "none", metavar="SOURCE:SHARE")]
HeldOut = Annotated[str | None, recipe_option(HELD_OUT_HELP, "none", metavar="SOURCE")]
CalibrationBos = Annotated[str | None, recipe_option(BOS_HELP, "auto", metavar=BOS_ARGUMENT)]
RecipeFile = Annotated[Path | None, typer.Option(help="YAML file of these options. Options on the command line win.")]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="Option of the method, key=value. Repeatable.")]
Pack = Annotated[
    str | None, recipe_option("What to pack: codes; auto (pruned weights too, where smaller); none.", "codes")
]
Embeddings = Annotated[
    str | None, recipe_option("Store embeddings and LM head as codes too: none, 4bit or 8bit.", "none")
]
OldEnds = Annotated[str | None, hidden_alias("--ends")]
ExpertTokens = Annotated[
    int | None,
    recipe_option("Mixtures: tokens of other experts that count beside the own ones of each expert, 0 for none.", 0),
]
Rotate = Annotated[
    str | None,
    recipe_option(
        "Change the basis first, so that less is lost: none, heads, auto (heads where it can) or all.", "none"
    ),
]
MergeAdapter = Annotated[
    bool,
    typer.Option(
        "--merge-adapter",
        help="MODEL holds an adapter (LoRA): merge it into the weights beside it, or into the base that it names. "
        "Takes the memory of the whole model. Needs niwaki\\[recover].",
    ),
]
DropUnused = Annotated[
    bool,
    typer.Option(
        "--drop-unused",
        help="Leave out tensors that the model does not read. Otherwise they are copied unchanged.",
    ),
]
Seed = Annotated[int | None, recipe_option("Seed of the random numbers.", 0)]
RecipeDevice = Annotated[str | None, recipe_option(DEVICE_HELP, "auto")]
RecipeDtype = Annotated[str | None, recipe_option(DTYPE_HELP, "auto")]
BatchTokens = Annotated[int | None, recipe_option("Tokens per forward pass.", "2048 on the CPU, 16384 on CUDA")]
ActivationBytes = Annotated[
    int | None,
    recipe_option("Max bytes of hidden states in memory. Beyond it they go to a mapped file.", "half of free memory"),
]
DenseStream = Annotated[
    bool, typer.Option("--dense-stream", help="Run the dense model alongside, and record the drift at each depth.")
]


def given(**flags: Any) -> dict[str, Any]:
    """Return the flags that the user set. The others leave the recipe unchanged."""
    return {name: value for name, value in flags.items() if value is not None}


def recipe_values(
    recipe: Path | None, text: dict[str, Any], options: Sequence[str] | None, **flags: Any
) -> dict[str, Any]:
    """Return the fields of a recipe: the file, then `text` of the calibration, `options` (key=value) and `flags`."""
    values: dict[str, Any] = load_recipe(recipe) if recipe else {}
    values |= given(**flags)
    values["calibration"] = {**calibration_fields(values.get("calibration")), **given(**text)}
    values["options"] = {**(values.get("options") or {}), **_key_values(options or [])}
    return values


def check_job(model: str | None, values: dict[str, Any], out: Path | None, **bounds: bool) -> None:
    """Raise InputError for a recipe with a wrong method, target or text file, and for a job that cannot be done.

    `bounds` are those of `check_early`. Without a `model` that is there already, the recipe alone is checked.
    """
    recipe = make_recipe(values)
    infos = method_infos(recipe.method)
    target = recipe.target or ""
    for part in target.split("+") if len(infos) > 1 else [target]:
        if part:
            parse_target(part)
    check_sources(recipe.calibration.files)
    parse_mix(recipe.calibration.mix, recipe.calibration.files)
    check_held_out(recipe.calibration.held_out, recipe.calibration.files)
    if model is not None:
        from niwaki.compression.preflight import check_early

        check_early(model, recipe, out, **bounds)


def check_inputs(
    *models: str, data: Sequence[str] | None = None, tasks: Sequence[str] | None = None, device: str | None = None
) -> None:
    """Raise InputError if a model, a text or a task file does not exist, or if a model is an adapter.

    It is raised too for a model folder whose files and config.json disagree, and for a GPU without a driver.
    """
    check_device(device or "auto")
    for model in models:
        folder = model_folder(model)
        if folder is not None and folder.is_dir():
            read_folder(folder)
    check_sources(data or ())
    check_tasks(tasks or ())


def check_bos(policy: str) -> Any:
    """Return the policy of --bos. Raises InputError for any other text."""
    if policy not in BOS_POLICIES:
        raise InputError(unknown("--bos", policy, BOS_POLICIES))
    return policy


def check_output_file(option: str, path: Path | None) -> None:
    """Raise InputError if the file that an option names cannot be written."""
    if path is not None and not path.parent.is_dir():
        raise InputError(f"{option} {path}: the folder {path.parent} does not exist")
    if path is not None and path.is_dir():
        raise InputError(f"{option} {path} is a folder: expected a file name")


def check_new_file(path: Path, *, overwrite: bool) -> None:
    """Raise OutputError if a file exists that may not be replaced, or if its folder does not exist."""
    if path.exists() and not overwrite:
        raise OutputError(f"{path} already exists: choose another file, or replace it with --overwrite")
    if not path.absolute().parent.is_dir():
        raise OutputError(f"cannot write {path}: the folder {path.parent} does not exist")


def print_line(text: str, to: Console = console) -> None:
    """Print a line as it is: no markup, no highlighting, no wrapping."""
    to.print(text, markup=False, highlight=False, soft_wrap=True)


def print_note(text: str) -> None:
    """Print a note on standard error."""
    error_console.print(f"[yellow]note:[/] {escape(text)}", highlight=False, soft_wrap=True)


def print_warning(event: str, **fields: Any) -> None:
    """Print the event of a warning as a note, for a command without a display of its progress."""
    if event == Event.WARNING:
        print_note(fields["message"])


def _key_values(pairs: Sequence[str]) -> dict[str, str]:
    values = {}
    for pair in pairs:
        key, sign, value = pair.partition("=")
        if not sign or not key:
            raise InputError(f"--set {pair!r}: expected key=value")
        values[key] = value
    return values
