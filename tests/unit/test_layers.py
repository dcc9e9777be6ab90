"""Who imports whom: the levels of ``docs/architecture.md``, back ends in one file each, benches on public names.

A room is a top-level module or sub-package of ``sparsecoll``. Every form of import counts for its level, also inside a
function or under ``TYPE_CHECKING``: a late import and a type hint are knowledge too. Only the load of a back end is
asked *when* it happens, and there ``TYPE_CHECKING`` never happens at all. ``sparsecoll/__init__.py`` is no room but the
roof: it may import every room, and no room may import it.
"""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import sparsecoll

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "sparsecoll"

BACK_ENDS = {"torch", "mpi4py", "cupy", "cupyx", "cuda", "nccl"}
PURE = {"placement", "plan", "balance", "topology", "reference"}
PUBLIC_MODULES = {"sparsecoll", "sparsecoll.balance", "sparsecoll.cuda", "sparsecoll.moe", "sparsecoll.native"}


class Import(NamedTuple):
    """One imported module, by absolute name.

    Attributes:
        names: what ``from module import ...`` takes out of it; empty for ``import module``.
        when: ``load``, ``call`` (inside a function) or ``never`` (under ``TYPE_CHECKING``).
    """

    module: str
    names: tuple[str, ...]
    when: str
    line: int


def imports_of(source: str, module: str, *, is_package: bool) -> list[Import]:
    """All imports in ``source``, the text of ``module``; relative ones made absolute."""
    package = module if is_package else module.rpartition(".")[0]
    return list(_walk(ast.parse(source), package, "load"))


def _walk(node: ast.AST, package: str, when: str) -> Iterator[Import]:
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield Import(alias.name, (), when, node.lineno)
    elif isinstance(node, ast.ImportFrom):
        parents = package.split(".")
        base = parents[: len(parents) - node.level + 1] if node.level else []
        found = ".".join([*base, *([node.module] if node.module else [])])
        yield Import(found, tuple(alias.name for alias in node.names), when, node.lineno)
    elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        called = ast.unparse(node.func).rpartition(".")[2]
        if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
            yield Import(node.args[0].value, (), when, node.lineno)
    if isinstance(node, ast.If) and ast.unparse(node.test).rpartition(".")[2] == "TYPE_CHECKING":
        for child in node.body:
            yield from _walk(child, package, "never")
        for child in node.orelse:
            yield from _walk(child, package, when)
        return
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) and when == "load":
        when = "call"
    for child in ast.iter_child_nodes(node):
        yield from _walk(child, package, when)


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def read_imports(path: Path) -> list[Import]:
    return imports_of(path.read_text(), module_of(path), is_package=path.name == "__init__.py")


MODULES = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def room_of(module: str) -> str | None:
    """``sparsecoll.plan.bounds`` is in ``plan``; None for the package itself."""
    parts = module.split(".")
    return parts[1].removeprefix("_") if len(parts) > 1 else None


def rooms_of(entry: Import) -> list[str | None]:
    """The rooms that an import reaches: ``from sparsecoll import native`` reaches native, not the roof."""
    if entry.module.split(".")[0] != "sparsecoll":
        return []
    if entry.module == "sparsecoll" and entry.names:
        return [name.removeprefix("_") if is_room(name.removeprefix("_")) else None for name in entry.names]
    return [room_of(entry.module)]


def is_room(name: str) -> bool:
    return (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").is_file()


def read_levels(text: str) -> dict[str, int]:
    """Room → level, from the block marked ``levels``."""
    block = re.search(r"^```levels\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert block, "docs/architecture.md has a fenced block named levels"
    levels: dict[str, int] = {}
    for line in block[1].splitlines():
        number, rooms = line.split(":")
        for room in rooms.split():
            assert room not in levels, f"{room} is listed once"
            levels[room] = int(number)
    return levels


LEVELS = read_levels((ROOT / "docs" / "architecture.md").read_text())


def broken_arrows(module: str, entries: list[Import]) -> list[str]:
    """What is wrong with the imports of a module of a room, as sentences."""
    room = room_of(module)
    assert room is not None
    wrong = []
    for entry in entries:
        for other in rooms_of(entry):
            if other is None:
                wrong.append(f"{module}:{entry.line} imports the public names of the package")
            elif other != room and LEVELS[other] >= LEVELS[room]:
                wrong.append(f"{module}:{entry.line} (level {LEVELS[room]}) imports {other} (level {LEVELS[other]})")
    return wrong


def test_every_room_has_a_level_and_every_level_its_rooms() -> None:
    found = {room for module in MODULES if (room := room_of(module)) is not None}
    assert found <= set(LEVELS), f"without a level in docs/architecture.md: {sorted(found - set(LEVELS))}"
    assert all(map(is_room, LEVELS)), f"no such room: {sorted(room for room in LEVELS if not is_room(room))}"


@pytest.mark.parametrize("module", [module for module in MODULES if room_of(module) is not None])
def test_imports_point_down(module: str) -> None:
    assert not broken_arrows(module, read_imports(MODULES[module]))


@pytest.mark.parametrize("module", MODULES)
def test_back_ends_are_imported_where_they_belong(module: str) -> None:
    room = room_of(module)
    for entry in read_imports(MODULES[module]):
        back_end = entry.module.split(".")[0]
        if back_end not in BACK_ENDS:
            continue
        place = f"{module}:{entry.line} imports {back_end}"
        assert room not in PURE, f"{place}, but {room} is pure"
        if module.startswith("sparsecoll.transport."):
            own = {"mpi": {"mpi4py"}, "torch": {"torch"}, "torch_stream": {"torch"}, "nccl": {"cupy", "nccl"}}
            assert back_end in own.get(module.rpartition(".")[2], set()), f"{place}, another's back end"
            assert entry.when != "load", f"{place} when it is loaded"
        elif room == "cuda":
            assert back_end in ("cupy", "torch") and entry.when != "load", f"{place} when it is loaded"
        else:
            torch_rooms = module == "sparsecoll.collectives.autograd" or room in ("moe", "fssdp")
            assert back_end == "torch" and torch_rooms, f"{place}, which only its transport does"


def test_only_config_reads_the_environment() -> None:
    touches = []
    for module, path in MODULES.items():
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module == "os":
                assert not {alias.name for alias in node.names} & {"environ", "environb", "getenv", "putenv"}, module
            if isinstance(node, ast.Attribute) and node.attr in ("environ", "environb", "getenv", "putenv"):
                touches.append((module, ast.unparse(node)))
    elsewhere = [touch for touch in touches if touch[0] != "sparsecoll.config"]
    # MPICH reads its settings once, when it starts, and from nowhere else.
    assert elsewhere == [("sparsecoll.transport.mpi", "os.environ")]
    lines = [line.strip() for line in MODULES["sparsecoll.transport.mpi"].read_text().splitlines()]
    (write,) = [line for line in lines if "environ" in line]
    assert re.fullmatch(r'os\.environ\.setdefault\("MPIR_CVAR_\w+", "\w+"\)', write)


@pytest.mark.parametrize(
    "path",
    [path for folder in ("bench", "examples") for path in sorted((ROOT / folder).rglob("*.py"))],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_benches_and_examples_use_public_names_only(path: Path) -> None:
    source = path.read_text()
    aliases = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "sparsecoll":
                    aliases[alias.asname or alias.name.split(".")[0]] = alias.name if alias.asname else "sparsecoll"
    for entry in imports_of(source, path.stem, is_package=False):
        if entry.module.split(".")[0] != "sparsecoll":
            continue
        assert entry.module in PUBLIC_MODULES, f"line {entry.line} imports {entry.module}"
        public = set(importlib.import_module(entry.module).__all__)
        children = {"balance", "moe", "native"} if entry.module == "sparsecoll" else set()
        assert set(entry.names) <= public | children, f"line {entry.line} takes {entry.names} from {entry.module}"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in aliases:
            public = set(importlib.import_module(aliases[node.value.id]).__all__) | {
                "balance",
                "moe",
                "native",
                "__version__",
            }
            assert node.attr in public, f"line {node.lineno} uses {ast.unparse(node)}"


def test_public_names_exist_and_are_documented() -> None:
    for name in sparsecoll.__all__:
        assert getattr(sparsecoll, name).__doc__, f"sparsecoll.{name} has a docstring"


LIGHT = """
import sys
import sparsecoll as sc
import numpy as np

def heavy():
    return sorted({name.split(".")[0] for name in sys.modules} & {"torch", "mpi4py", "cupy", "nccl", "scipy"})

assert not heavy(), f"import sparsecoll loads {heavy()}"

def main(group):
    place = sc.Placement.even(4, 2).replicate({0: [1]})
    held = sc.sparse_all_gather(np.full((2, 3), float(group.rank)), place)
    owned = sc.sparse_reduce_scatter(held, place, async_op=True).result()
    return sc.all_to_all(owned, [1, 1]).tolist()

print(sc.run_local(main, 2))
assert not heavy(), f"NumPy arrays load {heavy()}"
"""


def test_import_and_use_with_numpy_load_no_back_end() -> None:
    ended = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.strip() == "[[[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]], [[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]]"


SAMPLE = """
import os, sparsecoll.group
import sparsecoll.plan.bounds as bounds
from typing import TYPE_CHECKING
from . import program
from .. import fssdp as wrapper
from ..group import Group
from ...outside import thing
if TYPE_CHECKING:
    from sparsecoll.moe import MoELayer
else:
    import first
try:
    import second
except ImportError:
    pass
class Lazy:
    import third
    def late(self):
        import torch
        from sparsecoll import executor, Plan
        import_module("mpi4py.MPI")
"""


def test_the_reader_of_imports_sees_every_form() -> None:
    """The rules above are worth what this reader sees."""
    found = {
        (each.module, each.names, each.when) for each in imports_of(SAMPLE, "sparsecoll.plan.odd", is_package=False)
    }
    assert found == {
        ("os", (), "load"),
        ("sparsecoll.group", (), "load"),
        ("sparsecoll.plan.bounds", (), "load"),
        ("typing", ("TYPE_CHECKING",), "load"),
        ("sparsecoll.plan", ("program",), "load"),
        ("sparsecoll", ("fssdp",), "load"),
        ("sparsecoll.group", ("Group",), "load"),
        ("outside", ("thing",), "load"),
        ("sparsecoll.moe", ("MoELayer",), "never"),
        ("first", (), "load"),
        ("second", (), "load"),
        ("third", (), "load"),
        ("torch", (), "call"),
        ("sparsecoll", ("executor", "Plan"), "call"),
        ("mpi4py.MPI", (), "call"),
    }
    package = imports_of("from . import a\nfrom ..x import y", "sparsecoll.plan", is_package=True)
    assert [each.module for each in package] == ["sparsecoll.plan", "sparsecoll.x"]


def test_the_rule_of_levels_finds_each_broken_arrow() -> None:
    wrong = broken_arrows("sparsecoll.plan.odd", imports_of(SAMPLE, "sparsecoll.plan.odd", is_package=False))
    assert [line.split(" imports ")[1].split(" (")[0] for line in wrong] == [
        "group",
        "fssdp",
        "group",
        "moe",
        "executor",
        "the public names of the package",
    ]
