"""Published datasets as they are on the Hub: columns with their types, splits, and a row with what becomes of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
PICTURE = {"bytes": b"\x89PNG", "path": None}
LETTER = "Answer with the option's letter from the given choices directly."
WORD = "Answer the question using a single word or phrase."
STRINGS = pa.list_(pa.string())


@dataclass(frozen=True)
class PublishedSet:
    """One dataset."""

    columns: Mapping[str, pa.DataType]
    """By the dataset card."""
    split: str
    """The one that its config asks."""
    row: Mapping[str, Any]
    """Of that split; null in the columns that it leaves out."""
    prompt: str
    references: list[str]
    right: str
    """A right answer."""
    id: str | None = None
    num_images: int = 1
    other_splits: Mapping[str, Any] = field(default_factory=dict)
    """What their answer columns hold."""
    answer: str = "answer"
    """The answer column."""


def _columns(kind: pa.DataType, names: str) -> dict[str, pa.DataType]:
    return dict.fromkeys(names.split(), kind)


_STRING, _INT32, _INT64 = pa.string(), pa.int32(), pa.int64()
_VQA_ANSWER = pa.struct([("answer", _STRING), ("answer_confidence", _STRING), ("answer_id", _INT64)])
_IMAGES = " ".join(f"image_{number}" for number in range(1, 8))

SETS: dict[str, PublishedSet] = {
    "coco_captions": PublishedSet(
        columns={
            "question_id": _STRING, "image": IMAGE, "question": _STRING, "answer": STRINGS, "id": _INT64,
            "license": pa.int8(), **_columns(_STRING, "file_name coco_url"), **_columns(_INT32, "height width"),
            "date_captured": _STRING,
        },
        split="val",
        row={"question_id": "COCO_val2014_1.jpg", "image": PICTURE, "question": "?", "answer": ["a cat", "one cat"]},
        prompt="Provide a one-sentence caption for the provided image.",
        references=["a cat", "one cat"],
        right="a cat",
        id="COCO_val2014_1.jpg",
        other_splits={"test": None},
    ),
    "vqav2": PublishedSet(
        columns={
            **_columns(_STRING, "question_type multiple_choice_answer"), "answers": pa.list_(_VQA_ANSWER),
            "image_id": _INT64, "answer_type": _STRING, "question_id": _INT64, "question": _STRING, "image": IMAGE,
        },
        split="validation",
        row={
            "question_type": "what", "multiple_choice_answer": "red", "image_id": 262148, "answer_type": "other",
            "answers": [{"answer": "red", "answer_confidence": "yes", "answer_id": n} for n in range(1, 11)],
            "question_id": 262148000, "question": "What colour?", "image": PICTURE,
        },
        prompt=f"What colour?\n{WORD}",
        references=["red"] * 10,
        right="red",
        id="262148000",
        other_splits={"testdev": None, "test": None},
        answer="answers",
    ),
    "textvqa": PublishedSet(
        columns={
            "image_id": _STRING, "question_id": _INT32, "question": _STRING, "question_tokens": STRINGS, "image": IMAGE,
            **_columns(_INT32, "image_width image_height"), **_columns(_STRING, "flickr_original_url flickr_300k_url"),
            **_columns(STRINGS, "answers image_classes"), "set_name": _STRING, "ocr_tokens": STRINGS,
        },
        split="validation",
        row={
            "image_id": "003a8ae2ef43b901", "question_id": 34602, "image": PICTURE, "question": "What brand?",
            "answers": ["nokia"] * 10,
        },
        prompt=f"What brand?\n{WORD}",
        references=["nokia"] * 10,
        right="Nokia",
        id="34602",
        other_splits={"train": ["ihome"] * 10, "test": [""] * 10},
        answer="answers",
    ),
    "docvqa": PublishedSet(
        columns={
            **_columns(_STRING, "questionId question"), "question_types": STRINGS, "image": IMAGE, "docId": _INT64,
            **_columns(_STRING, "ucsf_document_id ucsf_document_page_no"), "answers": STRINGS, "data_split": _STRING,
        },
        split="validation",
        row={
            "questionId": "49153", "docId": 279, "question": "What date?", "image": PICTURE,
            "answers": ["1/8/93", "1 Aug 93"],
        },
        prompt=f"What date?\n{WORD}",
        references=["1/8/93", "1 Aug 93"],
        right="1/8/93",
        id="49153",
        other_splits={"test": None},
        answer="answers",
    ),
    "chartqa": PublishedSet(
        columns={**_columns(_STRING, "type question answer"), "image": IMAGE},
        split="test",
        row={"type": "human_test", "question": "How many?", "answer": "14", "image": PICTURE},
        prompt="How many?\nAnswer the question with a single word.",
        references=["14"],
        right="14.5",
    ),
    "ai2d": PublishedSet(
        columns={"question": _STRING, "options": STRINGS, "answer": _STRING, "image": IMAGE},
        split="test",
        row={"question": "Which part?", "options": ["leaf", "root", "stem", "2"], "answer": "2", "image": PICTURE},
        prompt=f"Which part?\nA. leaf\nB. root\nC. stem\nD. 2\n{LETTER}",
        references=["C"],
        right="C",
    ),
    "mmbench": PublishedSet(
        columns={
            "index": _INT64, **_columns(_STRING, "question hint A B C D answer category"), "image": IMAGE,
            **_columns(_STRING, "source l2-category comment split"),
        },
        split="dev",
        row={
            "index": 241, "question": "Which one?", "hint": "nan", "answer": "B", "A": "left", "B": "None", "C": "nan",
            "D": "nan", "category": "spatial", "image": PICTURE, "source": "x", "l2-category": "logic",
            "comment": "nan", "split": "dev",
        },
        prompt=f"Which one?\nA. left\nB. None\n{LETTER}",
        references=["B"],
        right="(B)",
        id="241",
        other_splits={"test": "nan"},
    ),
    "mmmu": PublishedSet(
        columns={
            **_columns(_STRING, "id question options explanation"), **_columns(IMAGE, _IMAGES),
            **_columns(_STRING, "img_type answer topic_difficulty question_type subfield"),
        },
        split="validation",
        row={
            "id": "validation_Art_1", "question": "Compare <image 1> with <image 2>.",
            "options": "['same', \"it's not\"]", "image_1": PICTURE, "image_2": PICTURE, "img_type": "['Photo']",
            "answer": "B", "topic_difficulty": "Easy", "question_type": "multiple-choice", "subfield": "Drawing",
        },
        prompt=f"Compare <image 1> with <image 2>.\nA. same\nB. it's not\n\n{LETTER}",
        references=["B"],
        right="B",
        id="validation_Art_1",
        num_images=2,
        other_splits={"dev": "A", "test": "?"},
    ),
    "video_mme": PublishedSet(
        columns={
            **_columns(_STRING, "video_id duration domain sub_category url videoID question_id task_type question"),
            "options": STRINGS, "answer": _STRING,
        },
        split="test",
        row={
            "video_id": "001", "duration": "short", "domain": "Knowledge", "sub_category": "Law", "url": "https://x",
            "videoID": "fFjv93ACGo8", "question_id": "001-1", "task_type": "Counting Problem", "question": "How many?",
            "options": ["A. One.", "B. Two.", "C. Three.", "D. Four."], "answer": "C",
        },
        prompt="Select the best answer to the following multiple-choice question based on the video.\nHow many?\n"
        "A. One.\nB. Two.\nC. Three.\nD. Four.\nRespond with only the letter of the correct option.",
        references=["C"],
        right="C. Three.",
        id="001-1",
    ),
    "nextqa": PublishedSet(
        columns={  # the widths of the card's types are not known
            "video": _STRING, **_columns(_INT32, "frame_count width height"), "question": _STRING, "answer": _INT32,
            "qid": _INT32, **_columns(_STRING, "type a0 a1 a2 a3 a4"),
        },
        split="test",
        row={
            "video": "4010069381", "frame_count": 369, "question": "how do the two men play the instrument",
            "answer": 0, "qid": 6, "type": "CH", "a0": "roll the handle", "a1": "tap their feet", "a2": "strum",
            "a3": "hit", "a4": "pat",
        },
        prompt="how do the two men play the instrument?\n"
        f"A. roll the handle\nB. tap their feet\nC. strum\nD. hit\nE. pat\n{LETTER}",
        references=["A"],
        right="A",
        id="4010069381-6",
    ),
}  # fmt: skip

NEXTQA_NUMBERS = replace(
    SETS["nextqa"],
    columns={name: _INT64 if kind == _INT32 else kind for name, kind in SETS["nextqa"].columns.items()}
    | {"video": _INT64},
    row=dict(SETS["nextqa"].row) | {"video": 4010069381},
)
"""NExT-QA as pandas makes it of the authors' CSV: videos are numbers."""
