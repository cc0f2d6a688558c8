"""The main function: a checkpoint in, a smaller checkpoint and the record of what it cost out.

niwaki.compress("MODEL", "OUT", method="sparsegpt", target="2:4", calibration=["mine.txt"])

A structured method may stand before others (`comp+gptq`, target `0.25+4bit`). It runs first and alone, into a folder
beside OUT that is gone in the end: what comes after needs a model that already has its shape.
"""

import shutil
from pathlib import Path
from typing import Any

from niwaki.compression.chain import FirstStage, columns_multiple, split_options, stages_of
from niwaki.compression.contextual import ShadowJob
from niwaki.compression.job import CompressionJob
from niwaki.compression.structured import ShapingJob
from niwaki.config.events import Report, silent
from niwaki.config.recipe import Recipe, make_recipe, parse_target
from niwaki.errors import InputError, NumericalError
from niwaki.methods.method import MethodKind
from niwaki.methods.registry import METHODS


def compress(
    model: str | Path,
    out: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    dense_stream: bool = False,
    report: Report | None = None,
    **recipe: Any,
) -> dict[str, Any]:
    """Compresses `model` into the new folder `out` and returns the content of its run.json.

    `recipe` holds the fields of `niwaki.config.recipe.Recipe` (method, target, calibration, options, seed, ...);
    `calibration` may be a file or a list of files. `report(event, **fields)` is called as the work proceeds.

    Raises InputError (nothing was written), OutputError (finished blocks are kept for `resume`) or
    NumericalError.
    """
    out, tell = Path(out), report or silent
    first, *rest = stages_of(make_recipe(recipe))
    if not rest:
        return _kind(first)(str(model), out, first, dense_stream, resume, overwrite, tell).run()
    target = parse_target(rest[0].target or "")
    fitting = columns_multiple(split_options(rest[0], target)[1], target)
    shaped = out.absolute().with_name(f"{out.name}.shaped")
    shaping = ShapingJob(str(model), shaped, first, False, resume, overwrite, tell, None, fitting)
    before = FirstStage({}, make_recipe(recipe), shaping.windows_ST, shaping.calibration_source)

    def after(source: Path | str) -> CompressionJob:
        return _kind(rest[0])(str(source), out, rest[0], dense_stream, resume, overwrite, tell, before)

    after(model)  # what is wrong with the second stage is said now, not after the first
    try:
        before.record.update(shaping.run())
        record = after(shaped).run()
    except (InputError, NumericalError):
        shutil.rmtree(shaped, ignore_errors=True)
        raise
    shutil.rmtree(shaped)
    return record


def _kind(recipe: Recipe) -> type[CompressionJob]:
    kinds = {MethodKind.SHAPE: ShapingJob, MethodKind.CONTEXTUAL: ShadowJob}
    info = METHODS.get(recipe.method)
    return CompressionJob if info is None else kinds.get(info.kind, CompressionJob)
