"""The folder of a report: report.html for people, compare.json for programs, junit.xml for continuous integration.

In JUnit a candidate is a test suite and a gate on a file a test case. Without gates there is nothing to pass, and the
one case of a suite is skipped and says so.
"""

import json
import xml.etree.ElementTree as Xml
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from niwaki.errors import OutputError
from niwaki.measure.schema import Candidate, Comparison
from niwaki.model.files import write_text

if TYPE_CHECKING:
    from niwaki.measure.report.write import Layers

COMPARISON, JUNIT = "compare.json", "junit.xml"


def check_report(folder: Path, language: str, *, overwrite: bool) -> None:
    """Refuses, before anything is measured, an unknown language and a folder of someone else or that cannot be made."""
    from niwaki.measure.report.write import check_language

    check_language(language)
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"--report {folder} is a file: expected a folder, new or of an earlier report")
    if not folder.parent.is_dir():
        raise OutputError(f"--report {folder}: the folder {folder.parent} does not exist")
    path = folder / COMPARISON
    if path.exists() and not _is_ours(path):
        raise OutputError(f"{path} was not written by niwaki: choose another folder with --report")
    if path.exists() and not overwrite:
        raise OutputError(f"--report {folder} holds a report: choose another folder, or replace it with --overwrite")


def read_records(outs: Sequence[Path]) -> list["Layers | None"]:
    """What niwaki wrote of every matrix of every candidate. Raises CheckpointError for a broken record."""
    from niwaki.measure.report.write import read_layers

    return [read_layers(out) for out in outs]


def write_report(folder: Path, comparison: Comparison, records: Sequence["Layers | None"], language: str) -> None:
    """Writes all files, each whole or not at all. `records`: see `read_records`."""
    from niwaki.measure.report.write import PAGE, write_page

    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot create {folder}: {error.strerror}. Choose another folder with --report") from error
    write_text(folder / JUNIT, junit(comparison))
    write_text(folder / COMPARISON, comparison.model_dump_json(indent=1) + "\n")
    write_page(folder / PAGE, comparison, records, language)


def junit(comparison: Comparison) -> str:
    """JUnit XML, a suite for every candidate."""
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
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.get("kind") == Comparison.model_fields["kind"].default
