"""Imports point one way, are absolute, and stay light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1] / "lmd_hf"
# Each room may import itself and the rooms of lower rank; rooms of equal rank do not know each other.
RANK = {
    "errors": 0, "shared": 0, "compat": 0.5, "visible": 0, "records": 1, "circuits": 1.5, "evidence": 1, "changes": 2,
    "weights": 2, "matrix": 2, "run": 3, "layers": 3, "report": 4, "pipeline": 4.5, "api": 5, "training": 5, "demo": 6,
    "hub": 7, "experiments": 7, "options": 7, "recipes": 7.5, "truncated": 7.5, "callback": 8, "cli": 8, "__main__": 9,
}  # fmt: skip


def imports(source):
    """Every module that a source imports, inside functions too; relative imports as '.'."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." if node.level else node.module


def violations(room, source):
    """Imports of `room` that go up, sideways or are relative."""
    for name in imports(source):
        parts = name.split(".")
        if name == ".":
            yield "relative import"
        elif parts[0] == "lmd_hf" and len(parts) > 1 and parts[1] != room and RANK[parts[1]] >= RANK[room]:
            yield f"{room} imports {name}"


def modules():
    return [path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py"]


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
    room = path.relative_to(ROOT).parts[0].removesuffix(".py")
    assert list(violations(room, path.read_text())) == []


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("weights", "from lmd_hf.run.plan import make_plan"),
        ("matrix", "def f():\n    import lmd_hf.weights.source"),
        ("report", "from . import text"),
        ("records", "from lmd_hf.api import analyze"),
    ],
)
def test_the_guard_can_fail(room, source):
    assert list(violations(room, source))


def fresh(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


LOADED = "import sys; {}; print(*sorted(set(sys.modules) & {{'torch', 'transformers', 'numpy', 'pandas', 'gradio'}}))"


def test_importing_the_package_is_light():
    assert fresh(LOADED.format("import lmd_hf")) == ""
    assert float(fresh("import time; t = time.perf_counter(); import lmd_hf; print(time.perf_counter() - t)")) < 0.3


def test_reading_a_report_needs_no_torch():
    loaded = fresh(LOADED.format("import lmd_hf; lmd_hf.Report.load; import lmd_hf.report.files, lmd_hf.report.card"))
    assert "torch" not in loaded
    assert "transformers" not in loaded


def test_the_light_import_test_can_fail():
    assert "torch" in fresh(LOADED.format("import lmd_hf; lmd_hf.analyze"))


def test_public_names_exist_and_others_do_not():
    import lmd_hf

    for name in lmd_hf.__all__:
        assert getattr(lmd_hf, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        lmd_hf.nonsense  # noqa: B018
    assert set(lmd_hf.__all__) <= set(dir(lmd_hf))


def _is_overload(node):
    return any(isinstance(d, ast.Name) and d.id == "overload" for d in node.decorator_list)


def test_public_functions_have_docstrings_and_annotations():
    for path in modules():
        tree = ast.parse(path.read_text())
        classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
        for node in [item for body in (tree, *classes) for item in body.body]:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and not _is_overload(node):
                arguments = [a for a in node.args.args + node.args.kwonlyargs if a.arg not in ("self", "cls")]
                assert ast.get_docstring(node), f"{path}: {node.name}"
                assert all(a.annotation for a in arguments), f"{path}: {node.name}"
                assert len(arguments) <= 6 or node.name in ("analyze", "truncate"), f"{path}: {node.name}"


def test_no_module_is_too_long():
    for path in modules():
        assert path.read_text().count("\n") <= 400, path
