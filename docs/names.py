"""Print names in docstrings that do not exist, and fail if there is one (``make check``).

Checked are targets of roles (``:class:`Row```), and in double backticks ``luthier.module.name`` and
``Class.member`` for classes of luthier. Other text in double backticks may be a literal, a setting,
a file or a name of another package. Ruff compares ``Args:`` with the parameters (DOC102).
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from itertools import chain

from prose import ROOT

SRC = ROOT / "src"
ROLE = re.compile(r":(?:class|func|meth|mod|data|attr|exc):`[~.]?([\w.]+)`")
QUOTED = re.compile(r"``((?:luthier|[A-Z]\w+)(?:\.\w+)+)(?:\(\))?``")


def docstrings(tree: ast.AST) -> Iterator[ast.Constant]:
    """Yield docstrings and the documentation of attributes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            for item in node.body:
                if isinstance(item, ast.Expr) and isinstance(item.value, ast.Constant):
                    yield item.value


def identifiers(tree: ast.AST) -> set[str]:
    """Return the names that code defines, imports or uses, and strings such as names of files."""
    fields = ("id", "attr", "arg", "name", "asname", "value")
    values = (getattr(node, field, None) for node in ast.walk(tree) for field in fields)
    return {value for value in values if isinstance(value, str)}


def is_module(parts: list[str]) -> bool:
    """Return whether parts name a module or package of luthier, or of the standard library."""
    path = SRC.joinpath(*parts)
    return path.is_dir() or path.with_suffix(".py").is_file() or parts[0] in sys.stdlib_module_names


class Names:
    """Names of all modules and classes."""

    def __init__(self) -> None:
        files = [*sorted(SRC.rglob("*.py")), SRC / "luthier/__init__.pyi"]
        self.trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in files}
        self.of_module = {path: identifiers(tree) for path, tree in self.trees.items()}
        self.everywhere = set(chain.from_iterable(self.of_module.values()))
        self.classes: dict[str, list[ast.ClassDef]] = {}
        for node in chain.from_iterable(map(ast.walk, self.trees.values())):
            if isinstance(node, ast.ClassDef):
                self.classes.setdefault(node.name, []).append(node)

    def members(self, name: str) -> set[str]:
        """Return the names in the classes of a name, and in their bases."""
        found = set[str]()
        for node in self.classes.get(name, ()):
            bases = set[str]().union(*map(identifiers, node.bases)) - {name}
            found |= identifiers(node).union(*map(self.members, bases))
        return found

    def exists(self, name: str) -> bool:
        """Return whether luthier has a module, name or member of a class with a dotted name."""
        parts, known = name.split("."), self.everywhere
        if is_module(parts) or name in self.everywhere:
            return True
        if parts[0] == "luthier":
            length = next(n for n in range(len(parts) - 1, 0, -1) if is_module(parts[:n]))
            path, parts = SRC.joinpath(*parts[:length]), parts[length:]
            stems = [path.with_suffix(".py"), path / "__init__.py", path / "__init__.pyi"]
            known = set[str]().union(*(self.of_module.get(each, ()) for each in stems))
        owner, *member = parts
        is_foreign = not member or owner not in self.classes
        return owner in known and (is_foreign or member[0] in self.members(owner))


def main() -> int:
    """Print the missing names with their places; return 1 if there is one."""
    names, missing = Names(), list[str]()
    for path, tree in names.trees.items():
        for text in docstrings(tree):
            quoted = QUOTED.findall(str(text.value))
            own = [name for name in quoted if {name.split(".")[0]} <= {"luthier", *names.classes}]
            for name in ROLE.findall(str(text.value)) + own:
                if not names.exists(name):
                    missing.append(f"{path.relative_to(ROOT)}:{text.lineno}: {name} does not exist")
    print("\n".join(missing), end="\n" * bool(missing))
    return int(bool(missing))


if __name__ == "__main__":
    sys.exit(main())
