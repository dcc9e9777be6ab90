"""``mpirun -n 4 python -m sparsecoll.probe --out topology.json``: measures, shows and saves the links of all ranks.

Ends with 0, or 2 when misused or when the back end is missing, or 1 when a rank failed.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from sparsecoll.errors import BackendUnavailable, InvalidArgument
from sparsecoll.group import init_group
from sparsecoll.probe import probe


def main(arguments: Sequence[str]) -> None:
    """Rank 0 speaks and writes; all ranks measure.

    Raises:
        SystemExit: misuse, with status 2, after a message.
        SparsecollError: as `init_group`, `probe` and `Topology.save`.
    """
    options = _parser().parse_args(arguments)
    with init_group(options.backend) as group:
        topology = probe(group, duration_s=options.duration_s)
        if group.rank == 0:
            print(topology.table(), flush=True)
            if options.out is not None:
                topology.save(options.out)
                print(f"written to {options.out}, for sparsecoll.init_group(topology={str(options.out)!r})", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m sparsecoll.probe",
        description="Measures the links between all ranks that mpirun or torchrun started.",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="where rank 0 saves the topology, as JSON")
    parser.add_argument("--backend", choices=("auto", "local", "torch", "mpi"), default="auto")
    parser.add_argument("--duration-s", type=float, default=2.0, metavar="S", help="about how long (default 2)")
    return parser


def _run() -> None:
    try:
        main(sys.argv[1:])
    except SystemExit:  # argparse has said what is wrong
        raise
    except KeyboardInterrupt:
        status = 130
    except (InvalidArgument, BackendUnavailable) as error:
        print(f"probe: {error}", file=sys.stderr)
        status = 2
    except BaseException:
        traceback.print_exc()
        status = 1
    else:
        return
    sys.stdout.flush()
    sys.stderr.flush()
    # A normal exit would wait in MPI's finalization for ranks that wait for this one. The launcher sees the status
    # and ends them.
    os._exit(status)


if __name__ == "__main__":
    _run()
