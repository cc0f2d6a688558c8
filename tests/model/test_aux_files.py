"""Files beside the weights: which of them a result copies."""

from pathlib import Path

from niwaki.model.aux_files import aux_files
from niwaki.model.checkpoint import Checkpoint
from support.models import tiny_llama

COPIED = {
    "generation_config.json": "{}",
    "preprocessor_config.json": '{"auto_map": {"AutoProcessor": "processing_x.Processor"}}',
    "tokenizer_config.json": '{"auto_map": {"AutoTokenizer": ["tokenization_x.Slow", null]}}',
    "modeling_x.py": "raise SystemExit('never run')\nfrom .parts_x import a\nfrom . import more_x\nimport torch\n",
    "parts_x.py": "from ..outside import nothing\n",
    "more_x.py": "this is no Python (\n",
    "processing_x.py": "",
    "tokenization_x.py": "",
    "chat_template.jinja": "x",
    "additional_chat_templates/tool_use.jinja": "y",
    "USE_POLICY.md": "be kind",
    "LICENSE.pdf": "rights",
    "NOTICE": "notes",
    "merges.txt": "a b",
    "tokenizer.model": "sp",
}
LEFT = {
    "README.md": "the card of the source",
    "helper.py": "no one names it",
    "elsewhere_x.py": "of another repository",
    "adapter_config.json": "{}",
    "adapter_model.safetensors": "",
    "pytorch_model.bin": "",
    "pytorch_model.bin.index.json": "{}",
    "optimizer.pt": "",
    ".hidden.json": "{}",
    "niwaki/run.json": "{}",
    "additional_chat_templates/weights.bin": "",
    "original/params.json": "{}",
}


def test_which_files_a_result_copies(tmp_path: Path) -> None:
    for name, content in {**COPIED, **LEFT}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    (tmp_path / "config.json").write_text(
        '{"auto_map": {"AutoModel": "modeling_x.Model", "AutoConfig": "someone/else--elsewhere_x.Config"}}'
    )
    found = {str(path.relative_to(tmp_path)) for path in aux_files(tmp_path)}
    assert found == {*COPIED, "config.json"}


def test_an_escaped_name_is_the_same_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(r'{"auto\u005fmap": {"AutoModel": "modeling_x.Model"}}')
    (tmp_path / "modeling_x.py").touch()
    assert tmp_path / "modeling_x.py" in aux_files(tmp_path)


def test_a_copy_keeps_folders_and_bytes(tmp_path: Path) -> None:
    model, out = tiny_llama(tmp_path / "m"), tmp_path / "out"
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates/rag.jinja").write_text("{{ messages }}")
    out.mkdir()
    Checkpoint.open(model).copy_aux_files(out)
    assert (out / "additional_chat_templates/rag.jinja").read_text() == "{{ messages }}"
    assert (out / "config.json").read_bytes() == (model / "config.json").read_bytes()
    assert not list(out.glob("*.safetensors"))
