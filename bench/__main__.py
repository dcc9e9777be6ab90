"""``python -m bench <case> [flags]``; ``python -m bench <case> --help`` lists the flags of a case.

A case is a module with ``run(arguments) -> record``, where ``record["passed"]`` says whether results were right.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Sequence

import sparsecoll as sc

_CASES = {
    "all_gather": "bench.collectives.all_gather",
    "reduce_scatter": "bench.collectives.reduce_scatter",
    "all_to_all": "bench.collectives.all_to_all",
    "kernels": "bench.kernels",
    "parity": "bench.parity",
    "expert_parallel": "bench.expert_parallel",
    "cluster": "bench.cluster.case",
    "bound": "bench.bound.case",
    "planner": "bench.planner",
    "balance": "bench.balance.case",
    "step": "bench.step.case",
    "memory": "bench.footprint.case",
    "gpu": "bench.gpu.case",
}


def main(arguments: Sequence[str]) -> int:
    """Runs the case and returns the exit status: 0 right, 1 wrong or failed, 2 misused or unavailable."""
    if not arguments or arguments[0] not in _CASES:
        print(f"usage: python -m bench {{{','.join(_CASES)}}} [flags]", file=sys.stderr)
        return 0 if arguments and arguments[0] in ("-h", "--help") else 2
    record = importlib.import_module(_CASES[arguments[0]]).run(arguments[1:])
    return 0 if record["passed"] else 1


def _run() -> None:
    try:
        status = main(sys.argv[1:])
    except SystemExit:  # argparse has said what is wrong
        raise
    except KeyboardInterrupt:
        print("bench: interrupted", file=sys.stderr)
        status = 130
    except (sc.BackendUnavailable, sc.InvalidArgument) as error:
        print(f"bench: {error}", file=sys.stderr)
        status = 2
    except BaseException:
        traceback.print_exc()
        status = 1
    else:
        sys.exit(status)
    sys.stdout.flush()
    sys.stderr.flush()
    # A normal exit would wait in MPI's finalization for ranks that wait for this one. The launcher sees the status
    # and ends them.
    os._exit(status)


if __name__ == "__main__":
    _run()
