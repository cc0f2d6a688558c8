"""The main function: a checkpoint in, a smaller checkpoint and the record of what it cost out.

niwaki.compress("MODEL", "OUT", method="sparsegpt", target="2:4", calibration=["mine.txt"])
"""

from pathlib import Path
from typing import Any

from niwaki.config import make_recipe
from niwaki.job import CompressionJob
from niwaki.methods import CONTEXTUAL, STRUCTURED
from niwaki.shadowing import ShadowJob
from niwaki.shaping import ShapingJob
from niwaki.walk import Report


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

    `recipe` holds the fields of `niwaki.config.Recipe` (method, target, calibration, options, seed, ...);
    `calibration` may be a file or a list of files. `report(event, **fields)` is called as the work proceeds.

    Raises InputError (nothing was written), OutputError (finished blocks are kept for `resume`) or
    NumericalError.
    """
    given = make_recipe(recipe)
    kinds = dict.fromkeys(STRUCTURED, ShapingJob) | dict.fromkeys(CONTEXTUAL, ShadowJob)
    kind = kinds.get(given.method, CompressionJob)
    return kind(str(model), Path(out), given, dense_stream, resume, overwrite, report or _ignore).run()


def _ignore(event: str, **fields: Any) -> None:
    """The report of a caller who wants none."""
