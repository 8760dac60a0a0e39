"""Pictures and clips of coloured shapes on a 3 x 3 board, drawn from a seed.

Knows geometry and colours; not files, codecs, questions or models.

    top left    |  top     |  top right          The board's shade drifts from left to right and from top to bottom,
    left        |  center  |  right              as under a lamp, so that a place looks the same at every size.
    bottom left |  bottom  |  bottom right
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from pipeline.preprocess.patches import Uint8Array

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 20, 30),
    "green": (0, 140, 40),
    "blue": (20, 50, 220),
    "yellow": (255, 225, 0),
    "black": (15, 15, 15),
}
SHAPES = ("circle", "square", "cross")
PLACES = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")

# A clip's object rests, moves between these shares of the clip's length, and rests again: whichever frames are
# sampled, the first step shows where it began and the last where it ended.
_MOVE_FROM, _MOVE_TO = 0.27, 0.47


@dataclass(frozen=True)
class Thing:
    """One object: what it is, where it stands, and how its drawing deviates from the norm."""

    colour: str
    shape: str
    place: int
    """Index into PLACES."""
    shift: tuple[float, float] = (0.0, 0.0)
    """Offset from the middle of its place, in parts of a place."""
    size: float = 0.8
    """Side, in parts of a place."""

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Picture:
    """A still scene of a certain size."""

    things: tuple[Thing, ...]
    width: int
    height: int


@dataclass(frozen=True)
class Clip:
    """A moving scene: the first thing moves to `destination`, the others stay."""

    things: tuple[Thing, ...]
    destination: int
    width: int
    height: int
    fps: int
    seconds: int

    @property
    def num_frames(self) -> int:
        return self.fps * self.seconds


def random_thing(rng: random.Random, name: tuple[str, str], place: int) -> Thing:
    """A (colour, shape) at a place, a little off the middle and a little smaller or larger."""
    shift = (rng.uniform(-0.07, 0.07), rng.uniform(-0.07, 0.07))
    return Thing(name[0], name[1], place, shift, rng.uniform(0.72, 0.82))


def random_names(rng: random.Random, count: int) -> list[tuple[str, str]]:
    """Different (colour, shape) pairs."""
    return rng.sample([(colour, shape) for colour in COLOURS for shape in SHAPES], count)


def random_picture(rng: random.Random, names: list[tuple[str, str]]) -> Picture:
    """The named objects at different places, in reading order; one picture in four is larger than the model sees."""
    places = sorted(rng.sample(range(len(PLACES)), len(names)))
    width, height = rng.randint(84, 150), rng.randint(84, 150)
    if rng.random() < 0.25:
        scale = rng.uniform(1.5, 3.0)
        width, height = round(width * scale), round(height * scale)
    things = tuple(random_thing(rng, name, place) for name, place in zip(names, places, strict=True))
    return Picture(things, width, height)


def random_clip(rng: random.Random, names: list[tuple[str, str]]) -> Clip:
    """The first named object moves; each other one stays where the moving one does not pass."""
    start, end = rng.sample(range(len(PLACES)), 2)
    free = [place for place in range(len(PLACES)) if _distance_to_path(place, start, end) > 0.9]
    others = rng.sample(free, len(names) - 1)
    things = tuple(random_thing(rng, name, place) for name, place in zip(names, [start, *others], strict=True))
    # H.264 with halved chroma wants even sides.
    width, height = 2 * rng.randint(42, 62), 2 * rng.randint(42, 62)
    # Two seconds are two steps in time for the model: enough for one object, too few to tell which of two has moved.
    seconds = 3 if others else rng.choice((2, 3))
    return Clip(things, end, width, height, rng.choice((8, 10, 12)), seconds)


def draw_picture(picture: Picture) -> Uint8Array:
    """RGB pixels [height, width, 3]."""
    return _draw(picture.width, picture.height, [(thing, _middle(thing.place)) for thing in picture.things])


def draw_clip(clip: Clip, frames: list[int] | None = None) -> Uint8Array:
    """RGB frames [T, height, width, 3]: all of them, or those asked for."""
    return np.stack([_draw_frame(clip, frame) for frame in (range(clip.num_frames) if frames is None else frames)])


def _draw_frame(clip: Clip, frame: int) -> Uint8Array:
    share = (frame / clip.num_frames - _MOVE_FROM) / (_MOVE_TO - _MOVE_FROM)
    share = min(max(share, 0.0), 1.0)
    mover, *others = clip.things
    (x0, y0), (x1, y1) = _middle(mover.place), _middle(clip.destination)
    where = (x0 + (x1 - x0) * share, y0 + (y1 - y0) * share)
    return _draw(clip.width, clip.height, [*((thing, _middle(thing.place)) for thing in others), (mover, where)])


def _middle(place: int) -> tuple[float, float]:
    """The middle of a place, in places from the top left corner of the board."""
    return place % 3 + 0.5, place // 3 + 0.5


def _distance_to_path(place: int, start: int, end: int) -> float:
    point, a, b = (np.array(_middle(index)) for index in (place, start, end))
    share = float(np.clip(np.dot(point - a, b - a) / np.dot(b - a, b - a), 0, 1))
    return float(np.linalg.norm(point - (a + share * (b - a))))


def _draw(width: int, height: int, things: list[tuple[Thing, tuple[float, float]]]) -> Uint8Array:
    board = np.empty((height, width, 3), dtype=np.uint8)
    board[..., 0] = np.linspace(150, 250, width).astype(np.uint8)[None, :]
    board[..., 1] = 200
    board[..., 2] = np.linspace(150, 250, height).astype(np.uint8)[:, None]
    image = Image.fromarray(board)
    pen = ImageDraw.Draw(image)
    line = max(1, min(width, height) // 90)
    for third in (1, 2):
        pen.line([(width * third / 3, 0), (width * third / 3, height)], fill=(255, 255, 255), width=line)
        pen.line([(0, height * third / 3), (width, height * third / 3)], fill=(255, 255, 255), width=line)
    cell_width, cell_height = width / 3, height / 3
    for thing, (x, y) in things:
        radius = thing.size * min(cell_width, cell_height) / 2
        _draw_shape(pen, thing, (x + thing.shift[0]) * cell_width, (y + thing.shift[1]) * cell_height, radius)
    return np.asarray(image)


def _draw_shape(pen: ImageDraw.ImageDraw, thing: Thing, x: float, y: float, radius: float) -> None:
    fill = COLOURS[thing.colour]
    if thing.shape == "circle":
        radius *= 0.9
        pen.ellipse([x - radius, y - radius, x + radius, y + radius], fill=fill)
    elif thing.shape == "square":
        pen.rectangle([x - radius, y - radius, x + radius, y + radius], fill=fill)
    else:
        bar = radius / 4
        pen.rectangle([x - radius, y - bar, x + radius, y + bar], fill=fill)
        pen.rectangle([x - bar, y - radius, x + bar, y + radius], fill=fill)
