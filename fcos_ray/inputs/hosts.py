"""Hosts: which web addresses images may be read from. Knows uris and IP addresses; looks nothing up.

A uri is taken apart here once, strictly, and the request is made from the parts: there is no second parser to disagree.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Final
from urllib.parse import quote

from fcos_ray.storage import InvalidUri, Location

WEB_SCHEMES: Final = ("http", "https")

_AUTHORITY: Final = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9._-]+))(?::([0-9]{1,5}))?")
_NUMBER: Final = re.compile(r"[0-9]+|0[xX][0-9A-Fa-f]*")
_UNFIT_FOR_A_REQUEST: Final = re.compile(r"[^!-~]+")


def _networks(texts: str) -> tuple[IPv4Network | IPv6Network, ...]:
    return tuple(ip_network(text) for text in texts.split())


# Written down, not asked of ipaddress: what `is_global` says changed between patch releases of Python 3.11.
# Source: IANA's registries of special-purpose IPv4 and IPv6 addresses.
_PRIVATE: Final = _networks(
    "10.0.0.0/8 100.64.0.0/10 127.0.0.0/8 169.254.0.0/16 172.16.0.0/12 192.168.0.0/16 ::1/128 fc00::/7 fe80::/10"
)
_NOT_PUBLIC: Final = _networks(
    "0.0.0.0/8 192.0.0.0/24 192.0.2.0/24 192.88.99.0/24 198.18.0.0/15 198.51.100.0/24 203.0.113.0/24 224.0.0.0/4 "
    "240.0.0.0/4 2001::/23 2001:db8::/32 3fff::/20"
)
_GLOBAL_UNICAST: Final = IPv6Network("2000::/3")
# IPv6 addresses that lead to the IPv4 address within: mapped, translated, NAT64 (the well-known prefix), 6to4.
_EMBEDDING: Final = (
    (IPv6Network("::ffff:0:0/96"), 0),
    (IPv6Network("::ffff:0:0:0/96"), 0),
    (IPv6Network("64:ff9b::/96"), 0),
    (IPv6Network("2002::/16"), 80),
)
_METADATA: Final = frozenset(
    ip_address(text)
    for text in (
        "169.254.169.254",  # AWS, Azure, Google, Oracle, OpenStack, DigitalOcean
        "169.254.170.2", "169.254.170.23", "fd00:ec2::254", "fd00:ec2::23",  # AWS: ECS and EKS credentials, IPv6
        "fd20:ce::254",  # Google, IPv6
        "168.63.129.16",  # Azure's host, a public address
        "100.100.100.200",  # Alibaba
        "169.254.42.42", "fd00:42::42",  # Scaleway
        "169.254.0.23",  # Tencent
        "192.0.0.192",  # Oracle
    )
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class WebAddress:
    """What a request is made from."""

    scheme: str
    host: str  # ASCII: a name, or an IP address in its one spelling, without brackets
    port: int | None  # None: the scheme's own
    target: str  # path and query as they are sent, ASCII; no fragment

    @property
    def authority(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port is None else f"{host}:{self.port}"


def web_address(location: Location) -> WebAddress:
    """Raises InvalidUri, without the uri in the message, for whatever two parsers could read differently."""
    if location.scheme not in WEB_SCHEMES:
        raise InvalidUri(f"scheme {location.scheme} is not http")
    rest = location.path.partition("#")[0]
    if "\\" in rest or any(character.isspace() for character in rest):
        raise InvalidUri("holds white space or a backslash: write %20 or %5C")
    authority = re.split(r"[/?]", rest, maxsplit=1)[0]
    match = _AUTHORITY.fullmatch(authority)
    if match is None:
        ascii_hint = "" if authority.isascii() else " in ASCII (xn--…)"
        raise InvalidUri(f"wanted a host{ascii_hint} and perhaps a port after {location.scheme}://")
    port = int(match[3]) if match[3] else None
    if port is not None and not 1 <= port <= 65535:
        raise InvalidUri("the port is not within 1 to 65535")
    host = _ip_literal(match[1]) if match[1] else _name(match[2])
    target = rest[len(authority) :]
    target = target if target.startswith("/") else f"/{target}"
    return WebAddress(location.scheme, host, port, _UNFIT_FOR_A_REQUEST.sub(_escaped, target))


def _escaped(match: re.Match[str]) -> str:
    # aiohttp hands on the bytes of a Location that are not UTF-8 as lone surrogates.
    return quote(match[0], safe="", errors="surrogateescape")


def _ip_literal(text: str) -> str:
    try:
        return str(IPv6Address(text))
    except ValueError:
        raise InvalidUri("what stands in brackets is not an IPv6 address") from None


def _name(text: str) -> str:
    labels = text.removesuffix(".").split(".")
    if len(text) > 253 or not all(0 < len(label) <= 63 for label in labels):
        raise InvalidUri("not a host name")
    if not _NUMBER.fullmatch(labels[-1]):
        return text.lower()
    try:
        return str(IPv4Address(text))
    except ValueError:  # 2130706433, 0x7f000001, 0177.0.0.1, 127.1: libc reads these, and each parser its own way
        raise InvalidUri("an IPv4 address that is not four plain decimal numbers") from None


def refused_literal(address: WebAddress, *, allow_private: bool) -> str | None:
    """Why the settings forbid this host, when it is an IP address; None for names, which say nothing before a look-up."""
    if ":" in address.host or _NUMBER.fullmatch(address.host.rpartition(".")[2]):
        return refused_ip(address.host, allow_private=allow_private)
    return None


def refused_ip(text: str, *, allow_private: bool) -> str | None:
    """Why no image is read from an IP address; None when it may be. `allow_private` lifts private, not the rest."""
    try:
        ip = ip_address(text)
    except ValueError:  # a zone (fe80::1%eth0) parses; what does not, no resolver should have said
        return "not an IP address"
    reached = _reached(ip)
    if reached in _METADATA:
        return "address of a cloud's metadata service"
    if any(reached in network for network in _PRIVATE):
        return None if allow_private else "private address: --allow-private-hosts"
    public = isinstance(reached, IPv4Address) or reached in _GLOBAL_UNICAST
    if not public or any(reached in network for network in _NOT_PUBLIC):
        return "not a public address"
    return None


def _reached(ip: IPv4Address | IPv6Address) -> IPv4Address | IPv6Address:
    if isinstance(ip, IPv6Address):
        ip = IPv6Address(int(ip))  # without its zone
        for network, shift in _EMBEDDING:
            if ip in network:
                return IPv4Address(int(ip) >> shift & 0xFFFFFFFF)
    return ip
