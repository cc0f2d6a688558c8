"""How fast a model is in every form that niwaki can give it, on this machine: decoding, prompts, memory, bandwidth.

    found = niwaki.bench("MODEL", ["OUT"], forms=["bitmap", "2:4", "4bit"])
    found.rows[1].decode[0].speedup.value

Each form takes turns with the dense model; the two are in memory, and no third. Forms are made for speed alone (see
`forms`); results of `compress` are measured as they are. A folder that holds a config.json and no weights is measured
with random ones. Quality is no part of it: that is what `compare` is for.

Cost: for every form its making (seconds) and, for every batch and the prompt, `rounds` turns or `seconds`, whichever
comes first.
"""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from niwaki.config.events import Event, Report, silent
from niwaki.errors import InputError, NiwakiError, unknown
from niwaki.measure.bench.decoding import has_window
from niwaki.measure.bench.models import dtype_of, only_config, random_model, read_config
from niwaki.measure.bench.schema import DENSE, Bench, Row, Settings, with_all_rounds
from niwaki.measure.bench.session import Plan, Side, measure, weigh
from niwaki.measure.bench.variants import FORMS, Made
from niwaki.measure.compare.describing import environment, names_of, record_of
from niwaki.model.anatomy import Anatomy, discover
from niwaki.model.checkpoint import Checkpoint
from niwaki.model.device import pick_device, return_free_memory
from niwaki.model.hf import build_skeleton
from niwaki.runtime.load import load
from niwaki.version import __version__

BATCHES, CONTEXT, NEW_TOKENS, PROMPT_TOKENS = (1, 4, 16), 128, 64, 2048
ROUNDS, SECONDS = 5, 60.0
NO_QUALITY = "not measured"
QUALITY = f"{NO_QUALITY}: forms are made for speed alone, by magnitude and rounding"


@dataclass(frozen=True)
class Asked:
    """A form to be measured: one that is made here, or the folder of a result."""

    name: str
    about: str
    source: str | None = None


def bench(
    model: str | Path,
    outs: str | Path | Sequence[str | Path] = (),
    *,
    forms: Sequence[str] | None = None,
    batches: Sequence[int] = BATCHES,
    context: int = CONTEXT,
    new_tokens: int = NEW_TOKENS,
    prompt_tokens: int = PROMPT_TOKENS,
    rounds: int = ROUNDS,
    seconds: float = SECONDS,
    threads: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    report: Report = silent,
    keep: Callable[[Bench], None] = lambda found: None,
) -> Bench:
    """Measures the dense `model`, its `forms` (all of them if not given and there are no `outs`) and results.

    `batches`: sequences that write `new_tokens` each behind `context` tokens; `prompt_tokens` are read, 0: none. `keep`
    is called with what there is after every form. Raises InputError before anything is measured.
    """
    outs = [outs] if isinstance(outs, str | Path) else list(outs)
    asked = _asked(forms, outs)
    plan = Plan(tuple(batches), context, new_tokens, prompt_tokens, rounds, seconds)
    _check_numbers(plan, threads)
    place = pick_device(device)
    folder = only_config(model)
    checkpoint = None if folder else Checkpoint.open(model)
    if checkpoint is not None:
        checkpoint.require_plain()
    config: Any = read_config(folder) if folder else checkpoint and checkpoint.config
    arithmetic = dtype_of(dtype, checkpoint, config)
    _check_lengths(config, plan)
    _check_outs(asked, config)
    anatomy = discover(build_skeleton(config, arithmetic))
    with _threads(threads):
        if folder:
            dense = random_model(config, arithmetic, place)
        else:
            dense = load(model, device=str(place), dense=True, dtype=arithmetic)
        graphs = place.type == "cuda" and not has_window(dense)
        found = Bench(
            version=__version__,
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            model=Path(model).name or str(model),
            architecture=(config.architectures or [type(dense).__name__])[0],
            blocks=len(anatomy.blocks),
            parameters=sum(parameter.numel() for parameter in dense.parameters()),
            random_weights=folder is not None,
            quality=NO_QUALITY if all(one.source for one in asked) else QUALITY,
            environment=environment(place),
            settings=_settings(plan, place, arithmetic, graphs),
            rows=(),
        )
        for rows in _measured(dense, anatomy, asked, plan, graphs, report):
            found = found.model_copy(update={"rows": rows})
            keep(found)
    return found


def _measured(
    dense: Any, anatomy: Anatomy, asked: Sequence[Asked], plan: Plan, graphs: bool, report: Report
) -> Iterator[tuple[Row, ...]]:
    """All rows so far, the dense one first, after every form."""
    counted = all(linear.expert is None for block in anatomy.blocks for linear in block.linears.values())
    base, rows = Row(form=DENSE, about="as it is"), list[Row]()
    side = Side(dense, weigh(Made(dense, "")), counted, graphs)
    for number, form in enumerate(asked, 1):
        row = Row(form=form.name, about=form.about, source=form.source)
        try:
            made = _make(form, dense, anatomy)
            mine = Side(made.model, weigh(made), counted, graphs and not has_window(made.model))
            timed, own = measure(side, mine, plan)
            row = row.model_copy(update={"detail": made.detail, **own})
            base = base if base.cells else base.model_copy(update=timed)
            del made, mine
        except (NiwakiError, torch.OutOfMemoryError) as error:
            row = row.model_copy(update={"reason": str(error).strip().split("\n")[0]})
        rows.append(row)
        _free()
        report(Event.BENCH, done=number, of=len(asked), form=form.name)
        yield (with_all_rounds(base, rows), *rows)
    if not base.cells:
        timed, _ = measure(side, None, plan)
        yield (base.model_copy(update=timed), *rows)


def _make(form: Asked, dense: Any, anatomy: Anatomy) -> Made:
    if form.source is None:
        return FORMS[form.name].make(dense, anatomy)
    loaded = load(form.source, device=str(dense.device), dtype=dense.dtype)
    running = getattr(loaded, "contextual", None)
    beside = () if running is None else tuple(running.shadow.predictor.tensors().values())
    return Made(loaded, "", beside)


def _asked(forms: Sequence[str] | None, outs: Sequence[str | Path]) -> list[Asked]:
    """What is to be measured beside the dense model, which always is."""
    wanted = list(forms) if forms is not None else [] if outs else list(FORMS)
    for name in wanted:
        if name != DENSE and name not in FORMS:
            raise InputError(unknown("form", name, [DENSE, *FORMS]))
    found = [Asked(name, FORMS[name].about) for name in dict.fromkeys(wanted) if name != DENSE]
    sources = [str(out) for out in outs]
    for name, source in zip(names_of(sources), sources, strict=True):
        if name == DENSE or name in wanted:
            name = source
        found.append(Asked(name, "", source))
    return found


def _check_numbers(plan: Plan, threads: int | None) -> None:
    least = {
        "context": (plan.context, 1),
        "new": (plan.new_tokens, 1),
        "prompt": (plan.prompt_tokens, 0),
        "rounds": (plan.rounds, 1),
        "threads": (1 if threads is None else threads, 1),
    }
    for name, (value, lowest) in least.items():
        if value < lowest:
            raise InputError(f"{name} must be {lowest} or more, got {value}")
    if any(batch < 1 for batch in plan.batches) or len(set(plan.batches)) < len(plan.batches):
        raise InputError(f"batches must be different numbers from 1 on, got {', '.join(map(str, plan.batches))}")
    if not plan.seconds > 0:
        raise InputError(f"seconds must be more than 0, got {plan.seconds}")
    if not plan.batches and not plan.prompt_tokens:
        raise InputError("nothing to measure: give a batch, or tokens of a prompt")


def _check_lengths(config: Any, plan: Plan) -> None:
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    longest = max(plan.prompt_tokens, plan.context + plan.new_tokens if plan.batches else 0)
    if positions is not None and longest > positions:
        raise InputError(
            f"prompt {plan.prompt_tokens} and context + new {plan.context + plan.new_tokens} tokens: the model has "
            f"{positions} positions: give --prompt, --context and --new within them"
        )


def _check_outs(asked: list[Asked], config: Any) -> None:
    """Opens every result, so that what cannot be read is said before anything is measured; completes `about`."""
    for number, form in enumerate(asked):
        if form.source is None:
            continue
        checkpoint = Checkpoint.open(form.source)
        theirs, ours = (c.get_text_config().vocab_size for c in (checkpoint.config, config))
        if theirs != ours:
            raise InputError(f"{form.source} has {theirs} tokens in its vocabulary, the model {ours}: not its result")
        recipe = record_of(checkpoint.folder).get("recipe") or {}
        about = " ".join(str(recipe[key]) for key in ("method", "target") if recipe.get(key)) or "as it is"
        asked[number] = Asked(form.name, about, form.source)


def _settings(plan: Plan, place: torch.device, dtype: torch.dtype, graphs: bool) -> Settings:
    return Settings(
        device=str(place),
        dtype=str(dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        batches=plan.batches,
        context=plan.context,
        new_tokens=plan.new_tokens,
        prompt_tokens=plan.prompt_tokens,
        rounds=plan.rounds,
        seconds=plan.seconds,
        steps="CUDA graphs" if graphs else "one call after another",
    )


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _free() -> None:
    gc.collect()
    return_free_memory()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
