"""Languages of a report: each is one table of texts, and all have the same keys.

t = strings("ja");  t["gates"]  ->  "ゲート判定"
"""

from collections.abc import Mapping
from datetime import UTC, datetime
from types import MappingProxyType

from niwaki.errors import InputError, unknown
from niwaki.measure.report import english, japanese

LANGUAGES: Mapping[str, Mapping[str, str]] = MappingProxyType({"en": english.TEXT, "ja": japanese.TEXT})


def check_language(language: str) -> None:
    """Raise InputError for an unsupported language."""
    if language not in LANGUAGES:
        raise InputError(unknown("language", language, LANGUAGES))


def strings(language: str) -> Mapping[str, str]:
    """Return all texts of a language."""
    check_language(language)
    return LANGUAGES[language]


def date(t: Mapping[str, str], text: str) -> str:
    """Format an ISO 8601 date in the style of the language, in UTC."""
    return datetime.fromisoformat(text).astimezone(UTC).strftime(t["date"])
