"""Assembly of a gateway: its chat template, and the files of its dashboard."""

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from niwaki.data.rendering import DialogueRefusedError
from niwaki.errors import InputError
from niwaki.rollout import dashboard
from niwaki.rollout.chat_template import ChatTemplate, read_template, token_names
from support.rollouts import Setup, make, settings

LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
BOMB = "{% if messages[0].content == 'boom' %}" + LOOP + "{% endif %}{{ messages[0].content }}"


@pytest.fixture
def rendered(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """What a template makes of one message of a user."""
    templates: list[ChatTemplate] = []

    def render(source: str, content: str = "a", names: dict[str, str] | None = None) -> str:
        path = tmp_path / "chat_template.jinja"
        path.write_text(source)
        templates.append(read_template(path, names or {}))
        return templates[-1]([{"role": "user", "content": content}])

    yield render
    for template in templates:
        template.close()


def test_chat_templates_run_in_the_sandbox_of_the_server(rendered: Callable[..., str]) -> None:
    """With its limits, and with what transformers gives to templates. The sandbox itself is tested in tests/data."""
    source = """{% if 'bad' in messages[0].content %}{{ raise_exception('no such thing') }}{% endif -%}
{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>{{ eos_token }}"""
    assert rendered(source, "{{ 1 + 1 }}", {"bos_token": "<s>"}) == "<s><user>{{ 1 + 1 }}<assistant>"
    with pytest.raises(DialogueRefusedError, match="no such thing"):
        rendered(source, "bad")
    with pytest.raises(InputError, match=r"cannot use the chat template .*unsafe"):
        rendered("{{ messages.__class__.__mro__ }}")
    with pytest.raises(InputError, match=r"cannot use the chat template .*exceeded its limits"):
        rendered(BOMB.replace("boom", "?"))
    with pytest.raises(InputError, match="at most"):
        rendered("x" * 200_000)


def test_a_template_that_loops_forever_delays_no_other_request(tmp_path: Path) -> None:
    """Its audit is counted as not done, by words that do not come from the template."""
    template = tmp_path / "chat_template.jinja"
    template.write_text(BOMB)

    async def work(setup: Setup) -> None:
        chat = {"model": "m", "messages": [{"role": "user", "content": "boom"}], "user": "u"}
        assert (await setup.client.post("/v1/chat/completions", json=chat)).status_code == 200
        answered = 0
        while setup.gateway.background.running["audit"]:
            assert (await setup.ask(1, chat=True)).status_code == 200
            answered += 1
            await asyncio.sleep(0)  # the fake models never wait
        await setup.gateway.background.idle()
        skipped = setup.gateway.controller.counters.open.skipped
        assert skipped["not audited: the chat template exceeded its limits"] == 1
        assert answered > 5, "the loop was free all the time"
        await setup.gateway.close()

    policy = {"steps": [1.0], "interval_s": 60, "min_requests": 40, "min_audits": 5}
    own = settings(policy=policy, chat_template=str(template), sampling={"audit_frac": 1.0, "max_audits": 1})
    asyncio.run(work(make(tmp_path, own)))


def test_names_of_tokens(tmp_path: Path) -> None:
    assert token_names(tmp_path, None) is None
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": {"content": "<s>"}, "eos_token": null}')
    assert token_names(None, tmp_path) == {"bos_token": "<s>", "eos_token": ""}
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(InputError, match="expected the config of a tokenizer"):
        token_names(tmp_path)


def test_every_file_of_the_dashboard_is_in_the_package() -> None:
    for name in ("report.css", "dashboard.css", "dashboard.js", "plotly.js"):
        found = dashboard.asset(name)
        assert found is not None and found.content
        assert f"rollout/{name}" in dashboard.page()
    assert dashboard.asset("other.js") is None
