"""Answers to multiple choice in the forms of GPT-4o's stored answers to MMMU-Pro."""

from __future__ import annotations

TEN = [f"number {index}" for index in range(10)]


STATED: list[tuple[str, list[str], str | None, str | None]] = [
    ("C. A kite", ["A ball", "A drum", "A kite"], "A", "C"),
    ("B. A", ["B", "A", "C"], "A", "B"),
    ("B. Figure C", ["Figure A", "Figure C", "Figure B"], "C", "B"),
    ("E", ["E", "C", "D", "A", "B"], "E", "E"),
    ("ROE = 20 %. The answer is C. 12 m", TEN, "E", "C"),
    (r"At 20°C (68°F) it is \(\text{B. 4 m}\), my answer", TEN, "C", "B"),
    ("Between A and B the difference is:\n\nC", ["1", "2", "0"], "B", "C"),
    ("That makes 12 N:\n\n**B. 12 N, 5 A**", ["3 N, 1 A", "12 N, 5 A"], "B", "B"),
    ("So, **B. V = 4** is the correct answer.", ["V = 1", "V = 4"], "B", "B"),
    ("10 mm is thinner than 12 mm. Therefore, the answer is:\n\n**A**", ["10 mm", "12 mm"], "B", "A"),
    ("None fits well.\n\nAnswer: (C)9132 N", TEN, "C", "C"),
    ("This leaves two links.\n\nAnswer: C2", ["1", "3", "2"], "C", "C"),
    (r"Answer: \( \text{(I)} \)", TEN, "I", "I"),
    ("**Answer**: D", TEN, "D", "D"),
    ("The answer, I think, is B.", TEN, "B", "B"),
    ("I'm sorry, I can't help with this.", TEN, "I", None),
    ("I'm unable to see what the picture shows.", ["A", "I", "O"], "C", None),
    ("I'm unable to see it.", TEN, None, None),
]
"""Answer, options, letter of MMMU-Pro's code (None where it guesses), our letter."""
