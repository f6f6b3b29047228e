"""lm-evaluation-harness on two stages against its own `hf` model: two tasks with data made here."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from test_chat import ENVIRONMENT, LLMPIPE
from test_generation import _model

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed")

CHOICE = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/choice.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
WRITING = """
task: tiny_writing
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/choice.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{target}}"
generation_kwargs: {until: ["3"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match}]
"""
ROLLING = """
task: tiny_rolling
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/choice.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}{{choices[0]}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
"""


def test_figures_are_those_of_the_hf_model(tmp_path: Path) -> None:
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model = _model(tmp_path, "llama")
    questions = ["where is it", "a much longer question about words", "why", "what else is there to ask", "who"]
    reference = HFLM(pretrained=str(model), batch_size=2, device="cpu")
    documents = [
        {"question": question, "choices": [" here", " there and back", " no", " " + "x" * 9], "answer": number % 4}
        for number, question in enumerate(questions)
    ]
    for document in documents[:3]:  # some that are right, for a figure that is not 0
        ids = reference.tokenizer(document["question"], return_tensors="pt")["input_ids"]
        text = reference.model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
        document["target"] = reference.tok_decode(text).split("3")[0]
    for document in documents[3:]:
        document["target"] = "nothing"
    (tmp_path / "choice.jsonl").write_text("\n".join(map(json.dumps, documents)))
    for name, text in (("choice", CHOICE), ("writing", WRITING), ("rolling", ROLLING)):
        (tmp_path / f"{name}.yaml").write_text(text.replace("FOLDER", str(tmp_path)))
    tasks = ["tiny_choice", "tiny_writing", "tiny_rolling"]
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    expected = lm_eval.simple_evaluate(reference, tasks=tasks, task_manager=manager, bootstrap_iters=0)["results"]
    command = [*LLMPIPE, "evaluate", str(model), "--harness", ",".join(tasks), "--harness-include", str(tmp_path)]
    done = subprocess.run([*command, "--devices", "2", "--json"], cwd=tmp_path, env=ENVIRONMENT, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    found = json.loads(done.stdout)["metrics"]
    assert found["tiny_choice"]["acc"] == expected["tiny_choice"]["acc,none"]
    assert found["tiny_choice"]["acc_norm"] == expected["tiny_choice"]["acc_norm,none"]
    assert found["tiny_writing"]["exact_match"] == expected["tiny_writing"]["exact_match,none"] == 0.6
    for name in ("word_perplexity", "bits_per_byte"):
        assert found["tiny_rolling"][name] == pytest.approx(expected["tiny_rolling"][f"{name},none"], rel=1e-5)
