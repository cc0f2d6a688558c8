"""Tasks of the installed lm-evaluation-harness, on any model that `niwaki.load` reads.

The package `lm_eval` provides tasks, prompts and metrics. The model runs as in use: packed layers stay packed, shapes
stay small. A contextual model reads each context with all of its weights and scores the continuation with the selected
ones (`harness_model`). The whole model is loaded, unlike in `evaluation`.

    niwaki.evaluate("OUT", lm_eval=["arc_easy"], reference="MODEL")
    niwaki.evaluate("OUT", lm_eval=["my_task"], include_path="folder of task YAML files")
"""

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from niwaki.config.recipe import BosPolicy
from niwaki.data.bos import find_bos, puts_bos_itself
from niwaki.data.texts import load_tokenizer
from niwaki.errors import InputError, unknown
from niwaki.model.checkpoint import Checkpoint
from niwaki.model.hf import only_errors

BATCH = 8  # of generated texts


@dataclass(frozen=True)
class HarnessTasks:
    """Tasks of lm_eval by name. `num_fewshot`: examples of each, None for the number of the task."""

    names: tuple[str, ...]
    manager: Any
    num_fewshot: int | None
    limit: int | None


def find_tasks(
    names: Sequence[str], include_path: str | Path | None, num_fewshot: int | None, limit: int | None
) -> HarnessTasks | None:
    """Resolve `names` (tasks, groups, tags, with * and ?); return None for no names.

    The user's folder is searched first, because reading the thousands of tasks of the package takes several seconds.
    Raises InputError if lm_eval is missing, or for an unknown name.
    """
    wanted = [name.strip() for given in names for name in given.split(",") if name.strip()]
    if include_path is not None and not Path(include_path).is_dir():
        raise InputError(f"include_path {include_path}: expected a folder of task YAML files")
    if num_fewshot is not None and num_fewshot < 0:
        raise InputError(f"num_fewshot must be 0 or more, got {num_fewshot}")
    if not wanted:
        if include_path is not None or num_fewshot is not None:
            raise InputError("include_path and num_fewshot belong to tasks of lm_eval: name some with --lm-eval TASKS")
        return None
    if not installed():
        raise InputError("--lm-eval needs lm-evaluation-harness: pip install lm-eval")
    from lm_eval.tasks import TaskManager

    folder = None if include_path is None else str(include_path)
    with _quiet(f"lm_eval cannot read the tasks in {folder}"):
        manager = None if folder is None else TaskManager(include_path=folder, include_defaults=False)
        if manager is None or not all(name in manager.all_subtasks for name in wanted):  # groups may hold other tasks
            manager = TaskManager(include_path=folder)
    for name in wanted:
        if not manager.match_tasks([name]):
            near = unknown("lm_eval task", name, manager.all_tasks).partition("choose from")[0].rstrip()
            raise InputError(f"{near} `lm_eval ls tasks` lists them; --include-path adds a folder of your own")
    tasks = tuple(dict.fromkeys(manager.match_tasks(wanted)))
    with _quiet(f"lm_eval cannot load {', '.join(tasks)}"):
        manager.load(list(tasks))  # a missing data set fails here, before hours of other work
    return HarnessTasks(tasks, manager, num_fewshot, limit)


def installed() -> bool:
    """Check that the package exists, without the seconds that its import takes."""
    return importlib.util.find_spec("lm_eval") is not None


def run_tasks(
    tasks: HarnessTasks,
    checkpoint: Checkpoint,
    *,
    device: str,
    dtype: torch.dtype,
    logit_bytes: int | None = None,
    bos: BosPolicy = "auto",
) -> dict[str, Any]:
    """Return `results`, `groups`, `n-shot`, `n-samples` and `versions` as lm_eval reports them.

    For a contextual model, `contextual` counts the sparse and the dense tokens. Raises CheckpointError if the model
    changed meanwhile.
    """
    import lm_eval

    from niwaki.measure.evaluate.harness_model import wrap
    from niwaki.runtime.load import load_checkpoint

    decoder = load_checkpoint(checkpoint, device=device, dtype=dtype, hashed=True)
    with _quiet(f"lm_eval could not run {', '.join(tasks.names)}"):
        tokenizer, special = _with_bos(load_tokenizer(checkpoint.folder), bos)
        model = wrap(decoder, tokenizer, BATCH, logit_bytes, special)
        output = lm_eval.simple_evaluate(
            model=model,
            tasks=list(tasks.names),
            num_fewshot=tasks.num_fewshot,
            limit=tasks.limit,
            task_manager=tasks.manager,
            log_samples=False,
        )
    checkpoint.log.check()
    kept = {name: output[name] for name in ("results", "groups", "n-shot", "n-samples", "versions") if name in output}
    result: dict[str, Any] = {"lm_eval": version("lm-eval"), **_plain(kept)}
    if (counts := model.token_counts) is not None:
        result["contextual"] = counts
    return result


def _with_bos(tokenizer: Any, policy: BosPolicy) -> tuple[Any, bool | None]:
    """Return the tokenizer, and whether lm_eval adds special tokens; None leaves it to the tokenizer.

    Raises InputError if the tokenizer cannot be told to begin a text.
    """
    bos = find_bos(tokenizer, policy)
    if not bos.ids:
        return tokenizer, False if policy == "off" else None
    if not puts_bos_itself(tokenizer, bos):
        tokenizer.add_bos_token = True
        if not puts_bos_itself(tokenizer, bos):
            raise InputError(f"{type(tokenizer).__name__} cannot begin a text with {bos.name}, so --lm-eval cannot run")
    return tokenizer, None


@contextmanager
def _quiet(what: str) -> Iterator[None]:
    """Silence the log of lm_eval and turn any of its errors, which have no common base, into one InputError."""
    with only_errors("lm_eval"):
        try:
            yield
        except InputError:
            raise
        except Exception as error:
            text = next((line for line in str(error).splitlines() if line.strip()), "")
            raise InputError(f"{what}: {type(error).__name__} {text}".rstrip()) from error


def _plain(value: Any) -> Any:
    """Convert a value for JSON: lm_eval returns some NumPy numbers."""
    if isinstance(value, Mapping):
        return {str(name): _plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value.item() if isinstance(value, np.generic) else value
