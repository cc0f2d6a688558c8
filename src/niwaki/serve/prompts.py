"""From a request to the tokens that the model reads, or to a refusal that says what is wrong.

prompts = Prompts(tokenizer, vocabulary=32000, context=2048)
ids = prompts.of_chat(messages)
"""

import re
from collections.abc import Sequence
from typing import Any

from niwaki.serve.http.api_errors import RefusalError
from niwaki.serve.rendering import Renderer
from niwaki.serve.request_models import Message


class Prompts:
    """The tokenizer and the chat template of one model."""

    def __init__(self, tokenizer: Any, *, vocabulary: int, context: int) -> None:
        self.tokenizer, self.vocabulary, self.context = tokenizer, vocabulary, context
        self.renderer = None
        if tokenizer.chat_template:
            self.renderer = Renderer(tokenizer.get_chat_template(), dict(tokenizer.special_tokens_map))

    def of_completion(self, prompt: str | Sequence[int]) -> list[int]:
        """The tokens of a text, with those that the tokenizer puts before it; or the ids as they are."""
        if isinstance(prompt, str):
            return [int(token) for token in self.tokenizer(prompt)["input_ids"]]
        wrong = next((token for token in prompt if not 0 <= token < self.vocabulary), None)
        if wrong is not None:
            raise RefusalError(400, f"token ids lie within 0 and {self.vocabulary - 1}, got {wrong}", param="prompt")
        return list(prompt)

    def text_of(self, ids: Sequence[int]) -> str:
        """Ids as text."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def of_chat(self, messages: Sequence[Message]) -> list[int]:
        """The tokens of a dialogue. Names of control tokens in what a user wrote are read as plain text."""
        from transformers.utils.chat_template_utils import encode_marked_chat, mark_control_tokens

        if self.renderer is None:
            raise RefusalError(400, "this model has no chat template: use /v1/completions", code="no_chat_template")
        marked = mark_control_tokens([message.plain for message in messages], _control_tokens(self.tokenizer))
        text = self.renderer.render(marked)
        return [int(token) for token in encode_marked_chat(self.tokenizer, text)]

    def close(self) -> None:
        """Ends the process that renders."""
        if self.renderer is not None:
            self.renderer.close()

    def checked(self, ids: list[int], wanted: int | None) -> int:
        """How many tokens may be written behind a prompt. Raises RefusalError if it and what is wanted are too long."""
        if not ids:
            raise RefusalError(400, "the prompt is empty: give at least one token", param="prompt")
        room = self.context - len(ids)
        if room < (1 if wanted is None else wanted):
            asked = "" if wanted is None else f" and max_tokens {wanted}"
            raise RefusalError(
                400, f"the context holds {self.context} tokens, the prompt has {len(ids)}{asked}",
                code="context_length_exceeded",
            )  # fmt: skip
        return room if wanted is None else wanted


def _control_tokens(tokenizer: Any) -> Any:
    """A pattern of the special tokens."""
    names = sorted((token.content for token in tokenizer.added_tokens_decoder.values() if token.special), key=len)
    return re.compile("|".join(map(re.escape, names[::-1])) or "(?!)")
