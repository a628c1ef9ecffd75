"""The house rules as a test: sizes, reachability, leftovers; the checks are tested below."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "python" / "symphony_sglang"
FUNCTION_LINES_MAX = 70
MODULE_LINES_MAX = 500
# Modules that are reached by name only: entry points, `python -m`, and SGLang's dynamic loading.
ENTRY_MODULES = {
    "symphony_sglang",
    "symphony_sglang.cli",
    "symphony_sglang.launch_server",
    "symphony_sglang.platform",
    "symphony_sglang.lang",
    "symphony_sglang.engine.plugin",
    "symphony_sglang.engine.nvme_backend",
}
# Shipped for users' tests as much as for ours.
SHIPPED_FAKES = "symphony_sglang.testing"
# Written apart, so that this file passes its own check.
LEFTOVERS = ("TO" + "DO", "FIX" + "ME", "X" + "XX", "Not" + "ImplementedError", "breakpoint" + "()")


def long_functions(source: str) -> list[tuple[str, int]]:
    """Name and length of every function over the limit, docstring and decorators not counted."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0]
            start = node.lineno
            length = (node.end_lineno or start) - start + 1
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                length -= (first.end_lineno or first.lineno) - first.lineno + 1
            if length > FUNCTION_LINES_MAX:
                found.append((node.name, length))
    return found


def imported_modules(source: str, module: str, *, is_package: bool) -> set[str]:
    """Every module that `source` may import, absolute; `from x import y` counts x and x.y."""
    base = module.split(".")
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            up = node.level - (1 if is_package else 0)
            prefix = base[: len(base) - up] if node.level else []
            target = ".".join([*prefix, *((node.module or "").split(".") if node.module else [])])
            names.add(target)
            names.update(f"{target}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            # "package.module:attribute" and module paths handed to SGLang by name.
            names.add(node.value.split(":")[0])
    return names


def unreachable(modules: dict[str, tuple[str, bool]], entries: set[str]) -> list[str]:
    """Modules of `modules` (name -> source, is a package) that no entry leads to."""
    seen: set[str] = set()
    todo = [name for name in entries if name in modules]
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        parents = {name.rsplit(".", depth)[0] for depth in range(1, name.count(".") + 1)}
        source, is_package = modules[name]
        reached = imported_modules(source, name, is_package=is_package) | parents
        todo.extend(other for other in reached if other in modules)
    return sorted(set(modules) - seen)


def leftovers(text: str) -> list[str]:
    return [word for word in LEFTOVERS if word in text]


def package_modules() -> dict[str, tuple[str, bool]]:
    modules = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        modules[".".join(parts[:-1] if is_package else parts)] = (path.read_text(), is_package)
    return modules


def code_files() -> list[Path]:
    return sorted(
        p for top in (PACKAGE, ROOT / "tests", ROOT / "benchmark") for p in top.rglob("*.py")
    )


@pytest.mark.parametrize("path", code_files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_sizes_and_leftovers(path: Path) -> None:
    text = path.read_text()
    assert not long_functions(text), f"functions over {FUNCTION_LINES_MAX} lines"
    assert len(text.splitlines()) <= MODULE_LINES_MAX
    assert not leftovers(text)


def test_every_module_is_reachable() -> None:
    modules = {n: m for n, m in package_modules().items() if not n.startswith(SHIPPED_FAKES)}
    assert unreachable(modules, ENTRY_MODULES) == []


def test_version_stands_in_the_changelog() -> None:
    from symphony_sglang import __version__

    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text()
    assert f'version = "{__version__}"' in (ROOT / "pyproject.toml").read_text()


def test_one_title_per_document() -> None:
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        lines, fenced = [], False
        for line in path.read_text().splitlines():
            fenced ^= line.startswith("```")
            if line.startswith("# ") and not fenced:
                lines.append(line)
        assert len(lines) == 1, f"{path.name}: {lines}"


def test_long_function_is_found() -> None:
    lines = ["    x = 1"] * FUNCTION_LINES_MAX
    whole = "\n".join(["def f():", *lines])
    assert long_functions(whole) == [("f", FUNCTION_LINES_MAX + 1)]
    documented = "\n".join(["def f():", '    """Doc."""', *lines[1:]])
    assert long_functions(documented) == []


def test_unreachable_module_is_found() -> None:
    modules = {
        "p": ("", True),
        "p.a": ("from . import b", False),
        "p.b": ("", False),
        "p.c": ("from p import a", False),
        "p.d": ("", False),
        "p.e": ("", False),
    }
    assert unreachable(modules, {"p.a"}) == ["p.c", "p.d", "p.e"]
    modules["p.b"] = ('LOADED_BY_NAME = "p.d:attribute"\nfrom .e import thing', False)
    assert unreachable(modules, {"p.a"}) == ["p.c"]


def test_leftover_is_found() -> None:
    assert leftovers("# " + "TO" + "DO later") == ["TO" + "DO"]
    assert leftovers("all done") == []
