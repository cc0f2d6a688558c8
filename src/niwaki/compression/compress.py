"""The main function: a checkpoint in, a smaller checkpoint and the record of its cost out.

    niwaki.compress("MODEL", "OUT", method="sparsegpt", target="2:4", calibration=["mine.txt"])

A structured method may come before others (`comp+gptq`, target `0.25+4bit`). It runs first and alone, because the
methods after it need a model that already has its shape. Its result is a folder beside OUT, removed in the end.
"""

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from niwaki.compression.contextual import contextual_job
from niwaki.compression.job import Job, Request, check_and_choose_embeddings, prepare, run, walk_job
from niwaki.compression.resolve import RecipeStage, recipe_stages, resolve, resolve_stage
from niwaki.compression.result_folder import ResultFolder, check_apart, check_free, partial_of
from niwaki.compression.run_record import RunRecord
from niwaki.compression.stages import FirstStage
from niwaki.compression.structured import shape_job
from niwaki.config.events import Report, silent
from niwaki.config.recipe import Recipe, make_recipe
from niwaki.errors import InputError, NumericalError
from niwaki.methods.method import MethodKind
from niwaki.model.decoder import Decoder, open_decoder
from niwaki.model.device import pick_device, pick_dtype
from niwaki.runtime.adapter import merged_model, open_adapter

JOBS: Mapping[MethodKind, Callable[[Job, ResultFolder, Report], RunRecord]] = {
    MethodKind.WALK: walk_job,
    MethodKind.SHAPE: shape_job,
    MethodKind.CONTEXTUAL: contextual_job,
}


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
    request = Request(Path(out).absolute(), resume, overwrite, report or silent, time.perf_counter())
    whole = make_recipe(recipe)
    stages = recipe_stages(whole)  # raises for a wrong recipe before the model is opened, or downloaded
    if not merge_adapter:
        return _compress(model, whole, stages, request, dense_stream).dump()
    _check_free(request)
    check_apart(open_adapter(model).folder, request.out)
    with merged_model(model, request.out.with_name(f"{request.out.name}.merged"), request.report) as folder:
        return _compress(folder, whole, stages, request, dense_stream).dump()


def _compress(
    model: str | Path, whole: Recipe, stages: list[RecipeStage], request: Request, dense_stream: bool
) -> RunRecord:
    """Run a recipe of one stage, or of two."""
    if len(stages) > 1:
        return _compress_stages(model, whole, stages[-1], request, dense_stream)
    _check_free(request)
    decoder = _open(model, whole)
    (stage,) = resolve(whole, decoder, dense_stream=dense_stream).stages
    return _run(prepare(decoder, stage, request))


def _compress_stages(
    model: str | Path, whole: Recipe, last: RecipeStage, request: Request, dense_stream: bool
) -> RunRecord:
    """Run both stages of a recipe. Everything is checked before the first one begins.

    The second stage is resolved twice. On the dense model, so that a wrong recipe is refused before the first stage
    runs. On the smaller model, because its shapes are not known before.
    """
    shaped = request.out.with_name(f"{request.out.name}.shaped")
    shaping = replace(request, out=shaped)
    _check_free(shaping)
    _check_free(request)
    decoder = _open(model, whole)
    first, second = resolve(whole, decoder, dense_stream=dense_stream).stages
    check_and_choose_embeddings(decoder, second, request)
    job = prepare(decoder, first, shaping)
    try:
        record = _run(job)
        request = replace(request, began=time.perf_counter())
        smaller = _open(shaped, whole)
        stage = resolve_stage(last, smaller, dense_stream=dense_stream)
        before = FirstStage(record, whole, job.calibration)
        record = _run(prepare(smaller, stage, request, before))
    except (InputError, NumericalError):
        shutil.rmtree(shaped, ignore_errors=True)
        raise
    shutil.rmtree(shaped)
    return record


def _open(model: str | Path, recipe: Recipe) -> Decoder:
    return open_decoder(model, pick_device(recipe.device), pick_dtype(recipe.dtype), logit_bytes=recipe.logit_bytes)


def _run(job: Job) -> RunRecord:
    return run(job, JOBS[job.stage.kind])


def _check_free(request: Request) -> None:
    check_free(request.out, partial_of(request.out), resume=request.resume, overwrite=request.overwrite)
