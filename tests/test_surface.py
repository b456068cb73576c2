"""The public surface: what ``blockcache.runtime`` exports, and that all of it is documented."""

from __future__ import annotations

import ast
import importlib
import inspect
from pathlib import Path

import pytest

from blockcache import runtime

ROOT = Path(__file__).resolve().parents[1]


def public_names(module):
    """Names without underscore that are no modules."""
    return {
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }


def test_all_is_exactly_the_public_names():
    """A new name belongs in ``__all__``, or behind an underscore."""
    assert set(runtime.__all__) == public_names(runtime)


def test_all_is_sorted_and_without_repeats():
    assert runtime.__all__ == sorted(set(runtime.__all__))


@pytest.mark.parametrize("name", runtime.__all__)
def test_a_public_name_has_a_docstring_of_its_own(name):
    value = getattr(runtime, name)
    documentation = vars(value).get("__doc__") or ""
    assert documentation.strip()
    assert not documentation.startswith(f"{name}("), "dataclass made this text, nobody wrote it"


@pytest.mark.parametrize("name", runtime.__all__)
def test_a_public_name_is_defined_in_the_runtime(name):
    assert getattr(runtime, name).__module__.startswith("blockcache.runtime.")


def test_every_error_is_public_and_descends_from_one_base():
    errors = importlib.import_module("blockcache.runtime.errors")
    made_here = {name: value for name, value in vars(errors).items() if inspect.isclass(value)}
    assert made_here.keys() <= set(runtime.__all__)
    assert all(issubclass(value, runtime.BlockCacheError) for value in made_here.values())


def test_every_error_stands_in_the_tree_that_the_module_draws():
    errors = importlib.import_module("blockcache.runtime.errors")
    for name, value in vars(errors).items():
        if inspect.isclass(value):
            assert f"{name}\n" in errors.__doc__ or f" {name} " in errors.__doc__, name


# -- docstrings ------------------------------------------------------------------------------------


def undocumented(tree):
    """Public functions, classes, and methods of public classes that have no docstring."""
    found = []

    def visit(body, prefix):
        for node in body:
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                continue
            if node.name.startswith("_"):
                continue
            if not (ast.get_docstring(node) or "").strip():
                found.append(prefix + node.name)
            if isinstance(node, ast.ClassDef):
                visit(node.body, f"{prefix}{node.name}.")

    if not (ast.get_docstring(tree) or "").strip():
        found.append("the module")
    visit(tree.body, "")
    return found


FILES = [
    pytest.param(path, id=path.relative_to(ROOT).as_posix())
    for folder in ("runtime", "export")
    for path in sorted((ROOT / folder).rglob("*.py"))
]


@pytest.mark.parametrize("path", FILES)
def test_everything_public_has_a_docstring(path):
    assert undocumented(ast.parse(path.read_text())) == []


def test_the_docstring_check_fires():
    source = '''
def documented():
    """Yes."""
    def inner(): ...
def bare(): ...
def _private(): ...
class Thing:
    """Yes."""
    def method(self): ...
    def __init__(self): ...
class _Hidden:
    def method(self): ...
'''
    assert undocumented(ast.parse(source)) == ["the module", "bare", "Thing.method"]


def test_the_surface_check_fires(monkeypatch):
    monkeypatch.setattr(runtime, "planted", object(), raising=False)
    assert public_names(runtime) - set(runtime.__all__) == {"planted"}
