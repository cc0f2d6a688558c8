"""Runs of every kind that are killed (SIGKILL) at every write, or at random moments, and then repeated.

A run is a forked child. A hook, here alone, counts what changes the disk (fsync, rename, unlink, mkdir, …), and kills
the child before the n-th of these. A random kill comes from the parent, by the clock. Then OUT is absent or whole.
The same command, with --resume where it exists, ends at the same bytes with nothing beside OUT and one block at most
compressed again.

    python -m tests.system.kill_points --moments 50 --out benchmarks/results/speed/kill-points-cpu.json
"""

import json
import os
import random
import shutil
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer

import niwaki
from niwaki.compression.adapt import adapt
from niwaki.compression.recover import recover
from niwaki.compression.run_record import read_run, write_record
from niwaki.errors import OutputError, ResumeError
from niwaki.measure.compare.comparison import compare
from niwaki.runtime.contextual.predictor_files import TENSORS, read_shadow, write_shadow
from support.models import file_bytes, tiny_llama, write_texts

CHANGES = ("fsync", "replace", "rename", "unlink", "mkdir", "rmdir", "link", "truncate")
HELD = ("niwaki/journal", "niwaki/events.jsonl")
FAILED = 13  # exit status of a child that raised an error


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
    """One kind of run: `run(world, out, resume)`. `resumes`: it has --resume. `begin` makes OUT before the run."""

    run: Run
    resumes: bool = True
    begin: Callable[[World, Path], Any] | None = None


def _compress(method: str | None, target: str, model: str = "model", **changes: Any) -> Kind:
    def run(world: World, out: Path, resume: bool) -> Any:
        text = {} if changes.get("plain") else {"calibration": world.calibration(**changes.get("size", {}))}
        more = {key: value for key, value in changes.items() if key not in ("plain", "size")}
        return niwaki.compress(
            world.folder / model, out, method=method, target=target, device="cpu", resume=resume, **text, **more
        )

    return Kind(run)


def _recover(world: World, out: Path, _: bool) -> Any:
    small: dict[str, Any] = {"steps": 4, "batch": 4, "samples": 16, "seq_len": 32, "rank": 4, "rate": 0.02}
    return recover(world.folder / "pruned", out, data=world.text, device="cpu", **small)


def _export(to: str, model: str, **more: Any) -> Kind:
    def run(world: World, out: Path, _: bool) -> Any:
        return niwaki.export(world.folder / model, out, to=to, **more)

    return Kind(run, resumes=False)


def _compare(world: World, out: Path, _: bool) -> Any:
    model, pruned = world.folder / "model", world.folder / "pruned"
    return compare(model, [pruned], data=[world.text], report=out, rounds=0, seq_len=16, max_tokens=96, device="cpu")


def _adapt(world: World, out: Path, _: bool) -> Any:
    size: dict[str, Any] = {"samples": 16, "seq_len": 24, "device": "cpu"}
    return adapt(out, data=str(world.folder / "new.jsonl"), **size)


def _blinded(world: World, out: Path) -> None:
    """Make OUT with a predictor that knows nothing, so that every new one is better."""
    shutil.copytree(world.folder / "shadow", out)
    made, record = read_shadow(out), read_run(out)
    prior_U = torch.rand(made.layout.size, generator=torch.Generator().manual_seed(0))
    sha256 = write_shadow(out, replace(made, predictor=replace(made.predictor, prior_U=prior_U)))
    result = record.result.model_copy(update={"sha256": record.result.sha256 | {TENSORS: sha256}})
    write_record(out, record.model_copy(update={"result": result}))


SHADOW = {"min_prompt": 8, "features": "last", "size_frac": 0.5}
COMP = {"try_heads": 0}
KINDS: Mapping[str, Kind] = {
    "walk": _compress("sparsegpt", "2:4"),
    "rtn without text": _compress("rtn", "4bit", plain=True, pack="auto", options={"group": 16}),
    "walk on disk": _compress("wanda", "0.6", allocation="owl", dense_stream=True, activation_bytes=0),
    "squeeze10": _compress("squeeze10", "3bit", pack="auto", options={"rounds": 1, "learn_rounds": 1, "samples": 4}),
    "learning": _compress("besa", "0.5", options={"steps": 2}),
    "preset": _compress(None, "2:4", preset="fast"),
    "one walk of two methods": _compress("sparsegpt+gptq", "2:4+4bit", pack="auto", options={"gptq.group": 16}),
    "comp": _compress("comp", "0.3", "wide", options=COMP),
    "comp uneven": _compress("comp", "0.3", "wide", allocation="searched", options=COMP),
    "flap": _compress("flap", "0.3", "wide"),
    "shortgpt": _compress("shortgpt", "0.34", "wide"),
    "chain": _compress("comp+gptq", "0.25+4bit", "wide", pack="auto", options={"comp.try_heads": 0, "gptq.group": 8}),
    "shadow": _compress("shadow", "0.5", "heads", size={"samples": 12, "seq_len": 24}, options=SHADOW),
    "merge adapter": _compress("wanda", "0.5", "adapter", merge_adapter=True),
    "merge adapter, chain": _compress(
        "comp+wanda", "0.3+0.5", "wide adapter", merge_adapter=True, options={"comp.try_heads": 0}
    ),
    "gguf": _compress("wanda", "0.5", "model.gguf"),
    "overwrite": Kind(
        lambda world, out, resume: _compress("wanda", "0.5", overwrite=True).run(world, out, resume),
        begin=lambda world, out: shutil.copytree(world.folder / "pruned", out),
    ),
    "recover": Kind(_recover, resumes=False),
    "export gguf": _export("gguf", "pruned", type="f16"),
    "export compressed-tensors": _export("compressed-tensors", "coded"),
    "compare": Kind(_compare, resumes=False),
    "adapt": Kind(_adapt, resumes=False, begin=_blinded),
}


def make_world(folder: Path) -> World:
    """Write models, an adapter, a GGUF file and results to `folder`."""
    world = World(folder)
    write_texts(folder / "text.jsonl")
    write_texts(folder / "new.jsonl", first=3)
    tiny_llama(folder / "model", blocks=4)
    tiny_llama(folder / "wide", intermediate_size=96, hidden_size=64)
    tiny_llama(folder / "heads", num_attention_heads=8, num_key_value_heads=4)
    _adapter(folder / "model", folder / "adapter")
    _adapter(folder / "wide", folder / "wide adapter")
    given: dict[str, Any] = {"device": "cpu"}
    niwaki.compress(folder / "model", folder / "pruned", method="magnitude", target="2:4", **given)
    niwaki.compress(
        folder / "model", folder / "coded", method="rtn", target="4bit", pack="auto", options={"group": 16}, **given
    )
    niwaki.export(folder / "model", folder / "gguf", to="gguf", type="f16")
    next((folder / "gguf").glob("*.gguf")).rename(folder / "model.gguf")
    shutil.rmtree(folder / "gguf")
    KINDS["shadow"].run(world, folder / "shadow", False)
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


class Bench:
    """One kind of run, with the bytes of an uninterrupted one, its disk changes and its seconds."""

    def __init__(self, world: World, name: str, place: Path) -> None:
        self.world, self.name, self.kind, self.place = world, name, KINDS[name], place
        os.environ["NIWAKI_CACHE"] = str(place / "cache")
        self._begin("straight")
        counted, began = place / "count", time.perf_counter()
        assert self._child(self.place / "straight/out", False, count_to=counted) == 0
        self.seconds = time.perf_counter() - began
        self.changes = int(counted.read_text())
        self.wanted = _bytes(place / "straight/out")

    def kill_before(self, change: int) -> int:
        """Kill a run before its n-th change of the disk; return how many blocks a repetition compressed again."""
        out = self._begin("killed")
        status = self._child(out, False, kill_at=change)
        assert status in (-signal.SIGKILL, 0), f"{self.name}: the run failed before change {change}"
        return self._check(out, f"change {change} of {self.changes}")

    def kill_after(self, seconds: float) -> int:
        """Kill a run after some seconds; return how many blocks a repetition compressed again."""
        out = self._begin("killed")
        status = self._child(out, False, kill_after=seconds)
        assert status in (-signal.SIGKILL, 0), f"{self.name}: the run failed within {seconds} s"
        return self._check(out, f"{seconds:.4f} s of {self.seconds:.4f} s")

    def _begin(self, name: str) -> Path:
        """Return OUT in a new folder."""
        shutil.rmtree(self.place / name, ignore_errors=True)
        shutil.rmtree(self.place / "cache", ignore_errors=True)
        (self.place / name).mkdir(parents=True)
        if self.kind.begin is not None:
            self.kind.begin(self.world, self.place / name / "out")
        return self.place / name / "out"

    def _check(self, out: Path, moment: str) -> int:
        where = f"{self.name}, killed at {moment}"
        if self.kind.begin is None and self.name != "compare" and out.exists():
            assert _bytes(out) == self.wanted, f"{where}: OUT is there and not whole"
        done = self._repeat(out, where)
        found = _bytes(out)
        different = [name for name in {**found, **self.wanted} if found.get(name) != self.wanted.get(name)]
        assert not different, f"{where}: other bytes in {sorted(different)}"
        left = sorted(path.name for path in out.parent.iterdir() if path.name != "out")
        assert not left, f"{where}: {left} stay beside OUT"
        assert not list(out.glob("niwaki/journal")), f"{where}: the journal stays in OUT"
        return done

    def _repeat(self, out: Path, where: str) -> int:
        """Repeat the command, and follow what its message says."""
        steps = [True, False] if self.kind.resumes else [False]
        for resume in steps:
            status = self._child(out, resume, answer_to=self.place / "answer")
            if status == 0:
                return _redone(out) if resume else 0
            answer = (self.place / "answer").read_text()
            if (not self.kind.resumes and "already exists" in answer) or "holds a report" in answer:
                return 0
            assert "nothing to resume" in answer and resume, f"{where}: {answer}"
        raise AssertionError(f"{where}: no way to go on")

    def _child(
        self, out: Path, resume: bool, *, kill_at: int | None = None, kill_after: float | None = None,
        count_to: Path | None = None, answer_to: Path | None = None,
    ) -> int:  # fmt: skip
        """Run in a forked child; return its exit status, negative for a signal."""
        child = os.fork()
        if not child:
            status = FAILED
            try:
                quiet = os.open(os.devnull, os.O_WRONLY)
                os.dup2(quiet, 1)
                with _killed_at(kill_at) as counted:
                    self.kind.run(self.world, out, resume)
                if count_to is not None:
                    count_to.write_text(str(counted[0]))
                status = 0
            except (OutputError, ResumeError) as error:
                if answer_to is None:
                    traceback.print_exc()
                else:
                    answer_to.write_text(str(error))
            except BaseException:
                traceback.print_exc()
                if answer_to is not None:
                    answer_to.write_text(traceback.format_exc())
            finally:
                os._exit(status)
        if kill_after is not None:
            time.sleep(kill_after)
            os.kill(child, signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@contextmanager
def _killed_at(change: int | None) -> Iterator[list[int]]:
    """Kill this process before its n-th change of the disk; the list counts them."""
    counted, real = [0], {name: getattr(os, name) for name in CHANGES}

    def hooked(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            counted[0] += 1
            if counted[0] == change:
                os.kill(os.getpid(), signal.SIGKILL)
            return real[name](*args, **kwargs)

        return call

    for name in CHANGES:
        setattr(os, name, hooked(name))
    try:
        yield counted
    finally:
        for name, function in real.items():
            setattr(os, name, function)


def _bytes(folder: Path) -> dict[str, bytes]:
    """Return what identifies a result; a report holds times, so its files are compared by name."""
    found = {name: content for name, content in file_bytes(folder).items() if not name.startswith(HELD)}
    timed = ("report.html", "compare.json", "junit.xml", "niwaki/adapted.json")
    return {name: b"" if name in timed else content for name, content in found.items()}


def _redone(out: Path) -> int:
    """Return how many blocks the events of a run name more than once as compressed."""
    events = out / "niwaki/events.jsonl"
    lines = [json.loads(line) for line in events.read_text().splitlines()] if events.is_file() else []
    compressed = [line["index"] for line in lines if line["event"] == "block" and not line["replayed"]]
    return len(compressed) - len(set(compressed))


def measure(bench: Bench, moments: int, rng: random.Random) -> dict[str, Any]:
    """Kill before every change of the disk, and at `moments` random moments; return counts and failures."""
    failures, redone = [], 0
    times = [rng.uniform(0, bench.seconds) for _ in range(moments)]
    for attempt, value in [(bench.kill_before, n + 1) for n in range(bench.changes)] + [
        (bench.kill_after, seconds) for seconds in times
    ]:
        try:
            redone = max(redone, attempt(value))  # type: ignore[operator]
        except AssertionError as error:
            failures.append(str(error))
    return {
        "changes": bench.changes, "moments": moments, "seconds": round(bench.seconds, 2), "blocks_redone_max": redone,
        "failures": failures,
    }  # fmt: skip


def main(
    moments: Annotated[int, typer.Option(help="Random moments per kind.")] = 50,
    out: Annotated[Path | None, typer.Option(help="JSON file for the counts.")] = None,
    kind: Annotated[list[str] | None, typer.Option(help="Kinds; all if none is given.")] = None,
) -> None:
    """Kill every kind of run at every change of the disk and at random moments."""
    rng = random.Random(0)
    kinds: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="kill-points-") as folder:
        (Path(folder) / "world").mkdir()
        world = make_world(Path(folder) / "world")
        for name in kind or KINDS:
            kinds[name] = measure(Bench(world, name, Path(folder) / "runs" / name), moments, rng)
            print(name, json.dumps(kinds[name]), flush=True)
            if out is not None:
                command = f"python -m tests.system.kill_points --moments {moments} --out {out}"
                out.write_text(json.dumps({"command": command, "kinds": kinds}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
