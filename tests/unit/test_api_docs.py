"""What users call is in `__all__`, and its docstrings say what goes in, what comes out and what a value holds."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import cpinfer
from docs_parts import public_names

ROOT = Path(__file__).parents[2]
INTEGRATIONS = ROOT / "integrations" / "cpinfer_integrations"
# Pages for users; those on architecture and extending name what lies below.
PAGES = [
    ROOT / "README.md",
    *(p for place in ("*", "guides/*", "reference/*") for p in (ROOT / "docs").glob(f"{place}.md")),
]
TEXT = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
SECTIONS = ("Args", "Returns", "Yields", "Raises", "Attributes")
Function = ast.FunctionDef | ast.AsyncFunctionDef
Definition = ast.ClassDef | Function


def section(docstring: str, title: str) -> str:
    """The lines below `title:`, up to the next section; empty without one."""
    found = re.search(rf"^{title}:\n((?:[ \t]+.*\n|\n)*)", f"{docstring}\n", re.MULTILINE)
    return found[1] if found else ""


def unnamed(docstring: str, title: str, names: list[str]) -> Iterator[str]:
    text = section(docstring, title)
    for name in names:
        if not re.search(rf"^ {{4}}{name}: \S", text, re.MULTILINE):
            yield f"{title} without {name}"


def parameters(function: Function) -> list[str]:
    args = function.args
    return [a.arg for a in (*args.posonlyargs, *args.args, *args.kwonlyargs) if a.arg not in ("self", "cls")]


def faults_of_function(function: Function) -> Iterator[str]:
    doc, names = ast.get_docstring(function) or "", parameters(function)
    if not names:
        return
    yield from unnamed(doc, "Args", names)
    returned = ast.unparse(function.returns) if function.returns else "nothing said"
    if returned not in ("None", "NoReturn") and not (section(doc, "Returns") or section(doc, "Yields")):
        yield "neither Returns nor Yields"


def says_itself(field: ast.AnnAssign) -> bool:
    """Whether a field of a schema has its sentence beside it, which docs/reference/config.md prints."""
    made = field.value
    if not isinstance(made, ast.Call) or ast.unparse(made.func) not in ("key", "_key") or not made.args:
        return False
    return isinstance(made.args[0], ast.Constant) and bool(made.args[0].value)


def faults_of_class(node: ast.ClassDef) -> Iterator[str]:
    """Fields of dataclasses; parameters of constructors that users call; methods that no library's class documents."""
    doc = ast.get_docstring(node) or ""
    bases = {ast.unparse(base) for base in node.bases}
    if any("dataclass" in ast.unparse(d) for d in node.decorator_list):
        fields = [f for f in node.body if isinstance(f, ast.AnnAssign)]
        yield from unnamed(doc, "Attributes", [ast.unparse(f.target) for f in fields if not says_itself(f)])
    is_error = any(base.endswith("Error") for base in bases)
    for method in (m for m in node.body if isinstance(m, Function)):
        if method.name == "__init__" and not is_error and "Made by" not in doc:
            yield from unnamed(doc, "Args", parameters(method))
        elif (not method.name.startswith("_") or method.name == "__call__") and bases <= {"Checked"}:
            yield from (f"{method.name}: {fault}" for fault in faults_of_function(method))


def faults(node: Definition) -> list[str]:
    if not ast.get_docstring(node):
        return ["no docstring"]
    return list(faults_of_class(node) if isinstance(node, ast.ClassDef) else faults_of_function(node))


def definition(tree: ast.Module, name: str) -> Definition:
    """Where it is defined: here, or in the integration that it is imported from."""
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and name in {alias.name for alias in node.names}:
            assert node.module is not None
            return definition(parsed(ROOT.joinpath("integrations", *node.module.split(".")).with_suffix(".py")), name)
    return next(node for node in tree.body if isinstance(node, Definition) and node.name == name)


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def surface() -> dict[str, Definition]:
    """Every public name by where users find it. Integrations are read, not imported: their libraries are slow."""
    homes = {name: ROOT.joinpath(*module.split(".")).with_suffix(".py") for name, module in cpinfer._HOMES.items()}
    found = {name: definition(parsed(path), name) for name, path in homes.items()}
    for path in sorted(INTEGRATIONS.glob("*.py")):
        tree = parsed(path)
        found |= {f"{path.stem}.{name}": definition(tree, name) for name in public_names(path)}
    return found


def imported_in(text: str) -> Iterator[tuple[str, str]]:
    """(module, name) of ours in examples: what they import, and what they take from `cpinfer` itself."""
    for module, names in re.findall(r"^ *from (cpinfer[\w.]*) import ([\w, ]+)$", text, re.MULTILINE):
        yield from ((module, name.strip()) for name in names.split(","))
    yield from (("cpinfer", name) for name in re.findall(r"(?<![\w.`/-])cpinfer\.(\w+)\(", text))


SURFACE = surface()


def test_every_name_of_the_package_exists_and_none_stands_twice():
    assert sorted(cpinfer.__all__) == sorted(cpinfer._HOMES) == sorted(set(cpinfer.__all__))
    for name in cpinfer.__all__:
        assert getattr(cpinfer, name) is not None


@pytest.mark.parametrize("name", sorted(SURFACE))
def test_a_public_name_says_what_goes_in_and_what_comes_out(name):
    assert not faults(SURFACE[name])


def test_what_the_documentation_imports_is_public():
    shown = set(imported_in(TEXT))
    assert {("cpinfer", "attach"), ("cpinfer_integrations.trl", "make_rollout_func")} <= shown
    for module, name in shown:
        path = ROOT.joinpath("integrations", *module.split(".")).with_suffix(".py")
        assert name in (cpinfer.__all__ if module == "cpinfer" else public_names(path)), f"{module}.{name}"


def test_errors_that_the_documentation_names_are_public():
    errors = {node.name for node in parsed(ROOT / "cpinfer" / "errors.py").body if isinstance(node, ast.ClassDef)}
    named = errors & set(re.findall(r"\w+Error", TEXT))
    assert "RanksDifferError" in named and named <= set(cpinfer.__all__)


ARGS = "Args:\n        x: one.\n"


@pytest.mark.parametrize(
    "source, fault",
    [
        ("def f(x) -> None: pass", "no docstring"),
        ("def f(x) -> None:\n    '''F.'''", "Args without x"),
        (f"def f(x, *, y) -> None:\n    '''F.\n\n    {ARGS}    '''", "Args without y"),
        (f"def f(x) -> int:\n    '''F.\n\n    {ARGS}    '''", "neither Returns nor Yields"),
        (f"def f(x):\n    '''F.\n\n    {ARGS}    '''", "neither Returns nor Yields"),
        ("def f(x) -> None:\n    '''F.\n\n    Raises:\n        x: one.\n    '''", "Args without x"),
        ("@dataclass\nclass C:\n    '''C.'''\n    x: int", "Attributes without x"),
        ("@dataclass\nclass C:\n    '''C.'''\n    x: int = _key('', 1)", "Attributes without x"),
        ("@dataclass\nclass C:\n    '''C.'''\n    x: int = field('one', 1)", "Attributes without x"),
        ("class C:\n    '''C.'''\n    def __init__(self, x): pass", "Args without x"),
        ("class C:\n    '''C.'''\n    def f(self, x) -> None:\n        '''F.'''", "f: Args without x"),
    ],
)
def test_what_is_not_said_is_noticed(source, fault):
    assert faults(ast.parse(source).body[0]) == [fault]


@pytest.mark.parametrize(
    "source",
    [
        "def f() -> int:\n    '''F.'''",
        f"def f(x) -> int:\n    '''F.\n\n    {ARGS}\n    Returns:\n        A number.\n    '''",
        "class C:\n    '''C. Made by `f`.'''\n    def __init__(self, x): pass\n    def _g(self, x): pass",
        "class E(ValueError):\n    '''E.'''\n    def __init__(self, x): pass",
        "@dataclass\nclass C:\n    '''C.'''\n    x: int = _key('one', 1)",
        "class C(TheirModel):\n    '''C.'''\n    def asked(self, x): pass",
    ],
)
def test_what_is_said_or_needs_no_word_is_not_complained_of(source):
    assert not faults(ast.parse(source).body[0])


def test_what_an_example_imports_is_found():
    text = "    from cpinfer_integrations.x import a, b\nimport cpinfer\nwith cpinfer.hidden(1) as e:\n"
    assert set(imported_in(text)) == {
        ("cpinfer_integrations.x", "a"),
        ("cpinfer_integrations.x", "b"),
        ("cpinfer", "hidden"),
    }
