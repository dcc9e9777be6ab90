"""What a limited link carries: ``tc``'s notation, and how much of it is payload."""

from __future__ import annotations

import re

import sparsecoll as sc

__all__ = ["BURST_BYTES", "FRAME_BYTES", "SEGMENT_BYTES", "link_of", "parse_rate", "payload_bytes_per_s", "topology_of"]

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}

# What a link gives for free after a pause, in each direction; `tc` writes it as 64kb.
BURST_BYTES = 64 << 10

_LATENCY_S = 1e-4
# Traffic between ranks of a host is a copy by the kernel. What matters is that it is fast beside the links.
_SCALE_UP = sc.Link(bandwidth_bytes_per_s=2e9, latency_s=1e-4)

_MTU_BYTES = 1500
_ETHERNET_BYTES = 14
_IP_BYTES, _TCP_BYTES, _TIMESTAMP_BYTES = 20, 20, 12

FRAME_BYTES = _MTU_BYTES + _ETHERNET_BYTES
SEGMENT_BYTES = _MTU_BYTES - _IP_BYTES - _TCP_BYTES - _TIMESTAMP_BYTES
"""``tbf`` counts whole frames, also of segments that travel as one; TCP's payload is what is left of them."""


def parse_rate(text: str) -> int:
    """Bits per second from ``400mbit``, ``1gbit``, ``2.5gbit``, ``800kbit`` or ``1000000bit``.

    Raises:
        InvalidArgument: anything else; also ``mbps``, which ``tc`` takes for bytes.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmg]?)bit", text.lower())
    rate = round(float(match[1]) * _UNITS[match[2]]) if match else 0
    if rate == 0:
        raise sc.InvalidArgument(f"--rate: expected bits per second such as 400mbit or 1gbit, got {text!r}")
    return rate


def payload_bytes_per_s(rate_bits_per_s: int) -> float:
    """What is left of a link's rate for payload in full TCP segments."""
    return rate_bits_per_s / 8 * SEGMENT_BYTES / FRAME_BYTES


def link_of(rate_bits_per_s: int) -> sc.Link:
    """A host's link as payload sees it."""
    return sc.Link(payload_bytes_per_s(rate_bits_per_s), _LATENCY_S)


def topology_of(num_hosts: int, ranks_per_host: int, rate_bits_per_s: int) -> sc.Topology:
    """Ranks of a host next to each other, sharing the host's link."""
    host_of = tuple(rank // ranks_per_host for rank in range(num_hosts * ranks_per_host))
    link = link_of(rate_bits_per_s)
    return sc.Topology(host_of, scale_up=_SCALE_UP, scale_out=link, node_link=link if ranks_per_host > 1 else None)
