"""The model card of a result: what it is, what it cost, how to make it again."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

_BODY = """---
{metadata}
---

# {name}

`{source}` compressed by [niwaki](https://pypi.org/project/niwaki/) {version}: method `{method}`, target `{target}`.

| | |
|---|---|
| matrices compressed | {matrices} |
| measured zeros in them | {zeros:.4%} |
| bytes of the weight files | {bytes:,} (before: {bytes_before:,}) |
| calibration | {calibration} |
| seed | {seed} |
| time | {seconds} s on {device} |

Zeros are stored in place: the file is as large and runs as fast as the dense one in engines without a
sparse format. Quality was not measured while compressing; `niwaki evaluate` does that.

Made with:

    {command}

The full record is in `niwaki/run.json`, the error of every matrix in `niwaki/blocks.jsonl`.
"""


def model_card(record: dict[str, Any]) -> str:
    """Markdown with YAML metadata, from the content of run.json."""
    recipe, result, calibration = record["recipe"], record["result"], record["calibration"]
    source = Path(record["model"]["source"]).name
    # eval_results stays empty on purpose: nothing was evaluated here.
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["niwaki", "pruned", recipe["method"]],
    )
    windows = calibration["windows"]
    return _BODY.format(
        metadata=metadata.to_yaml(),
        name=f"{source}, {recipe['method']} {recipe['target']}",
        source=source,
        version=record["niwaki"],
        method=recipe["method"],
        target=recipe["target"],
        matrices=result["matrices"],
        zeros=result["zeros_frac"],
        bytes=result["bytes"],
        bytes_before=record["model"]["bytes"],
        calibration="none" if windows is None else f"{windows[0]} windows of {windows[1]} tokens",
        seed=recipe["seed"],
        seconds=record["seconds"],
        device=record["device"],
        command=" ".join(record["command"]),
    )
