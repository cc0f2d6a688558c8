"""Rotation: another basis for the residual stream, the heads and the neurons of a model that computes the same.

The result is an ordinary model. Every method compresses it as it would the source, and loses less
(`methods.shared.rotation`). Four changes are merged into the weights:

- `residual`: the stream gets another basis. The gains of the norms move into the matrices after them, because a norm
  without a gain commutes with a rotation. A tied head moves too, so that it needs weights of its own.
- `heads`: the values of each head get another basis. Rows of the value matrix and columns of the output matrix turn.
- `neurons`: an order of the neurons in which groups of N:M keep more.
- `scales`: channels are scaled so that those with large inputs lose less by rounding (AWQ). Norms, values and the
  matrix beside the gate take the inverse.

Which norm feeds which matrix is found in a short forward. The logits must agree before and after. What cannot be turned
is refused: norms that subtract a mean or add a bias, fused experts, towers, other ways into the stream.

Cost: the model in float32 in memory, two forwards of the windows, and a Gram matrix per norm and head input.

    niwaki rotate MODEL OUT --target 2:4 --calibration mine.txt
"""

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from niwaki.compression.places import alone_at, check_apart, check_space, is_empty, partial_of, place_of, resumable
from niwaki.compression.run_record import FORMAT, provenance
from niwaki.config.events import Event, Report, silent
from niwaki.config.recipe import BosPolicy, as_files
from niwaki.config.sources import ROTATED
from niwaki.config.targets import NM, Bits, PrunedBits, Target, parse_target
from niwaki.data.text_amount import fit_seq_len
from niwaki.data.texts import digest, load_tokenizer, read_calibration
from niwaki.errors import ArchitectureError, InputError, NumericalError, OutputError, TargetError, unknown
from niwaki.methods.shared.rotation import (
    ROWS,
    Reads,
    Writes,
    learn_rotation,
    lost_share,
    principal_basis,
    random_hadamard,
    regroup,
    search_scales,
)
from niwaki.model.checkpoint import TIE, Checkpoint
from niwaki.model.decoder import Decoder
from niwaki.model.device import pick_device
from niwaki.model.files import remove_folder, write_text, writing
from niwaki.model.hf import plain_loading
from niwaki.model.rotation_sites import BlockSites, Sites, divide_gain, find_sites, linear_producer, set_plain
from niwaki.model.unread import append_unread
from niwaki.runtime.load import load_checkpoint

SEQ_LEN = 512
WAYS = {"residual": ("learned", "hadamard", "none"), "heads": ("learned", "hadamard", "none")}
PROBE_TOKENS = 16
TOLERANCE = 1e-3  # relative error of the logits in float32
REGROUP_ROUNDS = 60


@dataclass(frozen=True)
class Ways:
    """Choice of what is turned, for which target, and how long is learned."""

    target: Target
    residual: str = "learned"
    heads: str = "learned"
    neurons: bool = True
    scales: bool = False
    steps: int = 300
    rate: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        for name, known in WAYS.items():
            if getattr(self, name) not in known:
                raise InputError(unknown(name, getattr(self, name), known))
        if self.scales and not isinstance(self.target, Bits):
            raise InputError(f"scales help rounding only: expected a target such as 4bit, got {self.target}")
        if self.steps < 0 or not 0 < self.rate < 1:
            raise InputError("expected steps ≥ 0 and a rate in (0, 1)")

    @property
    def grouped(self) -> NM | None:
        """Return the N:M part of the target, None without one."""
        zeros = self.target.zeros if isinstance(self.target, PrunedBits) else self.target
        return zeros if isinstance(zeros, NM) else None


Notes = dict[str, list[tuple[float, float]]]  # lost shares before and after, by what was turned


@dataclass
class Rotated:
    """Outcome: the lost share of importance before and after, by what was turned, and the error of the logits."""

    lost: dict[str, tuple[float, float]] = field(default_factory=dict)
    logit_error: float = 0.0
    untied: bool = False


@alone_at("out")
def rotate(
    model: str | Path,
    out: str | Path,
    *,
    target: str,
    calibration: str | Path | Sequence[str | Path] = (),
    field: str = "text",
    samples: int = 64,
    seq_len: int = SEQ_LEN,
    bos: BosPolicy = "auto",
    device: str = "auto",
    report: Report | None = None,
    **ways: Any,
) -> dict[str, Any]:
    """Write `model` in another basis to the new folder `out`, and return the content of its record.

    `target` is what the result will be compressed to. `ways` are the fields of `Ways`. Raises ArchitectureError for a
    model that does not allow a rotation, with the reason; then nothing is written.
    """
    report = report or silent
    chosen, files, out = Ways(parse_target(target), **ways), as_files(calibration), place_of(out)
    if not files:
        raise InputError("no text to measure importance on: give --calibration FILE")
    _check_place(out)
    checkpoint = Checkpoint.open(model)
    checkpoint.require_plain()
    check_apart(checkpoint.folder, out)
    decoder = Decoder(checkpoint, torch.device("cpu"))
    seq_len = fit_seq_len(seq_len, SEQ_LEN, decoder.positions, "the model", report)
    size: dict[str, Any] = {"samples": samples, "seq_len": seq_len, "seed": chosen.seed, "bos": bos}
    windows = read_calibration(files, field, load_tokenizer(checkpoint.folder), **size, report=report)
    about = {"data": list(files), **size, **windows.about}
    return rotate_to(out, decoder, chosen, windows.ids_ST, about, device, report)


def rotate_to(
    out: Path, decoder: Decoder, ways: Ways, ids_ST: Tensor, about: Mapping[str, Any], device: str, report: Report
) -> dict[str, Any]:
    """Write the model of `decoder` in another basis to `out`, and return its record with `about` the windows."""
    started, checkpoint = time.perf_counter(), decoder.checkpoint
    if decoder.anatomy.idle:
        raise ArchitectureError(f"{checkpoint.folder} has towers ({', '.join(decoder.anatomy.idle)}): rotate decoders")
    check_space(out, checkpoint.nbytes)
    whole = load_checkpoint(checkpoint, device=device, dtype=torch.float32)
    done = turn(whole, decoder, ids_ST.to(pick_device(device)), ways, report)
    record = {
        "format": FORMAT,
        **provenance("torch", "transformers", "safetensors"),
        "model": {**checkpoint.source, "bytes": checkpoint.nbytes, "files": checkpoint.file_hashes()},
        "rotate": {**vars(ways), "target": str(ways.target), **about},
        "windows": {"shape": list(ids_ST.shape), "sha256": digest(ids_ST)},
        "result": vars(done),
    }
    _write(whole, decoder, out, record, started)
    written: dict[str, Any] = json.loads((out / ROTATED).read_text(encoding="utf-8"))
    return written


def _check_place(out: Path) -> None:
    """Refuse an OUT that exists, and a working folder that another program or run left."""
    partial = partial_of(out)
    if not is_empty(out):
        raise OutputError(f"{out} already exists: choose another OUT, or remove it")
    if resumable(partial) or not (is_empty(partial) or (partial / ROTATED).parent.is_dir()):
        raise OutputError(f"{partial} exists and was not left by `niwaki rotate`: choose another OUT, or remove it")


@torch.no_grad()
def turn(model: Any, decoder: Decoder, ids_ST: Tensor, ways: Ways, report: Report = silent) -> Rotated:
    """Turn `model` in place, and check that it computes the same. Raises ArchitectureError for one that cannot turn."""
    sites = find_sites(model, decoder, ids_ST[:1, :PROBE_TOKENS], residual=ways.residual != "none")
    before = model(ids_ST[:1, :PROBE_TOKENS]).logits
    done, generator = Rotated(), torch.Generator().manual_seed(ways.seed)
    notes: Notes = {}
    if ways.residual != "none":
        _fold_gains(model, sites)
        done.untied = _untie(model)
    grams = _grams(model, sites, ids_ST, report)
    if ways.residual != "none":
        _turn_residual(model, sites, grams, ways, generator, notes)
    for part, wanted, there in (
        ("heads", ways.heads != "none", any(block.values for block in sites.blocks)),
        ("neurons", ways.neurons and ways.grouped is not None, any(block.consumer for block in sites.blocks)),
    ):
        if wanted and not there:
            report(Event.WARNING, message=f"{part} stay as they are: blocks do not have them as matrices of their own")
    if ways.heads != "none":
        shapes: dict[tuple[Any, ...], list[BlockSites]] = {}
        for block in (block for block in sites.blocks if block.values):
            values, output = model.get_submodule(block.values), model.get_submodule(block.output)
            shapes.setdefault((values.weight.shape, output.weight.shape, block.width), []).append(block)
        for alike in shapes.values():
            _turn_heads(model, alike, grams, ways, generator, notes)
    for number, block in enumerate(sites.blocks):
        if ways.neurons and ways.grouped and block.consumer:
            _order_neurons(model, block, grams, ways.grouped, generator, notes)
        report(Event.SCAN, index=number, of=len(sites.blocks))
    if ways.scales:
        _scale(model, sites, ids_ST, ways, generator, notes, report)
    for name, pairs in notes.items():
        befores, afters = zip(*pairs, strict=True)
        done.lost[name] = (sum(befores) / len(pairs), sum(afters) / len(pairs))
    after = model(ids_ST[:1, :PROBE_TOKENS]).logits
    done.logit_error = float((after - before).norm() / before.norm())
    if not done.logit_error <= TOLERANCE:
        raise ArchitectureError(
            f"{type(model).__name__} computes something else in another basis (relative error of the logits "
            f"{done.logit_error:.1e}): its blocks use the residual stream or the heads in a way that does not turn. "
            "Turn less (--residual none, --heads none), or compress the model as it is"
        )
    return done


def _fold_gains(model: Any, sites: Sites) -> None:
    """Move the gain of every norm into the matrices that read it. A tied head gets weights of its own first."""
    _untie_head(model)
    for norm, readers in sites.norms().items():
        gain_D = set_plain(model.get_submodule(norm))
        for name in readers if gain_D is not None else ():
            model.get_submodule(name).weight.mul_(gain_D)


def _untie_head(model: Any) -> None:
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    if head.weight is table.weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)


def _untie(model: Any) -> bool:
    """Say in the config that the head has weights of its own; return whether it was tied."""
    tied = bool(model.all_tied_weights_keys)
    model.all_tied_weights_keys.clear()
    for config in model.config, model.config.get_text_config():
        setattr(config, TIE, False)
    return tied


def _grams(model: Any, sites: Sites, ids_ST: Tensor, report: Report) -> dict[str, Tensor]:
    """Return the mean Gram matrix of the input of the first reader of each norm, and of outputs of heads and neurons.

    Those of inputs to neurons are cut to `ROWS` columns, with their whole diagonal under the name with `.diagonal`.
    """
    wanted = {readers[0] for block in sites.blocks for readers in block.readers.values()}
    wanted |= {name for block in sites.blocks for name in (*block.writers, block.output, block.consumer) if name}
    grams: dict[str, Tensor] = {}
    heads = {block.output for block in sites.blocks}

    def watch(name: str) -> Callable[..., None]:
        def seen(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x_NI = args[0].reshape(-1, args[0].shape[-1]).float() / ids_ST.numel() ** 0.5
            some_NI = x_NI if name in heads or name in firsts else x_NI[:, :ROWS]
            for key, value in ((name, some_NI.T @ some_NI), (f"{name}.diagonal", x_NI.square().sum(0))):
                grams[key] = grams[key].add_(value) if key in grams else value

        return seen

    firsts = {readers[0] for block in sites.blocks for readers in block.readers.values()}
    hooks = [model.get_submodule(name).register_forward_pre_hook(watch(name)) for name in sorted(wanted)]
    try:
        for ids_BT in ids_ST.split(4):
            model.base_model(ids_BT, use_cache=False)  # the head is not needed
    finally:
        for hook in hooks:
            hook.remove()
    for name, gram in grams.items():
        if not torch.isfinite(gram).all():
            raise NumericalError(f"the inputs of {name} are not finite on the calibration text: check the checkpoint")
    return grams


def _turn_residual(
    model: Any, sites: Sites, grams: Mapping[str, Tensor], ways: Ways, generator: torch.Generator, notes: Notes
) -> None:
    """Turn the residual stream."""
    seen: list[Reads | Writes] = []
    total_DD: Tensor | None = None
    for block in sites.blocks:
        for readers in block.readers.values():
            gram_DD = grams[readers[0]]
            stacked_RD = torch.cat([model.get_submodule(name).weight for name in readers])
            seen.append(Reads.of(stacked_RD, gram_DD, generator))
            scaled_DD = gram_DD / gram_DD.diagonal().mean()
            total_DD = scaled_DD if total_DD is None else total_DD + scaled_DD
        seen += [Writes.of(model.get_submodule(name).weight, grams[name]) for name in block.writers]
    assert total_DD is not None, "blocks read norms"
    turn_DD = _choose(seen, total_DD, ways.residual, ways, generator, notes, "residual")
    for module in (model.get_submodule(sites.embeddings), model.get_submodule(sites.head)):
        _turn_columns(module, turn_DD)
    for block in sites.blocks:
        for name in (name for readers in block.readers.values() for name in readers):
            _turn_columns(model.get_submodule(name), turn_DD)
        for name in block.writers:
            writer = model.get_submodule(name)
            writer.weight.copy_(turn_DD.T @ writer.weight.double())
            if writer.bias is not None:
                writer.bias.copy_(writer.bias.double() @ turn_DD)


def _choose(
    seen: Sequence[Reads | Writes], gram_DD: Tensor, way: str, ways: Ways, generator: torch.Generator, notes: Notes,
    what: str,
) -> Tensor:  # fmt: skip
    """Return rotations [..., D, D] float64, and note the lost share before and after."""
    width, device = gram_DD.shape[-1], gram_DD.device
    before = lost_share(seen, torch.eye(width, device=device).expand_as(gram_DD), ways.target)
    if way == "hadamard" or isinstance(ways.target, Bits):
        turn_DD = random_hadamard(width, generator).to(device).expand_as(gram_DD)
        lost = lost_share(seen, turn_DD.float(), ways.target)
    else:
        turn_DD = principal_basis(gram_DD, 1 if ways.grouped is None else ways.grouped.group)
    if way == "learned":
        with torch.enable_grad():
            turn_DD, lost = learn_rotation(seen, turn_DD, ways.target, steps=ways.steps, rate=ways.rate)
    notes.setdefault(what, []).append((float(before.mean()), float(lost.mean())))
    return turn_DD


def _turn_columns(module: Any, turn_DD: Tensor) -> None:
    module.weight.copy_(module.weight.double() @ turn_DD)


def _turn_heads(
    model: Any,
    blocks: Sequence[BlockSites],
    grams: Mapping[str, Tensor],
    ways: Ways,
    generator: torch.Generator,
    notes: Notes,
) -> None:
    """Turn the values of each group of heads, and the columns of the output matrix that read them.

    The groups of all blocks are learned together. Legend here: N groups, S heads of a group, D channels of a head.
    """
    width = blocks[0].width
    values, outputs = ([model.get_submodule(getattr(b, name)) for b in blocks] for name in ("values", "output"))
    groups = values[0].weight.shape[0] // width
    by_head = [output.weight.unflatten(1, (groups, -1, width)).permute(1, 2, 0, 3) for output in outputs]
    read_NSRD = torch.cat(by_head)
    gram_NSDD = torch.cat([_head_grams(grams[block.output], groups, width) for block in blocks])
    seen: list[Reads | Writes] = [
        Reads.of(read_NSRD[:, head], gram_NSDD[:, head], generator) for head in range(read_NSRD.shape[1])
    ]
    if all(map(_reader, blocks)):
        inputs = [grams[_reader(block)] for block in blocks]
        written_NDC = torch.cat([module.weight.unflatten(0, (groups, width)) for module in values])
        seen.append(Writes.of(written_NDC, torch.stack(inputs).repeat_interleave(groups, 0)))
    turn_NDD = _choose(seen, gram_NSDD.sum(1), ways.heads, ways, generator, notes, "heads")
    for number, (module, output) in enumerate(zip(values, outputs, strict=True)):
        own_NDD = turn_NDD[number * groups : (number + 1) * groups]
        rows = module.weight.double().unflatten(0, (groups, width))
        module.weight.copy_((own_NDD.mT @ rows).flatten(0, 1))
        if module.bias is not None:
            module.bias.copy_((module.bias.double().view(groups, 1, width) @ own_NDD).flatten())
        columns = output.weight.double().unflatten(1, (groups, -1, width))
        output.weight.copy_(torch.einsum("rgsd,gde->rgse", columns, own_NDD).flatten(1))


def _reader(block: BlockSites) -> str:
    """Return the matrix whose inputs were summed for the values of a block, empty if no norm feeds them."""
    return next((readers[0] for readers in block.readers.values() if block.values in readers), "")


def _head_grams(gram_II: Tensor, groups: int, width: int) -> Tensor:
    """Return the diagonal blocks of a Gram matrix by group and head [N, S, D, D]."""
    heads = len(gram_II) // width
    blocks_HDD = gram_II.view(heads, width, heads, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    return blocks_HDD.reshape(groups, heads // groups, width, width)


def _scale(
    model: Any,
    sites: Sites,
    ids_ST: Tensor,
    ways: Ways,
    generator: torch.Generator,
    notes: Notes,
    report: Report,
) -> None:
    """Scale the channels that norms, values and neurons feed, block by block."""
    assert isinstance(ways.target, Bits), "checked by Ways"
    grams, bits = _grams(model, sites, ids_ST, report), max(2, round(ways.target.bits))

    def search(weight_RD: Tensor, input_D: Tensor) -> Tensor:
        rows = torch.randperm(len(weight_RD), generator=generator)[:ROWS].to(weight_RD.device)
        scale_D, before, after = search_scales(weight_RD[rows].float(), input_D, bits)
        notes.setdefault("scales", []).append((before, after))
        return scale_D

    for block in sites.blocks:
        for norm, readers in block.readers.items():
            if getattr(model.get_submodule(norm), "weight", None) is None:
                continue
            matrices = [model.get_submodule(name) for name in readers]
            scale_D = search(torch.cat([m.weight for m in matrices]), grams[f"{readers[0]}.diagonal"])
            divide_gain(model.get_submodule(norm), scale_D)
            for matrix in matrices:
                matrix.weight.mul_(scale_D)
        if block.values:
            values, output = model.get_submodule(block.values), model.get_submodule(block.output)
            groups = len(values.weight) // block.width
            # Heads that read the same values have the same scales.
            input_GSD = grams[f"{block.output}.diagonal"].view(groups, -1, block.width)
            scale_I = search(output.weight, input_GSD.mean(1, keepdim=True).expand_as(input_GSD).flatten())
            own_O = scale_I.view_as(input_GSD)[:, 0].flatten()
            output.weight.mul_(scale_I)
            _divide_rows(values, own_O)
        producer = linear_producer(model, block, ids_ST[:1, :PROBE_TOKENS]) if block.consumer else ""
        if producer:
            consumer = model.get_submodule(block.consumer)
            scale_I = search(consumer.weight, grams[f"{block.consumer}.diagonal"])
            consumer.weight.mul_(scale_I)
            _divide_rows(model.get_submodule(producer), scale_I)


def _divide_rows(module: Any, scale_O: Tensor) -> None:
    module.weight.div_(scale_O[:, None])
    if module.bias is not None:
        module.bias.div_(scale_O)


def _order_neurons(
    model: Any, block: BlockSites, grams: Mapping[str, Tensor], target: NM, generator: torch.Generator, notes: Notes
) -> None:
    """Order the neurons so that groups of N:M along the consumer keep more."""
    consumer = model.get_submodule(block.consumer)
    importance_RC = consumer.weight.square() * grams[f"{block.consumer}.diagonal"]
    if importance_RC.shape[1] % target.group:
        raise TargetError(f"target {target} does not divide the {importance_RC.shape[1]} columns of {block.consumer}")
    rows = torch.randperm(len(importance_RC), generator=generator)[:ROWS].to(importance_RC.device)
    order_C = regroup(importance_RC[rows], target, generator, REGROUP_ROUNDS)
    lost = (_lost_groups(importance_RC, target), _lost_groups(importance_RC[:, order_C], target))
    notes.setdefault("neurons", []).append(lost)
    consumer.weight.copy_(consumer.weight[:, order_C])
    for name in block.producers:
        producer = model.get_submodule(name)
        producer.weight.copy_(producer.weight[order_C])
        if producer.bias is not None:
            producer.bias.copy_(producer.bias[order_C])


def _lost_groups(importance_RC: Tensor, target: NM) -> float:
    groups = importance_RC.unflatten(1, (-1, target.group))
    lost = groups.topk(target.group - target.keep, dim=-1, largest=False).values.sum()
    return float(lost / importance_RC.sum())


def _write(model: Any, decoder: Decoder, out: Path, record: Mapping[str, Any], started: float) -> None:
    """Write the model in the dtype of its checkpoint with its record, complete or not at all."""
    checkpoint, partial = decoder.checkpoint, partial_of(out)
    remove_folder(partial, ROTATED)
    try:
        (partial / ROTATED).parent.mkdir(parents=True)
        with plain_loading(), writing(partial):
            model.to(checkpoint.dtype).save_pretrained(partial, max_shard_size="1GB")
        append_unread(checkpoint, decoder.unread.names, partial)
        checkpoint.copy_aux_files(partial)
        if record["result"]["untied"]:
            content = checkpoint.config_content()
            for section in (content, *(value for value in content.values() if isinstance(value, dict))):
                if section is content or TIE in section:
                    section[TIE] = False
            write_text(partial / "config.json", json.dumps(content, indent=2) + "\n")
        nbytes = Checkpoint.open(partial).nbytes
        done = {**record, "bytes": nbytes, "seconds": round(time.perf_counter() - started, 2)}
        write_text(partial / ROTATED, json.dumps(done, indent=2) + "\n")
        checkpoint.log.check()
        if not is_empty(out):
            raise OutputError(f"{out} appeared during this run and is not replaced: choose another OUT, or remove it")
        if out.is_dir():
            shutil.rmtree(out)  # it holds empty folders only
        partial.rename(out)
    except BaseException:
        remove_folder(partial, ROTATED)
        raise
