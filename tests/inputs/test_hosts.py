"""Which web addresses may be read is a table; what no parser must read its own way is refused."""

from __future__ import annotations

import random
from ipaddress import IPv4Address, IPv6Address

import pytest

from fcos_ray.inputs.fetch import FetchPolicy, reason_to_refuse
from fcos_ray.inputs.hosts import refused_ip, web_address
from fcos_ray.storage import parse_uri

SCHEMES = ("s3", "file", "http", "https")
OPEN, CLOSED = (FetchPolicy(allow_schemes=SCHEMES, allow_private_hosts=allowed) for allowed in (True, False))
PRIVATE = "private address: --allow-private-hosts"
METADATA = "address of a cloud's metadata service"
NOT_PUBLIC = "not a public address"
FOUR_NUMBERS = "malformed: an IPv4 address that is not four plain decimal numbers"
WHITE = "malformed: holds white space or a backslash: write %20 or %5C"
HOST = "malformed: wanted a host and perhaps a port after http://"
XN_HOST = "malformed: wanted a host in ASCII (xn--…) and perhaps a port after http://"

READABLE = [
    "http://host/x.jpg", "https://host.example:8443/a/b.jpg?size=2#top", "HTTP://HOST.example./x", "http://host", "http://host?x=1",
    "http://8.8.8.8/x", "http://[2606:4700::1111]:80/x", "http://[::ffff:8.8.8.8]/x", "http://[64:ff9b::808:808]/x",
    "http://[2002:808:808::]/x", "http://a_b.example/x", "http://0x7f.example/x", "http://host/a::b://c.jpg", "http://host/é%20.jpg",
    "http://host//etc/passwd", "http://10.0.0.1.nip.io/x",  # the last is looked up, and refused then
]  # fmt: skip

# uri: why it is refused, and why with --allow-private-hosts (None: it may be read then)
REFUSED: dict[str, tuple[str, str | None]] = {
    # private places, in their plain spelling
    **dict.fromkeys(
        [
            "http://127.0.0.1/x", "http://127.9.9.9:8080/x", "http://10.0.0.1/x", "http://172.31.255.255/x", "http://192.168.1.1/x",
            "http://169.254.1.1/x", "http://100.64.0.1/x", "https://[::1]/x", "http://[fd00::1]/x", "http://[fe80::1]/x",
        ],
        (PRIVATE, None),
    ),
    # the same, within IPv6: mapped, mapped in hexadecimal, translated, NAT64, 6to4
    **dict.fromkeys(
        [
            "http://[::ffff:127.0.0.1]/x", "http://[::ffff:7f00:1]/x", "http://[0:0:0:0:0:ffff:10.0.0.1]/x",
            "http://[::ffff:0:192.168.0.1]/x", "http://[64:ff9b::10.0.0.1]/x", "http://[2002:7f00:1::]/x",
        ],
        (PRIVATE, None),
    ),
    # whoever may read private hosts may still not ask a cloud for its keys
    **dict.fromkeys(
        [
            "http://169.254.169.254/latest/meta-data/", "http://169.254.170.2/v2/credentials", "http://168.63.129.16/x",
            "http://100.100.100.200/x", "http://192.0.0.192/x", "http://[fd00:ec2::254]/x", "http://[fd20:ce::254]/x",
            "http://[::ffff:a9fe:a9fe]/x", "http://[64:ff9b::a9fe:a9fe]/x", "http://[2002:a9fe:a9fe::1]/x",
        ],
        (METADATA, METADATA),
    ),
    # nowhere, everyone, or reserved; 0.0.0.0 is this machine on Linux
    **dict.fromkeys(
        [
            "http://0.0.0.0/x", "http://0.1.2.3/x", "http://224.0.0.1/x", "http://240.0.0.1/x", "http://255.255.255.255/x",
            "http://198.18.0.1/x", "http://203.0.113.1/x", "http://[::]/x", "http://[::ffff:0.0.0.0]/x", "http://[ff02::1]/x",
            "http://[::127.0.0.1]/x", "http://[64:ff9b:1::1]/x", "http://[fec0::1]/x", "http://[2001::1]/x", "http://[2001:db8::1]/x",
        ],
        (NOT_PUBLIC, NOT_PUBLIC),
    ),
    # spellings that libc, a browser and a proxy read differently
    **dict.fromkeys(
        [
            "http://2130706433/x", "http://0x7f000001/x", "http://017700000001/x", "http://0177.0.0.1/x", "http://127.1/x",
            "http://0x7f.0.0.1/x", "http://127.0.0.0x1/x", "http://127.0.0.1./x", "http://0/x", "http://1.2.3.4.5/x",
            "http://256.0.0.1/x", "http://127.000.000.001/x", "http://8.8.8.08/x",
        ],
        (FOUR_NUMBERS, FOUR_NUMBERS),
    ),
    **dict.fromkeys(
        [
            "http://①②⑦.⓪.⓪.①/x", "http://127。0。0。1/x", "http://ｌocalhost/x", "http://bücher.example/x", "http://host\u200b/x",
        ],
        (XN_HOST, XN_HOST),
    ),
    **dict.fromkeys(
        [
            "http://host:80:90/x", "http://host:http/x", "http://host:+80/x", "http://host:/x", "http://host%2e/x",
            "http://127%2e0.0.1/x", "http://host;x/x", "http://[fe80::1%25eth0]/x", "http://[fe80::1%eth0]/x",
            "http://[host]/x", "http://[::1]x/x",
        ],
        (HOST, HOST),
    ),
    **dict.fromkeys(
        ["http://host\\.example/x", "http://ho st/x", "http://host/a b", "http://host/a\u00a0b", "http://host/a\\b"],
        (WHITE, WHITE),
    ),
    "http:///x": ("malformed: nothing after http://",) * 2,
    "http://host:0/x": ("malformed: the port is not within 1 to 65535",) * 2,
    "http://host:65536/x": ("malformed: the port is not within 1 to 65535",) * 2,
    "http://a..b/x": ("malformed: not a host name",) * 2,
    f"http://{'a' * 64}.example/x": ("malformed: not a host name",) * 2,
    "http://[1::2::3]/x": ("malformed: what stands in brackets is not an IPv6 address",) * 2,
    "http://host/a\r\nHost: x": ("malformed: holds a control character",) * 2,
    "http://host\t/x": ("malformed: holds a control character",) * 2,
    **dict.fromkeys(
        ["http://me:hunter2@host/x", "http://host@10.0.0.1/x", "http://a::b/x", "http://::1/x",
            "http://[::1/x", "http://host\\@10.0.0.1/x",
            "http://8.8.8.8#@10.0.0.1/x", "http://host?@10.0.0.1/x"],
        ("malformed: holds user information or a chained uri",) * 2,
    ),
    "http:host/x": ("malformed: neither an absolute path nor a uri with a scheme",) * 2,
    "http:/host/x": ("malformed: neither an absolute path nor a uri with a scheme",) * 2,
    "//host/x": ("outside the allowed roots",) * 2,
    "gopher://host/x": ("scheme gopher is not allowed",) * 2,
    "http+unix://host/x": ("scheme http+unix is not allowed",) * 2,
}  # fmt: skip


@pytest.mark.parametrize("uri", READABLE)
def test_public_addresses_and_names_may_be_read(uri: str) -> None:
    assert reason_to_refuse(uri, CLOSED) is None
    assert reason_to_refuse(uri, FetchPolicy()) == f"scheme {uri.split(':')[0].lower()} is not allowed: --allow-http"


@pytest.mark.parametrize("uri", REFUSED)
def test_what_may_not_be_read_is_refused_before_anything_is_sent(uri: str) -> None:
    assert (reason_to_refuse(uri, CLOSED), reason_to_refuse(uri, OPEN)) == REFUSED[uri]


@pytest.mark.parametrize(
    ("uri", "authority", "target"),
    [
        ("HTTP://Host.Example:8080/A?b=C#d", "host.example:8080", "/A?b=C"),
        ("http://host", "host", "/"),
        ("http://host?a/b", "host", "/?a/b"),
        ("http://host#/x", "host", "/"),
        ("http://host/é%20", "host", "/%C3%A9%20"),
        ("http://host/../%2e%2e//x", "host", "/../%2e%2e//x"),
        ("http://[2606:4700:0::1]:81/x", "[2606:4700::1]:81", "/x"),
    ],
)
def test_a_request_is_made_from_the_parts_that_were_checked(uri: str, authority: str, target: str) -> None:
    address = web_address(parse_uri(uri))
    assert (address.authority, address.target) == (authority, target)


def test_the_written_list_refuses_whatever_python_knows_as_not_global() -> None:
    rng = random.Random(0)
    ips: list[IPv4Address | IPv6Address] = [IPv4Address(rng.getrandbits(32)) for _ in range(20_000)]
    ips += [IPv4Address(first << 24 | rng.getrandbits(24)) for first in range(256) for _ in range(20)]
    ips += [IPv6Address(rng.getrandbits(128)) for _ in range(2_000)]
    ips += [IPv6Address(first << 112 | rng.getrandbits(112)) for first in range(0, 2**16, 7)]
    allowed = [ip for ip in ips if refused_ip(str(ip), allow_private=False) is None]
    assert 15_000 < len(allowed) < len(ips)
    assert not [ip for ip in allowed if not ip.is_global or ip.is_multicast]


def test_a_private_address_stays_one_with_a_zone_and_what_is_none_is_refused() -> None:
    assert refused_ip("fe80::1%eth0", allow_private=False) == PRIVATE
    assert refused_ip("::ffff:127.0.0.1%1", allow_private=False) == PRIVATE
    assert refused_ip("fd00:ec2::254%1", allow_private=True) == METADATA
    assert refused_ip("host", allow_private=True) == "not an IP address"
