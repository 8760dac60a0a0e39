"""The web proxies that the environment names (`https_proxy`, `http_proxy`, `all_proxy`, `no_proxy`), for rows' URLs.

A proxy looks names up by itself, so nobody here can see whether a name leads into a private network. A proxy is
therefore used only where `input.allow` names it or private networks are allowed anyway; that it is left aside is said.
Knows the environment and hosts; makes no connection.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from urllib.parse import unquote
from urllib.request import getproxies_environment, proxy_bypass_environment  # type: ignore[attr-defined]

import urllib3
from urllib3.exceptions import LocationParseError
from urllib3.util import Url, parse_url

from pipeline.preprocess.fetch.allow import AllowList
from pipeline.preprocess.fetch.uri import WEB_SCHEMES
from pipeline.preprocess.limits import FetchOptions

_PORT = 80


class Proxies:
    """The environment's proxies as they are now. `may_use` says whether (host, port) may be one of the job's."""

    def __init__(self, may_use: Callable[[str, int], bool]) -> None:
        self._may_use = may_use
        self._environment = getproxies_environment()

    def for_url(self, url: str) -> Url | None:
        """The proxy that a URL goes through; None for a direct connection."""
        proxy = self._named(url)
        return proxy if proxy is not None and self._fault(proxy) is None else None

    def why_unused(self, url: str) -> str | None:
        """Why a proxy that the environment names for this URL is not used."""
        proxy = self._named(url)
        return None if proxy is None else self._fault(proxy)

    def _named(self, url: str) -> Url | None:
        parts = parse_url(url)
        entry = self._environment.get(parts.scheme or "") or self._environment.get("all")
        host = (parts.host or "").strip("[]")
        if not entry or proxy_bypass_environment(f"{host}:{parts.port}" if parts.port else host, self._environment):
            return None
        try:
            proxy = parse_url(entry if "://" in entry else f"http://{entry}")
        except LocationParseError:
            return Url(host=entry.rpartition("@")[2])  # without its password
        return proxy._replace(port=proxy.port or _PORT)

    def _fault(self, proxy: Url) -> str | None:
        host, port = (proxy.host or "").strip("[]"), proxy.port or _PORT
        if proxy.scheme is None:
            return f"the environment's proxy {host} is not used: it is not a URL; expected http://HOST:PORT"
        if proxy.scheme != "http":
            return f"the environment's proxy {proxy.scheme}://{host}:{port} is not used: only http:// proxies are"
        if not self._may_use(host, port):
            return f"the environment's proxy {host}:{port} is not used: name it in input.allow to use it"
        return None


def proxy_notes(options: FetchOptions) -> list[str]:
    """What to say at the start of a job about proxies that it leaves aside."""
    allowed = AllowList(options.base, options.allow, private_hosts=options.allow_private_hosts)
    proxies = Proxies(allowed.may_use_proxy)
    faults = (proxies.why_unused(f"{scheme}://a.public.host/") for scheme in WEB_SCHEMES)
    return [f"media with http(s) URLs: {fault}" for fault in dict.fromkeys(faults) if fault]


def credentials(proxy: Url) -> dict[str, str]:
    """The headers that authorise us with a proxy."""
    return dict(urllib3.make_headers(proxy_basic_auth=unquote(proxy.auth))) if proxy.auth else {}


def literal_address(host: str) -> str | None:
    """The address that a host's name spells out, however it does; None for a name that has to be looked up."""
    host = host.strip("[]").rstrip(".").lower()
    if host == "localhost" or host.endswith(".localhost"):
        return "127.0.0.1"
    try:
        return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)[0][4][0])
    except OSError:
        return None
