"""Another basis as the first step of a compression (`--rotate`): OUT.rotated takes the place of the model.

`heads` turns the values of the heads and orders the neurons, and costs nothing. `all` also turns the residual stream,
for which a tied head gets weights of its own. `auto` is `heads` where the model allows it and fits in memory in
float32; it says if the basis stays.

The folder is removed in the end. After an interruption it stays for the next run with the same model and recipe.

    with rotated_model("MODEL", Path("OUT"), recipe, report) as folder: ...
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from niwaki.compression.places import partial_of, replaced_of, rotated_of
from niwaki.compression.resolve import recipe_stages
from niwaki.compression.rotate import Ways, rotate_to
from niwaki.config.events import Event, Report
from niwaki.config.recipe import Recipe
from niwaki.config.sources import ROTATED
from niwaki.config.targets import Target
from niwaki.data.texts import windows_for
from niwaki.errors import ArchitectureError, InputError, faults_of
from niwaki.methods.method import MethodKind
from niwaki.model.decoder import Decoder, open_decoder
from niwaki.model.device import free_device_bytes, pick_device
from niwaki.model.files import kept_by_interruption, remove_folder, retire_folder, write_text

MAX_TOKENS = 32_768  # of the calibration windows, from which importance is measured
MEMORY_FACTOR = 1.5  # of the weights in float32: Gram matrices and activations


@contextmanager
def rotated_model(model: str | Path, out: Path, recipe: Recipe, report: Report) -> Iterator[str | Path]:
    """Yield the folder with `model` in another basis as `recipe` asks for it, or `model` itself if it stays."""
    if recipe.rotate == "none":
        yield model
        return
    place = rotated_of(out)
    target = _target(recipe, report)
    folder = None if target is None else _rotated(model, place, recipe, target, report)
    with kept_by_interruption(lambda: _retire(place)):
        yield model if folder is None else folder


def _target(recipe: Recipe, report: Report) -> Target | None:
    """Return the target that the basis is for. Without one, `auto` leaves the model as it is and the others refuse."""
    last = recipe_stages(recipe)[-1]
    reason = ""
    if last.target is None:
        reason = "target_bytes does not say how weights are stored: give --target"
    elif not recipe.calibration.files:
        reason = "importance is measured on text of yours: give --calibration FILE"
    elif last.steps[0].kind is not MethodKind.WALK:
        reason = f"{recipe.method} neither prunes single weights nor rounds them"
    if not reason:
        return last.target
    if recipe.rotate != "auto":
        raise InputError(f"--rotate {recipe.rotate}: {reason}")
    report(Event.WARNING, message=f"the basis stays as it is: {reason}")
    return None


def _rotated(model: str | Path, place: Path, recipe: Recipe, target: Target, report: Report) -> Path | None:
    """Return `place` with the model in another basis; None if `auto` cannot turn it."""
    decoder = open_decoder(model, pick_device(recipe.device))  # which writes text where the compression would
    ways = Ways(target, residual="learned" if recipe.rotate == "all" else "none", seed=recipe.seed)
    identity = {"model": decoder.checkpoint.fingerprint(), "recipe": recipe.dump(), "ways": str(ways)}
    if (place / ROTATED).is_file() and _identity(place) == json.loads(json.dumps(identity)):
        return place
    _retire(place)
    if recipe.rotate == "auto" and (reason := _too_large(decoder, recipe)):
        report(Event.WARNING, message=f"the basis stays as it is: {reason}")
        return None
    windows = windows_for(recipe.calibration, decoder, seed=recipe.seed, report=report)
    ids_ST = windows.ids_ST[: max(1, MAX_TOKENS // windows.ids_ST.shape[1])]
    about = {"data": list(recipe.calibration.files), **windows.about}
    try:
        rotate_to(place, decoder, ways, ids_ST, about, recipe.device, report)
    except ArchitectureError as error:
        if recipe.rotate != "auto":
            raise
        report(Event.WARNING, message=f"the basis stays as it is: {error}")
        return None
    record = json.loads((place / ROTATED).read_text(encoding="utf-8")) | {"identity": identity}
    write_text(place / ROTATED, json.dumps(record, indent=2) + "\n")
    return place


def _too_large(decoder: Decoder, recipe: Recipe) -> str:
    """Return why the whole model does not fit in memory, empty if it does."""
    device = pick_device(recipe.device)
    needed = MEMORY_FACTOR * 4 * sum(parameter.numel() for parameter in decoder.model.parameters())
    free = free_device_bytes(device) if device.type == "cuda" else psutil.virtual_memory().available
    if needed <= free:
        return ""
    return f"the model takes {needed / 1e9:.1f} GB in float32, and {free / 1e9:.1f} GB are free"


def _identity(place: Path) -> Any:
    with faults_of(f"{place / ROTATED} is not a record of niwaki", "remove the folder"):
        return json.loads((place / ROTATED).read_text(encoding="utf-8")).get("identity")


def _retire(place: Path) -> None:
    """Remove the model of this step, and what a killed run left of one."""
    remove_folder(partial_of(place), ROTATED)
    retire_folder(place, replaced_of(place), ROTATED)
