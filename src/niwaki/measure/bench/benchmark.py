"""Speed of every variant of a model on this machine: decoding, prefill, memory, bandwidth.

    bench = niwaki.bench("MODEL", ["OUT"], variants=["bitmap", "2:4", "4bit"])
    bench.rows[1].decode[0].speedup.value

Each variant takes turns with the dense model, so two models are in memory. Variants are made for speed alone (see
`variants`); results of `compress` are measured as they are. A folder with a config.json and no weights gets random
weights. Quality is not measured here, but by `compare`.

Cost: every variant is made in seconds. Then every batch and the prompt take `rounds` turns or `seconds`, the smaller.
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
from niwaki.errors import CheckpointError, InputError, NiwakiError, unknown
from niwaki.measure.bench.models import config_only_folder, random_model, read_config, resolve_dtype
from niwaki.measure.bench.prefill_decode import has_window
from niwaki.measure.bench.schema import DENSE, Bench, BenchSettings, Row, Workload, with_all_rounds
from niwaki.measure.bench.session import TimedModel, measure, variant_bytes
from niwaki.measure.bench.variants import VARIANTS, VariantModel
from niwaki.measure.description import describe_environment, read_recipe, short_name
from niwaki.model.anatomy import Anatomy, discover
from niwaki.model.checkpoint import Checkpoint
from niwaki.model.device import pick_device, return_free_memory
from niwaki.model.hf import build_skeleton
from niwaki.runtime.load import load_checkpoint
from niwaki.version import __version__

BATCHES, CONTEXT, NEW_TOKENS, PROMPT_TOKENS = (1, 4, 16), 128, 64, 2048
ROUNDS, SECONDS = 5, 60.0
NO_QUALITY = "not measured"
QUALITY = f"{NO_QUALITY}: variants are made for speed alone, by magnitude and rounding"


@dataclass(frozen=True)
class BenchItem:
    """A variant to measure: one that is made here, or the result `source`, which is opened before all work."""

    name: str
    about: str
    source: str | None = None
    checkpoint: Checkpoint | None = None


def bench(
    model: str | Path,
    outs: str | Path | Sequence[str | Path] = (),
    *,
    variants: Sequence[str] | None = None,
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
    keep: Callable[[Bench], None] = lambda bench: None,
    forms: Sequence[str] | None = None,
) -> Bench:
    """Measure the dense `model`, its `variants` (default without `outs`: all of them) and results `outs`.

    `batches`: numbers of sequences that decode `new_tokens` each after `context` tokens. `prompt_tokens`: length of the
    prefill, 0 for none. `keep` gets the benchmark after every variant. `forms` is the old name of `variants`.
    Raises InputError before the first measurement, and CheckpointError if a model changes or a file is broken.
    """
    outs = [outs] if isinstance(outs, str | Path) else list(outs)
    items = _items(variants if forms is None else forms, outs)
    workload = Workload(
        batches=tuple(batches), context=context, new_tokens=new_tokens, prompt_tokens=prompt_tokens, rounds=rounds,
        seconds=seconds,
    )  # fmt: skip
    _check_numbers(workload, threads)
    place = pick_device(device)
    checkpoint, config = _open(model)
    torch_dtype = resolve_dtype(dtype, checkpoint, config)
    workload = _fit_lengths(config, workload, report)
    items = _check_outs(items, config)
    anatomy = discover(build_skeleton(config, torch_dtype))
    with _threads(threads):
        dense = _load_dense(checkpoint, config, torch_dtype, place)
        graphs = place.type == "cuda" and not has_window(dense)
        result = Bench(
            version=__version__,
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            model=Path(model).name or str(model),
            architecture=(config.architectures or [type(dense).__name__])[0],
            blocks=len(anatomy.blocks),
            parameters=sum(parameter.numel() for parameter in dense.parameters()),
            random_weights=checkpoint is None,
            quality=NO_QUALITY if all(item.source for item in items) else QUALITY,
            environment=describe_environment(place),
            settings=_settings(workload, place, torch_dtype, graphs),
        )
        logs = [one.log for one in (checkpoint, *(item.checkpoint for item in items)) if one is not None]
        for rows in _measure_all(dense, anatomy, items, workload, graphs, report):
            for log in logs:
                log.check()
            result = result.model_copy(update={"rows": rows})
            keep(result)
    return result


def _open(model: str | Path) -> tuple[Checkpoint | None, Any]:
    """Return the checkpoint and the config of a model. A folder with a config alone has no checkpoint."""
    folder = config_only_folder(model)
    if folder is not None:
        return None, read_config(folder)
    checkpoint = Checkpoint.open(model)
    checkpoint.require_plain()
    return checkpoint, checkpoint.config


def _load_dense(checkpoint: Checkpoint | None, config: Any, dtype: torch.dtype, place: torch.device) -> Any:
    """Load the dense model, or create one of random weights from its config if there is no checkpoint."""
    if checkpoint is None:
        return random_model(config, dtype, place)
    return load_checkpoint(checkpoint, device=str(place), dense=True, dtype=dtype, hashed=True)


def _measure_all(
    dense: Any, anatomy: Anatomy, items: Sequence[BenchItem], workload: Workload, graphs: bool, report: Report
) -> Iterator[tuple[Row, ...]]:
    """Yield all rows so far, the dense one first, after every variant."""
    reads_all = all(linear.expert is None for block in anatomy.blocks for linear in block.linears.values())
    dense_row, rows = Row(variant=DENSE, about="as it is"), list[Row]()
    side = TimedModel(dense, variant_bytes(VariantModel(dense, "")), reads_all, graphs)
    for number, item in enumerate(items, 1):
        row = Row(variant=item.name, about=item.about, source=item.source)
        try:
            variant = _make(item, dense, anatomy)
            own_graphs = graphs and not has_window(variant.model)
            own_side = TimedModel(variant.model, variant_bytes(variant), reads_all, own_graphs)
            dense_fields, own_fields = measure(side, own_side, workload)
            row = row.model_copy(update={"detail": variant.detail, **own_fields})
            dense_row = dense_row if dense_row.cells else dense_row.model_copy(update=dense_fields)
            del variant, own_side
        except CheckpointError:
            raise  # a broken file, not a form that this machine cannot run
        except (NiwakiError, torch.OutOfMemoryError) as error:
            row = row.model_copy(update={"reason": str(error).strip().split("\n")[0]})
        rows.append(row)
        _free()
        report(Event.BENCH, done=number, of=len(items), variant=item.name)
        yield (with_all_rounds(dense_row, rows), *rows)
    if not dense_row.cells:
        dense_fields, _ = measure(side, None, workload)
        yield (dense_row.model_copy(update=dense_fields), *rows)


def _make(item: BenchItem, dense: Any, anatomy: Anatomy) -> VariantModel:
    if item.checkpoint is None:
        return VARIANTS[item.name].make(dense, anatomy)
    loaded = load_checkpoint(item.checkpoint, device=str(dense.device), dtype=dense.dtype, hashed=True)
    contextual = getattr(loaded, "contextual", None)
    predictor = () if contextual is None else tuple(contextual.shadow.tensors().values())
    return VariantModel(loaded, "", predictor)


def _items(variants: Sequence[str] | None, outs: Sequence[str | Path]) -> list[BenchItem]:
    """Return the variants and results to measure, without the dense model, which is always measured."""
    wanted = list(variants) if variants is not None else [] if outs else list(VARIANTS)
    for name in wanted:
        if name != DENSE and name not in VARIANTS:
            raise InputError(unknown("variant", name, [DENSE, *VARIANTS]))
    items = [BenchItem(name, VARIANTS[name].about) for name in dict.fromkeys(wanted) if name != DENSE]
    sources = [str(out) for out in outs]
    for source in sources:
        name = short_name(source, sources)
        if name == DENSE or name in wanted:
            name = source
        items.append(BenchItem(name, "", source))
    return items


def _check_numbers(workload: Workload, threads: int | None) -> None:
    bounds = {
        "context": (workload.context, 1),
        "new": (workload.new_tokens, 1),
        "prompt": (workload.prompt_tokens, 0),
        "rounds": (workload.rounds, 1),
        "threads": (1 if threads is None else threads, 1),
    }
    for name, (value, min_value) in bounds.items():
        if value < min_value:
            raise InputError(f"{name} must be {min_value} or more, got {value}")
    batches = workload.batches
    if any(batch < 1 for batch in batches) or len(set(batches)) < len(batches):
        raise InputError(f"batches must be different numbers from 1 on, got {', '.join(map(str, batches))}")
    if not workload.seconds > 0:
        raise InputError(f"seconds must be more than 0, got {workload.seconds}")
    if not batches and not workload.prompt_tokens:
        raise InputError("nothing to measure: give a batch, or tokens of a prompt")


def _fit_lengths(config: Any, workload: Workload, report: Report) -> Workload:
    """Return the workload with a default prompt that the model can take. Raises InputError for a length it cannot."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and workload.prompt_tokens == PROMPT_TOKENS > positions:
        report(Event.WARNING, message=f"a prompt of {positions} tokens: the model has no more positions")
        workload = workload.model_copy(update={"prompt_tokens": positions})
    decoded = workload.context + workload.new_tokens
    longest = max(workload.prompt_tokens, decoded if workload.batches else 0)
    if positions is not None and longest > positions:
        raise InputError(
            f"prompt {workload.prompt_tokens} and context + new {decoded} tokens exceed the {positions} positions of "
            "the model: lower --prompt, --context or --new"
        )
    return workload


def _check_outs(items: list[BenchItem], config: Any) -> list[BenchItem]:
    """Open every result before the first measurement, and return the items with `about` from their recipes."""
    checked = []
    for item in items:
        if item.source is None:
            checked.append(item)
            continue
        checkpoint = Checkpoint.open(item.source)
        own, dense = (c.get_text_config().vocab_size for c in (checkpoint.config, config))
        if own != dense:
            raise InputError(f"{item.source} has {own} tokens in its vocabulary, the model {dense}: not its result")
        recipe = read_recipe(checkpoint.folder)
        about = " ".join(str(recipe[key]) for key in ("method", "target") if recipe.get(key)) or "as it is"
        checked.append(BenchItem(item.name, about, item.source, checkpoint))
    return checked


def _settings(workload: Workload, place: torch.device, dtype: torch.dtype, graphs: bool) -> BenchSettings:
    return BenchSettings(
        **workload.model_dump(),
        device=str(place),
        dtype=str(dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
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
