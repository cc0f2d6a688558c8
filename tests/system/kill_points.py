"""Runs of every kind that are killed (SIGKILL) at writes, or at random moments, and then repeated.

Torch is imported once. Every run is a forked child with a process group of its own, which is killed as a whole. A hook,
here alone, counts what changes the disk (fsync, rename, unlink, mkdir, …), and kills the child before the n-th of
these. A random kill comes from the parent, by the clock. Then OUT is absent or whole, and so is what it was before. The
same command, with --resume where it exists, ends at the same bytes with nothing beside OUT. All runs are on the CPU: a
child cannot use CUDA that its parent has begun.

    python -m tests.system.kill_points --moments 50 --workers 16 --out benchmarks/results/speed/kill-points-cpu.json
"""

import gc
import hashlib
import importlib
import json
import os
import platform
import random
import re
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer

from niwaki.compression.result_folder import ResultFolder
from niwaki.compression.verify import check_weights
from niwaki.errors import NiwakiError, OutputError, ResumeError
from niwaki.measure.compare.report_folder import MADE
from system.kill_kinds import KINDS, World, make_world

CHANGES = ("fsync", "replace", "rename", "unlink", "mkdir", "rmdir", "link", "truncate")
FAILED = 13  # exit status of a child that raised an error
CHUNK = 3  # moments of one task
# What is compared without: the log of events, and fields that are times or measured memory.
LOGS = ("niwaki/journal", "niwaki/events.jsonl")
TIMES = ("seconds", "date", "load_seconds", "peak_rss_bytes", "peak_device_bytes")
STAMPS = re.compile(rb'<p class="meta">[^<]*</p>|\| time \|[^\n]*|timestamp="[^"]*"|\b\d+\.\d+ s\b')
TIMED = "niwaki/evaluation.json"  # holds seconds, so its hash in run.json differs
# A killed `adapt` may have put the better predictor: the repetition then finds nothing better, and says that.
ADAPTED = "niwaki/adapted.json"
ONNX = "export onnx"
Moment = tuple[str, float]  # ("change", number) or ("clock", seconds)


@dataclass
class Bench:
    """One kind of run in the folder `place`, with the hashes of an uninterrupted one, its changes and its seconds."""

    world: World
    name: str
    place: Path
    wanted: dict[str, str] = field(default_factory=dict)
    before: dict[str, str] = field(default_factory=dict)
    seconds: float = 0
    changes: int = 0

    @classmethod
    def of(cls, world: World, name: str, place: Path) -> "Bench":
        """Run the kind once, without a kill."""
        bench = cls(world, name, place)
        out = bench._begin()
        if out.exists():
            bench.before = contents(out)
        began = time.perf_counter()
        answer = place / "answer"
        status = bench._child(out, False, count_to=place / "count", answer_to=answer)
        assert status == 0, f"{name} fails without a kill: {answer.read_text() if answer.is_file() else status}"
        bench.seconds = time.perf_counter() - began
        bench.changes = int((place / "count").read_text())
        bench.wanted = contents(out)
        return bench

    def at(self, place: Path) -> "Bench":
        """Return the bench with another folder for its runs."""
        return Bench(self.world, self.name, place, self.wanted, self.before, self.seconds, self.changes)

    def kill(self, moment: Moment) -> dict[str, int]:
        """Kill a run, repeat it and compare. Return whether the kill met it, and how many blocks were made twice."""
        kind, value = moment
        out = self._begin()
        given: dict[str, Any] = {"kill_at": int(value)} if kind == "change" else {"kill_after": value}
        status = self._child(out, False, **given)
        where = f"{self.name}, killed at {kind} {value:.4g} of {self.changes if kind == 'change' else self.seconds:.4g}"
        assert status in (-signal.SIGKILL, 0), f"{where}: the run failed before"
        self._check_left(out, where)
        self._repeat(out, where)
        found = contents(out)
        free = {ADAPTED, "niwaki/run.json"} if self.name == "adapt" else set()
        different = {key for key in found | self.wanted if found.get(key) != self.wanted.get(key)} - free
        assert not different, f"{where}: other bytes in {sorted(different)}"
        left = sorted(path.name for path in out.parent.iterdir() if path.name != "out")
        assert not left, f"{where}: {left} stay beside OUT"
        assert not list(out.glob("niwaki/journal")), f"{where}: the journal stays in OUT"
        return {"killed": int(status != 0), "redone": self._redone()}

    def _begin(self) -> Path:
        """Return OUT in an empty folder."""
        shutil.rmtree(self.place, ignore_errors=True)
        (self.place / "runs").mkdir(parents=True)
        (self.place / "tmp").mkdir()
        os.environ["NIWAKI_CACHE"] = str(self.place / "cache")
        out = self.place / "runs/out"
        if begin := KINDS[self.name].begin:
            begin(self.world, out)
        return out

    def _check_left(self, out: Path, where: str) -> None:
        """Check what a kill left: OUT is absent, or whole as it was or as it was to become."""
        if KINDS[self.name].in_place:
            try:
                check_weights(out)
            except NiwakiError as error:
                raise AssertionError(f"{where}: {error}") from error
            return
        if self.name.startswith("compare"):  # compare.json comes last, so a report without it is not one
            assert not (out / "compare.json").exists() or contents(out) in (self.wanted, self.before), where
            return
        there = [contents(place) for place in (out, out.with_name("out.replaced")) if place.exists()]
        assert not out.exists() or there[0] in (self.wanted, self.before), f"{where}: OUT is there and not whole"
        assert not self.before or any(one in (self.wanted, self.before) for one in there), (
            f"{where}: the old OUT is lost"
        )

    def _repeat(self, out: Path, where: str) -> None:
        """Repeat the command, and follow what its message says."""
        for resume in [True, False] if KINDS[self.name].resumes else [False]:
            if self._child(out, resume, answer_to=self.place / "answer") == 0:
                return
            answer = (self.place / "answer").read_text()
            if not KINDS[self.name].resumes and ("already exists" in answer or "holds a report" in answer):
                return
            assert "nothing to resume" in answer and resume, f"{where}: {answer}"
        raise AssertionError(f"{where}: no way to go on")

    def _redone(self) -> int:
        """Return how many blocks a stage compressed more than once, as the events of the killed and next run say."""
        lines = (self.place / "blocks").read_text().split() if (self.place / "blocks").is_file() else []
        stages = {line.partition(":")[0] for line in lines}
        twice = [[line for line in lines if line.startswith(f"{stage}:")] for stage in stages]
        return max((len(of) - len(set(of)) for of in twice), default=0)

    def _child(
        self, out: Path, resume: bool, *, kill_at: int | None = None, kill_after: float | None = None,
        count_to: Path | None = None, answer_to: Path | None = None,
    ) -> int:  # fmt: skip
        """Run in a forked child; return its exit status, negative for a signal."""
        child = os.fork()
        if not child:
            os.setpgid(0, 0)
            status = FAILED
            try:
                quiet = os.open(os.devnull, os.O_WRONLY)
                os.dup2(quiet, 1)
                tempfile.tempdir = str(self.place / "tmp")
                with _blocks_to(self.place / "blocks"), _killed_at(kill_at) as counted:
                    KINDS[self.name].run(self.world, out, resume)
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
            with suppress(ProcessLookupError):  # it has not made its group, or has ended
                os.killpg(child, signal.SIGKILL)
            os.kill(child, signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@contextmanager
def _killed_at(change: int | None) -> Iterator[list[int]]:
    """Kill this process group before its n-th change of the disk; the list counts them."""
    counted, real = [0], {name: getattr(os, name) for name in CHANGES}

    def hooked(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            counted[0] += 1
            if counted[0] == change:
                os.killpg(0, signal.SIGKILL)
            return real[name](*args, **kwargs)

        return call

    for name in CHANGES:
        setattr(os, name, hooked(name))
    try:
        yield counted
    finally:
        for name, function in real.items():
            setattr(os, name, function)


@contextmanager
def _blocks_to(path: Path) -> Iterator[None]:
    """Append a line STAGE:BLOCK for every block that a run compresses."""
    real = ResultFolder.event

    def event(self: ResultFolder, kind: str, **fields: Any) -> None:
        if kind == "block" and not fields["replayed"]:
            with path.open("a") as file:
                file.write(f"{self.out.name}:{fields['index']}\n")
        real(self, kind, **fields)

    ResultFolder.event = event  # type: ignore[method-assign]
    try:
        yield
    finally:
        ResultFolder.event = real  # type: ignore[method-assign]


def contents(folder: Path) -> dict[str, str]:
    """Return the hash of every file of a result, without what is a time in it."""
    files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    own = str(folder).encode(), str(folder.with_name("out")).encode()
    found = {}
    for name, path in files.items():
        if name.startswith((*LOGS, MADE)):
            continue
        content = path.read_bytes()
        if name.endswith(".json") and b'"seconds"' in content:
            parsed = _without_times(json.loads(content))
            parsed.get("files", {}).pop(TIMED, None)
            content = json.dumps(parsed).encode()
        elif name in ("report.html", "junit.xml", "README.md"):
            content = STAMPS.sub(b"", content)
        for place in own:
            content = content.replace(place, b"OUT")
        found[name] = hashlib.sha256(content).hexdigest()
    return found


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_times(one) for key, one in value.items() if key not in TIMES}
    return [_without_times(one) for one in value] if isinstance(value, list) else value


def _straight(world: World, name: str, place: Path) -> Bench | str:
    """Return the bench of a kind, or why it cannot run here."""
    if find_spec(KINDS[name].needs) is None:
        return f"{KINDS[name].needs} is not installed"
    try:
        return Bench.of(world, name, place)
    except AssertionError as error:
        return str(error)


def _kill_all(bench: Bench, moments: Sequence[Moment], place: Path) -> list[dict[str, Any]]:
    """Kill at all moments; return one line each."""
    found: list[dict[str, Any]] = []
    for moment in moments:
        try:
            found.append({"at": moment[0], **bench.at(place).kill(moment)})
        except AssertionError as error:
            found.append({"at": moment[0], "failure": str(error)[:2000]})
    shutil.rmtree(place, ignore_errors=True)
    return found


@dataclass
class Campaign:
    """Kills of many kinds on several processes, until all moments are done or the time is over."""

    folder: Path
    workers: int
    ends: float
    benches: dict[str, Bench] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    found: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def run(self, world: World, kinds: Sequence[str], moments: int, writes: int) -> None:
        """Kill every kind at `writes` of its writes (0: all) and at random moments, a few of each kind at a time."""
        with ProcessPoolExecutor(self.workers, mp_context=get_context("fork")) as pool:
            straight = {name: pool.submit(_straight, world, name, self._place(name)) for name in kinds}
            for name, one in straight.items():
                bench = one.result()
                if isinstance(bench, Bench):
                    self.benches[name] = bench
                else:
                    self.skipped[name] = bench
            chosen = {name: _moments(bench, moments, writes) for name, bench in self.benches.items()}
            tasks = [
                (name, chosen[name][begin : begin + CHUNK])
                for begin in range(0, max(map(len, chosen.values()), default=0), CHUNK)
                for name in chosen
                if chosen[name][begin:]
            ]
            waiting: dict[Future[list[dict[str, Any]]], str] = {}
            while tasks or waiting:
                while tasks and len(waiting) < 2 * self.workers and time.monotonic() < self.ends:
                    name, part = tasks.pop(0)
                    place = self._place(f"{name}-{len(tasks)}")
                    waiting[pool.submit(_kill_all, self.benches[name], part, place)] = name
                if not waiting:
                    break  # the time is over
                for done in wait(waiting, return_when=FIRST_COMPLETED).done:
                    self.found.setdefault(waiting.pop(done), []).extend(done.result())

    def counts(self) -> dict[str, dict[str, Any]]:
        """Return the counts of every kind."""
        return {name: _counts(bench, self.found.get(name, [])) for name, bench in self.benches.items()}

    def _place(self, name: str) -> Path:
        return self.folder / name.replace(" ", "-").replace(",", "")


def _moments(bench: Bench, moments: int, writes: int) -> list[Moment]:
    rng = random.Random(bench.name)
    clock: list[Moment] = [("clock", rng.uniform(0, bench.seconds)) for _ in range(moments)]
    numbers = range(1, bench.changes + 1)
    chosen = sorted(rng.sample(numbers, writes)) if 0 < writes < len(numbers) else list(numbers)
    change: list[Moment] = [("change", number) for number in chosen]
    mixed: list[Moment] = []
    while clock or change:  # alternate, so that a run that ends early has both
        mixed += clock[:1] + change[:1]
        clock, change = clock[1:], change[1:]
    return mixed


def _counts(bench: Bench, found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    failures = [one["failure"] for one in found if "failure" in one]
    by_clock, by_change = ([one for one in found if one["at"] == at] for at in ("clock", "change"))
    return {
        "seconds": round(bench.seconds, 2),
        "changes": bench.changes,
        "killed_at_changes": len(by_change),
        "moments": len(by_clock),
        "killed_by_the_clock": sum(one.get("killed", 0) for one in by_clock),
        "same_bytes": len(found) - len(failures),
        "blocks_redone_max": max((one.get("redone", 0) for one in found), default=0),
        "failures": failures,
    }


def _import_all(world: World, kinds: Sequence[str]) -> None:
    """Import here what runs import late, so that no child does."""
    for name in ("peft", "plotly", "gguf", "niwaki.measure.report.page", "niwaki.exporters.compressed_tensors"):
        with suppress(ImportError):
            importlib.import_module(name)
    if ONNX in kinds and find_spec(KINDS[ONNX].needs) is not None:
        KINDS[ONNX].run(world, world.folder / "onnx", False)  # it imports while it works
    gc.collect()
    gc.freeze()


def main(
    moments: Annotated[int, typer.Option(help="Random moments per kind.")] = 50,
    writes: Annotated[int, typer.Option(help="Kills at writes per kind, drawn at random; 0: at every write.")] = 0,
    workers: Annotated[int, typer.Option(help="Processes that work at the same time.")] = 1,
    limit: Annotated[float, typer.Option(help="Seconds after which no more kills begin.")] = 7200,
    out: Annotated[Path | None, typer.Option(help="JSON file for the counts.")] = None,
    kind: Annotated[list[str] | None, typer.Option(help="Kinds; all if none is given.")] = None,
) -> None:
    """Kill every kind of run at writes and at random moments; exit with 1 if a repetition ended elsewhere."""
    began = time.monotonic()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="kill-points-") as folder:
        (Path(folder) / "world").mkdir()
        os.environ["NIWAKI_CACHE"] = str(Path(folder) / "cache")
        world = make_world(Path(folder) / "world")
        kinds = kind or list(KINDS)
        _import_all(world, kinds)
        print(f"models after {time.monotonic() - began:.0f} s", flush=True)
        campaign = Campaign(Path(folder) / "runs", workers, began + limit)
        campaign.run(world, kinds, moments, writes)
    counts = campaign.counts()
    for name, one in counts.items():
        print(name, json.dumps(one), flush=True)
    wall = round(time.monotonic() - began)
    print(f"{wall} s; skipped: {campaign.skipped}; failures: {sum(len(one['failures']) for one in counts.values())}")
    if out is not None:
        command = f"python -m tests.system.kill_points --moments {moments} --writes {writes} --workers {workers}"
        versions = {
            "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__
        }  # fmt: skip
        about = {"command": f"{command} --limit {limit:.0f} --out {out}", "wall_seconds": wall}
        about |= {"versions": versions, "skipped": campaign.skipped, "kinds": counts}
        out.write_text(json.dumps(about, indent=1) + "\n")
    missing = [text for text in campaign.skipped.values() if not text.endswith("is not installed")]
    if missing or any(one["failures"] for one in counts.values()):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
