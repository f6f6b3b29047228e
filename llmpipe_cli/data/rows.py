"""Rows that are more than texts and a label: questions, conversations, tagged words, several labels.

Each function turns one row, as a file or a dataset holds it, into a `Record` whose `value` is plain JSON in one form,
and refuses what cannot be learned from: answers that are not in their context, turns out of order or empty, words and
tags of different number.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llmpipe_cli.data.sources import Fields, Record, digest_of, missing_field, text_of, type_name
from llmpipe_cli.errors import UsageError

_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
}


def question_record(row: dict[str, Any], fields: Fields, where: str) -> Record:
    """A question about a context, with the columns of SQuAD on the hub.

    `fields.texts` names context, question and answers. Answers are ``{"text": [...], "answer_start": [...]}`` or a list
    of ``{"text", "answer_start"}``; none at all means that the context does not hold the answer (SQuAD v2).
    `Record.value` has `id`, `question`, `context` and `answers`, a list of (text, first character).
    """
    context_name, question_name, answers_name = fields.texts
    context, question = text_of(row, context_name, where), text_of(row, question_name, where)
    if answers_name not in row:
        raise missing_field(answers_name, list(row), where)
    answers = [_answer(text, start, context, where) for text, start in _pairs(row[answers_name], answers_name, where)]
    value = {"id": str(row.get("id", where)), "question": question, "context": context, "answers": answers}
    return Record(where, (context, question), value=value)


def question_records(document: dict[str, Any], fields: Fields, where: str) -> Iterator[Record | UsageError]:
    """The questions of a file in SQuAD's own form: articles with paragraphs with questions. Mistakes come in between,
    each named by its place in the file and its question's id."""
    context_name, question_name, answers_name = fields.texts
    for article_number, article in enumerate(document["data"]):
        paragraphs = article.get("paragraphs") if isinstance(article, dict) else None
        place = f"{where}: data[{article_number}]"
        if not isinstance(paragraphs, list):
            yield UsageError("an article without a list of `paragraphs`", where=place)
            continue
        for number, paragraph in enumerate(paragraphs):
            questions = paragraph.get("qas") if isinstance(paragraph, dict) else None
            if not isinstance(questions, list):
                yield UsageError("a paragraph without a list of `qas`", where=f"{place}.paragraphs[{number}]")
                continue
            for index, asked in enumerate(questions):
                spot = f"{place}.paragraphs[{number}].qas[{index}]"
                if not isinstance(asked, dict):
                    yield UsageError(f"a question must be an object, not {type_name(asked)}", where=spot)
                    continue
                row = {
                    "id": asked.get("id", spot),
                    context_name: paragraph.get("context"),
                    question_name: asked.get("question"),
                    answers_name: [] if asked.get("is_impossible") else asked.get("answers"),
                }
                try:
                    record = question_record(row, fields, f"{spot} (id {row['id']})")
                except UsageError as error:
                    yield error
                    continue
                yield Record(record.where, record.texts, digest=digest_of(record.texts[0]), value=record.value)


def _pairs(answers: Any, name: str, where: str) -> list[tuple[Any, Any]]:
    if isinstance(answers, dict) and isinstance(answers.get("text"), list):
        texts, starts = answers["text"], answers.get("answer_start")
        if isinstance(starts, list) and len(starts) == len(texts):
            return list(zip(texts, starts, strict=True))
    elif isinstance(answers, list) and all(isinstance(answer, dict) for answer in answers):
        return [(answer.get("text"), answer.get("answer_start")) for answer in answers]
    raise UsageError(
        f"field {name!r} holds no answers with `text` and `answer_start`, but {type_name(answers)}",
        where=where,
        hint='for example {"text": ["Bernadette"], "answer_start": [515]}, with empty lists where there is no answer',
    )


def _answer(text: Any, start: Any, context: str, where: str) -> tuple[str, int]:
    if not isinstance(text, str) or not text.strip() or not isinstance(start, int):
        raise UsageError("an answer has no text or no `answer_start`", where=where)
    if start < 0 or context[start : start + len(text)] != text:
        found = context.find(text)
        hint = f"it is at character {found}" if found >= 0 else "an answer is copied from the context, letter by letter"
        raise UsageError(f"the answer {text[:60]!r} is not in the context at character {start}", where=where, hint=hint)
    return text, start


def conversation_record(row: dict[str, Any], fields: Fields, where: str) -> Record:
    """A conversation in any of the usual forms; `fields.texts` names the field with the turns.

    - turns: a list of ``{"role", "content"}`` (OpenAI, TRL) or ``{"from", "value"}`` (sharegpt), or a list of texts
      that user and assistant say in turn, where a last turn without an answer is left out;
    - ``instruction``, ``output`` and optionally ``input``, ``history`` (pairs) and ``system`` (alpaca);
    - ``prompt`` and ``completion``: two texts, or two lists of turns.

    `Record.value` is a list of ``{"role": "system" | "user" | "assistant", "content"}`` in which user and assistant
    take turns after an optional system turn, and the assistant has the last word.
    """
    turns = _turns(row, fields.texts[0], where)
    _check_order(turns, where)
    return Record(where, ("\n".join(turn["content"] for turn in turns),), value=turns)


def _turns(row: dict[str, Any], name: str, where: str) -> list[dict[str, str]]:
    for key in (name, "messages", "conversations", "conversation", "dialog", "dialogue", "utterances"):
        if key in row and isinstance(row[key], list):
            return _listed_turns(row[key], row, where)
    if "instruction" in row and "output" in row:
        return _alpaca_turns(row, where)
    if "prompt" in row and ("completion" in row or "response" in row):
        answer = row["completion" if "completion" in row else "response"]
        if isinstance(row["prompt"], list) and isinstance(answer, list):
            return _listed_turns([*row["prompt"], *answer], row, where)
        return [_turn("user", row["prompt"], where, 1), _turn("assistant", answer, where, 2)]
    listed = ", ".join(repr(key) for key in list(row)[:20]) or "none"
    raise UsageError(
        f"there is no field {name!r} with turns",
        where=where,
        hint=f"a conversation has messages, conversations, instruction and output, or prompt and completion; "
        f"the fields are {listed}",
    )


def _listed_turns(listed: list[Any], row: dict[str, Any], where: str) -> list[dict[str, str]]:
    if all(isinstance(turn, str) for turn in listed):
        pairs = listed[: len(listed) // 2 * 2]
        return [_turn(("user", "assistant")[i % 2], text, where, i + 1) for i, text in enumerate(pairs)]
    turns = []
    if isinstance(row.get("system"), str) and row["system"].strip():
        turns.append(_turn("system", row["system"], where, 0))
    for number, turn in enumerate(listed, start=1):
        if not isinstance(turn, dict):
            raise UsageError(f"turn {number} is {type_name(turn)}, not an object with role and content", where=where)
        role = turn.get("role", turn.get("from"))
        if role not in _ROLES:
            hint = "roles are system, user and assistant; sharegpt's human and gpt are taken too"
            raise UsageError(f"turn {number} has the role {role!r}, which is not known", where=where, hint=hint)
        turns.append(_turn(_ROLES[role], turn.get("content", turn.get("value")), where, number))
    return turns


def _alpaca_turns(row: dict[str, Any], where: str) -> list[dict[str, str]]:
    turns = []
    if isinstance(row.get("system"), str) and row["system"].strip():
        turns.append(_turn("system", row["system"], where, 0))
    for number, pair in enumerate(row.get("history") or [], start=1):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise UsageError(f"entry {number} of `history` is not a pair of texts", where=where)
        turns += [_turn("user", pair[0], where, 2 * number - 1), _turn("assistant", pair[1], where, 2 * number)]
    asked = row["instruction"]
    if isinstance(asked, str) and isinstance(row.get("input"), str) and row["input"].strip():
        asked = f"{asked}\n{row['input']}"
    number = len(turns) + 1
    return [*turns, _turn("user", asked, where, number), _turn("assistant", row["output"], where, number + 1)]


def _turn(role: str, content: Any, where: str, number: int) -> dict[str, str]:
    if not isinstance(content, str):
        raise UsageError(f"turn {number} ({role}) holds {type_name(content)}, not text", where=where)
    if not content.strip():
        raise UsageError(f"turn {number} ({role}) is empty", where=where)
    return {"role": role, "content": content}


def _check_order(turns: list[dict[str, str]], where: str) -> None:
    expected = "user"
    for number, turn in enumerate(turns, start=1):
        if turn["role"] == "system" and number == 1:
            continue
        if turn["role"] != expected:
            message = f"roles out of order: turn {number} is the {turn['role']}'s, where the {expected}'s is due"
            raise UsageError(message, where=where, hint="user and assistant take turns, after at most one system turn")
        expected = "assistant" if expected == "user" else "user"
    if not turns or turns[-1]["role"] != "assistant":
        hint = "the assistant has the last word in each conversation"
        raise UsageError("the conversation ends without an answer", where=where, hint=hint)


def tagged_record(row: dict[str, Any], fields: Fields, where: str) -> Record:
    """Words with one tag each; `fields.texts` and `fields.label` name the two lists. `Record.value` is the words,
    `Record.labels` the tags."""
    (words_name,), tags_name = fields.texts, fields.label
    assert tags_name is not None
    for name in (words_name, tags_name):
        if name not in row:
            raise missing_field(name, list(row), where)
        if not isinstance(row[name], list):
            raise UsageError(f"field {name!r} holds {type_name(row[name])}, not a list", where=where)
    words, tags = row[words_name], row[tags_name]
    if len(words) != len(tags):
        raise UsageError(f"{len(words)} words have {len(tags)} tags", where=where)
    if not words:
        raise UsageError("there are no words", where=where)
    if not all(isinstance(word, str) for word in words):
        raise UsageError(f"field {words_name!r} holds something that is no text", where=where)
    labels = tuple(_label_name(tag, tags_name, where) for tag in tags)
    return Record(where, (" ".join(words),), value=list(words), labels=labels)


def multi_label_record(row: dict[str, Any], fields: Fields, where: str) -> Record:
    """A text with any number of labels, none included: a list, or a text with `|` between the labels."""
    (text_name,), label_name = fields.texts, fields.label
    assert label_name is not None
    text = text_of(row, text_name, where)
    if label_name not in row:
        raise missing_field(label_name, list(row), where)
    given = row[label_name]
    if isinstance(given, str):
        given = [part.strip() for part in given.split("|") if part.strip()]
    if not isinstance(given, list):
        hint = "a list of labels, or a text such as sports|politics"
        raise UsageError(f"label field {label_name!r} holds {type_name(given)}, not a list", where=where, hint=hint)
    labels = dict.fromkeys(_label_name(label, label_name, where) for label in given)
    return Record(where, (text,), labels=tuple(labels))


def _label_name(label: Any, field: str, where: str) -> str:
    if isinstance(label, bool) or not isinstance(label, (str, int)) or (isinstance(label, str) and not label.strip()):
        raise UsageError(f"field {field!r} holds a label that is {type_name(label)} or empty", where=where)
    return str(label)
