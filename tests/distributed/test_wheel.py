"""What `pip install` gives, in an environment of its own: commands, library, what ships, and nothing of a tree."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    # From a copy: a build leaves a folder beside what it is made of.
    source = folder / "source"
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.split(b"\0")
    wanted = ("cpinfer/", "integrations/", "tools/", "configs/", "pyproject.toml", "README.md", "LICENSE")
    for name in (os.fsdecode(name) for name in tracked if name):
        path = ROOT / name
        if not name.startswith(wanted) or not (path.exists() or path.is_symlink()):
            continue
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        if path.is_symlink():
            (source / name).symlink_to(os.readlink(path))
        else:
            (source / name).write_bytes(path.read_bytes())
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder), "."]
    subprocess.run(build, cwd=source, check=True, timeout=100)
    [path] = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of an environment that has the wheel, and the packages it needs from ours."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, with_pip=False)
    [site] = folder.glob("lib/python*/site-packages")
    install = [sys.executable, "-m", "pip", "-q", "--python", str(folder / "bin" / "python"), "install", "--no-deps"]
    subprocess.run([*install, str(wheel)], check=True, timeout=100)
    # A plain line of a .pth file adds a folder, behind; the finders of editable installs in it are not run.
    (site / "packages.pth").write_text(sysconfig.get_paths()["purelib"] + "\n", encoding="utf-8")
    return folder / "bin"


def run(command: list[str], cwd: Path) -> str:
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=clean, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_command_the_library_and_what_ships_work_outside_a_checkout(installed: Path, tmp_path: Path) -> None:
    cpinfer, python = str(installed / "cpinfer"), str(installed / "python")
    where = run([python, "-c", "import cpinfer; print(cpinfer.__file__, cpinfer.__version__)"], tmp_path).split()
    assert Path(where[0]).is_relative_to(installed.parent)
    assert run([cpinfer, "--version"], tmp_path) == f"cpinfer {where[1]}\n"
    explained = run([cpinfer, "explain", "--tp", "2", "--num-q-heads", "8", "--num-kv-heads", "2", "--json"], tmp_path)
    assert json.loads(explained.splitlines()[-1])["valid"]
    run([cpinfer, "init", "demo"], tmp_path)
    flags = ["--config", "configs/single.json", "--set", "sampling.max_new_tokens=4", "--output", "out/results.jsonl"]
    told = json.loads(run([cpinfer, "rollout", *flags], tmp_path / "demo").splitlines()[-1])
    lines = (tmp_path / "demo" / "out" / "results.jsonl").read_text(encoding="utf-8").splitlines()
    assert told["num_samples"] == len(lines) > 0


def test_the_wheel_holds_every_module_and_config_and_no_more(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    tracked = [name for name in tracked if (ROOT / name).exists()]
    homes = {"cpinfer/": "", "integrations/cpinfer_integrations/": "integrations/", "tools/cpinfer_tools/": "tools/"}
    expected = {
        name.removeprefix(cut)
        for name in tracked
        for home, cut in homes.items()
        if name.startswith(home) and name != "tools/cpinfer_tools/configs"
    }
    expected |= {f"cpinfer_tools/{name}" for name in tracked if name.startswith("configs/")}
    assert names == expected
