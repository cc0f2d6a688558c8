"""Questions with choices, as a file of ours and as a task of lm_eval."""

import json
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}, cache_dir: "{cache}"}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{pairs[0][0]}}}}"
doc_to_choice: "{{{{pairs|map(attribute=1)|list}}}}"
doc_to_target: gold
target_delimiter: ""
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""


def write_task(folder: Path, rows: list[dict[str, Any]], name: str = "mine") -> Path:
    """Write the items as a file of ours and as a task of lm_eval; return the former."""
    folder.mkdir(exist_ok=True)
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / f"{name}.yaml").write_text(TASK.format(name=name, data=data, cache=folder / "cache"), encoding="utf-8")
    return data


def questions(count: int, words: int = 12) -> list[dict[str, Any]]:
    """Return what follows in a help topic, against what follows elsewhere: 2 to 4 choices of different lengths."""
    texts = [topics[name].split() for name in sorted(topics) if len(topics[name].split()) > words + 8]
    rows = []
    for i in range(count):
        context = " ".join(texts[i % len(texts)][:words])
        ends = [
            " " + " ".join(texts[(i + 7 * j) % len(texts)][words : words + 2 + (i + j) % 5]) for j in range(2 + i % 3)
        ]
        gold = i % len(ends)
        ends[0], ends[gold] = ends[gold], ends[0]
        rows.append({"pairs": [[context, end] for end in ends], "gold": gold})
    return rows
