"""A row's own settings: how its media are seen and how its answer is sampled.

Names, types and bounds come from where the settings are declared (`MediumSettings`, `SamplingParams`). Text is accepted
for numbers, since CSV has nothing else; so are the floats that pandas makes of integers and booleans beside nulls, and
the decimals that warehouses make of all integers. A setting that is wrong, or applies to nothing in its row, is a
SettingError: nothing is dropped silently.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from decimal import Decimal, InvalidOperation
from typing import Any, get_args

from pipeline.conversation import VIDEO_SETTINGS, MediumPart, MediumSettings, Message, Text
from pipeline.engine.settings import SamplingParams, allowed, setting_types, within
from pipeline.errors import SettingError
from pipeline.preprocess.messages.values import from_json, plain, shown

_DECLARED = {
    each.name: (setting_types(declared)[each.name], each.metadata)
    for declared in (MediumSettings, SamplingParams)
    for each in fields(declared)
}
"""Name of a setting to its type and bounds."""


def medium_settings(values: Mapping[str, Any], where: str = "") -> MediumSettings:
    """Settings of one medium or row from their columns' or keys' values. Raises SettingError, naming `where`."""
    settings = MediumSettings(
        **{name: parse_setting(name, value, where) for name, value in values.items() if value not in (None, "")}
    )
    if settings.fps is not None and settings.num_frames is not None:
        raise SettingError(f"{where}fps and num_frames are both set; they exclude each other")
    for name in ("min_frames", "max_frames"):
        if settings.num_frames is not None and getattr(settings, name) is not None:
            raise SettingError(f"{where}num_frames and {name} are both set; {name} applies to sampling by fps only")
    if (settings.resized_height is None) != (settings.resized_width is None):
        raise SettingError(f"{where}resized_height and resized_width go together: set both or neither")
    for name in ("min_pixels", "max_pixels", "total_pixels"):
        if settings.resized_height is not None and getattr(settings, name) is not None:
            raise SettingError(f"{where}{name} and resized_height are both set; they exclude each other")
    _check_order(settings, where)
    return settings


def apply_row_settings(turns: Sequence[Message], of_row: MediumSettings) -> tuple[Message, ...]:
    """The turns with the row's settings on every medium that they can apply to. A medium's own settings win."""
    used = {name: value for name, value in vars(of_row).items() if value is not None}
    kinds = {part.kind for turn in turns for part in turn.parts if isinstance(part, MediumPart)}
    for name, value in used.items():
        if not kinds:
            raise SettingError(f"{name} is {value} on a row without media; leave it null")
        if name in VIDEO_SETTINGS and "video" not in kinds:
            raise SettingError(f"{name} is {value} on a row without videos; leave it null")

    def with_settings(part: Text | MediumPart) -> Text | MediumPart:
        return part if isinstance(part, Text) else replace(part, settings=_merged(part, used))

    return tuple(replace(turn, parts=tuple(map(with_settings, turn.parts))) for turn in turns)


def _merged(part: MediumPart, of_row: Mapping[str, Any]) -> MediumSettings:
    own = {name: value for name, value in vars(part.settings).items() if value is not None}
    left_out = set(VIDEO_SETTINGS) if part.kind == "image" else set()
    if own.keys() & {"fps", "num_frames"}:  # they exclude each other: the medium's choice stands alone
        left_out |= {"fps", "num_frames"}
    if own.keys() & {"min_frames", "max_frames"}:
        left_out.add("num_frames")
    if "resized_height" in own:
        left_out |= {"min_pixels", "max_pixels"}
    merged = MediumSettings(**{name: value for name, value in of_row.items() if name not in left_out} | own)
    _check_order(merged)
    return merged


def _check_order(settings: MediumSettings, where: str = "") -> None:
    low, high = settings.min_pixels, settings.max_pixels
    if low is not None and high is not None and low > high:
        raise SettingError(f"{where}min_pixels is {low} and max_pixels {high}; the first must not be larger")
    start, end = settings.start_s, settings.end_s
    if start is not None and end is not None and start >= end:
        raise SettingError(f"{where}start_s is {start} and end_s {end}; the segment must end after it starts")


def parse_setting(name: str, value: Any, where: str = "") -> Any:
    """The value of a medium setting or sampling parameter, in the type it is declared with. Raises SettingError."""
    kind, bounds = _DECLARED[name]
    parsed: Any
    if kind is bool:
        parsed, expected = _as_flag(value), "true, false"
    elif kind == tuple[str, ...]:
        parsed, expected = _as_list(value), "text or a list of texts, none empty"
        if parsed is not None and not all(isinstance(item, str) and item for item in parsed):
            parsed = None
    elif kind == tuple[int, ...]:
        parsed, expected = _as_list(value), "a list of token ids: whole numbers, 0 or more"
        parsed = None if parsed is None else tuple(_as_number(item, int, {"ge": 0}) for item in parsed)
        if parsed is not None and None in parsed:
            parsed = None
    elif float in (kind, *get_args(kind)):
        parsed, expected = _as_number(value, float, bounds), f"a number, {allowed(bounds)}"
    else:
        parsed, expected = _as_number(value, int, bounds), f"a whole number, {allowed(bounds)}"
    if parsed is None:
        raise SettingError(f"{where}{name} is {shown(value)}; allowed: {expected}")
    return parsed


def _as_flag(value: Any) -> bool | None:
    if isinstance(value, str):
        value = {"true": True, "false": False}.get(value.strip().lower())
    return bool(value) if value in (True, False) else None


def _as_number(value: Any, kind: type[int] | type[float], bounds: Mapping[str, Any]) -> float | None:
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal | str):
        return None
    try:
        exact = Decimal(value.strip()) if isinstance(value, str) else value
        approximate = float(exact)
        # `int` of 1e999999999 would take for ever.
        if kind is int and not abs(approximate) < 2.0**64:
            return None
        number = kind(exact)
    except (ValueError, OverflowError, InvalidOperation):
        return None
    changed = kind is int and number != exact  # 2.5 is no whole number
    too_large = kind is int and number >= 2**63
    return None if changed or too_large or not within(number, bounds) else number


def _as_list(value: Any) -> tuple[Any, ...] | None:
    value = plain(value)
    if isinstance(value, str):
        try:
            found = from_json(value)
        except ValueError:
            found = None
        value = found if isinstance(found, list) else [value]  # a stop string alone
    elif isinstance(value, int | float | Decimal) and not isinstance(value, bool):
        value = [value]
    return tuple(value) if isinstance(value, list) else None
