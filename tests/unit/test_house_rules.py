"""The rules of the house, read off the syntax trees: state, imports, names, size and words."""

import ast
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from cpinfer.models.families import FAMILIES, RECURRENT

ROOT = Path(__file__).parents[2]
CORE = sorted((ROOT / "cpinfer").rglob("*.py"))
BELOW_TOOLS = CORE + sorted((ROOT / "integrations").rglob("*.py"))
SHIPPED = BELOW_TOOLS + sorted((ROOT / "tools").rglob("*.py")) + sorted((ROOT / "examples").rglob("*.py"))

MAX_LINES = 500
TRIVIAL_LINES = 5  # A method this short says what it does; a function must be a single line for that.
FORBIDDEN_NAMES = {"utils", "util", "helpers", "helper", "manager", "managers"}
CONSTANT = re.compile(r"_?[A-Z][A-Z0-9_]*|__all__")
DISPLAYS = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
CONTAINERS = {"list", "dict", "set", "bytearray", "defaultdict", "deque", "OrderedDict", "Counter"}
PROPERTIES = {"property", "cached_property", "overload", "setter"}

Fault = tuple[int, str]
Function = ast.FunctionDef | ast.AsyncFunctionDef


def global_statements(tree: ast.Module) -> Iterator[Fault]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Global):
            yield node.lineno, f"global {', '.join(node.names)}"


def mutable_module_values(tree: ast.Module) -> Iterator[Fault]:
    for node in tree.body:
        if isinstance(node, ast.Assign):
            targets, value = node.targets, node.value
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            targets, value = [node.target], node.value
        else:
            continue
        called = isinstance(value, ast.Call) and _last_name(value.func) in CONTAINERS
        names = [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]
        if isinstance(value, DISPLAYS) or called:
            yield from ((node.lineno, name) for name in names if not CONSTANT.fullmatch(name))


def environment_reads(tree: ast.Module) -> Iterator[Fault]:
    """A module that is run as a command is a tool where it starts; there it may hand the environment on."""
    names = {"environ", "environb", "getenv", "getenvb"}
    start = [node for node in tree.body if isinstance(node, ast.If) and "__main__" in ast.unparse(node.test)]
    for node in (node for part in tree.body if part not in start for node in ast.walk(part)):
        if isinstance(node, ast.Attribute) and node.attr in names and _last_name(node.value) == "os":
            yield node.lineno, f"os.{node.attr}"
        elif isinstance(node, ast.ImportFrom) and node.module == "os":
            yield from ((node.lineno, f"os.{alias.name}") for alias in node.names if alias.name in names)


def manager_classes(tree: ast.Module) -> Iterator[Fault]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name.endswith("Manager"):
            yield node.lineno, node.name


def missing_docstrings(tree: ast.Module, told: frozenset[str] = frozenset()) -> Iterator[Fault]:
    """Of modules with code, public classes, and public functions and methods longer than they are plain.

    `told`: methods that a Protocol documents for all who implement it.
    """
    if tree.body and ast.get_docstring(tree) is None:
        yield 1, "the module"
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and _is_public(node):
            if ast.get_docstring(node) is None:
                yield node.lineno, node.name
            for method in node.body:
                if isinstance(method, Function) and _wants_words(method, TRIVIAL_LINES) and method.name not in told:
                    yield method.lineno, f"{node.name}.{method.name}"
        elif isinstance(node, Function) and _wants_words(node, 1):
            yield node.lineno, node.name


def methods_told_by_protocols(files: list[Path]) -> frozenset[str]:
    return frozenset(
        method.name
        for path in files
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef) and "Protocol" in map(_last_name, node.bases)
        for method in node.body
        if isinstance(method, Function) and ast.get_docstring(method) is not None
    )


def family_names(tree: ast.Module) -> Iterator[Fault]:
    """A family by name: what is particular about it is a field of its row, so that a family is one row."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and node.value in FAMILIES.keys() | RECURRENT.keys():
            yield node.lineno, str(node.value)


def distributed_imports(tree: ast.Module) -> Iterator[Fault]:
    yield from _imports_of("torch.distributed", tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr == "distributed" and _last_name(node.value) == "torch":
            yield node.lineno, "torch.distributed"


def _imports_of(module: str, tree: ast.Module) -> Iterator[Fault]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from ((node.lineno, name) for name in names if f"{name}.".startswith(f"{module}."))


def _is_public(node: ast.ClassDef | Function) -> bool:
    return not node.name.startswith("_")


def _wants_words(function: Function, trivial_lines: int) -> bool:
    lines = (function.end_lineno or 0) - function.body[0].lineno + 1
    attribute = any(_last_name(d) in PROPERTIES for d in function.decorator_list)
    return _is_public(function) and ast.get_docstring(function) is None and not attribute and lines > trivial_lines


def _last_name(node: ast.expr) -> str:
    if isinstance(node, ast.Call):
        return _last_name(node.func)
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def check(rule: Callable[[ast.Module], Iterator[Fault]], files: list[Path]) -> None:
    assert files
    faults = [
        f"{path.relative_to(ROOT)}:{line}: {what}"
        for path in files
        for line, what in rule(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert not faults, "\n".join(faults)


def outside(folder: str, files: list[Path]) -> list[Path]:
    return [path for path in files if ROOT / "cpinfer" / folder not in path.parents]


@pytest.mark.parametrize("rule", [global_statements, mutable_module_values], ids=lambda rule: rule.__name__)
def test_no_module_holds_state(rule):
    check(rule, BELOW_TOOLS)


def test_the_environment_is_read_by_tools_alone():
    check(environment_reads, BELOW_TOOLS)


def test_public_things_have_docstrings():
    check(partial(missing_docstrings, told=methods_told_by_protocols(CORE)), CORE)


def test_no_family_is_named_outside_its_table():
    table = ROOT / "cpinfer" / "models" / "families.py"
    check(family_names, [path for path in BELOW_TOOLS if path != table])


def test_in_the_core_only_comm_imports_torch_distributed():
    check(distributed_imports, outside("comm", CORE))


def test_no_class_is_a_manager():
    check(manager_classes, SHIPPED)


def test_no_module_is_named_after_nothing():
    bad = [path for path in SHIPPED if FORBIDDEN_NAMES & set(path.relative_to(ROOT).with_suffix("").parts)]
    bad += [path for path in SHIPPED if FORBIDDEN_NAMES & set(path.stem.split("_"))]
    assert not bad


def test_every_file_can_be_read_in_one_sitting():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in SHIPPED}
    assert not {name: n for name, n in lengths.items() if n > MAX_LINES}


@pytest.mark.parametrize(
    "rule, source",
    [
        (global_statements, "def f():\n    global x\n    x = 1"),
        (mutable_module_values, "cache = {}"),
        (mutable_module_values, "cache: dict[str, int] = dict()"),
        (mutable_module_values, "a = b = [1]"),
        (mutable_module_values, "seen = collections.defaultdict(list)"),
        (environment_reads, "import os\nx = os.environ['A']"),
        (environment_reads, "import os\nx = os.getenv('A')"),
        (environment_reads, "from os import environ"),
        (manager_classes, "class CacheManager: pass"),
        (missing_docstrings, "x = 1"),
        (missing_docstrings, '"""M."""\ndef f():\n    x = 1\n    return x'),
        (missing_docstrings, '"""M."""\nclass C: pass'),
        (missing_docstrings, '"""M."""\nclass C:\n    """C."""\n    def f(self):\n' + "        x = 1\n" * 6),
        (family_names, "if spec.family == 'gpt_bigcode': pass"),
        (family_names, "MINE = frozenset(('mamba', 'x'))"),
        (distributed_imports, "import torch.distributed as dist"),
        (distributed_imports, "from torch import distributed"),
        (distributed_imports, "from torch.distributed import all_gather"),
        (distributed_imports, "import torch\ntorch.distributed.barrier()"),
    ],
)
def test_each_rule_catches_what_it_forbids(rule, source):
    assert list(rule(ast.parse(source)))


@pytest.mark.parametrize(
    "rule, source",
    [
        (environment_reads, "import sys\nif __name__ == '__main__':\n    import os\n    sys.exit(main(os.environ))"),
        (mutable_module_values, "SIZES = {1: 2}\n_NAMES = ['a']\n__all__ = ['x']\npair = (1, 2)\ndef f():\n    x = []"),
        (environment_reads, "import os\nx = os.path.join('a', 'b')"),
        (
            missing_docstrings,
            '"""M."""\ndef _f():\n    x = 1\n    return x\nclass C:\n    """C."""\n    def f(self): return 1',
        ),
        (missing_docstrings, '"""M."""\ndef f(): return 1'),
        (missing_docstrings, ""),
        (family_names, "'It runs llama, and gpt_bigcode too.'\nif spec.traits.is_latent: pass"),
        (distributed_imports, "import torch\nfrom torch import nn"),
    ],
)
def test_no_rule_forbids_what_is_fine(rule, source):
    assert not list(rule(ast.parse(source)))
