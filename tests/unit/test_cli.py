"""The command `cpinfer`: every tool under one name, imported when it is asked for; what is missing is named."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import cpinfer
from cpinfer_tools import cli, init
from cpinfer_tools.cli import COMMANDS, main

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_under_its_own_name(name, capsys):
    with pytest.raises(SystemExit) as end:
        main([name, "--help"])
    assert end.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: cpinfer {name} ")
    shown = printed.partition("\n\n")[2]
    assert f"cpinfer {name}" in shown or f"-m cpinfer_tools {name}" in shown  # an example


def test_help_lists_every_command_and_the_version_is_the_packages(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    printed = capsys.readouterr().out
    assert all(f"\n  {name} " in printed and command.summary in printed for name, command in COMMANDS.items())
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"cpinfer {cpinfer.__version__}\n"


def test_an_unknown_command_names_the_nearest(capsys):
    assert main(["rolout", "--config", "x"]) == 2
    assert 'unknown command "rolout"; the nearest known command is "rollout"' in capsys.readouterr().err


def test_without_a_command_there_is_help(capsys):
    assert main([]) == 2
    assert "commands (cpinfer COMMAND --help tells more)" in capsys.readouterr().err


def test_what_a_launcher_puts_in_front_is_left_aside(capsys):
    """DeepSpeed's --module: `python -m cpinfer_tools --local_rank=0 explain ...`."""
    assert main(["--local_rank=1", "explain", "--num-q-heads", "8", "--num-kv-heads", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["valid"]


def test_a_tool_whose_package_is_missing_says_which_to_install(monkeypatch, capsys):
    def missing(name):
        raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib.axes")

    monkeypatch.setattr(cli, "import_module", missing)
    assert main(["compare", "--config", "x"]) == 2
    assert "compare: cpinfer compare needs the package matplotlib" in capsys.readouterr().err

    def broken(name):
        raise ModuleNotFoundError("No module named 'cpinfer_tools.gone'", name="cpinfer_tools.gone")

    monkeypatch.setattr(cli, "import_module", broken)
    with pytest.raises(ModuleNotFoundError, match="gone"):  # a fault of ours is not put on the user
        main(["compare", "--config", "x"])


def test_explain_needs_numpy_alone():
    code = (
        "import sys\n"
        "from cpinfer_tools.cli import main\n"
        "main(['explain', '--tp', '2', '--num-q-heads', '8', '--num-kv-heads', '2'])\n"
        "heavy = {'torch', 'transformers', 'deepspeed', 'accelerate', 'wandb', 'tqdm', 'safetensors'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("file", sorted(path.stem for path in (ROOT / "tools").glob("*.py")))
def test_files_for_launchers_are_commands(file):
    text = (ROOT / "tools" / f"{file}.py").read_text(encoding="utf-8")
    name = text.partition('run("')[2].partition('"')[0]
    assert name in COMMANDS and COMMANDS[name].module.endswith(f".{file}")


def test_init_writes_what_ships_and_replaces_nothing_unasked(tmp_path, capsys):
    assert main(["init", str(tmp_path / "demo")]) == 0
    written = {path.relative_to(tmp_path / "demo") for path in (tmp_path / "demo").rglob("*") if path.is_file()}
    assert written == {path.relative_to(ROOT) for path in (ROOT / "configs").rglob("*") if path.is_file()}
    assert "cpinfer rollout --config configs/single.json" in capsys.readouterr().out
    single = tmp_path / "demo" / "configs" / "single.json"
    single.write_text("mine")
    assert init.main([str(tmp_path / "demo")]) == 2
    assert single.read_text() == "mine" and "exists" in capsys.readouterr().err
    assert init.main([str(tmp_path / "demo"), "--overwrite"]) == 0
    assert single.read_text() != "mine"


def test_init_into_a_file_is_refused(tmp_path, capsys):
    (tmp_path / "demo").write_text("")
    assert init.main([str(tmp_path / "demo")]) == 1
    assert "could not be written" in capsys.readouterr().err
