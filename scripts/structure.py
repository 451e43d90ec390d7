"""Rooms of the code, the floors they stand on, the imports between them, and the circles among files.

    python scripts/structure.py [CHECKOUT] [--list] [--tree]

A room is a folder directly below `sae`, a file directly in it, or one of the other folders of Python files (`scripts`,
`benchmarks`). A room's floor is the longest chain of imports below it, so that what imports nothing is on the first.
Imports count wherever they stand: at the top of a file, in a function, under TYPE_CHECKING. A circle is a set of files
that import each other. `--list` prints every room with its floor and what it imports, `--tree` every file of the
package with its first line, as docs/architecture.md shows it.
"""

from __future__ import annotations

import argparse
import ast
import os
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

PACKAGE = "sae"
BESIDE = ("scripts", "benchmarks")
Node = TypeVar("Node", bound=Hashable)
Graph = Mapping[Node, set[Node]]


@dataclass(frozen=True)
class Structure:
    """What stands where, and what imports what.

    Attributes:
        files: for every module what it imports of this repository.
        rooms: for every room what it imports of the others.
    """

    files: Graph[str]
    rooms: Graph[str]

    @property
    def imports(self) -> int:
        return sum(map(len, self.rooms.values()))

    def circles(self) -> list[list[str]]:
        """Sets of modules that import each other; what a package hands on is no circle."""
        return [sorted(circle) for circle in components(self.files) if len(circle) > 1]

    def floors(self) -> dict[str, int]:
        """The floor of every room; rooms that import each other share one."""
        floors: dict[str, int] = {}
        for together in components(self.rooms):
            below = {floors[target] for room in together for target in self.rooms[room] if target not in together}
            floors |= dict.fromkeys(together, 1 + max(below, default=0))
        return floors


def structure_of(checkout: Path) -> Structure:
    """Read all Python files of a checkout; nothing of it is run."""
    modules = {module_of(checkout, path): path for path in python_files(checkout)}
    files = {name: set(imported(path, modules)) - {name} for name, path in modules.items()}
    rooms: dict[str, set[str]] = {room_of(name): set() for name in files}
    for name, targets in files.items():
        rooms[room_of(name)] |= {room_of(target) for target in targets} - {room_of(name)}
    handing_on = {name for name, path in modules.items() if path.name == "__init__.py"}
    inner = {name: targets - handing_on for name, targets in files.items() if name not in handing_on}
    return Structure(inner, rooms)


def python_files(checkout: Path) -> Iterator[Path]:
    """The checkout's own, without environments that benchmarks made in it."""
    for top in (PACKAGE, *BESIDE):
        for folder, inner, names in os.walk(checkout / top):
            if "pyvenv.cfg" in names:
                inner.clear()
                continue
            inner.sort()
            yield from (Path(folder, name) for name in sorted(names) if name.endswith(".py"))


def module_of(checkout: Path, path: Path) -> str:
    parts = path.relative_to(checkout).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def room_of(module: str) -> str:
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == PACKAGE else parts[0]


def imported(path: Path, modules: Mapping[str, Path]) -> Iterator[str]:
    """The repository's modules that a file imports: the nearest one to every name."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            module = name if name in modules else name.rpartition(".")[0]
            if module in modules:
                yield module


def components(graph: Graph[Node]) -> list[set[Node]]:
    """Strongly connected components, each behind those that it points to (Tarjan 1972)."""
    numbers: dict[Node, int] = {}
    lowest: dict[Node, int] = {}
    waiting: list[Node] = []
    found: list[set[Node]] = []

    def visit(node: Node) -> None:
        numbers[node] = lowest[node] = len(numbers)
        waiting.append(node)
        for target in graph[node]:
            if target not in graph:
                continue
            if target not in numbers:
                visit(target)
                lowest[node] = min(lowest[node], lowest[target])
            elif target in waiting:
                lowest[node] = min(lowest[node], numbers[target])
        if lowest[node] == numbers[node]:
            place = waiting.index(node)
            found.append(set(waiting[place:]))
            del waiting[place:]

    for node in graph:
        if node not in numbers:
            visit(node)
    return found


def tree(checkout: Path) -> str:
    """Every file of the package, folder by folder from the lowest floor up, with the first line of its docstring."""
    floors = structure_of(checkout).floors()
    rooms = sorted((room for room in floors if room.startswith(f"{PACKAGE}.")), key=lambda room: (floors[room], room))
    lines = []
    for room in rooms:
        path = checkout / room.replace(".", "/")
        if path.is_dir():
            lines.append(f"{path.name}/  {first_line(path / '__init__.py')}")
            inner = [file for file in sorted(path.rglob("*.py")) if file != path / "__init__.py"]
            lines += [f"    {file.relative_to(path).as_posix()}  {first_line(file)}" for file in inner]
        else:
            lines.append(f"{path.name}.py  {first_line(path.with_suffix('.py'))}")
    return "\n".join(lines)


def first_line(path: Path) -> str:
    """The first line of a module's docstring."""
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", nargs="?", type=Path, default=Path(__file__).parents[1])
    parser.add_argument("--list", action="store_true", help="every room, with its floor and what it imports")
    parser.add_argument("--tree", action="store_true", help="every file of the package, with its first line")
    arguments = parser.parse_args()
    if arguments.tree:
        print(tree(arguments.checkout))
        return
    structure = structure_of(arguments.checkout)
    floors, circles = structure.floors(), structure.circles()
    print(
        f"{len(structure.rooms)} rooms, {max(floors.values())} floors, {structure.imports} imports between rooms, "
        f"{len(circles)} circles"
    )
    for circle in circles:
        print("circle:", ", ".join(circle))
    if arguments.list:
        for room in sorted(floors, key=lambda room: (-floors[room], room)):
            print(f"{floors[room]:2} {room}: {', '.join(sorted(structure.rooms[room]))}")


if __name__ == "__main__":
    main()
