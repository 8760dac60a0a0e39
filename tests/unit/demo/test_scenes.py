"""Scenes and questions follow from the seed, and answers from the scene."""

from __future__ import annotations

import random

import numpy as np
import pytest

from pipeline.demo import clips, scenes, tasks
from pipeline.demo.scenes import Clip, Picture, Thing


@pytest.mark.parametrize("task", tasks.TASKS)
def test_an_example_is_a_function_of_its_seed(task: str) -> None:
    one, again = (tasks.example(task, "held-out", 3, 14) for _ in range(2))
    assert one == again
    for first, second in zip(one.media, again.media, strict=True):
        assert np.array_equal(_draw(first), _draw(second))


@pytest.mark.parametrize("task", tasks.TASKS)
def test_training_and_held_out_examples_come_from_different_seeds(task: str) -> None:
    train = [tasks.example(task, "train", 0, index) for index in range(20)]
    held_out = [tasks.example(task, "held-out", 0, index) for index in range(20)]
    assert train != held_out
    assert [made.media for made in train if made.media] != [made.media for made in held_out if made.media] or not (
        train[0].media
    )


def test_pictures_have_many_sizes_and_objects_in_reading_order() -> None:
    pictures = [tasks.example("describe_image", "train", 0, index).media[0] for index in range(50)]
    assert len({(picture.width, picture.height) for picture in pictures}) > 40
    assert all(
        [thing.place for thing in picture.things] == sorted(thing.place for thing in picture.things)
        for picture in pictures
    )


@pytest.mark.parametrize("shape", scenes.SHAPES)
@pytest.mark.parametrize("place", range(9))
def test_a_thing_is_drawn_in_its_colour_at_its_place_and_nowhere_else(shape: str, place: int) -> None:
    pixels = scenes.draw_picture(Picture((Thing("red", shape, place),), 120, 90))
    painted = (pixels == scenes.COLOURS["red"]).all(-1)
    rows, columns = np.nonzero(painted)
    assert len(rows) > 100
    assert {(int(row) // 30, int(column) // 40) for row, column in zip(rows, columns, strict=True)} == {
        (place // 3, place % 3)
    }


def test_a_clip_rests_moves_and_rests() -> None:
    clip = Clip((Thing("blue", "square", 0), Thing("red", "circle", 6)), 8, 90, 90, fps=8, seconds=2)
    frames = scenes.draw_clip(clip)
    assert [_place_of(frame, "blue") for frame in (frames[0], frames[4], frames[8], frames[15])] == [0, 0, 8, 8]
    assert {_place_of(frame, "red") for frame in frames} == {6}
    assert np.array_equal(scenes.draw_clip(clip, [4, 8]), frames[[4, 8]])


def test_h264_keeps_what_the_frames_show() -> None:
    clip = tasks.example("describe_video", "held-out", 0, 0).media[0]
    assert isinstance(clip, Clip)
    frames = scenes.draw_clip(clip)
    data = clips.encode_clip(frames, clip.fps)
    assert len(data) < 20_000
    chosen = clips.sampled_frames(clip.num_frames, clip.fps)
    decoded = clips.decode_clip(data, chosen)
    assert decoded.shape == (len(chosen), *frames.shape[1:])
    assert np.abs(decoded.astype(int) - frames[chosen]).mean() < 4
    assert np.abs(clips.halve_chroma(frames[chosen]).astype(int) - decoded).mean() < 4


def test_the_same_frames_give_the_same_bytes_whatever_memory_held_before() -> None:
    rng = np.random.default_rng(0)
    for index in range(8):
        clip = tasks.example("describe_video", "held-out", 0, index).media[0]
        assert isinstance(clip, Clip)
        frames = scenes.draw_clip(clip)
        data = clips.encode_clip(frames, clip.fps)
        for _ in range(2):
            freed = [rng.integers(0, 255, size, dtype=np.uint8) for size in rng.integers(1000, 400_000, 20)]
            del freed
            assert clips.encode_clip(frames, clip.fps) == data


@pytest.mark.parametrize(
    ("num_frames", "fps", "expected"),
    [(16, 8, [0, 4, 8, 12]), (20, 10, [0, 5, 10, 15]), (24, 8, [0, 4, 8, 12, 16, 20]), (3, 8, [0, 1])],
)
def test_sampled_frames_follow_the_rule_of_transformers(num_frames: int, fps: float, expected: list[int]) -> None:
    assert clips.sampled_frames(num_frames, fps) == expected


def test_answers_say_what_the_scene_holds() -> None:
    picture = Picture((Thing("red", "circle", 0), Thing("blue", "cross", 0), Thing("red", "square", 4)), 90, 90)
    rng = random.Random(0)
    assert tasks.describe_image(rng, (picture,))[1] == (
        "A red circle at the top left, a blue cross at the top left, a red square at the center."
    )
    counts = dict(tasks.count(rng, (picture,)) for _ in range(2000))
    assert counts["How many objects are there?"] == "Three."
    assert counts["How many red objects are there?"] == "Two."
    assert counts["How many crosses are there?"] == "One."
    assert counts["How many green objects are there?"] == "Zero."
    answers = dict(tasks.yes_no(rng, (picture,)) for _ in range(200))
    assert answers["Is there a red circle?"] == "Yes."
    assert answers["Is there a blue circle?"] == "No."
    assert all((answer == "Yes.") == (question[11:-1] in _names(picture)) for question, answer in answers.items())


@pytest.mark.parametrize("lesson", ["yes_no", "bound"])
def test_yes_and_no_are_right_and_about_as_frequent(lesson: str) -> None:
    rng = random.Random(0)
    answers = []
    for _ in range(400):
        media = tasks.LESSONS[lesson].scenes(rng)
        question, answer = tasks.LESSONS[lesson].ask(rng, media)
        assert (answer == "Yes.") == (question[11:-1] in _names(media[0]))
        answers.append(answer)
    assert 150 < answers.count("Yes.") < 250


def test_comparisons_name_the_right_picture() -> None:
    one = Picture((Thing("green", "square", 2),), 90, 90)
    two = Picture((Thing("red", "circle", 0), Thing("blue", "cross", 1)), 90, 90)
    rng = random.Random(0)
    answers = dict(tasks.compare(rng, (one, two)) for _ in range(100))
    assert answers == {
        "What is in Picture 1?": "A green square.",
        "Which picture has more objects?": "Picture 2.",
        "Which picture shows a green square?": "Picture 1.",
        "Which picture shows a red circle?": "Picture 2.",
        "Which picture shows a blue cross?": "Picture 2.",
    }


def test_a_clip_is_described_by_its_ends() -> None:
    clip = Clip((Thing("blue", "square", 0), Thing("red", "circle", 6)), 8, 90, 90, fps=8, seconds=2)
    assert tasks.describe_video(random.Random(0), (clip,))[1] == (
        "A blue square moves from the top left to the bottom right, a red circle stays at the bottom left."
    )


def test_a_picture_and_a_clip_share_one_object() -> None:
    for index in range(50):
        made = tasks.example("image_and_video", "held-out", 0, index)
        picture, clip = made.media
        (shared,) = _names(picture) & _names(clip)
        assert made.answer == f"A {shared}."


def test_sums_and_orders_are_right() -> None:
    for index in range(100):
        made = tasks.example("text", "held-out", 0, index)
        words = made.question.strip("?").replace(",", "").split()
        if "plus" in words:
            assert made.answer == f"{int(words[2]) + int(words[4])}."
        elif "larger" in words:
            assert made.answer == f"{max(int(words[4]), int(words[6]))}."
        else:
            assert made.answer == f"The {words[7] if words[-1] == 'right' else words[1]} box."


def _names(scene: Picture | Clip) -> set[str]:
    return {thing.name for thing in scene.things}


def _draw(scene: Picture | Clip) -> np.ndarray:
    return scenes.draw_picture(scene) if isinstance(scene, Picture) else scenes.draw_clip(scene)


def _place_of(frame: np.ndarray, colour: str) -> int:
    rows, columns = np.nonzero((frame == scenes.COLOURS[colour]).all(-1))
    return int(rows.mean()) * 3 // frame.shape[0] * 3 + int(columns.mean()) * 3 // frame.shape[1]
