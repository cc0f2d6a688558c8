"""Texts and windows under the import path of version 0.1, for scripts that were written for it.

The code is in `niwaki.data`. This path stays for one release.

    from niwaki.calibration import calibration_windows, load_tokenizer, read_texts
"""

from niwaki.data.documents import read_texts
from niwaki.data.texts import calibration_windows, evaluation_windows, load_tokenizer

__all__ = ["calibration_windows", "evaluation_windows", "load_tokenizer", "read_texts"]
