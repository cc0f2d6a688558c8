"""Tests of the table of export formats: nothing of a format is written down elsewhere."""

import string
from pathlib import Path

import pytest

import niwaki
from niwaki.compression.model_card import export_card
from niwaki.compression.run_record import ExportRecord, Record
from niwaki.compression.source_records import ModelRecord
from niwaki.errors import OutputError
from niwaki.exporters.export import weight_files
from niwaki.exporters.formats import FORMATS, ExportFormat

SOURCE = Path(niwaki.__file__).parent
FIELDS = {*ExportRecord.model_fields, "packed"}


@pytest.mark.parametrize("name", list(FORMATS))
def test_a_format_says_everything_in_the_table(name: str) -> None:
    format = FORMATS[name]
    fields = {field for _, field, _, _ in string.Formatter().parse(format.storage) if field is not None}
    assert fields <= FIELDS, "a card must not fail after the weights are written"
    assert all(suffix.startswith(".") for suffix in format.suffixes) and format.suffixes and format.purpose
    assert (SOURCE.parent / (format.module.replace(".", "/") + ".py")).is_file()


def test_a_new_format_gets_a_card_and_hashes_from_its_entry_alone(tmp_path: Path) -> None:
    new = ExportFormat("niwaki.exporters.new", (".new",), "newlib", "a new engine", "One file ({format}) for {to}.")
    (tmp_path / "model.new").write_bytes(b"weights")
    (tmp_path / "README.md").write_text("no weights")
    assert [path.name for path in weight_files(tmp_path, new)] == ["model.new"]
    export = ExportRecord(to="new", format="v1", bytes=7, sha256={"model.new": "0"})
    record = Record(model=ModelRecord(source="model", bytes=7), export=export)
    card = export_card(record, library=new.library, storage=new.storage)
    assert "One file (v1) for new." in card and "library_name: newlib" in card


def test_an_export_without_weight_files_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "model.other").write_bytes(b"weights")
    with pytest.raises(OutputError, match=r"wrote no file that ends with \.onnx or \.data"):
        weight_files(tmp_path, FORMATS["onnx"])
