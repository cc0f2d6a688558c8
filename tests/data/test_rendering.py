"""Templates render as transformers renders them, and cannot do anything else."""

from collections.abc import Iterator

import pytest

from niwaki.data.rendering import MAX_BYTES, DialogueRefusedError, Renderer, TemplateLimitError
from niwaki.errors import InputError
from support.servers import TEMPLATE

BOMBS = (
    """
{%- set told, many = messages[0].content, 8 -%}
{%- if told == 'one long step' -%}{{ 10 ** (10 ** many) }}
{%- elif told == 'memory' -%}{{ ('x' * 10 ** (many + 2)) | length }}
{%- elif told == 'output' -%}{% for a in range(2000) %}{{ 'x' * 1000 }}{% endfor %}
{%- elif told == 'wide' -%}{% for a in range(400) %}{{ '庭' * 1000 }}{% endfor %}
{%- elif told == 'escape' -%}{{ ''.__class__.__mro__[1].__subclasses__() }}
{%- elif told == 'write' -%}{{ messages.append(1) }}
{%- elif told == 'refuse' -%}{{ raise_exception('no such role') }}
{%- else -%}{{ bos_token }}"""
    + TEMPLATE
    + "{%- endif -%}"
)


@pytest.fixture(scope="module")
def bombs() -> Iterator[Renderer]:
    renderer = Renderer(BOMBS, {"bos_token": "<s>"})
    yield renderer
    renderer.close()


def asked(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


def test_a_dialogue_becomes_a_prompt(bombs: Renderer) -> None:
    assert bombs.render(asked("Grüße 庭\n{{ 1 }}")) == "<s><|user|>Grüße 庭\n{{ 1 }}\n<|assistant|>"


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ("one long step", "exceeded its limits"),
        ("memory", "too much memory"),
        ("output", f"the max is {MAX_BYTES:,}"),
        ("wide", "it becomes 1,200,000 bytes"),
        ("escape", "unsafe"),
        ("write", "'append' of 'list' object is unsafe"),
        ("refuse", "no such role"),
    ],
)
def test_what_a_template_may_not(bombs: Renderer, told: str, message: str) -> None:
    limit = TemplateLimitError if "limits" in message else DialogueRefusedError
    with pytest.raises(limit) as refused:
        bombs.render(asked(told))
    assert message in str(refused.value)
    assert bombs.render(asked("x")) == "<s><|user|>x\n<|assistant|>", "the next dialogue is rendered as ever"


def test_a_process_that_does_not_start_is_an_error_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when the template cannot be compiled within its limits."""
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(InputError, match="is the model's chat template sound"):
        Renderer(TEMPLATE, {})
