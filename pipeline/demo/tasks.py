"""Seven kinds of question about synthetic scenes, with exactly known answers.

Knows scenes and text; not files, tokens or models. `example(task, split, seed, index)` is a pure function: training
draws from the split "train", demo manifests and evaluation from "held-out", so that no seed serves both.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from pipeline.demo.scenes import COLOURS, PLACES, SHAPES, Clip, Picture, random_clip, random_names, random_picture

Split: TypeAlias = Literal["train", "held-out"]
Scene: TypeAlias = Picture | Clip
Name: TypeAlias = tuple[str, str]

NUMBERS = ("zero", "one", "two", "three")
PLAIN_PROMPTS = ("Describe the image.", "Describe the video.", "How many objects are there?")
"""Questions that suit any scene of their kind, and so may be a job's prompt."""


@dataclass(frozen=True)
class Example:
    """One question: its media first, in order, then its text; and the one right answer."""

    task: str
    media: tuple[Scene, ...]
    question: str
    answer: str


@dataclass(frozen=True)
class Task:
    """A kind of question: scenes that suit it, and a question about given scenes with its answer."""

    scenes: Callable[[random.Random], tuple[Scene, ...]]
    ask: Callable[[random.Random, tuple[Scene, ...]], tuple[str, str]]


def example(task: str, split: Split, seed: int, index: int) -> Example:
    """The example number `index` of a task; the same arguments always give the same one."""
    rng = random.Random(f"{split}/{seed}/{task}/{index}")
    media = TASKS[task].scenes(rng)
    return Example(task, media, *TASKS[task].ask(rng, media))


def picture_of_different(rng: random.Random) -> tuple[Scene, ...]:
    """One picture of one to three objects, no two alike."""
    return (random_picture(rng, random_names(rng, rng.randint(1, 3))),)


def picture_of_similar(rng: random.Random, num_objects: int | None = None) -> tuple[Scene, ...]:
    """One picture of one to three objects, or so many, of two colours and two shapes: something to count."""
    colours, shapes = rng.sample(list(COLOURS), 2), rng.sample(SHAPES, 2)
    number = num_objects or rng.randint(1, 3)
    return (random_picture(rng, [(rng.choice(colours), rng.choice(shapes)) for _ in range(number)]),)


def clip(rng: random.Random) -> tuple[Scene, ...]:
    """One clip of a moving object and perhaps one that stays."""
    return (random_clip(rng, random_names(rng, rng.randint(1, 2))),)


def clip_of_two(rng: random.Random) -> tuple[Scene, ...]:
    """One clip of a moving object and one that stays."""
    return (random_clip(rng, random_names(rng, 2)),)


def two_pictures(rng: random.Random) -> tuple[Scene, ...]:
    """Two pictures without an object in common; one of them may hold a single object."""
    first, second = rng.choice(((1, 1), (1, 2), (2, 1), (1, 3), (3, 1), (2, 3), (3, 2)))
    names = random_names(rng, first + second)
    return random_picture(rng, names[:first]), random_picture(rng, names[first:])


def picture_and_clip(rng: random.Random) -> tuple[Scene, ...]:
    """A picture and a clip with one object in common; all the others differ in colour from it and from each other."""
    shared, *others = [(colour, rng.choice(SHAPES)) for colour in rng.sample(list(COLOURS), len(COLOURS))]
    picture_names, clip_names = [shared, *others[: rng.randint(1, 2)]], [shared, others[2]]
    rng.shuffle(picture_names)
    rng.shuffle(clip_names)
    return random_picture(rng, picture_names), random_clip(rng, clip_names)


def nothing(rng: random.Random) -> tuple[Scene, ...]:
    return ()


def describe_image(rng: random.Random, media: tuple[Scene, ...]) -> tuple[str, str]:
    """Every object with its colour, shape and place, in reading order."""
    (picture,) = media
    answer = ", ".join(f"a {thing.name} at the {PLACES[thing.place]}" for thing in picture.things)
    return PLAIN_PROMPTS[0], _sentence(answer)


def describe_video(rng: random.Random, media: tuple[Scene, ...]) -> tuple[str, str]:
    """Which object moves from where to where, and which one stays."""
    (moving,) = media
    assert isinstance(moving, Clip)
    mover, *others = moving.things
    answer = f"a {mover.name} moves from the {PLACES[mover.place]} to the {PLACES[moving.destination]}"
    answer += "".join(f", a {thing.name} stays at the {PLACES[thing.place]}" for thing in others)
    return PLAIN_PROMPTS[1], _sentence(answer)


def count(rng: random.Random, media: tuple[Scene, ...]) -> tuple[str, str]:
    """How many objects there are: all of them, those of a colour, or those of a shape."""
    things = media[0].things
    kind = rng.choice(("objects", "colour", "shape"))
    if kind == "objects":
        what, number = "objects", len(things)
    elif kind == "colour":
        colour = rng.choice([*(thing.colour for thing in things), rng.choice(list(COLOURS))])
        what, number = f"{colour} objects", sum(thing.colour == colour for thing in things)
    else:
        shape = rng.choice([*(thing.shape for thing in things), rng.choice(SHAPES)])
        what, number = _plural(shape), sum(thing.shape == shape for thing in things)
    return f"How many {what} are there?", _sentence(NUMBERS[number])


def yes_no(rng: random.Random, media: tuple[Scene, ...]) -> tuple[str, str]:
    """Whether an object is there; half of the missing ones share their colour or their shape with one that is."""
    return _is_there(rng, media, _missing)


def bound(rng: random.Random, media: tuple[Scene, ...]) -> tuple[str, str]:
    """The hard yes/no questions: what is missing has the colour of one object in view and the shape of another."""
    return _is_there(rng, media, _crossed)


def _is_there(
    rng: random.Random, media: tuple[Scene, ...], missing: Callable[[random.Random, list[Name]], Name]
) -> tuple[str, str]:
    names = [(thing.colour, thing.shape) for thing in media[0].things]
    is_there = rng.random() < 0.5
    colour, shape = rng.choice(names) if is_there else missing(rng, names)
    return f"Is there a {colour} {shape}?", _sentence("yes" if is_there else "no")


def compare(rng: random.Random, media: tuple[Scene, ...]) -> tuple[str, str]:
    """Two pictures that the question or the answer names by number."""
    sizes = [len(picture.things) for picture in media]
    kinds = ["which", *(["what"] if 1 in sizes else []), *(["more"] if sizes[0] != sizes[1] else [])]
    kind = rng.choice(kinds)
    if kind == "what":
        number = rng.choice([number for number in range(2) if sizes[number] == 1])
        return f"What is in Picture {number + 1}?", _sentence(f"a {media[number].things[0].name}")
    if kind == "more":
        return "Which picture has more objects?", _sentence(f"Picture {1 + (sizes[1] > sizes[0])}")
    number = rng.randrange(2)
    asked = rng.choice(media[number].things)
    return f"Which picture shows a {asked.name}?", _sentence(f"Picture {number + 1}")


def image_and_video(rng: random.Random, media: tuple[Scene, ...]) -> tuple[str, str]:
    """The one object that is in both."""
    (shared,) = {thing.name for thing in media[0].things} & {thing.name for thing in media[1].things}
    return "What is in both the image and the video?", _sentence(f"a {shared}")


def text(rng: random.Random, media: tuple[Scene, ...]) -> tuple[str, str]:
    """Sums, orders of size and orders in space, without any medium."""
    return rng.choice((sum_of_two, larger, order))(rng, media)


def sum_of_two(rng: random.Random, media: tuple[Scene, ...]) -> tuple[str, str]:
    a, b = rng.randint(0, 9), rng.randint(0, 9)
    return f"What is {a} plus {b}?", _sentence(str(a + b))


def larger(rng: random.Random, media: tuple[Scene, ...]) -> tuple[str, str]:
    a, b = rng.sample(range(10), 2)
    return f"Which number is larger, {a} or {b}?", _sentence(str(max(a, b)))


def order(rng: random.Random, media: tuple[Scene, ...]) -> tuple[str, str]:
    """Which of two boxes is on the left, or on the right."""
    left, right = rng.sample(list(COLOURS), 2)
    asked, answer = rng.choice((("left", left), ("right", right)))
    question = f"The {left} box is left of the {right} box. Which box is on the {asked}?"
    return question, _sentence(f"the {answer} box")


TASKS: dict[str, Task] = {
    "describe_image": Task(picture_of_different, describe_image),
    "describe_video": Task(clip, describe_video),
    "count": Task(picture_of_similar, count),
    "yes_no": Task(picture_of_different, yes_no),
    "compare": Task(two_pictures, compare),
    "image_and_video": Task(picture_and_clip, image_and_video),
    "text": Task(nothing, text),
}
LESSONS: dict[str, Task] = TASKS | {
    "order": Task(nothing, order),
    "bound": Task(picture_of_different, bound),
    "count_three": Task(functools.partial(picture_of_similar, num_objects=3), count),
    "move_and_stay": Task(clip_of_two, describe_video),
}
"""The tasks, and parts of them that training asks separately."""


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def _plural(shape: str) -> str:
    return shape + ("es" if shape.endswith("s") else "s")


def _crossed(rng: random.Random, names: list[Name]) -> Name:
    """An object that is not there, of the colour and the shape of two that are; any one where there is none."""
    crossed = [(colour, shape) for colour, _ in names for _, shape in names if (colour, shape) not in names]
    return rng.choice(crossed) if crossed else _missing(rng, names)


def _missing(rng: random.Random, names: list[Name]) -> Name:
    """An object that is not there."""
    if rng.random() < 0.5:
        colour, shape = rng.choice(names)
        near = [(colour, other) for other in SHAPES] + [(other, shape) for other in COLOURS]
    else:
        near = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    return rng.choice([name for name in near if name not in names])
