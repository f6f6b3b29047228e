"""Writes the small data sets of the -mini recipes: sentences made from templates, so that every answer is known.

python recipes/data/make.py

topics.jsonl      a sentence and what it is about; in one of twenty the topic is another than its words say
questions.json    SQuAD's form: short texts about journeys; a quarter of the questions has no answer
names.conll       sentences with persons, places and days, a word a line
sums.jsonl        conversations about small sums, of one to three turns
numbers.jsonl     numbers up to 9999 in English and German words
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent

TOPICS = {
    "food": ["soup", "bread", "salt", "cheese", "apple", "dinner", "butter", "onion", "recipe", "oven"],
    "music": ["song", "violin", "drum", "concert", "singer", "melody", "choir", "piano", "guitar", "tune"],
    "sport": ["goal", "match", "race", "team", "player", "stadium", "coach", "medal", "ball", "league"],
    "weather": ["rain", "snow", "storm", "cloud", "sunshine", "wind", "fog", "frost", "thunder", "heat"],
}
FRAMES = [
    "we talked about the {0} and the {1} all evening",
    "nobody had expected such a {0} after the {1}",
    "the {0} was better than the {1} last week",
    "she wrote a long letter about {0} and {1}",
    "what a {0} , and then the {1} !",
    "he never forgot the {0} , the {1} and the {2}",
]
PERSONS = [
    "Ada Lovelace",
    "Alan Turing",
    "Grace Hopper",
    "Kurt",
    "Emmy Noether",
    "Sophie",
    "Niels",
    "Rosalind Franklin",
]
PLACES = ["Oslo", "New York", "Lima", "Cairo", "Buenos Aires", "Quito", "Hanoi", "Cape Town", "Dakar", "Vienna"]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]


def topics(draw: random.Random, count: int) -> list[dict[str, Any]]:
    """Sentences with their topic."""
    rows = []
    for _ in range(count):
        topic = draw.choice(sorted(TOPICS))
        text = draw.choice(FRAMES).format(*draw.sample(TOPICS[topic], 3))
        rows.append({"text": text, "label": draw.choice(sorted(TOPICS)) if draw.random() < 0.05 else topic})
    return rows


def questions(draw: random.Random, count: int) -> dict[str, Any]:
    """Journeys, and questions about their place, day or traveller."""
    paragraphs = []
    for number in range(count):
        person, place, day = draw.choice(PERSONS), draw.choice(PLACES), draw.choice(DAYS)
        facts = [f"{person} was on the way .", f"The train came to {place} .", f"It was a cold {day} ."]
        draw.shuffle(facts)
        context = " ".join(facts)
        asked = {"Who was on the way ?": person, "Where did the train go ?": place, "Which day was it ?": day}
        question, answer = draw.choice(sorted(asked.items()))
        if number % 4 == 3:
            context = " ".join(fact for fact in facts if answer not in fact)
        found = [] if number % 4 == 3 else [{"text": answer, "answer_start": context.index(answer)}]
        entry = {"id": f"journey-{number}", "question": question, "answers": found, "is_impossible": not found}
        paragraphs.append({"context": context, "qas": [entry]})
    return {"version": "v2.0", "data": [{"title": "Journeys", "paragraphs": paragraphs}]}


def names(draw: random.Random, count: int) -> str:
    """Sentences in CoNLL's form."""
    groups = {"PER": PERSONS, "LOC": PLACES, "DAY": DAYS}
    frames = ["PER went to LOC on DAY .", "On DAY PER wrote from LOC .", "PER met PER in LOC .", "LOC was far on DAY ."]
    lines = []
    for _ in range(count):
        for part in draw.choice(frames).split():
            for position, word in enumerate(draw.choice(groups[part]).split() if part in groups else [part]):
                lines.append(f"{word} {'I' if position else 'B'}-{part}" if part in groups else f"{word} O")
        lines.append("")
    return "\n".join(lines) + "\n"


def sums(draw: random.Random, count: int) -> list[dict[str, Any]]:
    """Conversations about sums."""
    rows = []
    for _ in range(count):
        total, messages = draw.randrange(1, 10), []
        messages.append({"role": "user", "content": f"Begin with {total}."})
        messages.append({"role": "assistant", "content": f"That is {total}."})
        for _ in range(draw.randrange(3)):
            more = draw.randrange(1, 10)
            total += more
            messages.append({"role": "user", "content": f"Add {more}."})
            messages.append({"role": "assistant", "content": f"That is {total}."})
        rows.append({"messages": messages})
    return rows


def numbers(draw: random.Random, count: int) -> list[dict[str, Any]]:
    """Numbers in two languages."""
    return [{"en": english(number), "de": german(number)} for number in draw.sample(range(1, 10_000), count)]


_ENGLISH = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
]
_ENGLISH_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_GERMAN = [
    "null",
    "eins",
    "zwei",
    "drei",
    "vier",
    "fünf",
    "sechs",
    "sieben",
    "acht",
    "neun",
    "zehn",
    "elf",
    "zwölf",
    "dreizehn",
    "vierzehn",
    "fünfzehn",
    "sechzehn",
    "siebzehn",
    "achtzehn",
    "neunzehn",
]
_GERMAN_TENS = ["zwanzig", "dreißig", "vierzig", "fünfzig", "sechzig", "siebzig", "achtzig", "neunzig"]


def english(number: int) -> str:
    """A number below 10000 in English words."""
    if number >= 1000:
        rest = f" {english(number % 1000)}" if number % 1000 else ""
        return f"{english(number // 1000)} thousand{rest}"
    if number >= 100:
        rest = f" and {english(number % 100)}" if number % 100 else ""
        return f"{english(number // 100)} hundred{rest}"
    if number >= 20:
        rest = f"-{_ENGLISH[number % 10]}" if number % 10 else ""
        return _ENGLISH_TENS[number // 10 - 2] + rest
    return _ENGLISH[number]


def german(number: int) -> str:
    """A number below 10000 in German words."""
    if number >= 1000:
        return f"{_one(number // 1000)}tausend" + (german(number % 1000) if number % 1000 else "")
    if number >= 100:
        return f"{_one(number // 100)}hundert" + (german(number % 100) if number % 100 else "")
    if number >= 20:
        units = f"{_one(number % 10)}und" if number % 10 else ""
        return units + _GERMAN_TENS[number // 10 - 2]
    return _GERMAN[number]


def _one(number: int) -> str:
    return "ein" if number == 1 else _GERMAN[number]


def main() -> None:
    """Writes all files, the same each time."""

    def lines(rows: list[dict[str, Any]]) -> str:
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    texts = {
        "topics.jsonl": lines(topics(random.Random(1), 800)),
        "questions.json": json.dumps(questions(random.Random(2), 600), ensure_ascii=False) + "\n",
        "names.conll": names(random.Random(3), 600),
        "sums.jsonl": lines(sums(random.Random(4), 600)),
        "numbers.jsonl": lines(numbers(random.Random(5), 1500)),
    }
    for name, text in texts.items():
        (FOLDER / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
