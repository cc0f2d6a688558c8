"""The languages of a report: one table of texts each, with the same keys.

t = strings("ja");  t["gates"]  ->  "ゲート判定"
"""

from collections.abc import Mapping
from datetime import UTC, datetime
from types import MappingProxyType

from niwaki.errors import InputError, unknown
from niwaki.measure.report import english, japanese

LANGUAGES: Mapping[str, Mapping[str, str]] = MappingProxyType({"en": english.TEXT, "ja": japanese.TEXT})


def check_language(language: str) -> None:
    """Raises InputError for a language that reports are not written in."""
    if language not in LANGUAGES:
        raise InputError(unknown("language", language, LANGUAGES))


def strings(language: str) -> Mapping[str, str]:
    """All texts of a language."""
    check_language(language)
    return LANGUAGES[language]


def date(t: Mapping[str, str], text: str) -> str:
    """A date of ISO 8601 as the language writes it, in UTC."""
    return datetime.fromisoformat(text).astimezone(UTC).strftime(t["date"])
