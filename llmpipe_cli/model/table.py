"""The table of architectures: which types were checked for which task, and what came of it.

`table.json` beside this module is written by `benchmarks/models.py` (`make models`). A row has a `status` (see
`parity.Verdict`), a `reason` where it is not `pass`, and the kinds of `attention` that were checked where it is.
`split` says whether it may be cut inside its layers too (`parity.check_split`); rows without it are checked when a job
is planned.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("table.json")

TASKS = {
    "causal-lm": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "masked-lm": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "classification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "token-classification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "question-answering": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
    "translation": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
}
"""transformers' register of the types for each task; `chat` is causal-lm."""

_HEADER = """\
# Models that run as a pipeline

llmpipe cuts Hugging Face's own model code into stages. This table holds every architecture that transformers
{transformers} registers for the tasks below; names are the `model_type` of a config. It is written by `make models`,
and the planner reads the same rows.

- **pass**: a tiny random model of the type, cut at every layer, each layer alone on a stage that holds only its own
  parameters, on a padded batch, gives the loss of the undivided model to 1e-6 and every gradient to 1e-5 of its largest
  element, in fp32 with torch {torch} on CPU; with each kind of attention named.
- **refused**: it cannot be cut. A plan with more than one stage is refused by name with this reason before anything
  starts; one stage works.
- **untested**: no tiny model of it ran here undivided, for the reason given. Such a type is tried when a job is
  planned, with a warning.

A type that is not in the table, or that another version of transformers brings, is checked in this way when a job is
planned: in about a second, on a tiny model with the flags of your config. If loss or gradients differ it is refused.

Router losses (`output_router_logits: true`) and shared key-value layers (`num_kv_shared_layers`) cross stages too.
LayerDrop is switched off, because a stage cannot leave out layers that the next stage waits for.

| task | types | pass | refused | untested |
|---|---|---|---|---|
"""


def registered_types(task: str) -> list[str]:
    """The types that transformers registers for a task, sorted."""
    from transformers.models.auto import modeling_auto

    return sorted(getattr(modeling_auto, TASKS[task]))


def read_table() -> dict[str, Any]:
    """The table: the versions that it was made with, and rows by task and type."""
    return json.loads(TABLE.read_text())


def write_table(table: dict[str, Any]) -> None:
    """Write the table with one row a line."""
    lines = ["{"]
    lines += [f'  "{name}": {json.dumps(value)},' for name, value in table.items() if name != "tasks"]
    lines.append('  "tasks": {')
    tasks = []
    for task, rows in table["tasks"].items():
        body = ",\n".join(f'      "{name}": {json.dumps(row)}' for name, row in sorted(rows.items()))
        tasks.append(f'    "{task}": {{\n{body}\n    }}')
    TABLE.write_text("\n".join(lines) + "\n" + ",\n".join(tasks) + "\n  }\n}\n")


def render(table: dict[str, Any]) -> str:
    """The table as a page of documentation."""
    text = _HEADER.format(transformers=table["transformers"], torch=table["torch"])
    for task, rows in table["tasks"].items():
        count = Counter(row["status"] for row in rows.values())
        text += f"| {task} | {len(rows)} | {count['pass']} | {count['refused']} | {count['untested']} |\n"
    for task, rows in table["tasks"].items():
        text += f"\n## {task}{' and chat' if task == 'causal-lm' else ''}\n\n| type | result | |\n|---|---|---|\n"
        for name, row in rows.items():
            detail = ", ".join(row["attention"]) if row["status"] == "pass" else row["reason"].replace("|", "\\|")
            text += f"| `{name}` | {row['status']} | {detail} |\n"
    return text
