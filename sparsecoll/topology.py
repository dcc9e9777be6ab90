"""Ranks on nodes, and what their links carry. Pure data, equal on all ranks."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import index
from pathlib import Path
from typing import Any, NamedTuple

from sparsecoll.errors import InvalidArgument

__all__ = ["Link", "Seat", "Topology"]

_VERSION = 1
_LINKS = ("scale_up", "scale_out", "node_link")
_FLAGS = ("shared_memory", "in_rounds")


@dataclass(frozen=True)
class Link:
    """One direction of a rank's link: ``latency_s`` per message and ``bandwidth_bytes_per_s``."""

    bandwidth_bytes_per_s: float
    latency_s: float

    def __post_init__(self) -> None:
        if not (self.bandwidth_bytes_per_s > 0 and self.latency_s >= 0):
            raise InvalidArgument(f"Link: expected a positive bandwidth and a latency of at least 0, got {self}")


_NVLINK = Link(bandwidth_bytes_per_s=3.5e11, latency_s=5e-6)
_ADAPTER = Link(bandwidth_bytes_per_s=4.5e10, latency_s=1.5e-5)


class Seat(NamedTuple):
    """Where a rank sits: what its machine and its launcher say. None where they say nothing.

    Attributes:
        host: name of the machine; containers and network namespaces of one machine may share it.
        node: the launcher's name or number for the node.
        rank: the launcher's number of the rank, in the whole job.
        local_rank: number of the rank among those of its node.
        local_size: number of ranks on the node.
    """

    host: str
    node: str | None = None
    rank: int | None = None
    local_rank: int | None = None
    local_size: int | None = None


@dataclass(frozen=True)
class Topology:
    """Where each rank lives and how fast it talks.

    Links are full duplex: each direction carries the whole bandwidth.

    Attributes:
        node_of: ``[world_size]``, the node of each rank; nodes count from 0.
        scale_up: a rank's link to ranks of its own node; one for all ranks, or ``[world_size]``.
        scale_out: a rank's link to ranks of other nodes (its rail); one for all ranks, or ``[world_size]``.
        node_link: what all ranks of a node share towards other nodes; one for all nodes, or ``[num_nodes]``. None where
            nothing is shared.
        shared_memory: whether ranks of a node reach each other through memory that all of them use up together, so that
            relaying inside a node spares nobody anything. ``auto`` plans then leave it.
        in_rounds: whether messages travel in groups that end together, as NCCL's do, so that a relay waits for whole
            rounds. ``auto`` plans count that (`sparsecoll.plan.rounds`).
    """

    node_of: tuple[int, ...]
    scale_up: Link | tuple[Link, ...] = Link(bandwidth_bytes_per_s=8e9, latency_s=2e-6)
    scale_out: Link | tuple[Link, ...] = Link(bandwidth_bytes_per_s=1.25e9, latency_s=2e-5)
    node_link: Link | tuple[Link, ...] | None = None
    shared_memory: bool = False
    in_rounds: bool = False

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "node_of", tuple(index(node) for node in self.node_of))
        except TypeError:
            raise InvalidArgument(f"Topology: expected a node number for each rank, got {self.node_of}") from None
        if not self.node_of:
            raise InvalidArgument("Topology: expected at least one rank, got none")
        nodes = set(self.node_of)
        if nodes != set(range(len(nodes))):
            raise InvalidArgument(f"Topology: expected nodes numbered from 0 without gaps, got {sorted(nodes)}")
        for name, count in (("scale_up", self.world_size), ("scale_out", self.world_size), ("node_link", len(nodes))):
            links = getattr(self, name)
            if isinstance(links, Link) or (name == "node_link" and links is None):
                continue
            if not isinstance(links, (tuple, list)) or not all(isinstance(each, Link) for each in links):
                raise InvalidArgument(f"Topology: expected {name} to be a Link or {count} Links, got {links!r}")
            if len(links) != count:
                raise InvalidArgument(f"Topology: expected {name} to be a Link or {count} Links, got {len(links)}")
            # Equal links are one, so that topologies are equal by what they say.
            object.__setattr__(self, name, links[0] if len(set(links)) == 1 else tuple(links))

    @classmethod
    def flat(cls, world_size: int, link: Link | None = None) -> Topology:
        """All ranks on one node, each with ``link`` to the others."""
        if world_size < 1:
            raise InvalidArgument(f"Topology.flat: expected world_size >= 1, got {world_size}")
        return cls((0,) * world_size) if link is None else cls((0,) * world_size, scale_up=link)

    @classmethod
    def from_hosts(cls, hosts: Sequence[str]) -> Topology:
        """One node per distinct host name, numbered in order of first appearance."""
        numbers = {host: node for node, host in enumerate(dict.fromkeys(hosts))}
        return cls(tuple(numbers[host] for host in hosts))

    @classmethod
    def from_seats(cls, seats: Sequence[Seat]) -> Topology:
        """Nodes as the launcher tells them where it does so for all ranks, otherwise one node per host name.

        Ranks share a node when host and the launcher's node are equal. Some launchers number only the ranks of a node:
        then the first ranks with local ranks 0, 1, ... are one node, the second ones another, provided that every node
        gets all the ranks that it should have. (A group of some ranks of a job has nodes with gaps, and so falls
        back to host names.)
        """
        named = all(seat.node is not None for seat in seats)
        names = [(seat.host, seat.node if named else None) for seat in seats]
        keys: Sequence[Any] = _split_by_local_rank(seats, names) or names
        numbers = {key: node for node, key in enumerate(dict.fromkeys(keys))}
        return cls(tuple(numbers[key] for key in keys))

    def with_gpus(self) -> Topology:
        """The same nodes where each rank has a GPU: links of the order of NVLink and of a 400 Gbit/s adapter."""
        return Topology(self.node_of, _NVLINK, _ADAPTER, in_rounds=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Topology:
        """Reads what `save` wrote. Links that a file written by hand leaves out are those of ``Topology(node_of)``.

        Raises:
            InvalidArgument: no such file, or not a sound topology of this version; names the path.
        """
        try:
            return cls._from_record(json.loads(Path(path).read_text(encoding="utf-8")))
        except OSError as error:
            raise InvalidArgument(f"Topology.load: expected a readable file at {path}, got {error}") from error
        except ValueError as error:  # also InvalidArgument, and errors of JSON and UTF-8
            raise InvalidArgument(f"Topology.load: expected a topology in {path}, got: {error}") from error

    @classmethod
    def _from_record(cls, record: Any) -> Topology:
        if not isinstance(record, dict) or record.get("sparsecoll_topology") != _VERSION:
            raise InvalidArgument(f"expected an object with sparsecoll_topology: {_VERSION}")
        unknown = record.keys() - {"sparsecoll_topology", "node_of", *_FLAGS, *_LINKS}
        if unknown or "node_of" not in record:
            raise InvalidArgument(f"expected node_of and {', '.join(_LINKS)}, got {', '.join(map(str, record))}")
        nodes = record["node_of"]
        if not isinstance(nodes, list) or not all(type(node) is int for node in nodes):
            raise InvalidArgument(f"expected node_of to be a list of node numbers, got {nodes!r}")
        flags = {name: record.get(name, False) for name in _FLAGS}
        for name, flag in flags.items():
            if type(flag) is not bool:
                raise InvalidArgument(f"expected {name} to be true or false, got {flag!r}")
        links = {name: _read_links(record[name]) for name in _LINKS if name in record}
        return cls(tuple(nodes), **flags, **links)  # type: ignore[arg-type]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a JSON file that people can read and `load` takes; replaces an old one in one step.

        Raises:
            InvalidArgument: the file cannot be written; names the path.
        """
        path = Path(path)
        # Beside the file itself, as a replacement in one step needs the same file system.
        fresh = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        try:
            fresh.write_text(self._text, encoding="utf-8")
            fresh.replace(path)
        except (OSError, ValueError) as error:  # ValueError: a path that no file can have
            with contextlib.suppress(OSError, ValueError):
                fresh.unlink()
            raise InvalidArgument(f"Topology.save: expected a writable path, got {path}: {error}") from error

    @cached_property
    def _text(self) -> str:
        """The file: one line for each field, and for each link of many."""
        fields = {"sparsecoll_topology": json.dumps(_VERSION), "node_of": json.dumps(self.node_of)}
        fields |= {name: _links_text(getattr(self, name)) for name in _LINKS}
        fields |= {name: json.dumps(getattr(self, name)) for name in _FLAGS}
        return "{\n" + ",\n".join(f'  "{name}": {text}' for name, text in fields.items()) + "\n}\n"

    @cached_property
    def digest(self) -> str:
        """32 hexadecimal digits, equal where topologies are."""
        return hashlib.blake2b(self._text.encode(), digest_size=16).hexdigest()

    def table(self) -> str:
        """Ranks, nodes and links as text; equal links stand in one line."""
        sizes = Counter(self.node_of)
        lines = [f"{_count(self.world_size, 'rank')} on {_count(self.num_nodes, 'node')}"]
        if self.num_nodes > 1:
            if len(set(sizes.values())) == 1 and list(self.node_of) == sorted(self.node_of):
                lines[0] += f", {sizes[0]} on each, in order"
            else:
                lines += [f"node {node}: {_ranges('rank', self._ranks_of(node))}" for node in range(self.num_nodes)]
        rows = [("link", "bandwidth", "latency", "of"), *self._link_rows(sizes)]
        if len(rows) > 1:
            lines += [f"{kind:<10} {bandwidth:>10} {latency:>10}  {of}" for kind, bandwidth, latency, of in rows]
        if self.shared_memory and max(sizes.values()) > 1:
            lines.append("ranks of a node share its memory")
        if self.in_rounds:
            lines.append("messages travel in rounds")
        return "\n".join(lines)

    def _ranks_of(self, node: int) -> list[int]:
        return [rank for rank, other in enumerate(self.node_of) if other == node]

    def _link_rows(self, sizes: Mapping[int, int]) -> Iterable[tuple[str, str, str, str]]:
        """Kind, bandwidth, latency, and of whom; only links that somebody can use."""
        kinds: list[tuple[str, str, Link | tuple[Link, ...] | None, int]] = []
        if max(sizes.values()) > 1:
            kinds.append(("scale-up", "rank", self.scale_up, self.world_size))
        if self.num_nodes > 1:
            kinds.append(("scale-out", "rank", self.scale_out, self.world_size))
            kinds.append(("node", "node", self.node_link, self.num_nodes))
        for kind, noun, links, count in kinds:
            if links is None:
                yield kind, "-", "-", "none is shared"
                continue
            members: dict[Link, list[int]] = {}
            for member, link in enumerate([links] * count if isinstance(links, Link) else links):
                members.setdefault(link, []).append(member)
            for link, those in members.items():
                of = f"every {noun}" if len(members) == 1 else _ranges(noun, those)
                yield kind, _rate(link.bandwidth_bytes_per_s), f"{_digits(link.latency_s * 1e6)} us", of

    def __hash__(self) -> int:
        # Plans are remembered by topology, so every call of a collective asks for this.
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash(self._fields)

    def __reduce__(self) -> tuple[Any, ...]:
        # Without what is cached: another process may hash differently.
        return Topology, self._fields

    @property
    def _fields(self) -> tuple[Any, ...]:
        return self.node_of, *(getattr(self, name) for name in (*_LINKS, *_FLAGS))

    @property
    def world_size(self) -> int:
        return len(self.node_of)

    @cached_property
    def num_nodes(self) -> int:
        return max(self.node_of) + 1

    def scale_up_of(self, rank: int) -> Link:
        """The link of ``rank`` to ranks of its own node."""
        return self.scale_up if isinstance(self.scale_up, Link) else self.scale_up[rank]

    def scale_out_of(self, rank: int) -> Link:
        """The link of ``rank`` to ranks of other nodes."""
        return self.scale_out if isinstance(self.scale_out, Link) else self.scale_out[rank]

    def node_link_of(self, node: int) -> Link | None:
        """What the ranks of ``node`` share towards other nodes."""
        return self.node_link[node] if isinstance(self.node_link, tuple) else self.node_link

    def link(self, src: int, dst: int) -> Link:
        """What a message from ``src`` to ``dst`` gets when nobody else sends: the slowest link on its way."""
        if self.node_of[src] == self.node_of[dst]:
            links = [self.scale_up_of(src), self.scale_up_of(dst)]
        else:
            shared = [self.node_link_of(self.node_of[rank]) for rank in (src, dst)]
            links = [self.scale_out_of(src), self.scale_out_of(dst), *(link for link in shared if link is not None)]
        return Link(min(link.bandwidth_bytes_per_s for link in links), max(link.latency_s for link in links))


def _split_by_local_rank(seats: Sequence[Seat], names: Sequence[tuple[str, str | None]]) -> list[Any] | None:
    """A key of the node of each rank, or None unless all ranks of all nodes are here."""
    jobs = [seat.rank for seat in seats]
    if any(None in (seat.rank, seat.local_rank, seat.local_size) for seat in seats) or len(set(jobs)) < len(jobs):
        return None
    occurrences: Counter[Any] = Counter()
    keys: list[Any] = [None] * len(seats)
    members: dict[Any, set[int | None]] = {}
    for _, position in sorted((seat.rank, position) for position, seat in enumerate(seats)):
        seat = seats[position]
        kind = (names[position], seat.local_size)
        keys[position] = (*kind, occurrences[kind, seat.local_rank])
        occurrences[kind, seat.local_rank] += 1
        members.setdefault(keys[position], set()).add(seat.local_rank)
    complete = all(found == set(range(key[1])) for key, found in members.items())
    return keys if complete else None


def _links_text(links: Link | tuple[Link, ...] | None) -> str:
    if links is None:
        return "null"
    if isinstance(links, tuple):
        return "[\n    " + ",\n    ".join(map(_links_text, links)) + "\n  ]"
    # Floats, so that equal links are equal text.
    return json.dumps(
        {"bandwidth_bytes_per_s": float(links.bandwidth_bytes_per_s), "latency_s": float(links.latency_s)}
    )


def _read_links(value: Any) -> Link | tuple[Link, ...] | None:
    if value is None:
        return None
    if isinstance(value, list):
        return tuple(map(_read_link, value))
    return _read_link(value)


def _read_link(value: Any) -> Link:
    names = ("bandwidth_bytes_per_s", "latency_s")
    if not isinstance(value, dict) or value.keys() != set(names):
        raise InvalidArgument(f"expected a link with {' and '.join(names)}, got {value!r}")
    if not all(type(each) in (int, float) for each in value.values()):
        raise InvalidArgument(f"expected a link of two numbers, got {value!r}")
    return Link(**value)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _ranges(noun: str, members: Sequence[int]) -> str:
    """``ranks 0-3, 8`` for 0, 1, 2, 3 and 8, ascending."""
    runs: list[list[int]] = []
    for member in members:
        if runs and runs[-1][-1] == member - 1:
            runs[-1].append(member)
        else:
            runs.append([member])
    texts = [f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs]
    return f"{noun}{'' if len(members) == 1 else 's'} {', '.join(texts)}"


def _rate(bytes_per_s: float) -> str:
    return f"{_digits(bytes_per_s / 1e9)} GB/s" if bytes_per_s >= 1e9 else f"{_digits(bytes_per_s / 1e6)} MB/s"


def _digits(value: float) -> str:
    """Three significant digits, without an exponent: ``1.25``, ``20.0``, ``400``."""
    decimals = 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{decimals}f}"
