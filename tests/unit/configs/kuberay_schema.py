"""Is this a RayJob, RayCluster or core Kubernetes object? Problems with a parsed YAML document, each with its path.

KubeRay's own types are those of kuberay_fields.json; below a pod template the types are those of the `kubernetes`
package, generated from Kubernetes' published API. Unknown fields, missing ones and wrong types are problems.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kubernetes.client import models

KUBERAY: dict[str, dict[str, str]] = json.loads((Path(__file__).parent / "kuberay_fields.json").read_text())["types"]
CORE = {"PersistentVolumeClaim": "V1PersistentVolumeClaim"}
_PRIMITIVES: dict[str, tuple[type, ...]] = {
    "string": (str,), "str": (str,), "integer": (int,), "int": (int,), "number": (int, float), "float": (int, float),
    "boolean": (bool,), "bool": (bool,), "object": (object,), "datetime": (str,),
}  # fmt: skip
_QUANTITY = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([KMGTPE]i|[numkMGTPE]|[eE][+-]?\d+)?")


def problems(document: dict[str, Any]) -> list[str]:
    """What is wrong with a document; an empty list where it is as the schemas want it."""
    kind = document.get("kind")
    if kind in ("RayJob", "RayCluster"):
        if document.get("apiVersion") != "ray.io/v1":
            return [f"apiVersion: found {document.get('apiVersion')!r}, expected 'ray.io/v1'"]
        return list(_check(document, kind, kind))
    if kind not in CORE:
        return [f"kind: found {kind!r}; known: RayJob, RayCluster, {', '.join(CORE)}"]
    return list(_check(document, CORE[kind], kind))


def _check(value: Any, kind: str, path: str) -> Iterator[str]:
    kind = kind.removesuffix("!")
    item = re.fullmatch(r"\[\](\w+)|list\[(.+)\]", kind)
    if item:
        if not isinstance(value, list):
            yield f"{path}: found {value!r}, expected a list"
            return
        for index, one in enumerate(value):
            yield from _check(one, item[1] or item[2], f"{path}[{index}]")
    elif kind == "map" or kind.startswith("dict["):
        yield from _check_map(value, "string" if kind == "map" else kind[:-1].partition(", ")[2], path)
    elif kind in KUBERAY:
        fields = KUBERAY[kind]
        yield from _check_fields(value, fields, {name for name, one in fields.items() if one.endswith("!")}, path)
    elif kind in _PRIMITIVES:
        if not isinstance(value, _PRIMITIVES[kind]) or (isinstance(value, bool) and kind not in ("boolean", "bool")):
            yield f"{path}: found {value!r}, expected type {kind}"
    elif "|" in kind:
        if value not in kind.split("|"):
            yield f"{path}: found {value!r}; allowed: {kind.replace('|', ', ')}"
    else:
        model = getattr(models, kind)
        types = {model.attribute_map[name]: one for name, one in model.openapi_types.items()}
        yield from _check_fields(value, types, _required(model), path)


def _check_fields(value: Any, fields: dict[str, str], required: set[str], path: str) -> Iterator[str]:
    if not isinstance(value, dict):
        yield f"{path}: found {value!r}, expected a mapping"
        return
    for name, one in value.items():
        if name not in fields:
            yield f"{path}.{name}: unknown field; known: {', '.join(fields)}"
        else:
            yield from _check(one, fields[name], f"{path}.{name}")
    for name in sorted(required - set(value)):
        yield f"{path}.{name}: missing"


def _check_map(value: Any, kind: str, path: str) -> Iterator[str]:
    if not isinstance(value, dict):
        yield f"{path}: found {value!r}, expected a mapping"
        return
    for name, one in value.items():
        if path.endswith((".limits", ".requests")):
            if not _QUANTITY.fullmatch(str(one)):
                yield f"{path}.{name}: found {one!r}, expected a quantity such as 500m or 16Gi"
        else:
            yield from _check(one, kind, f"{path}.{name}")


def _required(model: Any) -> set[str]:
    """A model refuses None for what the API requires."""
    empty = model.__new__(model)
    empty.local_vars_configuration = models.V1Pod().local_vars_configuration
    names = set()
    for name, json_name in model.attribute_map.items():
        try:
            setattr(empty, name, None)
        except ValueError:
            names.add(json_name)
    return names


def quantity(text: str | int) -> float:
    """A Kubernetes quantity as a number: bytes, or CPUs."""
    found = _QUANTITY.fullmatch(str(text))
    assert found, text
    unit = found[3] or ""
    if unit.endswith("i"):
        return float(found[1]) * 1024 ** (1 + "KMGTPE".index(unit[0]))
    return float(found[1]) * ({"m": 1e-3, "": 1.0, "k": 1e3}.get(unit) or 1000.0 ** (1 + "kMGTPE".index(unit)))
