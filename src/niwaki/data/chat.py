"""Dialogues: rows of messages → tokens of the text that the model's own chat template makes of them.

Two forms are read: `role` and `content` (OpenAI), `from` and `value` (ShareGPT). A content is a text, or a list of
parts of type `text`. The template is a program of the model, so it runs in a process with limits (`data.rendering`).
Names of control tokens inside a message are plain text, as in `niwaki serve`.

    writer = DialogueWriter(load_tokenizer("MODEL"))
    ids = writer.write(messages_of([{"role": "user", "content": "Hello"}]))
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from niwaki.data.rendering import DialogueRefusedError, Renderer, TemplateLimitError
from niwaki.errors import CalibrationError

ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "function_response": "tool",
    "observation": "tool",
}
KEPT_KEYS = ("name", "tool_calls", "tool_call_id", "reasoning_content")  # of a message, beside role and content
MAX_OVERRUNS = 4  # dialogues in a row that exceed the limits, each of which costs a process
NO_TOKENIZER = "a dialogue, which needs the tokenizer of a model"
NO_TEMPLATE = "a dialogue, and the model has no chat template"
Messages = list[dict[str, Any]]


class RowError(Exception):
    """A row cannot be used. The text is the reason, the same for all rows of a kind."""


def is_dialogue(value: object) -> bool:
    """Check that a value looks like messages."""
    return (
        isinstance(value, list) and bool(value) and isinstance(value[0], Mapping)
        and ("role" in value[0] or "from" in value[0])
    )  # fmt: skip


def messages_of(value: Sequence[Any]) -> Messages:
    """Return messages with `role` and `content`, for a template. Raises RowError for anything else."""
    messages = [_message(one) for one in value]
    if not any(message["content"].strip() for message in messages):
        raise RowError("an empty dialogue")
    require_unicode(json.dumps(messages, ensure_ascii=False, default=str))
    return messages


def require_unicode(text: str) -> None:
    """Raise RowError for a text with half of a surrogate pair, which a tokenizer cannot take."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowError("half of a surrogate pair") from error


class DialogueWriter:
    """Chat template of one tokenizer, which writes dialogues. Its process starts with the first one."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._renderer: Renderer | None = None
        self._overruns = 0

    @property
    def problem(self) -> str | None:
        """Return why this tokenizer can write no dialogue, None if it can."""
        if self.tokenizer is None:
            return NO_TOKENIZER
        try:
            return None if self.tokenizer.get_chat_template() else NO_TEMPLATE
        except ValueError:  # none is set, or there are several and no default
            return NO_TEMPLATE

    def write(self, messages: Messages) -> list[int]:
        """Return the tokens of a dialogue.

        Raises RowError if the template refuses it, CalibrationError if the template exceeds its limits every time.
        """
        if self._renderer is None:
            names = dict(self.tokenizer.special_tokens_map)
            self._renderer = Renderer(self.tokenizer.get_chat_template(), names, asks=False)
        try:
            text = self._renderer.render(mark_messages(messages, self.tokenizer))
            self._overruns = 0
            return encode_chat(text, self.tokenizer)
        except DialogueRefusedError as error:
            self._overruns = 0
            raise RowError(str(error)) from error
        except TemplateLimitError as error:
            self._overruns += 1
            if self._overruns >= MAX_OVERRUNS:
                raise CalibrationError(
                    f"the chat template of {self.tokenizer.name_or_path} exceeded its limits on {MAX_OVERRUNS} "
                    "dialogues in a row: repair chat_template.jinja, or give rows of text"
                ) from error
            raise RowError("a dialogue on which the chat template exceeds its limits") from error
        except ValueError as error:  # a control token that the tokenizer also makes of plain text
            raise RowError("a dialogue with the name of a control token") from error

    def close(self) -> None:
        """End the process."""
        if self._renderer is not None:
            self._renderer.close()


def mark_messages(messages: Sequence[Mapping[str, Any]], tokenizer: Any) -> list[dict[str, Any]]:
    """Return messages in which names of control tokens are marked as plain text."""
    names = sorted((token.content for token in tokenizer.added_tokens_decoder.values() if token.special), key=len)
    control_tokens = re.compile("|".join(map(re.escape, names[::-1])) or "(?!)")
    marked: list[dict[str, Any]] = _marking().mark_control_tokens(list(messages), control_tokens)
    return marked


def encode_chat(text: str, tokenizer: Any) -> list[int]:
    """Return the tokens of a rendered dialogue whose messages were marked."""
    return [int(token) for token in _marking().encode_marked_chat(tokenizer, text)]


def _marking() -> Any:
    """Return the module that marks control tokens. Raises CalibrationError for a version without it."""
    from transformers.utils import chat_template_utils

    if "encode_marked_chat" not in vars(chat_template_utils):
        raise CalibrationError("dialogues need transformers 5.23 or newer: pip install --upgrade transformers")
    return chat_template_utils


def _message(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise RowError("a message that is not an object")
    role = value.get("role", value.get("from"))
    if not isinstance(role, str):
        raise RowError("a message without a role")
    kept = {key: value[key] for key in KEPT_KEYS if value.get(key)}
    content = value.get("content", value.get("value"))
    if content is None and kept:
        content = ""
    return {"role": ROLES.get(role, role), "content": _plain(content), **kept}


def _plain(content: Any) -> str:
    """Return the content of a message as one text."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RowError("a message without text")
    parts = []
    for part in content:
        text = part if isinstance(part, str) else part.get("text") if isinstance(part, Mapping) else None
        if not isinstance(text, str):
            raise RowError("a message with parts that are not text")
        parts.append(text)
    return "".join(parts)
