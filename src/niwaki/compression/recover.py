"""Recovery after pruning: low-rank training on text, merged with every zero kept.

Training is LoRA (Hu et al. 2022) through `peft`, as in the papers of Wanda and Wanda++, with one difference. To merge a
plain adapter would fill the zeros, and to mask it afterwards would change the trained function. Here the forward of
every adapted matrix already is W + keep ∘ (B·A·scale), so the merged model is exactly the trained one.

The whole model is in memory. An eighth of the windows is held out, and the step with the lowest loss on it is kept.

    niwaki recover pruned recovered --data mine.jsonl
"""

import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from niwaki.compression.places import alone_at, check_apart, check_free, place_of, sweep
from niwaki.compression.result_folder import ResultFolder
from niwaki.compression.run_record import (
    FORMAT,
    RecoveryRecord,
    RecoveryResult,
    provenance,
    read_record,
    write_record,
)
from niwaki.compression.verify import hashed_files
from niwaki.config.events import Event, Report, silent
from niwaki.config.recipe import BosPolicy, as_files
from niwaki.data.texts import CalibrationWindows, digest, fit_seq_len, load_tokenizer, read_calibration
from niwaki.errors import ArchitectureError, InputError, NumericalError
from niwaki.methods.shared.best_state import BestState, cosine
from niwaki.model.checkpoint import Checkpoint
from niwaki.model.decoder import Decoder
from niwaki.model.device import peak_rss_bytes, pick_device
from niwaki.model.files import file_sha256, writing
from niwaki.model.hf import plain_loading
from niwaki.model.logits import FinalStates, position_slices, token_losses, vocabulary_of
from niwaki.model.unread import append_unread
from niwaki.runtime.load import load_checkpoint

CHECKS = 8
SEQ_LEN = 512


@alone_at("out")
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
    seq_len: int = SEQ_LEN,
    seed: int = 0,
    device: str = "auto",
    bos: BosPolicy = "auto",
    overwrite: bool = False,
    report: Report | None = None,
) -> dict[str, Any]:
    """Train adapters of `rank` on the compressed `model` and write the merged model to the new folder `out`.

    Training takes `steps` of `batch` windows [seq_len] at learning rate `rate` (AdamW, cosine). Returns the content of
    run.json. `bos`: beginning-of-text token of every window. Raises InputError for wrong input, and if the held-out
    loss did not fall: then nothing is written.
    """
    started, report = time.perf_counter(), report or silent
    if min(rank, steps, batch) < 1 or samples < 8 or not 0 < rate < 1:
        raise InputError("expected rank, steps and batch of at least 1, samples of at least 8 and a rate in (0, 1)")
    out, files = place_of(out), as_files(data)
    check_free(out, resume=False, overwrite=overwrite, resumes=False)
    checkpoint = Checkpoint.open(model)
    checkpoint.require_plain()
    check_apart(checkpoint.folder, out)
    skeleton = Decoder(checkpoint, torch.device("cpu"))
    names = _module_names(skeleton)
    calibration = _windows(skeleton, files, field, samples=samples, seq_len=seq_len, seed=seed, bos=bos, report=report)
    windows_ST = calibration.ids_ST
    adapted, layers = _adapt(load_checkpoint(checkpoint, device=device, hashed=True).float(), names, rank, seed)
    loss = _train(adapted, windows_ST, steps, batch, rate, seed, report)
    if not loss.improved:
        raise InputError(
            f"recovery did not lower the held-out loss ({loss.start_error:.4f} before): "
            "lower the rate, or give more text; nothing was written"
        )
    merged = {name: _merged(layer) for name, layer in layers.items()}
    settings = {"data": list(files), "rank": rank, "rate": rate, "steps": steps, "batch": batch, "seed": seed}
    settings |= calibration.about
    with ResultFolder(out, {"recover": digest(windows_ST)}, resume=False, overwrite=overwrite) as folder:
        try:
            result = _write(skeleton, merged, folder.path, loss)
            checkpoint.log.check()
        except BaseException:
            folder.discard()
            raise
        record = _record(checkpoint, windows_ST, settings, result, device, started)
        record = record.model_copy(update={"files": hashed_files(folder.path)})
        write_record(folder.path, record)
        folder.complete()
    sweep(out)
    return record.dump()


def _windows(
    skeleton: Decoder, files: tuple[str, ...], field: str, *, seq_len: int, report: Report, **size: Any
) -> CalibrationWindows:
    seq_len = fit_seq_len(seq_len, SEQ_LEN, skeleton.positions, "the model", report)
    tokenizer = load_tokenizer(skeleton.checkpoint.folder)
    return read_calibration(files, field, tokenizer, seq_len=seq_len, report=report, **size)


def _record(
    checkpoint: Checkpoint, windows_ST: Tensor, settings: dict[str, Any], result: RecoveryResult, device: str,
    started: float,
) -> RecoveryRecord:  # fmt: skip
    """Return the record of a recovery that began at `started`."""
    before = read_record(checkpoint.folder)
    fields = {
        "format": FORMAT,
        **provenance("torch", "transformers", "safetensors", "peft"),
        "model": {**checkpoint.source, "files": checkpoint.file_hashes()},
        "recover": {**settings, "windows": list(windows_ST.shape), "sha256": digest(windows_ST)},
        "compressed_from": None if before is None else before.dump(),
        "result": result,
        "device": str(pick_device(device)),
        "seconds": round(time.perf_counter() - started, 2),
        "peak_rss_bytes": peak_rss_bytes(),
    }
    return RecoveryRecord.model_validate(fields)


def _module_names(skeleton: Decoder) -> list[str]:
    """Return the names of the modules with compressed matrices. Raises ArchitectureError for fused experts."""
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
    """Return the model with adapters whose forward keeps every zero, and its adapted layers by module name."""
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
    """Replace the forward of an adapter by that of the masked sum."""
    base: nn.Module = layer.get_base_layer()
    layer.register_buffer("keep", base.get_parameter("weight") != 0, persistent=False)

    def forward(x: Tensor) -> Tensor:
        out: Tensor = functional_call(base, {"weight": _merged(layer)}, (x,))
        return out

    layer.forward = forward


def _merged(layer: Any) -> Tensor:
    """Return W + keep ∘ Δ in the layout of the module."""
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
    """Train the adapters with AdamW, and restore those of the lowest held-out loss."""
    place = next(adapted.parameters()).device
    held_ST, train_ST = windows_ST[: len(windows_ST) // 8].to(place), windows_ST[len(windows_ST) // 8 :].to(place)
    learned = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    adapted.eval()  # no dropout: there are few windows
    lowest = BestState(learned, _loss(adapted, held_ST))
    order: list[int] = []
    for step in range(steps):
        while len(order) < batch:
            order += torch.randperm(len(train_ST), generator=generator).tolist()
        chosen, order = order[:batch], order[batch:]
        optimizer.param_groups[0]["lr"] = rate * cosine(step, steps)
        optimizer.zero_grad()
        ids_BT = train_ST[chosen]
        if not torch.isfinite(_backward(adapted, ids_BT)):
            raise NumericalError(f"the loss is not finite at step {step}: lower the rate")
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        if (step + 1) % math.ceil(steps / CHECKS) == 0 or step + 1 == steps:
            held_loss = _loss(adapted, held_ST)
            report(Event.RECOVER, done=step + 1, of=steps, heldout_loss=held_loss)
            lowest.offer(held_loss)
    lowest.restore()
    return lowest


def _backward(adapted: Any, ids_BT: Tensor) -> Tensor:
    """Add the gradients of the mean loss of a batch, and return the loss. Logits are made in slices."""
    states, parts, x_BTD = _run(adapted, ids_BT)
    loss_BT, grad_BTD = token_losses(states.logits, ids_BT, x_BTD, parts, gradient=True)
    x_BTD.backward(grad_BTD / len(ids_BT))
    loss: Tensor = loss_BT.mean()
    return loss


@torch.no_grad()
def _loss(adapted: Any, windows_ST: Tensor) -> float:
    """Return the mean negative log-likelihood per predicted token."""
    losses = []
    for ids_1T in windows_ST.split(1):
        states, parts, x_1TD = _run(adapted, ids_1T)
        losses.append(token_losses(states.logits, ids_1T, x_1TD, parts).mean())
    return float(torch.stack(losses).double().mean())


def _run(adapted: Any, ids_BT: Tensor) -> tuple[FinalStates, list[slice], Tensor]:
    """Return the head of the model, the slices that logits are made in, and the hidden states after the last block."""
    model = adapted.get_base_model()
    states = FinalStates(model)
    parts = position_slices(ids_BT.numel(), vocabulary_of(model))
    return states, parts, states.run(ids_BT, use_cache=False)


@torch.no_grad()
def _write(skeleton: Decoder, merged: dict[str, Tensor], folder: Path, loss: BestState) -> RecoveryResult:
    """Save the model with `merged` weights in its storage dtype, and return the losses, the zeros and the hashes."""
    checkpoint = skeleton.checkpoint
    decoder = load_checkpoint(checkpoint, device="cpu", hashed=True)
    zeros = weights = 0
    for name, weight in merged.items():
        parameter = decoder.get_parameter(f"{name}.weight")
        before = parameter == 0
        parameter.copy_(weight)
        if not torch.equal(parameter == 0, before):
            raise NumericalError(f"{name}: merging would change which weights are zero")
        zeros += int(before.sum())
        weights += before.numel()
    idle = tuple(f"{name}." for name in skeleton.anatomy.idle)
    own = {name: tensor for name, tensor in decoder.state_dict().items() if not name.startswith(idle)}
    with plain_loading(), writing(folder):
        decoder.save_pretrained(folder, state_dict=own if idle else None, max_shard_size="1GB")
    append_unread(checkpoint, [*skeleton.tower_names, *skeleton.unread.names], folder)
    checkpoint.copy_aux_files(folder)
    return RecoveryResult(
        heldout_loss_before=loss.start_error,
        heldout_loss=loss.error,
        matrices=len(merged),
        zeros=zeros,
        zeros_frac=zeros / weights,
        sha256={path.name: file_sha256(path) for path in sorted(folder.glob("*.safetensors"))},
    )
