"""Make the bundled task: which of four passages continues a text of calib_data/docs_evaluation.txt.

    python scripts/make_task.py

A question is the beginning of a paragraph, cut after `BEFORE` words. The right answer is the next
`AFTER` words; the wrong ones are as many words from the same place of paragraphs elsewhere. The
same text gives the same file.
"""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

TEXTS = Path(__file__).parent.parent / "calib_data"
SOURCE = TEXTS / "docs_evaluation.txt"
TARGET = TEXTS / "tasks" / "continuation.jsonl"

QUESTIONS = 200
CHOICES = 4
BEFORE = 24
AFTER = 12
SEED = 0


def find_passages(text: str) -> list[tuple[str, str]]:
    """Return (beginning, next words) of each paragraph of prose that is long enough, once."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        words = line.split()
        prose = sum(bool(re.fullmatch(r"\(?[A-Za-z'-]+[.,;:)]*", word)) for word in words)
        if len(words) >= BEFORE + AFTER and prose >= 0.9 * len(words):
            found[" ".join(words[:BEFORE])] = " ".join(words[BEFORE : BEFORE + AFTER])
    return list(found.items())


def make_questions(passages: list[tuple[str, str]]) -> list[dict[str, object]]:
    """Return questions with their answers in a random order, in the order of the text."""
    draw = random.Random(SEED)
    rows: list[dict[str, object]] = []
    for number in sorted(draw.sample(range(len(passages)), QUESTIONS)):
        context, right = passages[number]
        others = [after for _, after in passages if after != right]
        choices = [right, *draw.sample(others, CHOICES - 1)]
        draw.shuffle(choices)
        rows.append({"context": context, "choices": choices, "answer": choices.index(right)})
    draw.shuffle(rows)
    return rows


def main() -> None:
    """Write the questions, one JSON object a line."""
    rows = make_questions(find_passages(SOURCE.read_text(encoding="utf-8")))
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    TARGET.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
