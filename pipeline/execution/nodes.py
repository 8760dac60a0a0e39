"""The cluster's nodes: what each of them has, and which have been lost since a moment.

Knows Ray's list of nodes; not what runs on them.
"""

from __future__ import annotations

from typing import Any

import ray

from pipeline.execution.placement import Node


def live_nodes() -> list[Node]:
    """The nodes that are alive, with what they have in all (not what is free)."""
    found = []
    for node in ray.nodes():
        if node["Alive"]:
            has = node["Resources"]
            found.append(
                Node(
                    node["NodeID"],
                    cpus=float(has.get("CPU", 0)),
                    gpus=float(has.get("GPU", 0)),
                    store_bytes=float(has.get("object_store_memory", 0)),
                )
            )
    return found


def beside_the_driver() -> dict[str, Any]:
    """Options of an actor that lives where the driver does, and nowhere else: they are lost together or not at all.

    By label: a soft node affinity was seen to go to another node on a loaded machine.
    """
    return {"label_selector": {"ray.io/node-id": ray.get_runtime_context().get_node_id()}}


class NodeWatch:
    """Tells which of the nodes that were there at first are gone."""

    def __init__(self) -> None:
        self._first = {node.node_id for node in live_nodes()}

    @property
    def num_nodes(self) -> int:
        """Nodes there were at first."""
        return len(self._first)

    def lost(self) -> set[str]:
        """Those that Ray has declared dead since; it takes Ray some seconds (its health checks) to notice."""
        return self._first - {node.node_id for node in live_nodes()}
