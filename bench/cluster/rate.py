"""What a limited link carries: ``tc``'s notation, and how much of it is payload."""

from __future__ import annotations

import re

import sparsecoll as sc

__all__ = ["BURST_BYTES", "FRAME_BYTES", "SEGMENT_BYTES", "parse_rate", "payload_bytes_per_s"]

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}

# What a link gives for free after a pause, in each direction; `tc` writes it as 64kb.
BURST_BYTES = 64 << 10

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
