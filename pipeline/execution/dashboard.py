"""A cluster's dashboard, through which jobs are submitted: reach it, send the token, follow a job's logs.

Ray is imported inside functions: `use_token` decides how it starts, and submitting must not wait for it.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import ClusterError, first_line

ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
_CONNECT_S = 30.0
_HEAD_LISTED_S = 10.0
_RECONNECT_S = 5.0


def use_token() -> bool:
    """Turn Ray's token authentication on where Ray would find a token here; whether it is on.

    To be called before Ray is imported.
    """
    variables = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    if any(map(os.environ.get, variables)) or Path("~/.ray/auth_token").expanduser().exists():
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    return os.environ.get("RAY_AUTH_MODE") == "token"


def connect(address: str) -> tuple[Any, bool]:
    """Ray's client for the cluster at this dashboard, and whether the cluster's head node is this machine.

    Raises ClusterError when nothing answers, something other than a dashboard answers, or the token is refused.
    """
    import requests  # as slow to import as Ray
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    for name in ADDRESS_VARIABLES:  # to Ray's client they count for more than the address that it is given
        os.environ.pop(name, None)
    try:
        requests.get(address, timeout=_CONNECT_S)  # Ray's client would wait for an answer without end
        client: Any = JobSubmissionClient(address)
        raylets = _raylets(client)
        deadline = time.monotonic() + _HEAD_LISTED_S  # a dashboard that has just started knows no node yet
        while not any(raylet.get("isHeadNode") for raylet in raylets) and time.monotonic() < deadline:
            time.sleep(0.5)
            raylets = _raylets(client)
    except AuthenticationError as error:
        raise ClusterError(
            f"{address} asks for a token: {first_line(error)}. `ray get-auth-token` on the head node prints it: "
            "put it into RAY_AUTH_TOKEN or into ~/.ray/auth_token"
        ) from error
    except (ValueError, LookupError, TypeError, RuntimeError, requests.HTTPError) as error:
        raise ClusterError(
            f"{address} answers, but not as a Ray dashboard does ({first_line(error)}): "
            "give the dashboard's address, port 8265 by default"
        ) from error
    except (requests.RequestException, ConnectionError) as error:
        raise ClusterError(
            f"no Ray dashboard answers at {address} ({type(error).__name__}): is the cluster up "
            "(`ray start --head`, `ray status`), and the dashboard's port, 8265 by default, open or forwarded to here?"
        ) from error
    return client, any(map(_is_head_here, raylets))


def _raylets(client: Any) -> list[Mapping[str, Any]]:
    """What the dashboard says of each node's Ray. Ray's client has no method for this path, but can send the token."""
    nodes = client._do_request("GET", "/nodes?view=summary").json()["data"]["summary"]
    return [node.get("raylet") or {} for node in nodes]


def _is_head_here(raylet: Mapping[str, Any]) -> bool:
    """By name and socket: with a forwarded port, the address of a distant cluster looks like one of this machine."""
    if not raylet.get("isHeadNode") or raylet.get("nodeManagerHostname") != socket.gethostname():
        return False
    return Path(raylet.get("rayletSocketName") or "/nowhere").is_socket()


async def show_logs(client: Any, submission_id: str) -> Any:
    """Print the logs as they come, through lost connections; returns the job's details once it has ended."""
    import aiohttp  # comes with Ray's client

    shown = 0
    while True:
        position = 0
        try:
            async for text in client.tail_job_logs(submission_id):  # always from the beginning
                print(text[max(0, shown - position) :], end="", flush=True)
                position += len(text)
                shown = max(shown, position)
            details = client.get_job_info(submission_id)
            if details.status.is_terminal():
                return details
        except (RuntimeError, OSError, aiohttp.ClientError) as error:
            print(f"(the connection was lost: {first_line(error)}; trying again)", file=sys.stderr)
        await asyncio.sleep(_RECONNECT_S)
