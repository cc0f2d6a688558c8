"""The import path of version 0.1."""

from niwaki import calibration
from niwaki.data import documents, texts


def test_the_old_path_holds_the_functions_of_today() -> None:
    assert calibration.read_texts is documents.read_texts
    for name in ("calibration_windows", "evaluation_windows", "load_tokenizer"):
        assert getattr(calibration, name) is getattr(texts, name)
