"""Tasks of the installed lm-evaluation-harness, on any model that `niwaki.load` reads.

The package `lm_eval` brings tasks, prompts and metrics; nothing of it is copied. A model goes to it as it is used:
packed layers stay packed, shapes stay small, and a contextual model reads each context with all of its weights and
scores the continuation with those that it chose (`harness_model`). Unlike perplexity here, the whole model is loaded.

    niwaki.evaluate("OUT", lm_eval=["arc_easy"], reference="MODEL")
    niwaki.evaluate("OUT", lm_eval=["mine"], include_path="folder of task YAML files")
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

from niwaki.data.texts import load_tokenizer
from niwaki.errors import InputError, unknown
from niwaki.model.hf import only_errors

BATCH = 8


@dataclass(frozen=True)
class Tasks:
    """Tasks that lm_eval knows by these names; `num_fewshot` examples each, or as many as the task itself says."""

    names: tuple[str, ...]
    manager: Any
    num_fewshot: int | None
    limit: int | None


def find_tasks(
    names: Sequence[str], include_path: str | Path | None, num_fewshot: int | None, limit: int | None
) -> Tasks | None:
    """What `names` stand for (tasks, groups, tags, with * and ?), None for no names.

    A folder of one's own is looked at first: reading the thousands of tasks of the package takes several seconds.
    Raises InputError if lm_eval is missing, or for a name that it does not know.
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
        if manager is None or not all(name in manager.all_subtasks for name in wanted):  # groups may hold others' tasks
            manager = TaskManager(include_path=folder)
    for name in wanted:
        if not manager.match_tasks([name]):
            near = unknown("lm_eval task", name, manager.all_tasks).partition("choose from")[0].rstrip()
            raise InputError(f"{near} `lm_eval ls tasks` lists them; --include-path adds a folder of your own")
    found = tuple(dict.fromkeys(manager.match_tasks(wanted)))
    with _quiet(f"lm_eval cannot load {', '.join(found)}"):
        manager.load(list(found))  # before hours are spent on the rest: data sets that cannot be had fail here
    return Tasks(found, manager, num_fewshot, limit)


def installed() -> bool:
    """Whether the package is there, without the seconds that importing it takes."""
    return importlib.util.find_spec("lm_eval") is not None


def run_tasks(tasks: Tasks, folder: Path, *, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """`results` and `groups` as lm_eval reports them, `n-shot`, `n-samples` and `versions` of the tasks.

    For a contextual model `contextual` counts the tokens that were scored sparsely and densely.
    """
    import lm_eval

    from niwaki.measure.evaluate.harness_model import wrap
    from niwaki.runtime.load import load

    decoder = load(folder, device=device, dtype=dtype)
    with _quiet(f"lm_eval could not run {', '.join(tasks.names)}"):
        model = wrap(decoder, load_tokenizer(folder), BATCH)
        found = lm_eval.simple_evaluate(
            model=model,
            tasks=list(tasks.names),
            num_fewshot=tasks.num_fewshot,
            limit=tasks.limit,
            task_manager=tasks.manager,
            log_samples=False,
        )
    kept = {name: found[name] for name in ("results", "groups", "n-shot", "n-samples", "versions") if name in found}
    result: dict[str, Any] = {"lm_eval": version("lm-eval"), **_plain(kept)}
    if (counted := model.counted()) is not None:
        result["contextual"] = counted
    return result


@contextmanager
def _quiet(what: str) -> Iterator[None]:
    """lm_eval without its log; whatever it raises is one line of ours, for its errors have no common base."""
    with only_errors("lm_eval"):
        try:
            yield
        except InputError:
            raise
        except Exception as error:
            text = next((line for line in str(error).splitlines() if line.strip()), "")
            raise InputError(f"{what}: {type(error).__name__} {text}".rstrip()) from error


def _plain(value: Any) -> Any:
    """Ready for JSON: lm_eval mixes in numbers of NumPy."""
    if isinstance(value, Mapping):
        return {str(name): _plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value.item() if isinstance(value, np.generic) else value
