"""Code in the documentation names what exists: imports, names, keywords, keys of configs. None of it is run.

Blocks that are run, of `pycon`, are those of `test_doctests.py`.
"""

from __future__ import annotations

import ast
import inspect
import json
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import pytest
from test_api_docs import INTEGRATIONS, definition, parsed

import cpinfer
from cpinfer.errors import UserError
from cpinfer_tools.run_config import parse_run_config
from docs_parts import public_names
from documents import blocks, name_of, pages

# Callables of ours that take a config: its keys are those of a JobConfig.
TAKE_CONFIGS = {
    "attach", "lend", "rollout_phase", "make_rollout_func", "with_cpinfer", "parse_config", "answering",
    "CpinferRolloutEngine", "invariant_training",
}  # fmt: skip
ANY = None  # every keyword


@cache
def keywords_of(module: str, name: str) -> frozenset[str] | None:
    """The keywords that a public callable takes, `ANY` where it takes all; KeyError for a name that is not public."""
    if module == "cpinfer":
        if name not in cpinfer.__all__:
            raise KeyError(name)
        taken = inspect.signature(getattr(cpinfer, name)).parameters
        extra = {field.name for field in fields(cpinfer.EngineConfig)} if name == "attach" else set()
        return frozenset({*taken, *extra})
    path = (INTEGRATIONS / module.removeprefix("cpinfer_integrations.")).with_suffix(".py")
    if name not in public_names(path):
        raise KeyError(name)
    return _keywords_of_definition(definition(parsed(path), name))


def _keywords_of_definition(node: ast.AST) -> frozenset[str] | None:
    if isinstance(node, ast.ClassDef):
        made = [part for part in node.body if isinstance(part, ast.FunctionDef) and part.name == "__init__"]
        if made:
            return _keywords_of_definition(made[0])
        return frozenset(ast.unparse(part.target) for part in node.body if isinstance(part, ast.AnnAssign)) or ANY
    assert isinstance(node, ast.FunctionDef)
    if node.args.kwarg is not None:
        return ANY
    return frozenset(arg.arg for arg in (*node.args.args, *node.args.kwonlyargs) if arg.arg != "self")


def faults(code: str, *, is_for_contributors: bool = False) -> Iterator[str]:
    """What a block of Python names of ours that does not exist. SyntaxError for one that is no Python.

    Contributors may be shown what an integration does not make public.
    """
    is_known = _is_defined if is_for_contributors else _is_public
    tree = _tree(code)
    ours: dict[str, tuple[str, str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "cpinfer":
            module = _found_module(node.module or "")
            yield from (f"{node.module}.{a.name}" for a in node.names if not hasattr(module, a.name))
        if isinstance(node, ast.ImportFrom) and node.module in ("cpinfer", *_integrations()):
            ours |= {alias.asname or alias.name: (node.module, alias.name) for alias in node.names}
    engines = _engines(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cpinfer_integrations"):
            yield from (f"{node.module}.{a.name}" for a in node.names if not is_known(node.module or "", a.name))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            owner, name = node.value.id, node.attr
            if owner == "cpinfer" and name not in cpinfer.__all__:
                yield f"cpinfer.{name}"
            if owner in engines and not hasattr(cpinfer.Engine, name) and name != "weights_version":
                yield f"Engine.{name}"
        if isinstance(node, ast.Call):
            yield from _faults_of_call(node, ours, engines)


def _tree(code: str) -> ast.Module:
    """Of statements, or of rows of a table as it has them."""
    return ast.parse(f"{{{code}}}" if code.rstrip().endswith(",") else code)


def _found_module(name: str) -> ModuleType | None:
    try:
        return import_module(name)
    except ModuleNotFoundError:
        return None


def _integrations() -> list[str]:
    return [f"cpinfer_integrations.{path.stem}" for path in INTEGRATIONS.glob("*.py")]


def _is_public(module: str, name: str) -> bool:
    try:
        keywords_of(module, name)
    except (KeyError, FileNotFoundError):
        return False
    return True


def _is_defined(module: str, name: str) -> bool:
    try:
        tree = parsed((INTEGRATIONS / module.removeprefix("cpinfer_integrations.")).with_suffix(".py"))
    except FileNotFoundError:
        return False
    return any(isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name for node in tree.body)


def _engines(tree: ast.Module) -> set[str]:
    """Names that a block binds to an engine."""
    items = [item for node in ast.walk(tree) if isinstance(node, ast.With) for item in node.items]
    return {
        item.optional_vars.id
        for item in items
        if isinstance(item.optional_vars, ast.Name)
        and isinstance(item.context_expr, ast.Call)
        and ast.unparse(item.context_expr.func).rpartition(".")[2] in ("attach", "rollout_phase")
    }


def _faults_of_call(node: ast.Call, ours: dict[str, tuple[str, str]], engines: set[str]) -> Iterator[str]:
    owner, _, name = ast.unparse(node.func).rpartition(".")
    taken: frozenset[str] | None = ANY
    if owner == "cpinfer" and name in cpinfer.__all__:
        taken = keywords_of("cpinfer", name)
    elif not owner and name in ours and _is_public(*ours[name]):
        taken = keywords_of(*ours[name])
    elif owner in engines and hasattr(cpinfer.Engine, name):
        taken = frozenset(inspect.signature(getattr(cpinfer.Engine, name)).parameters)
    else:
        return
    given = [keyword.arg for keyword in node.keywords if keyword.arg is not None]
    yield from (f"{name}({keyword}=)" for keyword in given if taken is not ANY and keyword not in taken)
    if name in TAKE_CONFIGS:
        for argument in (*node.args, *(keyword.value for keyword in node.keywords)):
            if isinstance(argument, ast.Dict):
                yield from _faults_of_config(ast.literal_eval(argument))


def _faults_of_config(config: dict[str, Any]) -> Iterator[str]:
    try:
        cpinfer.parse_config(config)
    except UserError as error:
        yield str(error)


PYTHON = [(page, block) for page in pages() for block in blocks(page.read_text(encoding="utf-8"), "python")]
JSON = [(page, block) for page in pages() for block in blocks(page.read_text(encoding="utf-8"), "json")]


@pytest.mark.parametrize("page, block", PYTHON, ids=[f"{name_of(page)}:{block.line}" for page, block in PYTHON])
def test_a_block_of_python_names_what_exists(page, block):
    assert list(faults(block.code, is_for_contributors=page.parent.name == "extending")) == []


@pytest.mark.parametrize("page, block", JSON, ids=[f"{name_of(page)}:{block.line}" for page, block in JSON])
def test_a_block_of_json_is_a_config(page, block):
    parse_run_config(json.loads(block.code))


def test_the_guides_have_code():
    found = {page.stem for page, _ in PYTHON if page.parent.name == "guides"}
    assert {"rollouts", "trl", "zero-and-fsdp", "same-bits", "agents", "async-clients", "lm-eval"} <= found
    assert JSON


@pytest.mark.parametrize(
    "code, fault",
    [
        ("from cpinfer import atach", "cpinfer.atach"),
        ("from cpinfer.layout.grid import RankGird", "cpinfer.layout.grid.RankGird"),
        ("from cpinfer.layuot import RankGrid", "cpinfer.layuot.RankGrid"),
        ("from cpinfer_integrations.trl import make_rollout", "cpinfer_integrations.trl.make_rollout"),
        ("from cpinfer_integrations.trl_new import answering", "cpinfer_integrations.trl_new.answering"),
        ("cpinfer.atach(model)", "cpinfer.atach"),
        ("cpinfer.SamplingParams(max_tokens=4)", "SamplingParams(max_tokens=)"),
        ("cpinfer.attach(model, kv_cache_gb=4)", "attach(kv_cache_gb=)"),
        ("with cpinfer.attach(model) as e:\n    e.generate_all(prompts)", "Engine.generate_all"),
        ("with cpinfer.rollout_phase(lent) as e:\n    e.generate(prompts, params=1)", "generate(params=)"),
        ("from cpinfer_integrations.server import serving\nserving(engine, prot=0)", "serving(prot=)"),
        ("from cpinfer_integrations.deepspeed import CpinferRolloutEngine as C\nC(e, t, conf={})", "C(conf=)"),
    ],
)
def test_a_name_that_does_not_exist_is_noticed(code, fault):
    assert fault in list(faults(code))


def test_contributors_are_shown_what_is_not_public_but_nothing_that_is_not_there():
    code = "from cpinfer_integrations.job_ranks import on_all_ranks, on_no_ranks"
    assert len(list(faults(code))) == 2
    assert list(faults(code, is_for_contributors=True)) == ["cpinfer_integrations.job_ranks.on_no_ranks"]


def test_a_key_of_a_config_that_does_not_exist_is_noticed():
    code = 'from cpinfer_integrations.lending import lend\nlent = lend(model, {"rollout": {"gahter": "full"}})'
    [fault] = faults(code)
    assert "gahter" in fault
    with pytest.raises(UserError, match="determinstic"):
        parse_run_config({"determinstic": True})


def test_code_that_is_no_python_is_noticed():
    with pytest.raises(SyntaxError):
        list(faults("with cpinfer.attach(model) as engine\n    pass"))
