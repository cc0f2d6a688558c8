"""Compare versions with known advisories, without a network.

    python dependencies/audit.py           # locks, constraints, lowest declared versions and the installed packages

`advisories.json` holds the advisories, in the fields of OSV. It is as good as its date: after MAX_DAYS the audit says
that it is old, and fails. pip-audit asks PyPI or OSV for every package, so it cannot run here; where a network is,
`pip-audit -r dependencies/dev.lock --require-hashes --disable-pip` knows more.

Exit code: 0 without a hit, 1 for a hit, 2 if the audit did not run or its file is too old.
"""

import json
import re
import sys
import tomllib
from collections.abc import Iterator
from datetime import date
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
HERE = ROOT / "dependencies"
MAX_DAYS = 180
Found = tuple[str, str, str]  # place, package, version


class NotRunError(Exception):
    """The audit did not run."""


def main(root: Path = ROOT, today: date | None = None) -> int:
    """Print what was found, and return the exit code."""
    today = today or date.today()
    try:
        known = read_advisories(root / "dependencies" / "advisories.json", today)
        places = [*locked(root), *declared(root / "pyproject.toml"), *installed()]
    except NotRunError as error:
        print(f"audit: DID NOT RUN: {error}")
        return 2
    hits, accepted = [], set()
    for advisory, (place, package, version) in ((a, found) for a in known["advisories"] for found in places):
        if not affects(advisory, package, version):
            continue
        line = f"{package} {version} ({place}): {advisory['id']}, {advisory['summary']}"
        reason = _accepted(known, advisory, package, today)
        if reason is None:
            hits.append(line)
        else:
            accepted.add(f"{package}: {advisory['id']} is accepted: {reason}")
    for line in (*sorted(accepted), *hits):
        print(f"audit: {line}")
    age = (today - known["date"]).days
    packages = len({package for _, package, _ in places})
    print(f"audit: {packages} packages, {len(known['advisories'])} advisories of {known['date']}, {len(hits)} hits")
    if age > MAX_DAYS:
        print(f"audit: THE ADVISORIES ARE {age} DAYS OLD, the max is {MAX_DAYS}: renew dependencies/advisories.json")
    return 1 if hits else 2 if age > MAX_DAYS else 0


def read_advisories(path: Path, today: date) -> dict[str, Any]:
    """Return the content of the file of advisories, with its date. Raises NotRunError if it cannot be used."""
    if not path.is_file():
        raise NotRunError(f"there is no {path}")
    try:
        known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        known["date"] = date.fromisoformat(known["date"])
        if not known["advisories"] or known["date"] > today:
            raise NotRunError(f"{path} holds no advisory, or is of a day to come")
        for advisory in known["advisories"]:
            affects(advisory, "", "0")  # every range can be read
            str(advisory["id"]), str(advisory["summary"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise NotRunError(f"{path} cannot be used ({type(error).__name__}: {error})") from error
    return known


def affects(advisory: dict[str, Any], package: str, version: str) -> bool:
    """Return whether a version of a package lies in a range of an advisory. Raises ValueError for an unknown range."""
    for affected in advisory["affected"]:
        inside = False
        for events in (one["events"] for one in affected["ranges"]):
            inside = inside or _inside(events, Version(version))
        if inside and canonicalize_name(affected["package"]["name"]) == canonicalize_name(package):
            return True
    return False


def _inside(events: list[dict[str, str]], version: Version) -> bool:
    """Return whether a version lies between events, which stand in the order of their versions."""
    inside = False
    for event in events:
        ((kind, at),) = event.items()
        if kind not in ("introduced", "fixed", "last_affected"):
            raise ValueError(f"unknown event {kind}")
        if kind == "introduced" and version >= Version(at):
            inside = True
        if (kind == "fixed" and version >= Version(at)) or (kind == "last_affected" and version > Version(at)):
            inside = False
    return inside


def locked(root: Path) -> Iterator[Found]:
    """Yield the versions of the locks and the constraints. Raises NotRunError if one is missing or empty."""
    names = [f"dependencies/{name}.lock" for name in ("build", "runtime", "dev")]
    for path in (root / name for name in (*names, "constraints.txt")):
        if not path.is_file() or not (found := pins(path)):
            raise NotRunError(f"{path} is missing or names no version")
        yield from ((path.name, package, version) for package, version in found.items())


def pins(path: Path) -> dict[str, str]:
    """Return the pinned versions of a lock or of constraints by canonical name."""
    found = re.findall(r"^([\w.-]+)==([^\s;\\]+)", path.read_text(encoding="utf-8"), re.M)
    return {canonicalize_name(package): version for package, version in found}


def declared(path: Path) -> Iterator[Found]:
    """Yield the lowest version that pyproject.toml allows of every package."""
    project = tomllib.loads(path.read_text(encoding="utf-8"))["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    for requirement in (Requirement(text) for group in groups for text in group):
        for specifier in requirement.specifier:
            if specifier.operator in (">=", "==", "~="):
                yield "lowest declared", requirement.name, specifier.version


def installed() -> Iterator[Found]:
    """Yield the packages of this environment."""
    for one in distributions():
        yield "installed", one.metadata["Name"], one.version


def _accepted(known: dict[str, Any], advisory: dict[str, Any], package: str, today: date) -> str | None:
    """Return why a hit is accepted, None if it is not, or no longer."""
    for one in known.get("accepted", ()):
        same = one["id"] == advisory["id"] and canonicalize_name(one["package"]) == canonicalize_name(package)
        if same and today <= date.fromisoformat(one["until"]):
            return f"{one['reason']} (until {one['until']})"
    return None


if __name__ == "__main__":
    sys.exit(main())
