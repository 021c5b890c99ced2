"""Who may import whom: the layers as a table, and a checker that reads sources without running them.

Every import counts, also one inside a function or under TYPE_CHECKING: a type is knowledge too. A module that the table
does not place is an error, so that the choice of its layer is made by whoever adds it.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

STANDARD = sys.stdlib_module_names


def row(names: str) -> frozenset[str]:
    """A set of names, written with spaces between them."""
    return frozenset(names.split())


UNPICKLERS = row("_pickle cloudpickle dill joblib marshal multiprocessing pickle shelve torch yaml")
"""Modules that turn bytes into objects of the sender's choice; ``multiprocessing`` does so behind its queues."""

EVALUATORS = row("compile eval exec")


@dataclass(frozen=True)
class Package:
    """The rules of one import package."""

    name: str
    layers: tuple[frozenset[str], ...]
    """Rows from the highest to the lowest. A module imports its own subpackage and rows below, nothing beside or above.

    An entry names a module or a subpackage; the longest entry that matches a module places it.
    """
    foreign: frozenset[str]
    """Other import roots that every module may use, beside the standard library."""
    extra: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """Import roots that only the modules below an entry may use too."""
    forbidden: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """Modules of the package itself that an entry must not import although they lie below it."""
    friends: frozenset[str] = frozenset()
    """Entries that may import others of their row (circles stay forbidden)."""


VALUES = row("allocator digests events layout limits manifest metrics model notify records sealing settings workers")
WORK = row("session restore upkeep")
SEAMS = row("clock tiers.filesystem tiers.errors")  # what the tests replace: known to all

DAEMON = Package(
    name="cairnd",
    layers=(
        row("__main__"),
        row("app"),
        row("rpc cli"),
        row("core"),
        WORK,
        row("replication"),
        row("catalog"),
        row("tiers"),
        VALUES,
        SEAMS,
    ),
    foreign=row("cairn_api awscrt fsspec isal prometheus_client s3fs"),
    extra={"rpc": row("grpc grpc_health grpc_reflection google"), "cli": row("grpc google rich")},
    forbidden={"tiers": row("model manifest layout"), "rpc": row("core"), "cli": row("core")},
    friends=WORK | VALUES | SEAMS,
)

CALLS = row("background client direct guards image live load launch overlap reading save session unpickling unsettled")
AGREED = row("agreement choice counters schedule settings")  # pure: what every rank computes alike, and plain values

CLIENT = Package(
    name="cairn",
    layers=(
        row("integrations"),
        CALLS,
        row("capture transport ranks"),
        AGREED,
    ),
    foreign=row("cairn_api torch grpc google"),
    extra={"integrations": row("deepspeed cairn_autoload")},
    friends=CALLS | AGREED,
)

API = Package(name="cairn_api", layers=(row("framing names v1 wire"), row("errors")), foreign=row("grpc google"))

WIRE = "cairn_api.v1"
WIRE_READERS = {"cairnd": row("rpc cli"), "cairn": row("transport"), "cairn_api": row("v1")}
"""Who may touch generated messages: translation happens at the edge and nowhere else."""


class Import(NamedTuple):
    """``target`` is the dotted name of what line ``line`` imports; deep enough to tell submodules apart."""

    target: str
    line: int


def imports_of(tree: ast.Module, module: str, *, is_package: bool) -> Iterator[Import]:
    """Every import in ``tree``, absolute, including ``import_module("literal")`` and ``__import__("literal")``."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from (Import(alias.name, node.lineno) for alias in names)
            case ast.ImportFrom(module=base, names=names, level=level):
                parents = module.split(".") if level else []
                climbed = parents[: len(parents) - level + is_package]
                stem = ".".join([*climbed, *([base] if base else [])])
                yield from (Import(f"{stem}.{alias.name}", node.lineno) for alias in names)
            case ast.Call(func=ast.Name(id="__import__" | "import_module") | ast.Attribute(attr="import_module")):
                if node.args and isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str):
                    yield Import(node.args[0].value, node.lineno)


def place(package: Package, path: str) -> tuple[int, str] | None:
    """The row and the entry of a dotted path relative to the package; None when the table does not know it."""
    parts = path.split(".")
    for length in range(len(parts), 0, -1):
        entry = ".".join(parts[:length])
        for depth, entries in enumerate(package.layers):
            if entry in entries:
                return depth, entry
    return None


def within(path: str, entries: Iterable[str]) -> bool:
    """Whether a dotted path is one of the entries or lies below one."""
    return any(path == entry or path.startswith(f"{entry}.") for entry in entries)


def violations(package: Package, root: Path) -> list[str]:
    """Every broken rule of the package whose source root is ``root``, as ``file:line: sentence``."""
    found: list[str] = []
    graph: dict[str, set[str]] = {}
    sources = [path for path in sorted((root / package.name).rglob("*.py")) if "_pb2" not in path.stem]
    modules = {dotted(path.relative_to(root)): path for path in sources}
    for module, path in modules.items():
        tree = ast.parse(path.read_text(), str(path))
        local = module.removeprefix(package.name).removeprefix(".")
        placed = place(package, local) if local else (-1, "")
        if placed is None:
            found.append(f"{path}:1: no layer is given to {module}: add it to the table in tests/packaging/imports.py")
            continue
        graph[module] = set()
        found += (f"{path}:{line}: {name}() makes code out of data" for name, line in evaluations(tree))
        for target, line in imports_of(tree, module, is_package=path.name == "__init__.py"):
            problem = judge(package, local, placed, target)
            if problem:
                found.append(f"{path}:{line}: {problem}")
            else:
                graph[module].update({target, target.rpartition(".")[0]} & modules.keys() - {module, package.name})
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found.append(f"{root / package.name}:1: modules import each other in a circle: {' > '.join(error.args[1])}")
    return found


def dotted(path: Path) -> str:
    """The name of the module in a file, given relative to its source root."""
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def evaluations(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Calls of the built-ins that run text as code."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in EVALUATORS:
            yield node.func.id, node.lineno


def judge(package: Package, importer: str, placed: tuple[int, str], target: str) -> str | None:
    """What is wrong with ``importer`` (relative to the package) importing ``target`` (absolute), or None."""
    origin = target.partition(".")[0]
    where = f"{package.name}.{importer}" if importer else package.name
    if within(target, [WIRE]) and not within(importer, WIRE_READERS[package.name]):
        return f"{where} imports {target}: only {', '.join(sorted(WIRE_READERS[package.name]))} may touch wire types"
    if origin != package.name:
        allowed = package.foreign.union(*(roots for entry, roots in package.extra.items() if within(importer, [entry])))
        if package.name == "cairnd" and origin in UNPICKLERS:
            return f"{where} imports {target}: the daemon never turns bytes into objects"
        if origin in STANDARD or origin in allowed:
            return None
        return f"{where} imports {target}: {origin} is not open to it"
    if not importer:
        return None  # the package's own __init__ chooses what is public
    imported = target.removeprefix(package.name).removeprefix(".")
    other = place(package, imported)
    if other is None:
        return None if imported.startswith("__") else f"{where} imports {target}, which no layer is given to"
    return judge_layers(package, where, placed, target, other)


def judge_layers(
    package: Package, where: str, placed: tuple[int, str], target: str, other: tuple[int, str]
) -> str | None:
    """The one-way rule between two placed modules of the package."""
    (depth, entry), (other_depth, other_entry) = placed, other
    if within(other_entry, package.forbidden.get(entry, ())):
        return f"{where} imports {target}: {entry} must not know {other_entry}"
    same = entry.partition(".")[0] == other_entry.partition(".")[0]
    if same or other_depth > depth:
        return None
    if other_depth < depth:
        return f"{where} imports {target}: {other_entry} lies above {entry}"
    return None if entry in package.friends else f"{where} imports {target}: {other_entry} lies beside {entry}"


def autoload_violations(path: Path) -> list[str]:
    """What the entry point imports too early: it runs in every ``import torch`` on the machine.

    The standard library is free; cairn itself only inside a function.
    """
    tree = ast.parse(path.read_text(), str(path))
    eager = {id(node) for statement in tree.body for node in outside_functions(statement)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = ast.Module([node], [])
            for target, line in imports_of(module, path.stem, is_package=False):
                origin = target.partition(".")[0]
                if origin not in STANDARD and (id(node) in eager or origin != "cairn"):
                    found.append(f"{path}:{line}: the autoload module imports {target}")
    return found


def outside_functions(node: ast.AST) -> Iterator[ast.AST]:
    """``node`` and what lies below it, but not what only runs when somebody calls a function."""
    yield node
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        for child in ast.iter_child_nodes(node):
            yield from outside_functions(child)
