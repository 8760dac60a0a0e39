"""Which folders, buckets and hosts rows may read from.

Rows are data, and data may be hostile: a row must not be able to read the machine's other files or talk to its private
network. Allowed are the manifest's own tree or bucket, public web hosts and the entries of `input.allow`. Knows paths,
URIs and addresses; opens nothing.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Sequence
from urllib.parse import urlsplit

from pipeline import storage
from pipeline.errors import AccessDenied, ConfigError
from pipeline.preprocess.fetch.uri import WEB_SCHEMES, bucket_of, local_path, normal_bucket_uri, scheme_of, shown

_ANYTHING = "*"
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


class AllowList:
    """The places that the rows of one manifest may read."""

    def __init__(self, base: str, allow: Sequence[str], *, private_hosts: bool) -> None:
        """`base` is the manifest's folder or prefix; `private_hosts` allows all hosts of private networks."""
        self._base = base
        self._private_hosts = private_hosts
        self._anything = _ANYTHING in allow
        folders, buckets, hosts = [], [], set[tuple[str, int | None]]()
        for entry in allow:
            if entry == _ANYTHING:
                continue
            if scheme_of(entry) in WEB_SCHEMES:
                hosts.add(_host_in(entry))
            elif scheme_of(entry):
                buckets.append(normal_bucket_uri(entry))
            elif os.sep in entry or entry in (".", ".."):
                folders.append(os.path.realpath(local_path(entry)))
            else:
                hosts.add(_host_in(entry))
        if not scheme_of(base):
            folders.insert(0, os.path.realpath(local_path(base) or "."))
        elif scheme_of(base) not in WEB_SCHEMES:
            buckets.insert(0, bucket_of(base))
        self._folders, self._buckets, self._hosts = tuple(folders), tuple(buckets), frozenset(hosts)

    def file(self, source: str) -> str:
        """The real path of a local file, relative ones starting at the manifest. Raises AccessDenied."""
        path = local_path(source)
        if not os.path.isabs(path):
            if scheme_of(self._base):
                raise AccessDenied(f"{shown(source)}: the manifest is not on this machine's disk")
            path = os.path.join(local_path(self._base) or ".", path)
        real = os.path.realpath(path)
        if not self._anything and not any(_is_below(real, folder) for folder in self._folders):
            outside = "is" if real == os.path.abspath(path) else f"resolves to {shown(real)},"
            raise AccessDenied(
                f"{shown(source)} {outside} outside the folders that rows may read "
                f"({', '.join(self._folders) or 'none'}); add {shown(os.path.dirname(real))} to input.allow"
            )
        return real

    def bucket_object(self, source: str) -> str:
        """The normal form of an object's URI. Raises AccessDenied."""
        uri = normal_bucket_uri(source)
        if not self._anything and not any(_is_below(uri, bucket) for bucket in self._buckets):
            raise AccessDenied(
                f"{shown(source)} is outside the buckets that rows may read ({', '.join(self._buckets) or 'none'}); "
                f"add {shown(storage.parent(uri))} to input.allow"
            )
        return uri

    def check_address(self, host: str, port: int, address: str) -> None:
        """Raise AccessDenied if the host's address is in a private network and the host is not allowed by name."""
        if self._private_hosts or self.names(host, port) or is_public(address):
            return
        raise AccessDenied(
            f"{host} is {address}, in a private network; set input.allow_private_hosts to reach such hosts, "
            "or name this one in input.allow"
        )

    def may_use_proxy(self, host: str, port: int) -> bool:
        """Whether rows' URLs may go through this proxy, which looks up by itself where they lead."""
        return self._private_hosts or self.names(host, port)

    def names(self, host: str, port: int) -> bool:
        """Whether `input.allow` names this host, alone or with this port."""
        host = _normal_host(host)
        return (host, None) in self._hosts or (host, port) in self._hosts


def is_public(address: str) -> bool:
    """Whether an IP address lies outside private, loopback, link-local, multicast and reserved ranges."""
    parsed: ipaddress.IPv4Address | ipaddress.IPv6Address = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(parsed, ipaddress.IPv6Address):
        # An address that carries an IPv4 one inside leads where that one leads.
        inner = parsed.ipv4_mapped or parsed.sixtofour or (parsed.teredo[1] if parsed.teredo else None)
        if inner is None and parsed in _NAT64:
            inner = ipaddress.IPv4Address(int(parsed) & 0xFFFFFFFF)
        parsed = inner or parsed
    return parsed.is_global and not parsed.is_multicast


def _host_in(entry: str) -> tuple[str, int | None]:
    """(host, port) of an entry: a URL, or a host with or without a port; an IPv6 address may do without brackets."""
    if is_address(entry):
        return _normal_host(entry), None
    try:
        parts = urlsplit(entry if "://" in entry else f"//{entry}")
        return _normal_host(parts.hostname or ""), parts.port
    except ValueError as error:
        raise ConfigError(f"input.allow: {entry!r} is no host, folder or bucket: {error}") from error


def is_address(host: str) -> bool:
    """Whether it is an IP address, not a name."""
    try:
        ipaddress.ip_address(host.strip("[]").partition("%")[0])
    except ValueError:
        return False
    return True


def _normal_host(host: str) -> str:
    """One spelling of a name or an address."""
    host = host.strip("[]").lower()
    return ipaddress.ip_address(host).compressed if is_address(host) else host


def _is_below(path: str, root: str) -> bool:
    return path == root or path.startswith(root.rstrip("/") + "/")
