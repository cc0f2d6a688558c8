"""Keys of our servers: from where, and how they are compared."""

import base64
import hashlib
import hmac
from pathlib import Path

import pytest

from niwaki.errors import InputError
from niwaki.serve.http.keys import Keys, read_keys


def test_keys_are_compared_in_constant_time_and_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append((one, other))
        return one == other

    monkeypatch.setattr(hmac, "compare_digest", compare)
    keys = Keys(["first", "second"])
    assert keys.accept("Bearer first") and keys.accept("bearer second") and not keys.accept("Bearer firs")
    assert not keys.accept("first") and not keys.accept("")
    assert len(compared) == 2 * 5 and {len(one) for pair in compared for one in pair} == {32}
    assert compared[0][0] == hashlib.sha256(b"first").digest()


def test_a_browser_sends_a_key_as_a_password() -> None:
    keys = Keys(["geheim:nis"])
    assert keys.accept("Basic " + base64.b64encode(b"anyone:geheim:nis").decode())
    for header in ("Basic " + base64.b64encode(b"geheim:nis").decode(), "Basic !", "Basic", "Basic " + "A" * 5):
        assert not keys.accept(header)


def test_without_keys_everybody_is_let_in() -> None:
    keys = Keys(())
    assert not keys and keys.accept("") and keys.accept("Bearer x")


def test_an_empty_password_is_no_key() -> None:
    assert not Keys(["one"]).accept("Bearer ") and not Keys(["one"]).accept("Basic Og==")


def test_keys_come_from_a_file_and_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\none\n\n two \n")
    assert read_keys(file) == ("one", "two") and read_keys(None) == ()
    monkeypatch.setenv("NIWAKI_API_KEYS", "three, four,")
    assert sorted(read_keys(file)) == ["four", "one", "three", "two"]
    file.write_text("\n")
    with pytest.raises(InputError, match="holds no key"):
        read_keys(file)
    with pytest.raises(InputError, match="cannot read the keys"):
        read_keys(tmp_path / "gone")
