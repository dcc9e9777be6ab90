"""Hosts on this machine: network namespaces around a switch, each behind a link of limited rate.

    with Hosts(4, rate_bits_per_s=400_000_000) as hosts:
        subprocess.run(hosts.command(2, ["hostname", "-I"]))

The switch is a bridge in a namespace of its own, so that nothing shows among the machine's interfaces, nothing of the
machine's firewall applies, and deleting the namespaces deletes everything.

[Note: the links] ``tbf`` limits what leaves an interface. Egress of a host is limited at its own end of the cable,
ingress at the switch's end. The queues before the limits are long enough that nothing is dropped, so that TCP waits
rather than losing packets: what is emulated is a link, not a policer. Traffic inside a host goes over ``lo`` and is not
limited. TCP is set to what every kernel has, and to buffers that hold some milliseconds of a link: with the megabytes
that Linux else grows to, and with BBR, which looks for the rate again and again, times of one and the same schedule
differed by a fifth.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import sparsecoll as sc
from bench.cluster.rate import BURST_BYTES
from bench.cluster.signals import undisturbed

__all__ = ["INTERFACE", "MOST_HOSTS", "Hosts", "remove_leftovers"]

INTERFACE = "eth0"
MOST_HOSTS = 200

_PREFIX = "sparsecoll"
_NETWORK = "10.213.0"
_LIMIT_BYTES = 64 << 20

# TCP hands over segments in batches, which tbf takes apart if they exceed its burst. That took a core at 400 Mbit/s;
# batches that stay whole take an eighth of it, and count as many bytes: tbf adds the headers of each segment.
_BATCH_BYTES = 32 << 10

# Under /proc/sys/net/ipv4.
_TCP_SETTINGS = {"tcp_congestion_control": "reno", "tcp_wmem": "4096 262144 262144"}
_NEEDS = "root (CAP_NET_ADMIN, CAP_SYS_ADMIN), iproute2's ip and tc, and a kernel with veth, bridge and tbf"


class Hosts:
    """Hosts, a switch and the cables between them, from entering to leaving.

    Names hold the number of this process, so that runs at the same time do not meet.

    Args:
        num_hosts: from 1 to `MOST_HOSTS`.
        rate_bits_per_s: of every host's link, in each direction.
    """

    def __init__(self, num_hosts: int, rate_bits_per_s: int) -> None:
        self.num_hosts = num_hosts
        self._rate_bits_per_s = rate_bits_per_s
        self._switch = f"{_PREFIX}-{os.getpid()}-switch"
        self._names = [f"{_PREFIX}-{os.getpid()}-{host}" for host in range(num_hosts)]

    def __enter__(self) -> Hosts:
        """Makes everything, or nothing.

        Raises:
            BackendUnavailable: says what this machine lacks.
        """
        _check_needs()
        remove_leftovers()
        try:
            self._make()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._remove()

    def command(self, host: int, command: Sequence[str]) -> list[str]:
        """The command line that runs ``command`` on a host."""
        return ["ip", "netns", "exec", self._names[host], *command]

    def address(self, host: int) -> str:
        """A host's address, which the others reach over its link."""
        return f"{_NETWORK}.{host + 1}"

    def dropped_packets(self) -> int:
        """Packets for which a link had no room, so far; not 0 means that it policed rather than limited."""
        total = 0
        for name in (self._switch, *self._names):
            queues = json.loads(_run("tc", "-n", name, "-s", "-j", "qdisc", "show"))
            total += sum(queue["drops"] for queue in queues if queue["kind"] == "tbf")
        return total

    def _make(self) -> None:
        switch = self._switch
        _run("ip", "netns", "add", switch)
        _run("ip", "-n", switch, "link", "add", "bridge", "type", "bridge")
        _run("ip", "-n", switch, "link", "set", "bridge", "up")
        for host, name in enumerate(self._names):
            port = f"port{host}"
            _run("ip", "netns", "add", name)
            _run("ip", "-n", name, "link", "set", "lo", "up")
            _run(*f"ip link add {INTERFACE} netns {name} type veth peer name {port} netns {switch}".split())
            for place, end in ((name, INTERFACE), (switch, port)):
                # No link-local addresses: their discovery would put packets of its own on the links.
                _run("ip", "-n", place, "link", "set", end, "addrgenmode", "none", "gso_max_size", str(_BATCH_BYTES))
                limit = f"rate {self._rate_bits_per_s}bit burst {BURST_BYTES} limit {_LIMIT_BYTES}"
                _run("tc", "-n", place, "qdisc", "add", "dev", end, "root", "tbf", *limit.split())
            _run("ip", "-n", switch, "link", "set", port, "master", "bridge", "up")
            _run("ip", "-n", name, "address", "add", f"{self.address(host)}/24", "dev", INTERFACE)
            _run("ip", "-n", name, "link", "set", INTERFACE, "up")
            for setting, value in _TCP_SETTINGS.items():
                _run(*self.command(host, ["sh", "-c", f"echo {value} > /proc/sys/net/ipv4/{setting}"]))

    def _remove(self) -> None:
        _delete([*self._names, self._switch])


def remove_leftovers() -> None:
    """Deletes what runs have left that were killed before they could."""
    left = []
    for name in _namespaces():
        match = re.fullmatch(rf"{_PREFIX}-(\d+)-\w+", name)
        if match and not Path("/proc", match[1]).exists():
            left.append(name)
    _delete(left)


def _check_needs() -> None:
    missing = [f"no {tool} on the PATH" for tool in ("ip", "tc") if shutil.which(tool) is None]
    if os.geteuid() != 0:
        missing.append(f"user {os.geteuid()}")
    if missing:
        raise sc.BackendUnavailable(f"cluster: expected {_NEEDS}, got {' and '.join(missing)}")


def _namespaces() -> list[str]:
    lines = _run("ip", "netns", "list").splitlines()
    return [line.split()[0] for line in lines if line]


def _delete(names: Sequence[str]) -> None:
    with undisturbed():
        existing = set(_namespaces())
        for name in names:
            if name in existing:
                with contextlib.suppress(sc.BackendUnavailable):
                    _run("ip", "netns", "delete", name)
        for name in existing.intersection(names).intersection(_namespaces()):
            print(f"bench: could not remove the network namespace {name}", file=sys.stderr)


def _run(*command: str) -> str:
    """Runs a tool of iproute2 and returns what it wrote."""
    ended = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if ended.returncode:
        text = ended.stderr.strip() or f"status {ended.returncode}"
        raise sc.BackendUnavailable(f"cluster: expected {_NEEDS}; {' '.join(command)!r} says: {text}")
    return ended.stdout
