"""The main function: a checkpoint in, a smaller checkpoint and the record of its cost out.

    niwaki.compress("MODEL", "OUT", method="sparsegpt", target="2:4", calibration=["mine.txt"])

A structured method may come before others (`comp+gptq`, target `0.25+4bit`). It runs first and alone, because the
methods after it need a model that already has its shape. Its result is a folder beside OUT, removed in the end.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from niwaki.compression.basis import rotated_model
from niwaki.compression.contextual import contextual_job
from niwaki.compression.job import (
    Job,
    Request,
    check_and_choose_embeddings,
    fingerprint_of,
    prepare,
    run,
)
from niwaki.compression.matrix_job import matrix_job
from niwaki.compression.places import (
    alone_at,
    check_apart,
    check_free,
    drop_unfinished,
    is_result,
    merged_of,
    partial_of,
    place_of,
    replaced_of,
    resumable,
    retire,
    rotated_of,
    shaped_of,
    sweep,
)
from niwaki.compression.resolve import RecipeStage, ResolvedStage, recipe_stages, resolve, resolve_stage
from niwaki.compression.result_folder import MODEL, OTHER_INPUTS, ResultFolder, current_hashes, require_same
from niwaki.compression.run_record import RunRecord, read_run
from niwaki.compression.stages import FirstStage
from niwaki.compression.structured import shape_job
from niwaki.config.events import Event, Report, silent
from niwaki.config.recipe import Recipe, make_recipe
from niwaki.errors import InputError, NumericalError, ResumeError
from niwaki.methods.method import MethodKind
from niwaki.model.decoder import Decoder, open_decoder
from niwaki.model.device import pick_device, pick_dtype
from niwaki.runtime.adapter import merged_model, open_adapter

JOBS: Mapping[MethodKind, Callable[[Job, ResultFolder, Report], RunRecord]] = {
    MethodKind.WALK: matrix_job,
    MethodKind.SHAPE: shape_job,
    MethodKind.CONTEXTUAL: contextual_job,
}


@alone_at("out")
def compress(
    model: str | Path,
    out: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    dense_stream: bool = False,
    merge_adapter: bool = False,
    report: Report | None = None,
    **recipe: Any,
) -> dict[str, Any]:
    """Compress `model` into the new folder `out` and return the content of its run.json.

    `recipe` holds the fields of `niwaki.config.recipe.Recipe` (method, target, calibration, options, seed, ...).
    `calibration` may be a file or a list of files. `report(event, **fields)` is called as the work proceeds.
    `merge_adapter`: merge the adapter in the folder `model` into the weights beside it, or into the base that it names.
    The merged model is a folder beside OUT, removed in the end.

    Raises InputError (nothing was written), OutputError (finished blocks are kept for `resume`) or NumericalError.
    """
    request = Request(place_of(out), resume, overwrite, report or silent, time.perf_counter())
    whole = make_recipe(recipe)
    stages = recipe_stages(whole)  # raises for a wrong recipe before the model is opened, or downloaded
    check_free(request.out, resume=resume, overwrite=overwrite)
    if not merge_adapter:
        with rotated_model(model, request.out, whole, request.report) as folder:
            record = _compress(folder, whole, stages, request, dense_stream)
    else:
        if whole.rotate != "none":
            raise InputError("--rotate and --merge-adapter do not go together: merge first, with `niwaki rotate` after")
        check_apart(open_adapter(model).folder, request.out)
        with merged_model(model, merged_of(request.out), request.report) as folder:
            record = _compress(folder, whole, stages, request, dense_stream)
    sweep(request.out)
    return record.dump()


def _compress(
    model: str | Path, whole: Recipe, stages: list[RecipeStage], request: Request, dense_stream: bool
) -> RunRecord:
    """Run a recipe of one stage, or of two."""
    if len(stages) > 1:
        return _compress_stages(model, whole, stages[-1], request, dense_stream)
    shaped = shaped_of(request.out)
    if request.resume and (is_result(shaped) or resumable(partial_of(shaped))):
        raise ResumeError(
            f"{shaped} is the first stage of another recipe: repeat that one with --resume, or start again with "
            "--overwrite instead of --resume"
        )
    decoder = _open(model, whole)
    (stage,) = resolve(whole, decoder, dense_stream=dense_stream).stages
    job = prepare(decoder, stage, request)
    _drop_unfinished(request, model)
    return _run(job)


def _compress_stages(
    model: str | Path, whole: Recipe, last: RecipeStage, request: Request, dense_stream: bool
) -> RunRecord:
    """Run both stages of a recipe. Everything is checked before the first one begins.

    The second stage is resolved twice. On the dense model, so that a wrong recipe is refused before the first stage
    runs. On the smaller model, because its shapes are not known before.
    """
    out, shaped = request.out, shaped_of(request.out)
    shaping = replace(request, out=shaped)
    decoder = _open(model, whole)
    first, second = resolve(whole, decoder, dense_stream=dense_stream).stages
    check_and_choose_embeddings(decoder, second, request)
    job = prepare(decoder, first, shaping)
    if request.resume and not (is_result(shaped) or resumable(partial_of(shaped))):
        if resumable(partial_of(out)):
            raise ResumeError(
                f"{partial_of(out)} goes on from {shaped}, which does not exist: repeat the recipe that it began with, "
                "or start again with --overwrite instead of --resume"
            )
        if is_result(out) and (finished := _finished_chain(job, second, request)):
            return finished
    _drop_unfinished(request, model)
    try:
        record = _run(job)
        request = replace(request, began=time.perf_counter())
        smaller = _open(shaped, whole)
        stage = resolve_stage(last, smaller, dense_stream=dense_stream)
        before = FirstStage(record, whole, job.calibration)
        record = _run(prepare(smaller, stage, request, before))
    except (InputError, NumericalError):
        retire(shaped, replaced_of(shaped))
        raise
    retire(shaped, replaced_of(shaped))
    return record


def _finished_chain(job: Job, last: ResolvedStage, request: Request) -> RunRecord | None:
    """Return the record of a finished OUT of two stages; `job` is the first one, whose result is gone.

    Raises ResumeError if OUT was made from other inputs; one that is to be overwritten gives None. The shapes after the
    first stage follow from its inputs.
    """
    try:
        record = _require_finished(job, last, request)
    except (InputError, ResumeError):
        if request.overwrite:
            return None
        raise
    request.report(Event.COMPLETE, out=str(request.out))
    return record


def _require_finished(job: Job, last: ResolvedStage, request: Request) -> RunRecord:
    """Return the record of OUT. Raises ResumeError if it was made from other inputs, InputError if it has none."""
    record, message = read_run(request.out), OTHER_INPUTS.format(request.out)
    first = record.stages[0].fingerprint if record.stages else record.fingerprint
    require_same(current_hashes(first), fingerprint_of(job, first), message)
    recipe = last.recipe.model_copy(update={"device": job.recipe.device, "batch_tokens": job.recipe.batch_tokens})
    second = fingerprint_of(replace(job, stage=last, recipe=recipe), record.fingerprint)
    both = (current_hashes(record.fingerprint), second)
    before, now = ({name: value for name, value in one.items() if not name.startswith(MODEL)} for one in both)
    require_same(before, now, message)
    return record


def _drop_unfinished(request: Request, model: str | Path) -> None:
    """Remove what earlier runs left, if --overwrite says so. Everything was checked by now."""
    if request.overwrite and not request.resume:
        drop_unfinished(request.out, keep_source=Path(model) in (merged_of(request.out), rotated_of(request.out)))


def _open(model: str | Path, recipe: Recipe) -> Decoder:
    device, dtype = pick_device(recipe.device), pick_dtype(recipe.dtype)
    return open_decoder(model, device, dtype, logit_bytes=recipe.logit_bytes, blocks=recipe.blocks)


def _run(job: Job) -> RunRecord:
    return run(job, JOBS[job.stage.kind])
