"""Assembly of a gateway: its chat template, and the files of its dashboard."""

from pathlib import Path

import pytest

from niwaki.errors import InputError
from niwaki.rollout import dashboard
from niwaki.rollout.running import read_template, token_names


def test_chat_templates_are_rendered_in_a_sandbox(tmp_path: Path) -> None:
    path = tmp_path / "chat_template.jinja"
    path.write_text("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>")
    assert read_template(path)([{"role": "user", "content": "{{ 1 + 1 }}"}]) == "<user>{{ 1 + 1 }}<assistant>"
    for wrong in ("{{ messages.__class__.__mro__ }}", "{% for", "{{ messages.append(1) }}"):
        path.write_text(wrong)
        with pytest.raises(InputError, match="cannot use the chat template"):
            read_template(path)
    path.write_text("{{ bos_token }}{{ messages[0].content }}{{ eos_token }}")
    assert read_template(path)([{"role": "user", "content": "a"}]) == "a"
    assert token_names(tmp_path, None) is None
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": {"content": "<s>"}, "eos_token": null}')
    names = token_names(None, tmp_path)
    assert names == {"bos_token": "<s>", "eos_token": ""}
    assert read_template(path, names)([{"role": "user", "content": "a"}]) == "<s>a"
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(InputError, match="expected the config of a tokenizer"):
        token_names(tmp_path)
    path.write_text("x" * 200_000)
    with pytest.raises(InputError, match="at most"):
        read_template(path)


def test_every_file_of_the_dashboard_is_in_the_package() -> None:
    for name in ("report.css", "dashboard.css", "dashboard.js", "plotly.js"):
        found = dashboard.asset(name)
        assert found is not None and found.content
        assert f"rollout/{name}" in dashboard.page()
    assert dashboard.asset("other.js") is None
