"""Locks, constraints and pyproject.toml agree, and the audit finds what the file of advisories names."""

import importlib.util
import json
import re
import tomllib
from datetime import date, timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
HERE = ROOT / "dependencies"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
TODAY = date(2026, 12, 1)


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


audit = script("audit")
DEV = audit.pins(HERE / "dev.lock")
RUNTIME = audit.pins(HERE / "runtime.lock")
BUILD = audit.pins(HERE / "build.lock")
DECLARED = {
    "runtime": (PROJECT["project"]["dependencies"], RUNTIME),
    "dev": ([*PROJECT["project"]["dependencies"], *PROJECT["project"]["optional-dependencies"]["dev"]], DEV),
    "build": (PROJECT["build-system"]["requires"], BUILD),
}


@pytest.mark.parametrize("name", DECLARED)
def test_every_declared_package_is_locked_within_its_range(name: str) -> None:
    texts, lock = DECLARED[name]
    for requirement in map(Requirement, texts):
        if requirement.name == "torch":
            continue  # see dependencies/lock.py
        version = lock.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement.name} is not in {name}.lock: run make lock"
        assert requirement.specifier.contains(version), f"{requirement}: {name}.lock has {version}, run make lock"


def test_locks_constraints_and_each_other_agree() -> None:
    wanted = audit.pins(ROOT / "constraints.txt")
    for lock in (DEV, RUNTIME, BUILD):
        assert not {name: version for name, version in lock.items() if wanted.get(name, version) != version}
    assert len(RUNTIME) > 20 and RUNTIME.items() <= DEV.items()
    # Extras that the locks leave out, and packages that tests of engines and a browser need.
    assert {"transformers", "pytest", "ruff", "regex"} <= DEV.keys() and "torch" not in DEV


@pytest.mark.parametrize("name", ["build", "runtime", "dev"])
def test_every_line_of_a_lock_has_hashes_and_names_no_index(name: str) -> None:
    text = (HERE / f"{name}.lock").read_text(encoding="utf-8")
    parts = re.split(r"^(?=[a-z])", text, flags=re.M)[1:]
    assert len(parts) == len(audit.pins(HERE / f"{name}.lock"))
    for part in parts:
        assert re.search(r"--hash=sha256:[0-9a-f]{64}\b", part), part.splitlines()[0]
    assert "://" not in text and "--index" not in text and "--find-links" not in text


def test_the_makefile_installs_from_the_locks() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "HASHED := -m pip install --quiet --require-hashes --no-deps" in text
    for name in ("build", "runtime", "dev"):
        assert f"$(RUN)/python $(HASHED) dependencies/{name}.lock" in text
    assert "dependencies/audit.py" in (ROOT / ".ci/run").read_text(encoding="utf-8")


def advisory(*events: dict[str, str], package: str = "torch") -> dict[str, Any]:
    ranges = [{"type": "ECOSYSTEM", "events": [*events]}]
    affected = [{"package": {"ecosystem": "PyPI", "name": package}, "ranges": ranges}]
    return {"id": "X-1", "summary": "runs code", "affected": affected}


@pytest.mark.parametrize(
    ("events", "inside", "outside"),
    [
        ([{"introduced": "0"}, {"fixed": "2.6.0"}], ["0.1", "2.5.1", "2.6.0rc1"], ["2.6.0", "2.6", "2.13.0+cpu"]),
        ([{"introduced": "0.39.0"}, {"fixed": "0.49.1"}], ["0.39.0", "0.49.0"], ["0.38.9", "0.49.1", "1.0"]),
        ([{"introduced": "0"}, {"last_affected": "5.6.3"}], ["5.6.3", "1"], ["5.6.4"]),
        ([{"introduced": "1"}, {"fixed": "2"}, {"introduced": "3"}, {"fixed": "4"}], ["1", "3.9"], ["2", "4", "0.9"]),
        ([{"introduced": "3"}], ["3", "99"], ["2.9"]),
    ],
)
def test_ranges_are_those_of_osv(events: list[dict[str, str]], inside: list[str], outside: list[str]) -> None:
    for version in (*inside, *outside):
        assert audit.affects(advisory(*events), "Torch", version) == (version in inside), version
        assert not audit.affects(advisory(*events), "torchvision", version)


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a small repository without a hit."""
    (tmp_path / "dependencies").mkdir()
    for name in ("build", "runtime", "dev"):
        (tmp_path / f"dependencies/{name}.lock").write_text("torch==2.13.0 \\\n    --hash=sha256:00\n")
    (tmp_path / "constraints.txt").write_text("torch==2.13.0\n")
    (tmp_path / "pyproject.toml").write_text(
        '[project]\ndependencies = ["torch>=2.10,<3"]\n[project.optional-dependencies]\ndev = []\n'
    )
    write(tmp_path, {})
    monkeypatch.setattr(audit, "installed", lambda: iter([("installed", "torch", "2.13.0")]))
    return tmp_path


def write(tree: Path, changes: dict[str, Any]) -> None:
    content = {"date": "2026-11-30", "advisories": [advisory({"introduced": "0"}, {"fixed": "2.6.0"})], **changes}
    (tree / "dependencies/advisories.json").write_text(json.dumps(content))


def test_nothing_known_is_nothing_found(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert audit.main(tree, TODAY) == 0
    assert capsys.readouterr().out == "audit: 1 packages, 1 advisories of 2026-11-30, 0 hits\n"


@pytest.mark.parametrize("place", ["dev.lock", "constraints.txt", "lowest declared", "installed"])
def test_a_hit_in_any_place_fails(
    tree: Path, place: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if place == "installed":
        monkeypatch.setattr(audit, "installed", lambda: iter([("installed", "Torch", "2.5.1+cpu")]))
    else:
        paths = {"dev.lock": "dependencies/dev.lock", "lowest declared": "pyproject.toml"}
        path = tree / paths.get(place, place)
        path.write_text(re.sub(r"2\.1[03](\.0)?", "2.5.1", path.read_text()))
    assert audit.main(tree, TODAY) == 1
    assert f"({place}): X-1, runs code" in capsys.readouterr().out


def test_a_hit_may_be_accepted_until_a_day(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tree / "constraints.txt").write_text("torch==2.5.1\n")
    accepted = {"id": "X-1", "package": "torch", "reason": "never loads a pickle", "until": "2026-12-01"}
    write(tree, {"accepted": [accepted]})
    assert audit.main(tree, TODAY) == 0 and "is accepted: never loads a pickle" in capsys.readouterr().out
    assert audit.main(tree, TODAY + timedelta(1)) == 1
    write(tree, {"accepted": [{**accepted, "package": "jinja2"}]})
    assert audit.main(tree, TODAY) == 1


def test_an_old_file_says_so(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert audit.main(tree, date(2026, 11, 30) + timedelta(audit.MAX_DAYS)) == 0
    assert audit.main(tree, date(2026, 11, 30) + timedelta(audit.MAX_DAYS + 1)) == 2
    assert f"THE ADVISORIES ARE {audit.MAX_DAYS + 1} DAYS OLD" in capsys.readouterr().out


@pytest.mark.parametrize(
    "content",
    [None, "", "[]", "{}", '{"date": "x", "advisories": [1]}', '{"date": "2026-11-30", "advisories": []}',
     json.dumps({"date": "2026-11-30", "advisories": [advisory({"limit": "3"})]}),
     json.dumps({"date": "2026-11-30", "advisories": [advisory({"introduced": "no version"})]}),
     json.dumps({"date": "2027-11-30", "advisories": [advisory({"introduced": "0"}, {"fixed": "1"})]})],
)  # fmt: skip
def test_without_a_usable_file_it_says_that_it_did_not_run(
    tree: Path, content: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tree / "dependencies/advisories.json"
    path.unlink() if content is None else path.write_text(content)
    assert audit.main(tree, TODAY) == 2
    assert capsys.readouterr().out.startswith("audit: DID NOT RUN: ")


def test_a_missing_lock_is_no_empty_one(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tree / "dependencies/dev.lock").write_text("# nothing\n")
    assert audit.main(tree, TODAY) == 2 and "DID NOT RUN" in capsys.readouterr().out


def test_the_repository_has_no_hit_and_every_advisory_concerns_it(capsys: pytest.CaptureFixture[str]) -> None:
    known = audit.read_advisories(HERE / "advisories.json", TODAY)
    assert audit.main(ROOT, known["date"]) == 0, capsys.readouterr().out
    packages = {canonicalize_name(one["affected"][0]["package"]["name"]) for one in known["advisories"]}
    declared = {canonicalize_name(name) for _, name, _ in audit.declared(ROOT / "pyproject.toml")}
    assert packages <= declared | DEV.keys() | audit.pins(ROOT / "constraints.txt").keys()
    assert len({one["id"] for one in known["advisories"]}) == len(known["advisories"])
    assert all(Version(version) for version in DEV.values())
