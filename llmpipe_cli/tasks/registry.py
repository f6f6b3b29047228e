"""The task of a recipe, by name."""

from __future__ import annotations

from llmpipe_cli.data.prepared import PreparedData
from llmpipe_cli.tasks.base import Task
from llmpipe_cli.tasks.causal_lm import CausalLM
from llmpipe_cli.tasks.chat import Chat
from llmpipe_cli.tasks.classification import Classification
from llmpipe_cli.tasks.features import check_available
from llmpipe_cli.tasks.masked_lm import MaskedLM
from llmpipe_cli.tasks.question_answering import QuestionAnswering
from llmpipe_cli.tasks.token_classification import TokenClassification
from llmpipe_cli.tasks.translation import Translation

_TASKS: dict[str, type[Task]] = {
    task.name: task
    for task in (CausalLM, MaskedLM, Chat, Classification, QuestionAnswering, TokenClassification, Translation)
}


def get_task(data: PreparedData) -> Task:
    """The task that `data` was prepared for.

    Raises:
        UsageError: the task is not available yet.
    """
    check_available(data.task)
    split = data.train or data.validation
    assert split is not None
    return _TASKS[data.task](data, split.sequence_len, split.target_sequence_len)
