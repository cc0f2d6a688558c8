"""Recovery after pruning: low-rank training on text, merged with every zero kept.

LoRA (Hu et al. 2022) through `peft`, as the papers of Wanda and Wanda++ report it, with one difference: merging a
plain adapter would fill the zeros, and masking it afterwards would change what was trained. Here the forward of
every adapted matrix already is W + keep ∘ (B·A·scale), so what is merged is exactly what was trained.

The whole model is in memory. An eighth of the windows is held out and decides which step is kept.

    niwaki recover pruned recovered --data mine.jsonl
"""

import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from niwaki.compression.run import RECORD, Run, check_apart, check_free, partial_of, provenance
from niwaki.config.events import Event, Report, silent
from niwaki.config.recipe import as_files
from niwaki.data.texts import calibration_windows, digest, load_tokenizer, read_texts
from niwaki.errors import ArchitectureError, InputError, NumericalError
from niwaki.methods.shared.best_state import BestState, cosine
from niwaki.model.checkpoint import Checkpoint
from niwaki.model.decoder import Decoder
from niwaki.model.device import peak_rss_bytes, pick_device
from niwaki.model.files import copy_file, file_sha256, write_text
from niwaki.model.hf import plain_loading
from niwaki.runtime.load import load

CHECKS = 8


def recover(
    model: str | Path,
    out: str | Path,
    *,
    data: str | Path | list[str],
    field: str = "text",
    rank: int = 8,
    rate: float = 5e-4,
    steps: int = 200,
    batch: int = 4,
    samples: int = 256,
    seq_len: int = 512,
    seed: int = 0,
    device: str = "auto",
    overwrite: bool = False,
    report: Report | None = None,
) -> dict[str, Any]:
    """Trains adapters of `rank` on the compressed `model` and writes the merged model to the new folder `out`.

    `steps` of `batch` windows [seq_len] at learning rate `rate` (AdamW, cosine). Returns the content of run.json.
    Raises InputError for wrong input, and when the held-out loss did not fall: then nothing is written.
    """
    started = time.perf_counter()
    say = report or silent
    if min(rank, steps, batch) < 1 or samples < 8 or not 0 < rate < 1:
        raise InputError("expected rank, steps and batch of at least 1, samples of at least 8 and a rate in (0, 1)")
    out = Path(out).absolute()
    check_free(out, partial_of(out), resume=False, overwrite=overwrite)
    checkpoint = Checkpoint.open(model)
    checkpoint.require_plain()
    check_apart(checkpoint.folder, out)
    skeleton = Decoder(checkpoint, torch.device("cpu"))
    names = _module_names(skeleton)
    windows_ST = _windows(skeleton, as_files(data), field, samples, seq_len, seed)
    adapted, layers = _adapt(load(checkpoint.folder, device=device).float(), names, rank, seed)
    loss = _train(adapted, windows_ST, steps, batch, rate, seed, say)
    if not loss.improved:
        raise InputError(
            f"recovery did not lower the held-out loss ({loss.start_error:.4f} before): "
            "lower the rate, or give more text; nothing was written"
        )
    merged = {name: _merged(layer) for name, layer in layers.items()}
    settings = {"data": list(as_files(data)), "rank": rank, "rate": rate, "steps": steps, "batch": batch, "seed": seed}
    with Run(out, {"recover": digest(windows_ST)}, resume=False, overwrite=overwrite) as run:
        try:
            zeros, weights = _write(checkpoint, merged, run.folder)
        except BaseException:
            run.discard()
            raise
        record = _record(checkpoint, windows_ST, settings) | {
            "result": {
                "heldout_loss_before": loss.start_error,
                "heldout_loss": loss.error,
                "matrices": len(merged),
                "zeros": zeros,
                "zeros_frac": zeros / weights,
                "sha256": {path.name: file_sha256(path) for path in sorted(run.folder.glob("*.safetensors"))},
            },
            "device": str(pick_device(device)),
            "seconds": round(time.perf_counter() - started, 2),
            "peak_rss_bytes": peak_rss_bytes(),
        }
        write_text(run.folder / RECORD / "run.json", json.dumps(record, indent=2, ensure_ascii=False) + "\n")
        run.complete()
    return record


def _windows(skeleton: Decoder, files: tuple[str, ...], field: str, samples: int, seq_len: int, seed: int) -> Tensor:
    texts = read_texts(files, field)
    positions = skeleton.positions
    if positions is not None and seq_len > positions:
        raise InputError(f"seq_len {seq_len} is longer than the model's {positions} positions: give at most that many")
    tokenizer = load_tokenizer(skeleton.checkpoint.folder)
    return calibration_windows(texts, tokenizer, samples=samples, seq_len=seq_len, seed=seed)


def _record(checkpoint: Checkpoint, windows_ST: Tensor, settings: dict[str, Any]) -> dict[str, Any]:
    """What of run.json is known before the result."""
    path = checkpoint.folder / RECORD / "run.json"
    return {
        **provenance("torch", "transformers", "safetensors", "peft"),
        "model": {"source": str(checkpoint.folder), "files": checkpoint.file_hashes()},
        "recover": {**settings, "windows": list(windows_ST.shape), "sha256": digest(windows_ST)},
        "compressed_from": json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None,
    }


def _module_names(skeleton: Decoder) -> list[str]:
    """Names of the modules that hold the compressed matrices. Raises ArchitectureError for fused experts."""
    anatomy = skeleton.anatomy
    names = []
    for index, block in enumerate(anatomy.blocks):
        for linear in block.linears.values():
            if linear.expert is not None:
                raise ArchitectureError(
                    f"{anatomy.prefix(index)}{linear.name} is one slice of fused experts, which adapters do not reach: "
                    "recovery covers decoders without fused experts"
                )
            names.append(anatomy.prefix(index) + linear.parameter.removesuffix(".weight"))
    return names


def _adapt(decoder: Any, names: list[str], rank: int, seed: int) -> tuple[Any, dict[str, Any]]:
    """The model with adapters whose forward keeps every zero, and its adapted layers by module name."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise InputError("recovery needs the package peft: pip install peft") from error
    torch.manual_seed(seed)
    transposed = type(decoder.get_submodule(names[0])).__name__ == "Conv1D"
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=names, fan_in_fan_out=transposed, task_type="CAUSAL_LM"
    )
    adapted = get_peft_model(decoder, config)
    layers = {name: adapted.get_submodule(f"base_model.model.{name}") for name in names}
    for layer in layers.values():
        _keep_zeros(layer)
    return adapted, layers


def _keep_zeros(layer: Any) -> None:
    """Replaces the adapter's forward by that of the masked sum."""
    base: nn.Module = layer.get_base_layer()
    layer.register_buffer("keep", base.get_parameter("weight") != 0, persistent=False)

    def forward(x: Tensor) -> Tensor:
        out: Tensor = functional_call(base, {"weight": _merged(layer)}, (x,))
        return out

    layer.forward = forward


def _merged(layer: Any) -> Tensor:
    """W + keep ∘ Δ in the layout of the module."""
    weight: Tensor = layer.get_base_layer().weight
    merged: Tensor = weight + layer.keep * layer.get_delta_weight("default")
    return merged


def _train(
    adapted: Any,
    windows_ST: Tensor,
    steps: int,
    batch: int,
    rate: float,
    seed: int,
    report: Report,
) -> BestState:
    """AdamW on the adapters; leaves those of the lowest held-out loss."""
    place = next(adapted.parameters()).device
    held_ST, train_ST = windows_ST[: len(windows_ST) // 8].to(place), windows_ST[len(windows_ST) // 8 :].to(place)
    learned = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    adapted.eval()  # no dropout: the block is small and the text is short
    lowest = BestState(learned, _loss(adapted, held_ST))
    order: list[int] = []
    for step in range(steps):
        while len(order) < batch:
            order += torch.randperm(len(train_ST), generator=generator).tolist()
        chosen, order = order[:batch], order[batch:]
        optimizer.param_groups[0]["lr"] = rate * cosine(step, steps)
        optimizer.zero_grad()
        ids_BT = train_ST[chosen]
        loss = adapted(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss
        if not torch.isfinite(loss):
            raise NumericalError(f"the loss is not finite at step {step}: lower the rate")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        if (step + 1) % math.ceil(steps / CHECKS) == 0 or step + 1 == steps:
            found = _loss(adapted, held_ST)
            report(Event.RECOVER, done=step + 1, of=steps, heldout_loss=found)
            lowest.offer(found)
    lowest.restore()
    return lowest


@torch.no_grad()
def _loss(adapted: Any, windows_ST: Tensor) -> float:
    """Mean negative log-likelihood per predicted token."""
    losses = [adapted(input_ids=row[None], labels=row[None], use_cache=False).loss for row in windows_ST]
    return float(torch.stack(losses).double().mean())


@torch.no_grad()
def _write(checkpoint: Checkpoint, merged: dict[str, Tensor], folder: Path) -> tuple[int, int]:
    """Saves the model with `merged` weights in its storage dtype; returns zeros and weights of those matrices."""
    decoder = load(checkpoint.folder, device="cpu")
    zeros = weights = 0
    for name, weight in merged.items():
        parameter = decoder.get_parameter(f"{name}.weight")
        before = parameter == 0
        parameter.copy_(weight)
        if not torch.equal(parameter == 0, before):
            raise NumericalError(f"{name}: merging would change which weights are zero")
        zeros += int(before.sum())
        weights += before.numel()
    with plain_loading():
        decoder.save_pretrained(folder, max_shard_size="1GB")
    for source in checkpoint.aux_files():
        copy_file(source, folder / source.name)
    return zeros, weights
