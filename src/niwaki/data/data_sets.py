"""Data sets that the package `datasets` loads: by a short name, by hub id, or from a folder.

A short name stands for a data set of the hub, its configuration, its splits, its field, and a revision. The revision is
a commit, so that a run can be repeated after the data set has changed. `NAME@REVISION` takes another commit,
`NAME:SPLIT` another split; both work for hub ids too. Calibration reads the split for training. Evaluation reads the
one that is held out from it, if there is one.

    for place, row in DataSet("wikitext:test").rows(): ...
"""

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from niwaki.config.sources import SUFFIXES
from niwaki.data.text_files import Rows, first_line
from niwaki.errors import CalibrationError
from niwaki.model.files import require_content

SHUFFLE_ROWS = 1000  # held in memory by a random order, after the files of the data set were shuffled
TITLE = re.compile(r" = [^=].* = \n")  # of an article of wikitext
_SPEC = re.compile(r"(?P<name>[^:@]+)(:(?P<split>[^:@]+))?(@(?P<revision>[^:@]+))?")


@dataclass(frozen=True)
class HubSet:
    """Data set of the hub. `held_out` is the split of an evaluation. `articles`: rows are lines of articles."""

    hub_id: str
    config: str | None = None
    split: str = "train"
    held_out: str = "train"
    field: str = "text"
    revision: str | None = None
    articles: bool = False


NAMED = {
    "c4": HubSet(
        "allenai/c4", "en", held_out="validation", revision="1588ec454efa1a09f29cd18ddd04fe05fc8653a2"
    ),
    "wikitext": HubSet(
        "Salesforce/wikitext", "wikitext-2-raw-v1", held_out="test",
        revision="b08601e04326c79dfdd32d625aee71d232d685c3", articles=True,
    ),
    "ultrachat": HubSet(
        "HuggingFaceH4/ultrachat_200k", None, "train_sft", "test_sft", "messages",
        revision="8049631c405ae6576f93f445c6b8166f76f5505a",
    ),
    "fineweb-edu": HubSet(
        "HuggingFaceFW/fineweb-edu", "sample-10BT", revision="87f09149ef4734204d70ed1d046ddc9ca3f2b8f9"
    ),
}  # fmt: skip


@dataclass(frozen=True)
class DataSet:
    """One split of a data set. `held_out`: the one of an evaluation, unless the source names a split."""

    source: str
    held_out: bool = False

    @cached_property
    def about(self) -> HubSet:
        """Return what the source stands for. The revision of a hub id is the commit that the hub has now."""
        if self.is_folder:
            return HubSet(self.source)
        match = _SPEC.fullmatch(self.source)
        if match is None:
            raise CalibrationError(f"{self.source}: expected NAME, NAME:SPLIT or NAME:SPLIT@REVISION of a data set")
        name, split, revision = match["name"], match["split"], match["revision"]
        known = NAMED.get(name, HubSet(name))
        split = split or (known.held_out if self.held_out else known.split)
        revision = revision or known.revision or _newest(known.hub_id)
        return HubSet(known.hub_id, known.config, split, split, known.field, revision, known.articles)

    @property
    def field(self) -> str:
        """Return the field of the rows that holds their text."""
        return NAMED.get(self.source.partition("@")[0].partition(":")[0], HubSet("")).field

    @property
    def is_folder(self) -> bool:
        """Check whether the source is a local folder."""
        return Path(self.source).is_dir()

    @property
    def nbytes(self) -> int | None:
        """Return the bytes of all rows, None if they are unknown."""
        if self.is_folder:
            return sum(path.stat().st_size for path in self._files())
        if self.about.articles:
            return 0  # their lines must stay in order
        splits = self._loaded.info.splits or {}
        return splits[self.about.split].num_bytes if self.about.split in splits else None

    def rows(self) -> Rows:
        """Yield the rows in the order of the data set."""
        return self._numbered(self._loaded)

    def shuffled(self, seed: int) -> Rows:
        """Yield the rows in a random order: of the files, and of SHUFFLE_ROWS rows at a time."""
        return self._numbered(self._loaded.shuffle(seed=seed, buffer_size=SHUFFLE_ROWS))

    @cached_property
    def _loaded(self) -> Any:
        """Open the split, of which rows are fetched as they are read."""
        try:
            import datasets
        except ImportError as error:
            raise CalibrationError(
                f"{self.source} is not a {'/'.join(SUFFIXES)} file. To load it as a data set: pip install datasets"
            ) from error
        for path in self._files():
            require_content(path, CalibrationError)
        about = self.about
        given = {} if about.config is None else {"name": about.config}
        given |= {} if about.revision is None else {"revision": about.revision}
        try:
            return datasets.load_dataset(about.hub_id, split=about.split, streaming=True, **given)
        except Exception as error:  # datasets raises its own, requests' and OS errors alike
            raise CalibrationError(self._problem(error)) from error

    def _files(self) -> list[Path]:
        if not self.is_folder:
            return []
        return [path for path in sorted(Path(self.source).rglob("*")) if path.is_file()]

    def _problem(self, error: Exception) -> str:
        reason = first_line(error) or type(error).__name__
        name = self.source.partition("@")[0].partition(":")[0]
        if name in NAMED:
            return (
                f"the data set {self.source} ({self.about.hub_id}) could not be fetched ({reason}): it needs a network "
                "once; without one, give a file, or a folder that holds a copy of it"
            )
        near = difflib.get_close_matches(name, [*NAMED], n=1, cutoff=0.6)
        hint = f": did you mean {near[0]}?" if near else ""
        return f"{self.source} is neither a {'/'.join(SUFFIXES)} file nor a loadable data set ({reason}){hint}"

    def _numbered(self, rows: Any) -> Rows:
        try:
            found = _articles(rows, self.about.field) if self.about.articles else iter(rows)
            for number, row in enumerate(found, start=1):
                yield f"row {number}", row
        except CalibrationError:
            raise
        except Exception as error:  # of the network, or of a file of the data set
            raise CalibrationError(self._problem(error)) from error


def _newest(hub_id: str) -> str | None:
    """Return the newest commit of a data set, None if the hub cannot be asked and a copy on this machine may do."""
    try:
        from huggingface_hub import HfApi

        return HfApi().dataset_info(hub_id, timeout=10).sha
    except Exception:  # the hub client raises its own, HTTP and OS errors alike
        return None


def _articles(rows: Any, field: str) -> Iterator[dict[str, str]]:
    """Yield one row per article; the data set has one per line."""
    lines: list[str] = []
    for row in rows:
        if TITLE.fullmatch(row[field]) and any(line.strip() for line in lines):
            yield {field: "".join(lines)}
            lines = []
        lines.append(row[field])
    if lines:
        yield {field: "".join(lines)}
