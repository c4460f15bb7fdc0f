"""The floors of the package and of the converter, and which way imports go: `python tests/floors.py` prints them.

A folder is a floor. A file may import from its own floor and from those below it, never from above; files of one floor
may not import each other in a circle. `convert` lies beside the package: it may import all of it, the package imports
nothing of it, and its own files form no circle either. Imports inside functions and those for type checkers count.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE, CONVERTER = "mlx_gemma_mtp", "convert"
COMMANDS, BASE = "commands", "base"
FACADE = "__init__"
# From top to bottom. Files that lie flat in the package are commands, but for those of the lowest floor.
FLOORS = (
    COMMANDS,
    "cli",
    "server",
    "checks",
    "engine",
    "text",
    "speculative",
    "sampling",
    "models",
    "cache",
    "ops",
    "files",
    "machine",
    BASE,
)
LOWEST = ("errors", "_version")


def floor_of(module: str) -> str:
    """The floor of a dotted name inside the package, 'engine.request' say."""
    first, _, rest = module.partition(".")
    if rest or first in FLOORS:
        return first
    return BASE if first in LOWEST else COMMANDS


def imports_of(path: Path, package: Path) -> Iterator[str]:
    """The package's own modules that a file imports, as dotted names without the package's."""
    modules = {name_of(each, package) for each in package.rglob("*.py")} - {""}
    here = path.relative_to(package.parent).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else ()
            module = ".".join([*base, *filter(None, [node.module])])
            names = [module, *(f"{module}.{alias.name}" for alias in node.names)]
        else:
            continue
        inside = {name.removeprefix(f"{package.name}.") for name in names if name.startswith(f"{package.name}.")}
        yield from inside & modules
        if isinstance(node, ast.ImportFrom) and module == package.name and inside - modules:
            yield FACADE  # a name of the package's own __init__, such as __version__


def name_of(path: Path, package: Path) -> str:
    """'engine.request' for engine/request.py, 'engine' for engine/__init__.py."""
    parts = path.relative_to(package).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def graph(package: Path) -> dict[str, set[str]]:
    """Every module of the package, without its own __init__, and the modules that it imports."""
    arrows = {}
    for path in sorted(package.rglob("*.py")):
        if path != package / "__init__.py":
            name = name_of(path, package)
            arrows[name] = set(imports_of(path, package)) - {name}
    return arrows


def upward(arrows: Mapping[str, set[str]]) -> list[str]:
    """A line for every import that goes up, with both names."""
    height = {floor: place for place, floor in enumerate(FLOORS)}
    return [
        f"{source} (floor {floor_of(source)}) imports {target} (floor {floor_of(target)}), which lies above it"
        for source, targets in sorted(arrows.items())
        for target in sorted(targets)
        if height[floor_of(target)] < height[floor_of(source)] or floor_of(target) == COMMANDS
    ]


def readers(package: Path, other: str) -> list[str]:
    """A line for every file of a package that imports another package, under its own name or as a part of this one."""
    imports = re.compile(rf"^\s*(from|import) +({package.name}\.|\.+)?{other}\b", re.MULTILINE)
    files = sorted(package.rglob("*.py"))
    return [f"{name_of(path, package)} imports {other}" for path in files if imports.search(path.read_text("utf-8"))]


def circles(arrows: Mapping[str, set[str]]) -> list[str]:
    """A line for every circle of imports that a walk in depth finds."""
    found, done, path = [], set(), []

    def walk(module: str) -> None:
        if module in path:
            found.append(" -> ".join([*path[path.index(module) :], module]))
        elif module not in done:
            path.append(module)
            for target in sorted(arrows.get(module, ())):
                walk(target)
            done.add(path.pop())

    for module in arrows:
        walk(module)
    return found


def main() -> int:
    """Prints the floors with their files and the floors that each reads; returns 1 where an arrow goes up or round."""
    arrows = graph(ROOT / PACKAGE)
    for floor in FLOORS:
        files = [name for name in arrows if floor_of(name) == floor and name != floor]
        if files:
            below = {floor_of(target) for name in files for target in arrows[name]} - {floor}
            print(f"{floor}: {' '.join(name.removeprefix(f'{floor}.') for name in files)}")
            print(f"    reads {' '.join(each for each in FLOORS if each in below) or 'nothing'}")
    beside = graph(ROOT / CONVERTER)
    print(f"beside them, {CONVERTER}: {' '.join(beside)}")
    wrong = [*upward(arrows), *readers(ROOT / PACKAGE, CONVERTER)]
    wrong += [f"a circle: {each}" for each in (*circles(arrows), *circles(beside))]
    files, imports = len(arrows) + len(beside), sum(map(len, (arrows | beside).values()))
    print("\n".join(wrong) or f"{files} files, {imports} imports: none goes up, no circle")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
