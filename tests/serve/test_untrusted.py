"""Nothing that comes with a model is run."""

import json
import os
import pickle
from pathlib import Path

from niwaki.serve.server import ServerSettings, make_service
from support.servers import chat_model


class Canary:
    """Leaves a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_code_and_pickles_beside_the_weights_stay_unread(tmp_path: Path) -> None:
    model, sung = chat_model(tmp_path / "model"), tmp_path / "sung"
    for name in ("pytorch_model.bin", "model.pt", "training_args.pkl"):
        (model / name).write_bytes(pickle.dumps(Canary(sung)))
    code = f"import os\nos.mkdir({str(sung)!r})\n"
    for name in ("modeling_own.py", "configuration_own.py", "tokenization_own.py", "custom_generate/generate.py"):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text(code)
    for name, own in {
        "config.json": {
            "AutoConfig": "configuration_own.OwnConfig",
            "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
        },
        "tokenizer_config.json": {"AutoTokenizer": ["tokenization_own.Own", "tokenization_own.Own"]},
    }.items():
        given = json.loads((model / name).read_text())
        (model / name).write_text(json.dumps({**given, "auto_map": own}))
    service = make_service(model, ServerSettings(device="cpu"))
    assert service.prompts.tokenize_text("Hello")
    service.close()
    assert not sung.exists()


def test_the_canary_would_sing(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Canary(tmp_path / "sung")))
    assert (tmp_path / "sung").exists()
