"""``python -m bench cluster``: sparse collectives on hosts whose links are the only thing that is slow.

The hosts are on this machine (`bench.cluster.hosts`), the ranks on them talk over TCP through torch.distributed's
Gloo, and links are limited in both directions. Waiting on a link costs no processor time, so that schedures can be
judged by the clock on few cores. Every algorithm of the library and what a user of torch.distributed would write
(`bench.cluster.baselines`) take turns on the same chunks, and every result is checked.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import sparsecoll as sc
from bench.cluster.hosts import Hosts
from bench.cluster.launch import RankFailed, run_ranks
from bench.cluster.options import LAUNCHED, Options, parse
from bench.cluster.report import now, print_footer, print_header, print_row, record
from bench.cluster.rows import Row
from bench.cluster.signals import terminable
from bench.report import write_record

__all__ = ["run"]


def run(arguments: Sequence[str] = ()) -> dict[str, Any]:
    """Makes the hosts, starts the ranks and reports; or is one of the ranks.

    Raises:
        BackendUnavailable: this machine cannot make hosts, or has no torch.
    """
    options = parse(arguments)
    if options.launcher is not None:
        return _run_rank(options)
    if importlib.util.find_spec("torch") is None:
        raise sc.BackendUnavailable('cluster: expected torch, try pip install "sparsecoll[torch]"')
    found = _run_all(options)
    if options.output is not None:
        write_record(found, options.output)
    return found


def _run_all(options: Options) -> dict[str, Any]:
    start_time = now()
    errors: list[str] = []
    with (
        terminable(),
        tempfile.TemporaryDirectory(prefix="sparsecoll-bench-") as name,
        Hosts(options.num_hosts, options.rate_bits_per_s) as hosts,
    ):
        print_header(options)
        folder = Path(name)
        output = folder / "rows.jsonl"
        command = ["-m", "bench", "cluster", *options.arguments, LAUNCHED, str(os.getpid()), "--json", str(output)]
        try:
            run_ranks(hosts, options.ranks_per_host, command, folder)
        except RankFailed as error:
            errors.append(str(error))
        rows = [Row(**json.loads(line)) for line in output.read_text().splitlines()] if output.exists() else []
        dropped_packets = hosts.dropped_packets()
    found = record(options, rows, errors, dropped_packets, start_time)
    print_footer(found)
    for text in errors:
        print(f"bench: {text}", file=sys.stderr)
    return found


def _run_rank(options: Options) -> dict[str, Any]:
    from bench.cluster.rank import measure_all  # loads torch, which takes a second

    output = options.output
    assert output is not None

    def report(row: Row) -> None:
        print_row(row)
        with output.open("a") as file:
            file.write(json.dumps(asdict(row)) + "\n")

    measure_all(options, report)
    return {"passed": True}
