"""The public surface: what ``runtime`` and ``export`` offer, and that all of it is documented."""

from __future__ import annotations

import ast
import importlib
import inspect
from pathlib import Path

import pytest

from blockcache import export, runtime

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


# -- the door of export, which imports a name when it is asked for ---------------------------------


def lazy_imports(source):
    """Name to module, as the door's block for type checkers has them."""
    (block,) = [node for node in ast.parse(source).body if isinstance(node, ast.If)]
    return {
        alias.asname: node.module.removeprefix("blockcache.export.")
        for node in block.body
        for alias in node.names
    }


def test_type_checkers_see_what_the_door_gives():
    assert lazy_imports(Path(export.__file__).read_text()) == export._HOMES
    assert export.__all__ == sorted(export._HOMES) == dir(export)


def test_an_unknown_name_is_no_attribute_of_the_door():
    with pytest.raises(AttributeError, match=r"'blockcache\.export' has no attribute 'nonsense'"):
        _ = export.nonsense


@pytest.mark.parametrize("name", export.__all__)
def test_a_name_of_the_door_is_documented_and_of_export(name):
    pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    value = getattr(export, name)
    assert value.__module__.startswith("blockcache.export.")
    assert (value.__doc__ or "").strip()
    assert not value.__doc__.startswith(f"{name}("), "dataclass made this text, nobody wrote it"


def test_the_check_of_the_door_fires():
    source = "if TYPE_CHECKING:\n    from blockcache.export.a.b import C as C\n"
    assert lazy_imports(source) == {"C": "a.b"}


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
