"""Chat template of the models, which renders the dialogues that are audited.

The template is a program of the model, so it runs in the process with limits of `data.rendering`. One thread waits for
it, never the loop that answers requests.

    template = read_template(Path("chat_template.jinja"), {"bos_token": "<s>", "eos_token": "</s>"})
    text = await template.render([{"role": "user", "content": "Hello"}])
"""

import asyncio
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType

from niwaki.data.rendering import DialogueRefusedError, Renderer, RendererStartError, TemplateLimitError
from niwaki.errors import InputError
from niwaki.rollout.answers import UnreadableError

MAX_CHARACTERS = 100_000


class ChatTemplate:
    """Chat template in its process, with the thread that waits for it."""

    def __init__(self, text: str, names: Mapping[str, str]) -> None:
        self.renderer = Renderer(text, dict(names))
        self._thread = ThreadPoolExecutor(1, "niwaki-template")

    def __call__(self, messages: list[dict[str, str]]) -> str:
        """Return the text of a dialogue. Raise the errors of `Renderer.render`."""
        return self.renderer.render(messages)

    async def render(self, messages: list[dict[str, str]]) -> str:
        """Return the text of a dialogue. Raise UnreadableError, whose words never come from a template."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, self, messages)
        except DialogueRefusedError as error:
            raise UnreadableError("the chat template refuses the dialogue") from error
        except TemplateLimitError as error:
            raise UnreadableError("the chat template exceeded its limits") from error
        except RendererStartError as error:
            raise UnreadableError("the process of the chat template does not start") from error

    def close(self) -> None:
        """End the process. Dialogues that still wait are not rendered."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        self.renderer.close()


def read_template(path: Path, names: Mapping[str, str] = MappingProxyType({})) -> ChatTemplate:
    """Return the chat template in a file. Raise InputError if it does not render a short dialogue.

    `names`: those of begin and end token. Without them a chat has neither, and the server puts the begin token.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot use the chat template {path}: {str(error).splitlines()[0]}") from error
    if len(text) > MAX_CHARACTERS:
        raise InputError(f"{path}: expected a template of at most {MAX_CHARACTERS} characters")
    template = ChatTemplate(text, {"bos_token": "", "eos_token": "", **names})
    try:
        template([{"role": "user", "content": "?"}])
    except InputError as error:
        template.close()
        raise InputError(f"cannot use the chat template {path}: {str(error).splitlines()[0]}") from error
    return template


def token_names(*folders: Path | None) -> dict[str, str] | None:
    """Return the names of begin and end token from the first tokenizer_config.json, "" for none; None without one."""
    for folder in folders:
        path = None if folder is None else folder / "tokenizer_config.json"
        if path is None or not path.is_file():
            continue
        try:
            described = json.loads(path.read_text(encoding="utf-8"))
            found = {name: described.get(name) or "" for name in ("bos_token", "eos_token")}
        except (OSError, ValueError, AttributeError) as error:
            raise InputError(f"cannot read {path}: expected the config of a tokenizer as JSON") from error
        return {name: str(value["content"] if isinstance(value, dict) else value) for name, value in found.items()}
    return None
