"""From YAML files and command-line overrides (`--section.key value`) to a config, with every mistake reported at once.

Files are laid over those before them, overrides over all. Knows the shape of sections; not what any key means.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from pipeline.config import ENGINE_SECTIONS, Section, written
from pipeline.errors import ConfigError

ConfigType = TypeVar("ConfigType", bound=Section)

_ALLOWED = {
    "tuple": "a list",
    "list": "a list",
    "dict": "a mapping, as in {name: value}",
    "string": "text, in quotes",
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
}
"""What to write instead of a value of a wrong type, by the first word of pydantic's name for the mistake."""


def load_config(model: type[ConfigType], path: str | Sequence[str] | None, overrides: Mapping[str, str]) -> ConfigType:
    """The config of a YAML file with overrides (`section.key` to text) laid over it.

    Of several files, each is laid over those before it, key by key. Raises ConfigError that lists every unknown key
    and wrong value with its full name.
    """
    paths = [path] if isinstance(path, str) else list(path or ())
    values: dict[str, Any] = {}
    for one in paths:
        _lay_over(values, _read_yaml(one))
    mistakes: list[tuple[str, str]] = []
    for name, field in model.model_fields.items():
        if _section_type(field.annotation) and values.get(name) is None:
            values[name] = {}  # so that a missing key is reported by its own name, not by its section's
    keys = dict(fields_of(model))
    for name, text in overrides.items():
        if name not in keys and not _inside_mapping(name, keys):
            mistakes.append((name, _unknown_key(name, keys)))
            continue
        _set(values, name, _override_value(text, keys.get(name)))
    _make_lists(values, model)
    try:
        config = model.model_validate(values)
    except ValidationError as error:
        mistakes += [_mistake(dict(detail), keys) for detail in error.errors()]
        raise ConfigError(_report(paths, overrides, mistakes)) from error
    if mistakes:
        raise ConfigError(_report(paths, overrides, mistakes))
    return config


def fields_of(model: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every (full name, pydantic field) of a config, in order of definition."""
    for name, field in _fields(model).items():
        section = _section_type(field.annotation)
        if section:
            yield from fields_of(section, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def _fields(section: type) -> Mapping[str, FieldInfo]:
    if issubclass(section, BaseModel):
        return section.model_fields
    assert dataclasses.is_dataclass(section)
    types = typing.get_type_hints(section)
    return {
        each.name: FieldInfo.from_annotated_attribute(types[each.name], each) for each in dataclasses.fields(section)
    }


def _section_type(annotation: Any) -> type | None:
    for candidate in _kinds(annotation):
        if isinstance(candidate, type) and issubclass(candidate, (Section, *ENGINE_SECTIONS)):
            return candidate
    return None


def _kinds(annotation: Any) -> tuple[Any, ...]:
    """The types of a union; of any other annotation itself."""
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return typing.get_args(annotation) if is_union else (annotation,)


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"can't read the config {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text: {error}; save it as UTF-8") from error
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds a {type(values).__name__}; expected sections such as `input:` and `model:`")
    return values


def _lay_over(values: dict[str, Any], later: Mapping[str, Any]) -> None:
    """Set what the later file sets. Sections and mappings are joined, everything else is replaced."""
    for key, value in later.items():
        earlier = values.get(key)
        if isinstance(earlier, dict) and isinstance(value, dict):
            _lay_over(earlier, value)
        elif not (isinstance(earlier, dict) and value is None):  # an empty section says nothing
            values[key] = value


def _inside_mapping(name: str, keys: Mapping[str, Any]) -> bool:
    """Whether a name is a key of a field that takes any, as `input.columns.image` is."""
    parent = name.rpartition(".")[0]
    return parent in keys and typing.get_origin(keys[parent].annotation) is dict


def _set(values: dict[str, Any], name: str, value: Any) -> None:
    *sections, key = name.split(".")
    for section in sections:
        inner = values.get(section)
        if isinstance(inner, list):  # of names that stand for themselves, as in `input.keep`
            inner = values[section] = {name: name for name in inner if isinstance(name, str)}
        if not isinstance(inner, dict):
            inner = values[section] = {}
        values = inner
    values[key] = value


def _override_value(text: str, field: Any) -> Any:
    """A command-line value for this field: for lists and mappings YAML where it begins like YAML's lists, mappings or
    quoted texts, else one item as it stands; for every other field the text as it stands."""
    kinds = _kinds(field.annotation) if field is not None else (Any,)
    if text in ("null", "none", "None") and type(None) in kinds:
        return None
    origins = {typing.get_origin(kind) or kind for kind in kinds}
    if origins & {list, tuple, dict}:
        value: Any = text
        if text[:1] in ("[", "{", '"', "'"):
            try:
                value = yaml.safe_load(text)
            except yaml.YAMLError:
                return text  # the field's own check refuses it
        return [value] if isinstance(value, str) and dict not in origins else value
    return text


def _make_lists(values: dict[str, Any], section: type) -> None:
    """One item alone stands for the list of it, in a file as on the command line."""
    for name, field in _fields(section).items():
        value, inner = values.get(name), _section_type(field.annotation)
        if inner and isinstance(value, dict):
            _make_lists(value, inner)
        elif isinstance(value, str | int | float) and _is_list(field.annotation):
            values[name] = [value]


def _is_list(annotation: Any) -> bool:
    return not {typing.get_origin(kind) or kind for kind in _kinds(annotation)}.isdisjoint((list, tuple))


def _mistake(detail: dict[str, Any], keys: Mapping[str, Any]) -> tuple[str, str]:
    """(full name, what is wrong with it)."""
    name = ".".join(str(part) for part in detail["loc"])
    if detail["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return name, _unknown_key(name, keys)
    if detail["type"] == "missing":
        return name, f"{name}: missing; {_describe(keys.get(name))}".rstrip("; ")
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "value_error":
        return name, f"{name}: {message}" if name else message
    return name, f"{name}: found {written(detail['input'])}; allowed: {_allowed(name, detail['type'], message, keys)}"


def _allowed(name: str, kind: str, message: str, keys: Mapping[str, Any]) -> str:
    if below := next((key for key in keys if key.startswith(f"{name}.")), None):
        return f"keys below `{name.rpartition('.')[2]}:`, such as `{below.removeprefix(f'{name}.')}`"
    subject, _, fault = kind.partition("_")
    words = message.removeprefix("Input should be ").removeprefix("a valid ")
    return _ALLOWED.get(subject, words) if fault in ("type", "parsing", "from_float") else words


def _describe(field: Any) -> str:
    return " ".join(field.description.split()) if field is not None and field.description else ""


def _unknown_key(name: str, keys: Mapping[str, Any]) -> str:
    section = name.rpartition(".")[0]
    siblings = [key for key in keys if key.rpartition(".")[0] == section]
    close = difflib.get_close_matches(name, keys, n=1, cutoff=0.6)
    hint = f"did you mean {close[0]}?" if close else ""
    allowed = ", ".join(key.rpartition(".")[2] for key in siblings) or ", ".join(
        dict.fromkeys(key.partition(".")[0] for key in keys)
    )
    return f"{name}: unknown key; {hint or f'allowed here: {allowed}'}"


def _report(paths: Sequence[str], overrides: Mapping[str, str], mistakes: Sequence[tuple[str, str]]) -> str:
    """The mistakes, each under the place where its key was written; of a section, under both."""
    places: dict[str, list[str]] = {}
    for name, mistake in mistakes:
        sources = [" + ".join(paths)] if paths else []
        if not paths or any(f"{key}.".startswith(f"{name}.") or name.startswith(f"{key}.") for key in overrides):
            sources = [*sources, "the command line"] if name.count(".") == 0 else ["the command line"]
        places.setdefault(" + ".join(sources), []).append(mistake)
    lines = []
    for place, found in places.items():
        if len(found) == 1:
            lines.append(f"{place}: {found[0]}")
        else:
            lines += [f"{place} has {len(found)} mistakes:", *(f"  {mistake}" for mistake in found)]
    return "\n".join(lines)
