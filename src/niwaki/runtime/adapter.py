"""Merge of an adapter (LoRA, DoRA and the like, by `peft`) into the weights that it was trained for.

The adapter lies beside its base, or in a folder of its own that names the base. The merged model is an ordinary folder:
the config, tokenizer and unread tensors of the base, the merged weights, and `niwaki/merged.json` with the lineage. A
tokenizer of the adapter replaces that of the base. Embeddings that grew with the adapter grow here too.

Matrices that the base ties are untied first: peft would otherwise add the change of one to both. They stay untied if
their values differ in the end. The logits before and after must agree.

Cost: the whole model in memory in its dtype, the adapter beside it, and the bytes of the base on the disk.

    with merged_model("MODEL", Path("OUT.merged"), report) as folder: ...
"""

import json
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from niwaki.config.events import Event, Report
from niwaki.config.sources import ADAPTER, LINEAGE, adapter_about, holds_weights
from niwaki.errors import CheckpointError, InputError, NumericalError, OutputError, faults_of
from niwaki.formats.quantized import WEIGHT
from niwaki.model.aux_files import aux_files
from niwaki.model.checkpoint import TIE, Checkpoint, fetched_folder, local_folder
from niwaki.model.complete import names_of
from niwaki.model.files import (
    copy_file,
    file_sha256,
    kept_by_interruption,
    remove_folder,
    retire_folder,
    write_text,
    writing,
)
from niwaki.model.hf import plain_loading
from niwaki.model.unread import append_unread
from niwaki.runtime.load import load_checkpoint

WEIGHTS = "adapter_model.safetensors"
TOKENIZER_STEMS = ("tokenizer", "special_tokens", "added_tokens", "vocab", "merges", "chat_template", "spiece")
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 2e-2}  # relative error of a module's output


@dataclass(frozen=True)
class Adapter:
    """An adapter on the disk: its folder, its adapter_config.json, the folder of its base, its tensors by shape."""

    folder: Path
    config: dict[str, Any]
    base: Path
    shapes: dict[str, tuple[int, ...]]

    @property
    def lineage(self) -> dict[str, Any]:
        """Return what run.json says of the merge."""
        weights = self.folder / WEIGHTS
        return {
            "source": str(self.folder),
            "base": str(self.base),
            "base_named": self.config.get("base_model_name_or_path"),
            "type": self.config.get("peft_type"),
            "rank": self.config.get("r"),
            "bytes": weights.stat().st_size,
            "sha256": file_sha256(weights),
            "config_sha256": file_sha256(self.folder / ADAPTER),
        }


def open_adapter(model: str | Path) -> Adapter:
    """Return the adapter in the folder or hub repository `model`.

    Raises InputError if there is none, and CheckpointError for a pickled one or a base that cannot be found.
    """
    folder = fetched_folder(str(model))
    config = adapter_about(folder)
    if config is None:
        raise InputError(f"{model} holds no {ADAPTER}, so there is nothing to merge: leave --merge-adapter out")
    if not (folder / WEIGHTS).is_file():
        pickled = "; a pickled one can run code and is never loaded" if list(folder.glob("adapter_model.bin")) else ""
        raise CheckpointError(f"{folder} has no {WEIGHTS}{pickled}: save the adapter with save_pretrained of peft")
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(f"{folder / WEIGHTS} is not a complete safetensors file ({error})") from error
    base = folder
    if not holds_weights(folder):
        named = config.get("base_model_name_or_path")
        if not named:
            raise CheckpointError(f"{folder / ADAPTER} names no base_model_name_or_path: write the base model there")
        base = local_folder(str(named))
    return Adapter(folder, config, base, shapes)


def read_lineage(folder: Path) -> dict[str, Any] | None:
    """Return the lineage of a merged model, None for any other folder."""
    path = folder / LINEAGE
    if not path.is_file():
        return None
    with faults_of(f"{path} is not a record of niwaki", "remove it, or merge again"):
        lineage: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["adapter"]
        return {**lineage, "source": str(lineage["source"])}


@contextmanager
def base_folder(adapter: Adapter) -> Iterator[Path]:
    """Yield the base of an adapter as a folder without the adapter, made of links."""
    with TemporaryDirectory(prefix="niwaki-base-") as temporary:
        for path in adapter.base.iterdir():
            if not path.name.startswith("adapter_"):
                (Path(temporary) / path.name).symlink_to(path.resolve())
        yield Path(temporary)


@contextmanager
def merged_model(model: str | Path, place: Path, report: Report) -> Iterator[Path]:
    """Yield the folder `place` with the adapter of `model` merged into its base; it is removed in the end.

    After an interruption it stays, and serves the next call with the same adapter and base.
    """
    adapter = open_adapter(model)
    with base_folder(adapter) as base:
        lineage = {"adapter": adapter.lineage, "base_files": Checkpoint.open(base, adapter.base).fingerprint()}
        if place.exists() and not (place / LINEAGE).is_file():
            raise OutputError(f"{place} exists and is not a merged model of niwaki: choose another OUT")
        if not place.exists() or json.loads((place / LINEAGE).read_text(encoding="utf-8")) != lineage:
            _merge_to(adapter, base, place, lineage, report)
    with kept_by_interruption(lambda: retire_folder(place, place.with_name(place.name + ".partial"), LINEAGE)):
        yield place


def _merge_to(adapter: Adapter, base: Path, place: Path, lineage: dict[str, Any], report: Report) -> None:
    """Write the merged model to `place`, complete or not at all."""
    nbytes, partial = Checkpoint.open(base, adapter.base).nbytes, place.with_name(place.name + ".partial")
    if (free := shutil.disk_usage(place.parent).free) < nbytes:
        raise OutputError(f"{place.parent} has {free / 1e9:.2f} GB free, the merged model needs {nbytes / 1e9:.2f} GB")
    message = (
        f"the adapter {adapter.folder.name} is merged into {adapter.base.name}: this takes {nbytes / 1e9:.2f} GB of "
        "memory and as much disk while it runs"
    )
    report(Event.WARNING, message=message)
    remove_folder(partial, LINEAGE)
    try:
        (partial / LINEAGE).parent.mkdir(parents=True)  # shows who writes here
        checkpoint = Checkpoint.open(base, adapter.base)
        checkpoint.log.add(adapter.folder / name for name in (WEIGHTS, ADAPTER))
        merged = _merged(adapter, checkpoint)
        with plain_loading(), writing(partial):
            merged.save_pretrained(partial, max_shard_size="1GB")
        append_unread(checkpoint, names_of(checkpoint).unread, partial)
        _copy_files(adapter, checkpoint, merged, partial)
        write_text(partial / LINEAGE, json.dumps(lineage, indent=2) + "\n")
        checkpoint.log.check()
        if place.is_dir():
            retire_folder(place, place.with_name(place.name + ".replaced"), LINEAGE)
        partial.rename(place)
    except BaseException:
        remove_folder(partial, LINEAGE)
        raise


def _merged(adapter: Adapter, checkpoint: Checkpoint) -> Any:
    """Return the model with the adapter merged. Raises an error for an adapter that does not fit."""
    try:
        from peft import PeftModel, get_peft_model_state_dict
    except ImportError as error:
        raise InputError("merging an adapter needs the package peft: pip install peft") from error
    model = load_checkpoint(checkpoint, device="cpu", hashed=True)
    tied = _grow_and_untie(adapter, model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of ties, which are handled here, and of missing keys, which are checked
        try:
            adapted = PeftModel.from_pretrained(model, adapter.folder).eval()
        except Exception as error:  # peft and torch raise their own for configs and shapes that do not fit
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(f"{adapter.folder}: the adapter does not fit {adapter.base}: {reason}") from error
        if not hasattr(adapted, "merge_and_unload"):
            raise CheckpointError(
                f"{adapter.folder} is of type {adapter.config.get('peft_type')}, which changes no weights and cannot "
                "be merged: expected LoRA, DoRA or another adapter of weights"
            )
        known = get_peft_model_state_dict(adapted, save_embedding_layers=True).keys()
        _check_names(adapter, known)
        if tied:
            _follow_embeddings(adapter, model)
        ids_BT = torch.arange(2, 18)[None] % model.config.get_text_config().vocab_size
        with torch.no_grad():
            products = _adapted_products(adapted, ids_BT)
            try:
                merged: Any = adapted.merge_and_unload(safe_merge=True)
            except (ValueError, AttributeError, NotImplementedError) as error:
                reason = " ".join(str(error).split())[:200]
                raise CheckpointError(f"{adapter.folder}: the adapter cannot be merged: {reason}") from error
            for name, (given, named, wanted) in products.items():
                distance = _distance(_first(merged.get_submodule(name)(*given, **named)), wanted)
                if not distance <= TOLERANCE[model.dtype]:
                    raise NumericalError(
                        f"{adapter.folder}: the merged {name} computes something else than base and adapter (relative "
                        f"error {distance:.1e}): it is not used"
                    )
    _settle_ties(merged, tied)
    return merged


def _adapted_products(adapted: Any, ids_BT: Tensor) -> dict[str, tuple[Any, Any, Tensor]]:
    """Return arguments and output of each module that the adapter changes, for one short text.

    Logits would not do: a deep model in bfloat16 amplifies the rounding of its first blocks.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper

    products: dict[str, tuple[Any, Any, Tensor]] = {}

    def keep(name: str) -> Any:
        return lambda _, given, named, out: products.update({name: (given, named, _first(out))})

    changed: Any = (BaseTunerLayer, ModulesToSaveWrapper)
    modules = [(n, m) for n, m in adapted.base_model.model.named_modules() if isinstance(m, changed)]
    hooks = [module.register_forward_hook(keep(name), with_kwargs=True) for name, module in modules]
    adapted(input_ids=ids_BT, use_cache=False)
    for hook in hooks:
        hook.remove()
    return products


def _first(out: Any) -> Tensor:
    """Return the output of a module, the first of several."""
    first: Tensor = out[0] if isinstance(out, tuple) else out
    return first.float()


def _distance(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def _grow_and_untie(adapter: Adapter, model: Any) -> bool:
    """Give the embeddings the rows that the adapter has, and a tied head weights of its own; return if it was tied."""
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    rows = {
        shape[0]
        for name, shape in adapter.shapes.items()
        if len(shape) == 2 and shape[1] == table.weight.shape[1] and name.endswith(WEIGHT)
        and any(f".{part}." in name for part in _names(model, table, head))
    }  # fmt: skip
    if rows and max(rows) != table.weight.shape[0]:
        model.resize_token_embeddings(max(rows), mean_resizing=False)
        table, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and head.weight is table.weight
    if tied:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    return tied


def _names(model: Any, *parts: Any) -> list[str]:
    """Return the last names of modules of a model."""
    return [name.rpartition(".")[2] for name, module in model.named_modules() if any(module is part for part in parts)]


def _check_names(adapter: Adapter, known: Any) -> None:
    """Raise CheckpointError for tensors of the adapter that found no place, or that the model expects and lacks."""
    unknown = sorted(name for name in adapter.shapes if name not in known and ".original_module." not in name
                     and ".modules_to_save." not in name)  # fmt: skip
    if unknown:
        raise CheckpointError(
            f"{adapter.folder / WEIGHTS}: {unknown[0]} has no place in {adapter.base} ({len(unknown)} such tensors): "
            "the adapter belongs to another model"
        )
    missing = sorted(name for name in known if name not in adapter.shapes and "lora_" in name)
    if missing:
        raise CheckpointError(f"{adapter.folder / WEIGHTS} lacks {missing[0]} ({len(missing)} such tensors)")


def _follow_embeddings(adapter: Adapter, model: Any) -> None:
    """Give the head the embeddings of the adapter file if it holds them whole, for a tied head, and no head."""
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    ends = {name: _names(model, part) for name, part in (("table", table), ("head", head))}
    there = {
        name: any(key.endswith(f".{part}{WEIGHT}") for key in adapter.shapes for part in parts)
        for name, parts in ends.items()
    }
    trained = adapter.config.get("modules_to_save") or ()
    if there["table"] and not there["head"] and not any(part in trained for part in ends["table"]):
        head.weight = nn.Parameter(table.weight.detach().clone(), requires_grad=False)


def _settle_ties(model: Any, tied: bool) -> None:
    """Tie the head again if it still equals the embeddings; otherwise the config says that it does not."""
    if not tied:
        return
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    if torch.equal(table.weight, head.weight):
        head.weight = table.weight
        own = True
    else:
        model.all_tied_weights_keys.clear()
        own = False
    for config in model.config, model.config.get_text_config():
        setattr(config, TIE, own)


def _copy_files(adapter: Adapter, base: Checkpoint, merged: Any, folder: Path) -> None:
    """Copy the files of the base, then the tokenizer of the adapter; write config.json with what the merge changed."""
    base.copy_aux_files(folder)
    if adapter.folder != adapter.base:
        for source in aux_files(adapter.folder):
            if source.name.startswith(TOKENIZER_STEMS) or source.parent != adapter.folder:
                target = folder / source.relative_to(adapter.folder)
                target.parent.mkdir(exist_ok=True)
                copy_file(source, target)
    content, text = base.config_content(), merged.config.get_text_config()
    rows, tied = text.vocab_size, bool(getattr(merged.config, TIE, False))
    sections = [content, *(section for section in content.values() if isinstance(section, dict))]
    for section in sections:
        if "vocab_size" in section and (section is content or "hidden_size" in section):
            section["vocab_size"] = rows
        if section is content or TIE in section:
            section[TIE] = tied
    write_text(folder / "config.json", json.dumps(content, indent=2) + "\n")
