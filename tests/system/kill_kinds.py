"""Every kind of run that writes a folder, on models so small that importing torch would take longer than a run."""

import json
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers

import niwaki
from niwaki.compression.adapt import adapt
from niwaki.compression.recover import recover
from niwaki.compression.recovery import training
from niwaki.compression.rotate import rotate
from niwaki.compression.run_record import read_run, write_record
from niwaki.measure.compare.comparison import compare
from niwaki.measure.evaluate.evaluation import evaluate
from niwaki.measure.prompt_gate import calibrate_gate
from niwaki.measure.report.evaluation_card import put_evaluation
from niwaki.runtime.contextual.predictor_files import TENSORS, read_shadow, write_shadow
from support.models import tiny_llama, write_texts


@dataclass(frozen=True)
class World:
    """Models and texts that the runs read."""

    folder: Path

    @property
    def text(self) -> str:
        return str(self.folder / "text.jsonl")

    def calibration(self, samples: int = 6, seq_len: int = 16) -> dict[str, Any]:
        return {"files": (self.text,), "samples": samples, "seq_len": seq_len}


Run = Callable[[World, Path, bool], Any]


@dataclass(frozen=True)
class Kind:
    """One kind of run: `run(world, out, resume)`. `resumes`: it has --resume. `begin` makes OUT before the run.

    `needs`: a package without which it cannot run. `in_place`: it changes files of OUT, instead of replacing OUT.
    """

    run: Run
    resumes: bool = True
    begin: Callable[[World, Path], Any] | None = None
    needs: str = "torch"
    in_place: bool = False


def _compress(method: str | None, target: str | None, model: str = "model", **changes: Any) -> Kind:
    def run(world: World, out: Path, resume: bool) -> Any:
        text = {} if changes.get("plain") else {"calibration": world.calibration(**changes.get("size", {}))}
        more = {key: value for key, value in changes.items() if key not in ("plain", "size")}
        given = {"method": method, "target": target, "device": "cpu", "resume": resume, **text, **more}
        return niwaki.compress(world.folder / model, out, **given)

    return Kind(run)


def _over(kind: Kind, old: str = "pruned") -> Kind:
    """Return the kind with an OUT of an earlier run, which it replaces. `kind` was made with overwrite=True."""
    return replace(kind, begin=lambda world, out: shutil.copytree(world.folder / old, out))


def _recover(overwrite: bool) -> Kind:
    """Recover with a state in the journal after every step; the process is a child, so nothing is set back."""
    small: dict[str, Any] = {"steps": 4, "batch": 4, "seq_len": 32, "rate": 0.01}

    def run(world: World, out: Path, resume: bool) -> Any:
        training.SAVE_SECONDS = 0.0
        given = {"data": world.text, "device": "cpu", "overwrite": overwrite, "resume": resume, **small}
        return recover(world.folder / "pruned", out, **given)

    return Kind(run)


def _rotate(world: World, out: Path, _: bool) -> Any:
    size: dict[str, Any] = {"samples": 4, "seq_len": 16, "steps": 4, "device": "cpu"}
    return rotate(world.folder / "model", out, target="2:4", calibration=world.text, **size)


def _export(to: str, model: str, needs: str, **more: Any) -> Kind:
    def run(world: World, out: Path, _: bool) -> Any:
        return niwaki.export(world.folder / model, out, to=to, **more)

    return Kind(run, resumes=False, needs=needs)


def _compare(overwrite: bool) -> Kind:
    size: dict[str, Any] = {"rounds": 0, "seq_len": 16, "max_tokens": 96}

    def run(world: World, out: Path, _: bool) -> Any:
        model, pruned = world.folder / "model", world.folder / "pruned"
        given = {"data": [world.text], "report": out, "device": "cpu", "overwrite": overwrite, **size}
        return compare(model, [pruned], **given)

    return Kind(run, resumes=False, needs="plotly")


def _adapt(world: World, out: Path, _: bool) -> Any:
    size: dict[str, Any] = {"samples": 16, "seq_len": 24, "device": "cpu"}
    return adapt(out, data=str(world.folder / "new.jsonl"), **size)


def _gate(world: World, out: Path, _: bool) -> Any:
    size: dict[str, Any] = {"samples": 4, "prompt_tokens": 8, "new_tokens": 4, "device": "cpu"}
    return calibrate_gate(out, data=world.text, **size)


def _card(world: World, out: Path, _: bool) -> None:
    size: dict[str, Any] = {"seq_len": 16, "max_tokens": 64, "device": "cpu"}
    put_evaluation(out, evaluate(str(out), data=(world.text,), **size))


def _blinded(world: World, out: Path) -> None:
    """Make OUT with a predictor that knows nothing, so that every new one is better."""
    shutil.copytree(world.folder / "shadow", out)
    made, record = read_shadow(out), read_run(out)
    prior_U = torch.rand(made.layout.size, generator=torch.Generator().manual_seed(0))
    sha256 = write_shadow(out, replace(made, predictor=replace(made.predictor, prior_U=prior_U)))
    result = record.result.model_copy(update={"sha256": record.result.sha256 | {TENSORS: sha256}})
    write_record(out, record.model_copy(update={"result": result}))


def _copied(name: str) -> Callable[[World, Path], Any]:
    return lambda world, out: shutil.copytree(world.folder / name, out)


SHADOW = {"unit": "prompt", "min_prompt": 8, "features": "last", "size_frac": 0.5}
COMP = {"try_heads": 0}
CHAIN = {"comp.try_heads": 0, "gptq.group": 8}
QUICK_CODES = {"rounds": 1, "learn_rounds": 1, "samples": 4}
KINDS: Mapping[str, Kind] = {
    # zeros, chosen or learned
    "walk": _compress("sparsegpt", "2:4"),
    "magnitude": _compress("magnitude", "0.5", plain=True),
    "wanda, packed": _compress("wanda", "0.6", pack="auto"),
    "walk on disk": _compress("wanda", "0.6", allocation="owl", dense_stream=True, activation_bytes=0),
    "gblm": _compress("gblm", "2:4"),
    "wandapp": _compress("wandapp", "2:4", options={"rounds": 1, "samples": 2}),
    "besa": _compress("besa", "0.5", options={"steps": 2}),
    "preset": _compress(None, "2:4", preset="fast"),
    # codes
    "rtn without text": _compress("rtn", "4bit", plain=True, pack="auto", options={"group": 16}),
    "gptq and embeddings": _compress("gptq", "4bit", "wide", pack="auto", embeddings="8bit", options={"group": 16}),
    "squeeze10": _compress("squeeze10", "3bit", pack="auto", options=QUICK_CODES),
    "squeeze10 by block": _compress("squeeze10", "3bit", allocation="sensitivity", options=QUICK_CODES),
    "billm": _compress("billm", "5bit", "wide"),
    "arb": _compress("arb", "5bit", "wide", options={"iterations": 2}),
    "ptq161": _compress("ptq161", "3bit", "wide", options={"rounds": 1, "samples": 4}),
    # zeros and codes
    "one walk of two methods": _compress("sparsegpt+gptq", "2:4+4bit", pack="auto", options={"gptq.group": 16}),
    # shapes, and chains that begin with them
    "comp": _compress("comp", "0.3", "wide", options=COMP),
    "comp uneven": _compress("comp", "0.3", "wide", allocation="searched", options=COMP),
    "flap": _compress("flap", "0.3", "wide"),
    "wanda_sp": _compress("wanda_sp", "0.3", "wide"),
    "two_ssp": _compress("two_ssp", "0.3", "wide"),
    "shortgpt": _compress("shortgpt", "0.34", "wide"),
    "chain": _compress("comp+gptq", "0.25+4bit", "wide", pack="auto", options=CHAIN),
    "chain of removed blocks": _compress("shortgpt+wanda", "0.34+0.5", "wide"),
    # the rest
    "shadow": _compress("shadow", "0.5", "heads", size={"samples": 12, "seq_len": 24}, options=SHADOW),
    "merge adapter": _compress("wanda", "0.5", "adapter", merge_adapter=True),
    "merge adapter, chain": _compress(
        "comp+wanda", "0.3+0.5", "wide adapter", merge_adapter=True, options={"comp.try_heads": 0}
    ),
    "gguf": _compress("wanda", "0.5", "model.gguf"),
    "overwrite": _over(_compress("wanda", "0.5", overwrite=True)),
    "overwrite by a chain": _over(
        _compress("comp+gptq", "0.25+4bit", "wide", pack="auto", options=CHAIN, overwrite=True)
    ),
    "rotate": Kind(_rotate, resumes=False),
    "recover": _recover(overwrite=False),
    "recover over a result": _over(_recover(overwrite=True)),
    "export gguf": _export("gguf", "pruned", "gguf", type="f16"),
    "export gguf over a result": _over(_export("gguf", "pruned", "gguf", type="f16", overwrite=True)),
    "export compressed-tensors": _export("compressed-tensors", "coded", "compressed_tensors"),
    "export onnx": _export("onnx", "small", "onnxscript"),
    "compare": _compare(overwrite=False),
    "compare over a report": _over(_compare(overwrite=True), "report"),
    "evaluate to the card": Kind(_card, resumes=False, begin=_copied("pruned"), in_place=True),
    "adapt": Kind(_adapt, resumes=False, begin=_blinded, in_place=True),
    "calibrate-gate": Kind(_gate, resumes=False, begin=_copied("shadow"), in_place=True),
}


def make_world(folder: Path, *, whole: bool = True) -> World:
    """Write models, an adapter, a GGUF file and results to `folder`; without `whole` only what quick tests need."""
    world = World(folder)
    write_texts(folder / "text.jsonl")
    write_texts(folder / "new.jsonl", first=3)
    tiny_llama(folder / "model", blocks=4)
    tiny_llama(folder / "wide", intermediate_size=96, hidden_size=64)
    tiny_llama(folder / "heads", num_attention_heads=8, num_key_value_heads=4)
    niwaki.compress(folder / "model", folder / "pruned", method="magnitude", target="2:4", device="cpu")
    KINDS["shadow"].run(world, folder / "shadow", False)
    if whole:
        _adapter(folder / "model", folder / "adapter")
        _adapter(folder / "wide", folder / "wide adapter")
        KINDS["rtn without text"].run(world, folder / "coded", False)
        KINDS["compare"].run(world, folder / "report", False)
        tiny_llama(folder / "small", blocks=1)
        niwaki.export(folder / "model", folder / "gguf", to="gguf", type="f16")
        next((folder / "gguf").glob("*.gguf")).rename(folder / "model.gguf")
        shutil.rmtree(folder / "gguf")
    return world


def _adapter(base: Path, folder: Path) -> None:
    import peft

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(1)
    adapted: Any = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted.save_pretrained(folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": str(base)}))
