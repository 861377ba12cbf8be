"""Write down how FlashInfer's wrappers are called, from its wheels: the table that the tests bind our calls against.

pip download --no-deps flashinfer-python==0.6.18 flashinfer-python==0.7.4
python tools/dev/flashinfer_signatures.py flashinfer_python-*.whl > tests/flashinfer_signatures.json

The package needs a GPU to do anything and gigabytes to be installed, so its sources are read, not imported.
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
import zipfile
from collections.abc import Sequence

_RESET = {"reset_workspace_buffer": "reset_workspace_buffer"}
# Class -> our name of a call -> the method that holds its parameters. Decode's `plan` passes `**kwargs` on.
CALLS = {
    "BatchPrefillWithPagedKVCacheWrapper": {"__init__": "__init__", "plan": "plan", "run": "run", **_RESET},
    "BatchDecodeWithPagedKVCacheWrapper": {"__init__": "__init__", "plan": "_plan_impl", "run": "run", **_RESET},
    "BatchMLAPagedAttentionWrapper": {"__init__": "__init__", "plan": "plan", "run": "run"},
    "MLAPlanMetadata": {"csr": "csr"},
}
NOT_IN_ALL = ("MLAPlanMetadata",)  # from 0.7 on


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheels", nargs="+", metavar="WHEEL")
    args = parser.parse_args(argv)
    table = dict(signatures_in(wheel) for wheel in args.wheels)
    # One call per line: a new version is then a readable difference.
    versions = []
    for version, calls in sorted(table.items()):
        lines = ",\n".join(f"  {json.dumps(call)}: {json.dumps(parameters)}" for call, parameters in calls.items())
        versions.append(f' "{version}": {{\n{lines}\n }}')
    print("{\n" + ",\n".join(versions) + "\n}")
    return 0


def signatures_in(wheel: str) -> tuple[str, dict[str, list[list[object]]]]:
    """The version of a wheel, and for every call its parameters after `self`: name, kind, whether it must be given."""
    found: dict[str, list[list[object]]] = {}
    with zipfile.ZipFile(wheel) as files:
        names = [name for name in files.namelist() if name.startswith("flashinfer/") and name.endswith(".py")]
        for name in names:
            source = files.read(name).decode()
            if any(f"class {wrapper}" in source for wrapper in CALLS):
                for node in ast.parse(source).body:
                    if isinstance(node, ast.ClassDef) and node.name in CALLS:
                        found |= _calls_of(node)
    wanted = [f"{w}.{call}" for w, calls in CALLS.items() if w not in NOT_IN_ALL for call in calls]
    missing = [call for call in wanted if call not in found]
    if missing:
        raise ValueError(f"{wheel} has no {', '.join(missing)}")
    return wheel.rsplit("/", 1)[-1].split("-")[1], dict(sorted(found.items()))


def _calls_of(wrapper: ast.ClassDef) -> dict[str, list[list[object]]]:
    methods: dict[str, ast.FunctionDef] = {}
    for node in wrapper.body:
        # Overloads come first; the last definition is the one that runs.
        if isinstance(node, ast.FunctionDef):
            methods[node.name] = node
    calls = CALLS[wrapper.name]
    return {f"{wrapper.name}.{call}": _parameters(methods[method].args) for call, method in calls.items()}


def _parameters(arguments: ast.arguments) -> list[list[object]]:
    plain = arguments.args[1:]
    num_required = len(plain) - min(len(plain), len(arguments.defaults))
    parameters: list[list[object]] = [[a.arg, "plain", i < num_required] for i, a in enumerate(plain)]
    if arguments.vararg is not None:
        parameters.append([arguments.vararg.arg, "rest", False])
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        parameters.append([argument.arg, "keyword", default is None])
    if arguments.kwarg is not None:
        parameters.append([arguments.kwarg.arg, "keywords", False])
    return parameters


if __name__ == "__main__":
    sys.exit(main())
