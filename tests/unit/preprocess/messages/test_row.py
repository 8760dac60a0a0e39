"""Rows to conversations: both chat forms, media columns, per-row settings, and what is refused with which words."""

from __future__ import annotations

import base64
import json
from datetime import date, datetime, time
from decimal import Decimal
from typing import Any
from uuid import UUID

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.conversation import Conversation, MediumPart, MediumSettings, Message, Text
from pipeline.errors import ConfigError, ManifestError, MediaMissing, MessageError, RowError, SettingError
from pipeline.preprocess.messages.columns import MessageOptions, check_columns, needed_columns, row_id, unread_settings
from pipeline.preprocess.messages.row import conversation
from pipeline.schema import MANIFEST_COLUMNS, MEDIUM_SETTING_COLUMNS, SAMPLING_COLUMNS

SETTINGS = frozenset({*MEDIUM_SETTING_COLUMNS, *SAMPLING_COLUMNS})
PLAIN = MessageOptions(settings=SETTINGS, allow_missing_media=True)


def read(options: MessageOptions = PLAIN, **row: Any) -> Conversation:
    return conversation(row, options)


def ask(*content: Any, **row: Any) -> tuple[Text | MediumPart, ...]:
    """The parts of a single user turn given as messages."""
    (message,) = read(messages=[{"role": "user", "content": list(content)}], **row).messages
    return message.parts


def image(source: str | bytes, name: str | None = None, **settings: Any) -> MediumPart:
    return MediumPart("image", source, MediumSettings(**settings), name)


def video(source: str | bytes, **settings: Any) -> MediumPart:
    return MediumPart("video", source, MediumSettings(**settings))


def through_arrow(values: list[Any]) -> list[Any]:
    """The values as a Parquet column would give them back: every struct has all keys."""
    return list(pa.array(values).to_pylist())


# ---------------------------------------------------------------------------------------------------------------------
# Media columns and prompt


def test_images_come_first_then_videos_then_the_prompt() -> None:
    row = read(prompt="Compare.", video="c.mp4", images=["b.jpg", "d.jpg"], image="a.jpg", videos=["e.mp4"])
    expected = (image("a.jpg"), image("b.jpg"), image("d.jpg"), video("c.mp4"), video("e.mp4"), Text("Compare."))
    assert row == Conversation((Message("user", expected),))


@pytest.mark.parametrize(
    ("value", "sources"),
    [
        ("a.jpg", ["a.jpg"]),
        ("s3://bucket/a.jpg", ["s3://bucket/a.jpg"]),
        ("data:image/png;base64,AAAA", ["data:image/png;base64,AAAA"]),
        (b"\xff\xd8", [b"\xff\xd8"]),
        ({"bytes": b"\xff\xd8", "path": "a.jpg"}, [b"\xff\xd8"]),
        ({"bytes": None, "path": "a.jpg"}, ["a.jpg"]),
        (["a.jpg", b"\xff", {"bytes": None, "path": "c.jpg"}], ["a.jpg", b"\xff", "c.jpg"]),
        (("a.jpg", "b.jpg"), ["a.jpg", "b.jpg"]),
        ('["a.jpg", "b.jpg"]', ["a.jpg", "b.jpg"]),
        ('{"path": "a.jpg", "bytes": null}', ["a.jpg"]),
        ("[1] holiday.jpg", ["[1] holiday.jpg"]),
        ([], []),
        (None, []),
        ("", []),
        (float("nan"), []),
    ],
)
def test_a_medium_may_be_a_uri_bytes_a_struct_or_a_list_of_them(value: Any, sources: list[str | bytes]) -> None:
    for column in ("image", "images", "video", "videos"):
        media = conversation({column: value, "prompt": "What?"}, PLAIN).media
        assert [medium.source for medium in media] == sources
        assert {medium.kind for medium in media} <= {column.rstrip("s")}


def test_text_only_and_media_only_rows_are_fine() -> None:
    assert read(prompt="Two plus two?").messages == (Message("user", (Text("Two plus two?"),)),)
    assert read(image="a.jpg").messages == (Message("user", (image("a.jpg"),)),)


@pytest.mark.parametrize("row", [{}, {"prompt": None}, {"prompt": "  "}, {"prompt": "", "images": []}])
def test_a_row_that_asks_nothing_is_refused(row: dict[str, Any]) -> None:
    with pytest.raises(MessageError, match="asks nothing"):
        conversation(row, PLAIN)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"image": 7}, "image must be a URI, bytes or a struct of bytes and path; found 7"),
        ({"images": ["a.jpg", None]}, r"images\[1\] must be a URI.*found null"),
        ({"image": "['a.jpg', 'b.jpg']"}, "looks like a list but is not JSON.*double quotes"),
        ({"image": {"file": "a.jpg"}}, "has the keys file; allowed: bytes, path, url"),
        ({"image": '{"bytes": "AAAA"}'}, "JSON can't hold bytes"),
        ({"prompt": ["What?"]}, "prompt must be text"),
        ({"prompt": "x", "system": 3}, "system must be text; found 3"),
    ],
)
def test_a_column_of_the_wrong_form_says_what_was_found(row: dict[str, Any], words: str) -> None:
    with pytest.raises(MessageError, match=words):
        conversation(row, PLAIN)


def test_columns_may_have_other_names() -> None:
    options = MessageOptions(columns={"image": "url", "prompt": "question", "fps": "rate"})
    row = conversation({"url": "a.jpg", "question": "What?", "image": "not this", "prompt": "nor this"}, options)
    assert row.messages[0].parts == (image("a.jpg"), Text("What?"))


def test_a_column_can_be_switched_off() -> None:
    options = MessageOptions(columns={"image": ""})
    assert conversation({"image": "thumbnail.jpg", "prompt": "Why?"}, options).media == ()


def test_a_line_the_manifest_could_not_read_is_an_error_row() -> None:
    with pytest.raises(MessageError, match="the line is not JSON"):
        read(prompt="x", _manifest_error="the line is not JSON: ...")
    read(prompt="x", _manifest_error=None)
    read(prompt="x", _manifest_error=float("nan"))


# ---------------------------------------------------------------------------------------------------------------------
# Messages


def test_turns_keep_their_order_and_texts_and_media_keep_theirs() -> None:
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "First "}, {"type": "image", "image": "a.jpg"}, "then?"]},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": "Sure?"},
    ]
    expected = (
        Message("system", (Text("Be brief."),)),
        Message("user", (Text("First "), image("a.jpg"), Text("then?"))),
        Message("assistant", (Text("A cat."),)),
        Message("user", (Text("Sure?"),)),
    )
    assert read(messages=turns).messages == expected
    assert read(messages=json.dumps(turns)).messages == expected


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ({"type": "text", "text": "hi"}, Text("hi")),
        ({"type": "input_text", "text": "hi"}, Text("hi")),
        ({"text": "hi"}, Text("hi")),
        ({"type": "image_url", "image_url": {"url": "a.jpg"}}, image("a.jpg")),
        ({"type": "image_url", "image_url": {"url": "a.jpg", "detail": "auto"}}, image("a.jpg")),
        ({"type": "image_url", "image_url": "a.jpg"}, image("a.jpg")),
        ({"type": "input_image", "image_url": "a.jpg"}, image("a.jpg")),
        ({"type": "video_url", "video_url": {"url": "a.mp4"}}, video("a.mp4")),
        ({"type": "video_url", "video_url": "a.mp4"}, video("a.mp4")),
        ({"type": "image", "url": "a.jpg"}, image("a.jpg")),
        ({"type": "image", "path": "a.jpg"}, image("a.jpg")),
        ({"type": "image", "image": "a.jpg"}, image("a.jpg")),
        ({"type": "image", "image": b"\xff"}, image(b"\xff")),
        ({"type": "image", "bytes": b"\xff", "path": "a.jpg"}, image(b"\xff", "a.jpg")),
        ({"type": "image", "image": {"bytes": b"\xff", "path": "a.jpg"}}, image(b"\xff", "a.jpg")),
        ({"type": "image", "image": {"bytes": None, "path": "a.jpg"}}, image("a.jpg")),
        ({"type": "image", "base64": base64.b64encode(b"\xff").decode()}, image(b"\xff")),
        ({"type": "video", "video": "a.mp4"}, video("a.mp4")),
        ({"type": "video", "path": "a.mp4"}, video("a.mp4")),
        ({"image": "a.jpg"}, image("a.jpg")),
        ({"video": "a.mp4", "fps": 1.0}, video("a.mp4", fps=1.0)),
        (
            {"image": "a.jpg", "min_pixels": 3136, "max_pixels": 50176.0},
            image("a.jpg", min_pixels=3136, max_pixels=50176),
        ),
        ({"type": "video", "video": "a.mp4", "nframes": 8}, video("a.mp4", num_frames=8)),
        ({"type": "video", "video": "a.mp4", "num_frames": 8}, video("a.mp4", num_frames=8)),
        (
            {"video": "a.mp4", "resized_height": 280, "resized_width": 420, "fps": 1, "max_frames": 8},
            video("a.mp4", resized_height=280, resized_width=420, fps=1.0, max_frames=8),
        ),
        (
            {"video": ["1.jpg", "2.jpg"], "sample_fps": 2, "raw_fps": 30},
            MediumPart("video", ("1.jpg", "2.jpg"), MediumSettings(fps=2.0)),
        ),
        ({"video": "a.mp4", "total_pixels": 20480, "min_frames": 6}, video("a.mp4", total_pixels=20480, min_frames=6)),
        (
            {"image": "a.jpg", "resized_height": 28, "resized_width": 56},
            image("a.jpg", resized_height=28, resized_width=56),
        ),
        ({"video": "a.mp4", "video_start": 1, "video_end": 2.5}, video("a.mp4", start_s=1.0, end_s=2.5)),
        ({"video": "a.mp4", "start_s": 1, "end_s": 2.5}, video("a.mp4", start_s=1.0, end_s=2.5)),
        ({"type": "video_url", "video_url": {"url": "a.mp4", "fps": 2}}, video("a.mp4", fps=2.0)),
        ({"type": "image", "url": "a.jpg", "cache_control": {"type": "ephemeral"}}, image("a.jpg")),
    ],
)
def test_each_form_of_a_part_is_understood(part: dict[str, Any], expected: Text | MediumPart) -> None:
    assert ask("see", part) == (Text("see"), expected)
    # Arrow pads the part with the keys of its neighbours.
    padded = dict.fromkeys(("text", "image", "video", "image_url", "fps", "nframes", "bytes", "path")) | part
    assert ask("see", padded) == (Text("see"), expected)


def test_structs_that_went_through_arrow_mean_what_they_meant() -> None:
    turns = [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": "a.jpg", "min_pixels": 3136},
                {"type": "video", "video": "b.mp4", "fps": 1.0},
                {"type": "image_url", "image_url": {"url": "c.jpg"}},
                {"type": "text", "text": "What do they share?"},
            ],
        }
    ]
    (through,) = through_arrow([turns])
    assert set(through[0]["content"][3]) > {"type", "text", "fps"}
    assert read(messages=through) == read(messages=turns)
    nulls = {"type": "text", "text": "x", "image_url": {"url": None}, "image": {"bytes": None, "path": None}}
    assert ask(nulls) == (Text("x"),)


def test_content_may_be_plain_text_in_arrow() -> None:
    (through,) = through_arrow([[{"role": "user", "content": "Hello"}]])
    assert read(messages=through).messages == (Message("user", (Text("Hello"),)),)


def test_parts_without_a_source_take_the_rows_media_in_order() -> None:
    parts = ask(
        {"type": "image"}, "and", {"type": "video", "fps": 1}, {"type": "image", "max_pixels": 9999},
        image="a.jpg", images=[{"bytes": b"\xff", "path": "b.jpg"}], videos=["c.mp4"],
    )  # fmt: skip
    assert parts == (image("a.jpg"), Text("and"), video("c.mp4", fps=1.0), image(b"\xff", "b.jpg", max_pixels=9999))


def test_parts_with_and_without_a_source_may_be_mixed() -> None:
    parts = ask({"type": "image", "url": "own.jpg"}, {"type": "image"}, images=["row.jpg"])
    assert parts == (image("own.jpg"), image("row.jpg"))


@pytest.mark.parametrize(("placeholders", "media"), [(2, 1), (0, 1), (1, 0), (1, 3)])
def test_placeholders_and_media_must_pair_off(placeholders: int, media: int) -> None:
    with pytest.raises(MessageError, match=f"has {placeholders} image parts without a source.* has {media} in image"):
        ask("look", *[{"type": "image"}] * placeholders, images=["a.jpg"] * media)


def test_the_messages_win_over_prompt_and_template() -> None:
    options = MessageOptions(template="Describe {thing}.")
    turns = [{"role": "user", "content": "Mine"}]
    assert conversation({"messages": turns, "prompt": "Not this", "thing": None}, options).messages == (
        Message("user", (Text("Mine"),)),
    )


def test_the_system_prompt_comes_from_the_messages_then_the_row_then_the_config() -> None:
    options = MessageOptions(system="config")
    turns = [{"role": "user", "content": "Hi"}]
    own = [{"role": "system", "content": "messages"}, *turns]

    def system(**row: Any) -> str:
        first = conversation(row, options).messages[0]
        assert first.role == "system" and isinstance(first.parts[0], Text)
        return first.parts[0].text

    assert system(messages=own, system="row") == "messages"
    assert system(messages=turns, system="row") == "row"
    assert system(prompt="Hi", system="row") == "row"
    assert system(prompt="Hi", system=None) == "config"
    assert read(prompt="Hi").messages[0].role == "user"


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("not json", "messages is not JSON"),
        ("{}", "messages must be a list of turns"),
        ([], "empty list"),
        (["hi"], r"messages\[0\] must be an object"),
        ([{"role": "robot", "content": "x"}], "role 'robot'; expected a role: system, user, assistant"),
        ([{"from": "human", "value": "x"}], "has the keys from, value; expected a role"),
        ([{"role": "user", "content": None}], r"messages\[0\].content must be text or a list of parts; found null"),
        ([{"role": "user", "content": []}], "user turn without text or media"),
        ([{"role": "user", "content": " "}], "user turn without text or media"),
        ([{"role": "user", "content": [7]}], r"messages\[0\].content\[0\] must be text or an object"),
        ([{"role": "user", "content": [{"type": "audio", "audio": "a.mp3"}]}], "type 'audio'; allowed: text, image"),
        ([{"role": "user", "content": [{"type": ["text"], "text": "x"}]}], r"type \['text'\]; allowed: text, image"),
        ([{"role": ["user"], "content": "x"}], r"role \['user'\]; expected a role"),
        ([{"role": "user", "content": [{"url": "a.jpg"}]}], "has no type"),
        ([{"role": "user", "content": [{"type": "text"}]}], "text part whose text is null"),
        ([{"role": "user", "content": [{"type": "text", "text": "x", "image": "a.jpg"}]}], "type text but also image"),
        ([{"role": "user", "content": [{"type": "image", "url": "a", "path": "b"}]}], "several sources: url, path"),
        ([{"role": "user", "content": [{"type": "image", "image": 5}]}], "must be a URI, a path or bytes; found 5"),
        ([{"role": "user", "content": [{"type": "image", "base64": "?"}]}], "is not base64"),
        ([{"role": "user", "content": [{"type": "image", "bytes": "AA"}]}], "JSON can't hold bytes"),
        ([{"role": "user", "content": [{"type": "video", "video": ["1.jpg", 2]}]}], r"video\[1\] must be a URI"),
        ([{"role": "user", "content": [{"type": "image", "image": ["1.jpg", "2.jpg"]}]}], "must be a URI, a path"),
        ([{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}], "last turn is the assistant's"),
        ([{"role": "system", "content": "x"}], "last turn is the system's"),
        ([{"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}], "tool_calls"),
    ],
)
def test_messages_that_make_no_sense_say_where_and_what(value: Any, words: str) -> None:
    with pytest.raises(MessageError, match=words):
        read(messages=value)


# ---------------------------------------------------------------------------------------------------------------------
# Settings


def test_a_rows_settings_reach_all_media_they_apply_to() -> None:
    row = read(image="a.jpg", video="b.mp4", prompt="?", min_pixels=3136.0, fps=1, end_s="2.5", max_pixels=50176)
    assert row.media == (
        image("a.jpg", min_pixels=3136, max_pixels=50176),
        video("b.mp4", min_pixels=3136, max_pixels=50176, fps=1.0, end_s=2.5),
    )


def test_a_parts_settings_win_over_the_rows() -> None:
    parts = ask(
        {"video": "a.mp4", "num_frames": 8}, {"video": "b.mp4", "fps": 4}, {"video": "c.mp4"}, fps=1, start_s=0.5
    )
    assert parts == (
        video("a.mp4", num_frames=8, start_s=0.5),
        video("b.mp4", fps=4.0, start_s=0.5),
        video("c.mp4", fps=1.0, start_s=0.5),
    )


@pytest.mark.parametrize("null", [None, float("nan"), ""])
def test_null_settings_are_not_set(null: Any) -> None:
    row = read(image="a.jpg", fps=null, min_pixels=null, temperature=null, stop_strings=null, n=null)
    assert row == Conversation((Message("user", (image("a.jpg"),)),))


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"image": "a.jpg", "fps": 1}, "fps is 1.0 on a row without videos"),
        ({"image": "a.jpg", "start_s": 1}, "start_s is 1.0 on a row without videos"),
        ({"prompt": "x", "min_pixels": 9}, "min_pixels is 9 on a row without media"),
        ({"video": "a.mp4", "fps": 0}, "fps is 0; allowed: a number, above 0"),
        ({"video": "a.mp4", "fps": "fast"}, "fps is 'fast'; allowed: a number, above 0"),
        ({"video": "a.mp4", "fps": float("inf")}, "fps is inf"),
        ({"video": "a.mp4", "fps": True}, "fps is True"),
        ({"video": "a.mp4", "fps": 1, "num_frames": 4}, "exclude each other"),
        ({"video": "a.mp4", "fps": "nan"}, "fps is 'nan'; allowed"),
        ({"video": "a.mp4", "num_frames": 2.5}, "num_frames is 2.5; allowed: a whole number"),
        ({"video": "a.mp4", "num_frames": 1}, "num_frames is 1; allowed: a whole number, 2 or more"),
        ({"video": "a.mp4", "start_s": 3, "end_s": 3}, "must end after it starts"),
        ({"video": "a.mp4", "start_s": 3, "end_s": 1}, "must end after it starts"),
        ({"video": "a.mp4", "end_s": 0}, "end_s is 0; allowed: a number, above 0"),
        ({"video": "a.mp4", "start_s": -1}, "start_s is -1"),
        ({"image": "a.jpg", "min_pixels": 100, "max_pixels": 50}, "min_pixels is 100 and max_pixels 50"),
        ({"image": "a.jpg", "min_pixels": -1}, "min_pixels is -1"),
    ],
)
def test_settings_that_are_wrong_or_cannot_be_applied_are_refused(row: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingError, match=words):
        conversation(row, PLAIN)


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"type": "image", "image": "a.jpg", "fps": 1}, "fps on an image"),
        ({"type": "image", "image": "a.jpg", "num_frames": 4}, "num_frames on an image"),
        ({"type": "image", "image": "a.jpg", "start_s": 0}, "start_s on an image"),
        ({"type": "image", "image": "a.jpg", "min_pixels": 10_000, "max_pixels": 5000}, "must not be larger"),
        ({"type": "text", "text": "x", "fps": 1}, "on a text part"),
        ({"type": "image", "image": "a.jpg", "resized_depth": 280}, "resized_depth.*can't be applied; allowed"),
        ({"type": "image_url", "image_url": {"url": "a.jpg", "detail": "low"}}, "set min_pixels or max_pixels"),
        ({"type": "video", "video": "a.mp4", "nframes": 4, "num_frames": 4}, "twice"),
        ({"type": "video", "video": "a.mp4", "nframes": 4, "max_frames": 4}, "max_frames applies to sampling by fps"),
        ({"type": "video", "video": "a.mp4", "max_frames": 1}, "allowed: a whole number, 2 or more"),
        ({"type": "image", "image": "a.jpg", "resized_height": 280}, "resized_height and resized_width go together"),
        ({"image": "a.jpg", "resized_height": 28, "resized_width": 28, "max_pixels": 784}, "exclude each other"),
        ({"type": "image", "image": "a.jpg", "total_pixels": 20480}, "total_pixels on an image"),
        ({"type": "video", "video": "a.mp4", "fps": "x"}, r"messages\[0\].content\[0\].fps is 'x'"),
    ],
)
def test_settings_inside_parts_are_checked_too(part: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingError, match=words):
        ask(part)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("max_tokens", 64, 64),
        ("max_tokens", 64.0, 64),
        ("max_tokens", "64", 64),
        ("max_tokens", "64.0", 64),
        ("max_tokens", Decimal("64"), 64),
        ("max_tokens", Decimal("64.000"), 64),
        ("max_tokens", np.int64(64), 64),
        ("max_tokens", np.float32(64), 64),
        ("seed", Decimal(2**62 + 1), 2**62 + 1),
        ("seed", str(2**62 + 1), 2**62 + 1),
        ("temperature", Decimal("0.7"), 0.7),
        ("temperature", np.float64(0.7), 0.7),
        ("stop_token_ids", [Decimal(1), 2.0, np.int32(3)], (1, 2, 3)),
        ("stop_token_ids", np.array([1, 2]), (1, 2)),
        ("stop_token_ids", Decimal(7), (7,)),
        ("stop_token_ids", 7.0, (7,)),
        ("ignore_eos", Decimal(1), True),
        ("ignore_eos", np.True_, True),
        ("min_tokens", 0, 0),
        ("temperature", 0, 0.0),
        ("temperature", "0.7", 0.7),
        ("top_k", 50, 50),
        ("top_p", 1, 1.0),
        ("min_p", 0.05, 0.05),
        ("repetition_penalty", 1.1, 1.1),
        ("presence_penalty", Decimal("-0.5"), -0.5),
        ("n", 3, 3),
        ("seed", 2**62, 2**62),
        ("stop_strings", "END", ("END",)),
        ("stop_strings", ["a", "b"], ("a", "b")),
        ("stop_strings", '["a", "b"]', ("a", "b")),
        ("stop_token_ids", [1, 2], (1, 2)),
        ("stop_token_ids", "[1, 2]", (1, 2)),
        ("stop_token_ids", 7, (7,)),
        ("ignore_eos", True, True),
        ("ignore_eos", 0, False),
        ("ignore_eos", "true", True),
        ("ignore_eos", 1.0, True),
        ("logprobs", False, False),
        ("stop_on_repetition", True, True),
    ],
)
def test_sampling_columns_become_sampling_parameters(name: str, value: Any, expected: Any) -> None:
    sampling = conversation({"prompt": "x", name: value}, PLAIN).sampling
    assert sampling == {name: expected}
    assert type(sampling[name]) is type(expected)


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("max_tokens", 0, "a whole number, 1 or more"),
        ("max_tokens", 1.5, "a whole number"),
        ("max_tokens", "many", "a whole number"),
        ("max_tokens", Decimal("64.5"), "a whole number"),
        ("max_tokens", "1e999999999", "a whole number"),
        ("max_tokens", Decimal("1e999999"), "a whole number"),
        ("max_tokens", "nan", "a whole number"),
        ("max_tokens", "sNaN", "a whole number"),
        ("temperature", "sNaN", "a number, 0"),
        ("temperature", "1e999", "a number, 0"),
        ("max_tokens", True, "a whole number"),
        ("temperature", -1, "a number, 0"),
        ("temperature", [0.5], "a number, 0"),
        ("top_p", 0, "a number, above 0, up to 1"),
        ("top_p", 1.5, "a number, above 0, up to 1"),
        ("min_p", 2, "a number, 0 to 1"),
        ("repetition_penalty", 0, "a number, above 0"),
        ("presence_penalty", -2.5, "a number, -2 to 2"),
        ("n", 10**9, "a whole number, 1 to 16384"),  # the engine has a sequence for each
        ("seed", -1, "a whole number, 0 to"),
        ("seed", 2**63, "a whole number, 0 to"),
        ("stop_strings", [""], "text or a list of texts"),
        ("stop_strings", [3], "text or a list of texts"),
        ("stop_token_ids", ["x"], "a list of token ids: whole numbers, 0 or more"),
        ("stop_token_ids", [1, -1], "a list of token ids"),
        ("stop_token_ids", 0.5, "a list of token ids"),
        ("ignore_eos", "maybe", "true, false"),
        ("logprobs", 5, "true, false"),
    ],
)
def test_a_wrong_sampling_value_says_name_value_and_what_is_allowed(name: str, value: Any, allowed: str) -> None:
    with pytest.raises(SettingError) as caught:
        conversation({"prompt": "x", name: value}, PLAIN)
    assert str(caught.value).startswith(name) and f"allowed: {allowed}" in str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# Templates


def test_a_template_fills_in_the_rows_columns() -> None:
    options = MessageOptions(template="Describe this {category} image: {{{n_th}}}.")
    assert conversation({"image": "a.jpg", "category": "street", "n_th": 3}, options).messages[0].parts == (
        image("a.jpg"),
        Text("Describe this street image: {3}."),
    )
    assert conversation({"prompt": "Own", "category": None}, options).messages[0].parts == (Text("Own"),)


def test_a_template_can_be_the_same_for_all_rows() -> None:
    assert conversation({"image": "a.jpg"}, MessageOptions(template="Describe it.")).messages[0].parts[1] == Text(
        "Describe it."
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (3, "3"),
        (3.0, "3"),
        (2.5, "2.5"),
        (1e300, "1e+300"),
        (Decimal("3.000"), "3"),
        (Decimal("19.90"), "19.90"),
        (np.int16(3), "3"),
        (date(2026, 1, 31), "2026-01-31"),
        (datetime(2026, 1, 31, 12, 30), "2026-01-31 12:30:00"),
        (time(12, 30), "12:30:00"),
        (UUID(int=7), "00000000-0000-0000-0000-000000000007"),
    ],
)
def test_a_template_writes_numbers_and_dates_as_a_person_would(value: Any, text: str) -> None:
    (message,) = conversation({"x": value}, MessageOptions(template="<{x}>")).messages
    assert message.parts == (Text(f"<{text}>"),)


@pytest.mark.parametrize("value", [None, float("nan"), b"x", ["x"]])
def test_a_template_column_without_text_is_an_error_row(value: Any) -> None:
    with pytest.raises(MessageError, match="category"):
        conversation({"category": value}, MessageOptions(template="Describe this {category}."))


@pytest.mark.parametrize(
    "template", ["{a.__class__}", "{a[0]}", "{a!r}", "{a:>9999999999}", "{}", "{a:{b}}", "{a", "a}", "{ }"]
)
def test_a_template_is_no_way_into_python(template: str) -> None:
    with pytest.raises(ConfigError, match=r"prompt\.template"):
        check_columns(["a", "b", "image"], MessageOptions(template=template))
    with pytest.raises(ConfigError):
        conversation({"a": "x", "image": "a.jpg"}, MessageOptions(template=template))


# ---------------------------------------------------------------------------------------------------------------------
# Columns and ids


@pytest.mark.parametrize("name", ["messages", "image", "images", "video", "videos", "prompt"])
def test_one_content_column_is_enough(name: str) -> None:
    check_columns(["id", name], PLAIN)


def test_no_usable_column_names_what_was_found_and_looked_for() -> None:
    with pytest.raises(ManifestError, match=r"found url, caption; looked for messages, image, .*input\.columns"):
        check_columns(["url", "caption"], PLAIN)
    with pytest.raises(ManifestError, match="no usable column"):
        check_columns(["url"], MessageOptions(template="Describe it."))
    check_columns(["url"], MessageOptions(columns={"image": "url"}))
    check_columns(["topic"], MessageOptions(template="Write about {topic}."))


def test_mapped_and_template_columns_must_exist() -> None:
    with pytest.raises(ManifestError, match=r"input.columns.image names the column 'uri'; the manifest's columns: url"):
        check_columns(["url"], MessageOptions(columns={"image": "uri"}))
    with pytest.raises(ManifestError, match=r"prompt.template names the column 'topic'; the manifest's columns: image"):
        check_columns(["image"], MessageOptions(template="{topic}"))


def test_only_the_columns_that_matter_are_needed() -> None:
    options = MessageOptions({"image": "url", "prompt": ""}, "{topic}", settings=SETTINGS)
    names = ["key", "url", "prompt", "topic", "fps", "label", "id", "image", "seed"]
    assert needed_columns(names, options) == ["url", "topic", "fps", "id", "seed"]


def test_rows_that_pandas_wrote_are_read_as_they_were_meant() -> None:
    frame = pd.DataFrame(
        {
            "images": [np.array(["a.jpg", "b.jpg"]), None],
            "prompt": ["What?", "Why?"],
            "max_tokens": [64, None],
            "seed": pd.array([7, None], dtype="Int64"),
            "ignore_eos": [True, None],
            "temperature": np.array([0.5, np.nan], dtype=np.float32),
            "stop_strings": [np.array(["x"]), None],
        }
    )
    rows = pa.Table.from_pandas(frame).to_pylist()
    assert conversation(rows[0], PLAIN) == Conversation(
        (Message("user", (image("a.jpg"), image("b.jpg"), Text("What?"))),),
        {"max_tokens": 64, "seed": 7, "ignore_eos": True, "temperature": 0.5, "stop_strings": ("x",)},
    )
    assert conversation(rows[1], PLAIN) == Conversation((Message("user", (Text("Why?"),)),))


def test_half_a_surrogate_pair_in_json_is_an_error_row() -> None:
    turns = json.dumps([{"role": "user", "content": "\U0001f600"}])
    assert read(messages=turns).messages[0].parts == (Text("\U0001f600"),)
    broken = turns.replace("\\ude00", "")
    assert broken != turns
    with pytest.raises(MessageError, match=r"messages is not JSON: it holds '\\ud83d', half of a character"):
        read(messages=broken)
    with pytest.raises(MessageError, match="half of a character"):
        read(image='["\\ud83d.jpg"]')


def test_text_that_nests_too_deeply_is_an_error_row_or_plain_text() -> None:
    deep = "[" * 200_000
    assert read(prompt="x", stop_strings=deep).sampling == {"stop_strings": (deep,)}
    for column in ("messages", "image"):
        with pytest.raises(MessageError, match="is not JSON"):
            conversation({column: deep + "]"}, PLAIN)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("a", "a"),
        (7, "7"),
        (7.0, "7"),
        (7.5, "7.5"),
        (None, "2:31"),
        (float("nan"), "2:31"),
        ("", "2:31"),
        (b"row 7", "row 7"),
        (b"\xfa\x01", "fa01"),
        (bytes(range(240, 256)), "f0f1f2f3-f4f5-f6f7-f8f9-fafbfcfdfeff"),
        (UUID(int=7), "00000000-0000-0000-0000-000000000007"),
        (Decimal("9007199254740993"), "9007199254740993"),
        (Decimal("7.000000000"), "7"),
        (Decimal("7.50"), "7.50"),
        (np.int64(7), "7"),
        (np.float32(7.0), "7"),
        (date(2026, 1, 31), "2026-01-31"),
    ],
)
def test_a_row_without_id_is_called_by_its_place(value: Any, expected: str) -> None:
    assert row_id({"id": value}, PLAIN, (2, 31)) == expected
    assert row_id({"key": value}, MessageOptions(columns={"id": "key"}), (2, 31)) == expected


# ---------------------------------------------------------------------------------------------------------------------
# Many inputs

_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.binary(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["role", "content", "type", "text", "image", "url", "bytes", "path", "fps", "image_url", "x"]
            ),
            inner | st.sampled_from(["user", "text", "image", "video", "assistant"]),
            max_size=4,
        )
    ),
    max_leaves=12,
)


@settings(deadline=None)  # a busy machine is no failure
@given(st.dictionaries(st.sampled_from([*MANIFEST_COLUMNS, "_manifest_error"]), _VALUES, max_size=4))
def test_any_row_is_a_conversation_or_a_row_error_and_nothing_else(row: dict[str, Any]) -> None:
    row_id(row, PLAIN, (0, 0))
    try:
        result = conversation(row, PLAIN)
    except RowError:
        return
    assert result.messages[-1].role == "user"
    assert all(isinstance(medium.source, str | bytes) and medium.source for medium in result.media)


_PARTS = st.lists(
    st.one_of(
        st.text(min_size=1, max_size=5).filter(str.strip).map(Text),
        st.tuples(st.sampled_from(["image", "video"]), st.text("abc", min_size=1, max_size=3)).map(
            lambda pair: MediumPart(pair[0], pair[1])  # type: ignore[arg-type]
        ),
    ),
    min_size=1,
    max_size=6,
)


@settings(deadline=None)
@given(_PARTS, st.sampled_from(["openai", "hugging face", "placeholders"]), st.booleans())
def test_both_chat_forms_give_the_same_conversation(parts: list[Text | MediumPart], form: str, as_json: bool) -> None:
    def spell(part: Text | MediumPart) -> dict[str, Any]:
        if isinstance(part, Text):
            return {"type": "text", "text": part.text}
        if form == "openai":
            return {"type": f"{part.kind}_url", f"{part.kind}_url": {"url": part.source}}
        return {"type": part.kind} if form == "placeholders" else {"type": part.kind, part.kind: part.source}

    turns: Any = [{"role": "user", "content": [spell(part) for part in parts]}]
    row: dict[str, Any] = {"messages": json.dumps(turns) if as_json else through_arrow([turns])[0]}
    if form == "placeholders":
        media = [part for part in parts if isinstance(part, MediumPart)]
        row["images"] = [part.source for part in media if part.kind == "image"]
        row["videos"] = [part.source for part in media if part.kind == "video"]
    assert conversation(row, PLAIN).messages == (Message("user", tuple(parts)),)


@pytest.mark.parametrize(
    "row",
    [{"image": None}, {"image": ""}, {"image": float("nan")}, {"images": []}, {"image": None, "video": None}],
)
def test_a_row_without_its_picture_is_an_error_unless_the_config_means_it(row: dict[str, Any]) -> None:
    with pytest.raises(MediaMissing, match="allow_missing_media true"):
        conversation({**row, "prompt": "What is it?"}, MessageOptions())
    (message,) = conversation({**row, "prompt": "What is it?"}, MessageOptions(allow_missing_media=True)).messages
    assert message.parts == (Text("What is it?"),)


def test_rows_that_need_no_media_column_miss_nothing() -> None:
    for row in (
        {"prompt": "Name a colour."},
        {"image": None, "video": "a.mp4", "prompt": "?"},
        {"image": None, "messages": [{"role": "user", "content": "Name a colour."}]},
    ):
        conversation(row, MessageOptions())
    conversation({"image": None, "prompt": "?"}, MessageOptions(columns={"image": ""}))


def test_a_column_that_happens_to_have_a_setting_s_name_changes_nothing_and_is_named() -> None:
    row = {"prompt": "x", "n": 4, "max_tokens": 7, "rate": 0.5, "temperature": 1.0}
    assert conversation(row, MessageOptions()).sampling == {}
    options = MessageOptions(settings=frozenset({"max_tokens"}), columns={"temperature": "rate"})
    assert conversation(row, options).sampling == {"max_tokens": 7, "temperature": 0.5}
    assert unread_settings(list(row), options) == ["n"]
    assert needed_columns(list(row), options) == ["prompt", "max_tokens", "rate"]
