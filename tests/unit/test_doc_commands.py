"""Every command line of the documentation is one that the tools read. None of them is run."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator

import pytest

from command_reference import parser_of
from cpinfer.errors import UserError
from cpinfer_tools.cli import COMMANDS
from documents import ROOT, inline_code, name_of, pages, shell_lines

SCRIPTS = sorted((ROOT / "examples" / "slurm").glob("*.sbatch"))
FILES_OF_TOOLS = {command.module.rpartition(".")[2]: name for name, command in COMMANDS.items()}
# In examples a path of the repository that a reader is to have; others (my_config.json) are the reader's own.
SHIPPED_PATH = re.compile(r"(?:configs|examples|tools)/[\w./-]*\w\.\w+")


def flags_of(parser: argparse.ArgumentParser) -> set[str]:
    return {flag for action in parser._actions for flag in action.option_strings}


def tool_words(line: str) -> list[str] | None:
    """The command and its words, of a line that starts a tool by whatever launcher; None for one that starts none."""
    if not re.match(r"(?:[A-Z_]+=\S* )*(?:cpinfer|torchrun|deepspeed|accelerate|python)\s", f"{line} "):
        return None
    line = re.split(r" {3,}(?=[^ \[#-])", line)[0]  # what a help text says beside an example
    words: list[str] = []
    for word in shlex.split(line, comments=True):
        if word == "->":  # the path of a request, drawn
            return None
        if word in ("&&", "|", ";", ">", "&"):
            break
        words.append(word)
    while re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    for i, word in enumerate(words):
        before = words[i - 1] if i else ""
        if (word == "cpinfer" and i == 0) or (word == "cpinfer_tools" and before in ("-m", "--module")):
            return words[i + 1 :]
        script = re.fullmatch(r"(?:\./)?tools/(\w+)\.py", word)
        if script:
            return [FILES_OF_TOOLS.get(script[1], script[1]), *words[i + 1 :]]
    return None


def faults_of_words(words: list[str], *, is_excerpt: bool) -> Iterator[str]:
    """What the tools would say of a command and its words. Of an excerpt no flag is missed."""
    command, *arguments = [word for word in words if word not in ("...", "…")] or [""]
    if re.fullmatch(r"|-.*|[A-Z]+", command):  # cpinfer --help, cpinfer COMMAND
        return
    if command not in COMMANDS:
        yield f"there is no command {command}"
        return
    parser = parser_of(command)
    if any("[" in word for word in arguments):  # a synopsis
        named = set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", " ".join(arguments)))
        yield from (f"{command} has no {flag}" for flag in sorted(named - flags_of(parser)))
        return
    if is_excerpt:
        for part in (*parser._actions, *parser._mutually_exclusive_groups):
            part.required = False
    try:
        parser.parse_args(arguments)
    except (UserError, SystemExit) as error:
        yield f"{command} does not read {shlex.join(arguments)}: {error}"


def faults(text: str) -> list[str]:
    """Of all command lines of a page, with what names files that are not shipped."""
    found: list[str] = []
    for line in shell_lines(text):
        words = tool_words(line)
        if words is not None:
            found += [f"{line}: {fault}" for fault in faults_of_words(words, is_excerpt=False)]
        if words is not None or line.startswith("python "):
            found += [f"{line}: there is no {p}" for p in SHIPPED_PATH.findall(line) if not (ROOT / p).exists()]
    for code in inline_code(text):
        if code.startswith("cpinfer ") and (words := tool_words(code)) is not None:
            found += [f"{code}: {fault}" for fault in faults_of_words(words, is_excerpt=True)]
    return found


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_the_commands_of_a_page_are_read_by_the_tools(page):
    assert faults(page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("script", SCRIPTS, ids=name_of)
def test_the_commands_of_a_recipe_are_read_by_the_tools(script):
    text = script.read_text(encoding="utf-8")
    found = re.findall(r"-m cpinfer_tools (?:.*\\\n)*.*", text)
    assert found
    for line in found:
        words = tool_words(f"python {line.rstrip(chr(39))}")
        assert words is not None and list(faults_of_words(words, is_excerpt=False)) == []


def test_commands_are_found_however_they_are_started():
    text = """
    cpinfer rollout --config configs/single.json            # a comment
    cpinfer init demo && cd demo
    ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 tools/eval_longctx.py --config F
    torchrun --nproc-per-node 2 \\
        -m cpinfer_tools rollout --config F --set a.b=1
    python examples/score.py
"""
    assert [tool_words(line) for line in shell_lines(text)] == [
        ["rollout", "--config", "configs/single.json"],
        ["init", "demo"],
        ["eval", "--config", "F"],
        ["rollout", "--config", "F", "--set", "a.b=1"],
        None,
    ]


@pytest.mark.parametrize(
    "text, fault",
    [
        ("    cpinfer rolout --config F", "there is no command rolout"),
        ("    torchrun -m cpinfer_tools eval-longctx --config F", "there is no command eval-longctx"),
        ("    cpinfer rollout --confg F", "rollout does not read --confg F"),
        ("    cpinfer rollout --config F --resume --overwrite", "not allowed with"),
        ("    cpinfer rollout --config F [--input F] [--inptu F]", "rollout has no --inptu"),
        ("    cpinfer rollout --config F [--input F]\n        [--inptu F]", "rollout has no --inptu"),
        ("    deepspeed --num_gpus 8 tools/rollout.py --confg F", "rollout does not read --confg F"),
        ("    cpinfer rollout --config configs/gone.json", "there is no configs/gone.json"),
        ("    python examples/gone.py", "there is no examples/gone.py"),
        ("```text\ncpinfer serve --config F --prot 8001\n```", "serve does not read"),
        ("prose with `cpinfer gpu-check --only nothing` in it", "gpu-check does not read"),
        ("prose with `cpinfer explain\n--plam` in it", "explain does not read"),
    ],
)
def test_a_command_that_has_rotted_is_noticed(text, fault, capsys):
    [found] = faults(f"A page.\n\n{text}\n")
    assert fault in found


@pytest.mark.parametrize(
    "text",
    [
        "    cpinfer rollout -> Engine.stream -> the rest of a drawing",
        "prose that begins with\ncpinfer --nothing",
        "prose with `cpinfer COMMAND --help`, `cpinfer compare --bitwise` and `cpinfer explain --tp 8 ...`",
        "    pip install cpinfer --nothing",
        '```python\ncpinfer = "--nothing"\n```',
    ],
)
def test_what_is_no_command_is_not_complained_of(text):
    assert faults(f"A page.\n\n{text}\n") == []
