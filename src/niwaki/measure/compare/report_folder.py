"""The folder of a report: report.html for people, compare.json for programs, junit.xml for continuous integration.

In JUnit a candidate is a test suite, and a gate on a file is a test case. Without gates a suite has one skipped case.
"""

import json
import xml.etree.ElementTree as Xml
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from niwaki.errors import OutputError
from niwaki.measure.report.layers import Layers, read_layers
from niwaki.measure.report.strings import check_language
from niwaki.measure.schema import Candidate, Comparison, write_comparison
from niwaki.model.files import remove_folder, sync_folder, write_text

COMPARISON, JUNIT = "compare.json", "junit.xml"
MADE = ".niwaki-report-"  # begins the name of a folder in which a report is made


def check_report(folder: Path, language: str, *, overwrite: bool) -> Path:
    """Check language and folder before the measurement, and return the folder.

    Raises InputError for an unknown language, OutputError if the folder cannot be created or holds other files.
    """
    check_language(language)
    if folder.is_symlink() and not folder.exists():
        raise OutputError(f"--report {folder} is a link to {folder.readlink()}, which does not exist: create it")
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"--report {folder} is a file: expected a new folder, or that of an earlier report")
    if not folder.parent.is_dir():
        raise OutputError(f"--report {folder}: the folder {folder.parent} does not exist")
    path = folder / COMPARISON
    if path.exists() and not _is_ours(path):
        raise OutputError(f"{path} was not written by niwaki: choose another folder with --report")
    if path.exists() and not overwrite:
        raise OutputError(f"--report {folder} holds a report: choose another folder, or replace it with --overwrite")
    return folder


def report_place(folder: str | Path) -> Path | None:
    """Return the path of a report, None if `check_report` refuses it for want of a folder around it."""
    path = Path(folder).absolute()
    return path if path.parent.is_dir() else None


def read_records(outs: Sequence[Path]) -> list[Layers | None]:
    """Return niwaki's record of every matrix of every candidate. Raises CheckpointError for a broken record."""
    return [read_layers(out) for out in outs]


def write_report(folder: Path, comparison: Comparison, records: Sequence[Layers | None], language: str) -> None:
    """Write all files, each one complete or not at all. `records`: see `read_records`.

    compare.json shows that a report is complete: that of an earlier report goes first, and the new one comes last.
    """
    from niwaki.measure.report.page import PAGE, write_page  # plotly takes a second to import

    try:
        folder.mkdir(exist_ok=True)
        for left in folder.glob(f"{MADE}*"):  # of a killed run
            remove_folder(left, COMPARISON)
    except OSError as error:
        raise OutputError(f"cannot create {folder}: {error.strerror}. Choose another folder with --report") from error
    with TemporaryDirectory(prefix=MADE, dir=folder) as made:
        write_page(Path(made) / PAGE, comparison, records, language)
        write_text(Path(made) / JUNIT, junit(comparison))
        write_comparison(Path(made) / COMPARISON, comparison)
        (folder / COMPARISON).unlink(missing_ok=True)
        for name in (PAGE, JUNIT, COMPARISON):
            (Path(made) / name).replace(folder / name)
    sync_folder(folder)


def junit(comparison: Comparison) -> str:
    """Return the verdicts as JUnit XML, with a suite for every candidate."""
    root = Xml.Element("testsuites", name="niwaki compare")
    for candidate in comparison.candidates:
        _suite(root, candidate, comparison)
    Xml.indent(root)
    return Xml.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _suite(root: Xml.Element, candidate: Candidate, comparison: Comparison) -> None:
    gates, name = candidate.gates, candidate.model.name
    failures = sum(not verdict.passed for verdict in gates)
    counts = {"tests": max(len(gates), 1), "failures": failures, "errors": 0, "skipped": int(not gates)}
    about = {"name": name, "timestamp": comparison.date, **{key: str(value) for key, value in counts.items()}}
    suite = Xml.SubElement(root, "testsuite", about)
    for verdict in gates:
        file = f" {verdict.about}" if verdict.about else ""
        case = Xml.SubElement(suite, "testcase", classname=name, name=f"{verdict.gate}{file}")
        if verdict.passed:
            Xml.SubElement(case, "system-out").text = verdict.reason
        else:
            Xml.SubElement(case, "failure", message=verdict.reason, type=verdict.gate)
    if not gates:
        case = Xml.SubElement(suite, "testcase", classname=name, name="gates")
        Xml.SubElement(case, "skipped", message="no gates given: nothing was judged (--gate FILE)")


def _is_ours(path: Path) -> bool:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("kind") == Comparison.model_fields["kind"].default
