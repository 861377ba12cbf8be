"""Two hosts on one machine: network namespaces with an address, a name and no way to each other but one virtual cable.

As root, or as anybody where user namespaces are permitted; `why_not` says where neither can be had.

    10.77.0.1  cpi-a: rank 0, 1  <--- cpi0, cpi0 --->  cpi-b: rank 2, 3  10.77.0.2
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from cpinfer_tools.verify.comparison.launches import end_processes
from launching import BIN, ENVIRON, ROOT, Finished

LINK = "cpi0"
MASTER = "10.77.0.1"
PORT = 29_500  # nobody else is in these networks
# gloo and NCCL ask the host's name for an address, which nobody resolves here.
LINK_ENVIRON = {"GLOO_SOCKET_IFNAME": LINK, "NCCL_SOCKET_IFNAME": LINK}


@dataclass(frozen=True)
class Host:
    """One of them: `enter` before a command runs it there, `pid` a process in its network."""

    name: str
    address: str
    enter: tuple[str, ...]
    pid: int

    def run(self, *command: str) -> str:
        """What a command prints there; CalledProcessError when it fails."""
        done = subprocess.run([*self.enter, *command], capture_output=True, text=True, check=True, timeout=20)
        return done.stdout

    def counters(self) -> tuple[int, int]:
        """Bytes that have come over the cable, and gone."""
        found = json.loads(self.run("ip", "-s", "-j", "link", "show", "dev", LINK))[0]["stats64"]
        return found["rx"]["bytes"], found["tx"]["bytes"]

    def plug(self) -> None:
        """Give the end of the cable that is here its address."""
        self.run("ip", "addr", "add", f"{self.address}/24", "dev", LINK)
        self.run("ip", "link", "set", LINK, "up")

    def start(self, command: Sequence[str], env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
        """A command from the repository's root, whose output is read by `finish`."""
        return subprocess.Popen(
            [*self.enter, *command],
            cwd=ROOT,
            env={**os.environ, **ENVIRON, **LINK_ENVIRON, **(env or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )


@functools.cache
def why_not() -> str | None:
    """Why this machine cannot have two hosts; None when it can."""
    try:
        with two_hosts() as (a, b):
            probe = "import socket; socket.create_server(('10.77.0.2', 7)).close()"
            b.run(sys.executable, "-c", probe)
            return None if a.counters() else "no counters"
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or error
        return f"network namespaces are not to be had here: {str(said).strip()}"


@contextlib.contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Both, joined; gone after the block, with all that still runs there."""
    with contextlib.ExitStack() as stack:
        outer: list[str] = []
        users: list[str] = []
        if os.geteuid() != 0:
            outside = _holder(stack, ["unshare", "-U", "-r", "-n", "-m"], "true")
            users = ["-U", "--preserve-credentials"]
            outer = ["nsenter", "-t", str(outside), *users, "-n", "-m"]
        pids = [
            _holder(stack, [*outer, "unshare", "-n", "-u"], f"echo {name} > /proc/sys/kernel/hostname")
            for name in ("cpi-a", "cpi-b")
        ]
        pair = ["type", "veth", "peer", "name", LINK, "netns", str(pids[1])]
        subprocess.run(
            [*outer, "ip", "link", "add", LINK, "netns", str(pids[0]), *pair],
            check=True,
            capture_output=True,
            text=True,
            timeout=20,
        )
        hosts = [
            Host(f"cpi-{'ab'[i]}", f"10.77.0.{i + 1}", ("nsenter", "-t", str(pid), *users, "-n", "-u"), pid)
            for i, pid in enumerate(pids)
        ]
        for host in hosts:
            host.plug()
            host.run("ip", "link", "set", "lo", "up")
        yield hosts[0], hosts[1]


@contextlib.contextmanager
def slow_cable(a: Host, b: Host) -> Iterator[Callable[[], dict[str, list[int]]]]:
    """A cable as `slow_cable.py` has it, in the place of the first; what tells the frames of each direction so far.

    OSError, with what was said, where this machine has no taps.
    """
    a.run("ip", "link", "delete", LINK)
    cable = subprocess.Popen(
        [*a.enter, sys.executable, str(Path(__file__).with_name("slow_cable.py")), LINK, str(b.pid)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert cable.stdin is not None and cable.stdout is not None and cable.stderr is not None

    def told() -> dict[str, list[int]]:
        print(file=cable.stdin, flush=True)
        frames: dict[str, list[int]] = json.loads(cable.stdout.readline())
        return frames

    try:
        if cable.stdout.readline() != "ready\n":
            raise OSError(cable.stderr.read().strip().splitlines()[-1])
        for host in (a, b):
            host.plug()
        yield told
    finally:
        cable.kill()
        cable.wait()


def _holder(stack: contextlib.ExitStack, unshare: Sequence[str], first: str) -> int:
    """The process that holds a namespace open for the length of a block, when it has done something `first`."""
    process = subprocess.Popen(
        [*unshare, "sh", "-c", f"{first} && echo ready && exec sleep infinity"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    stack.callback(process.wait)
    stack.callback(process.kill)
    assert process.stdout is not None and process.stderr is not None
    if process.stdout.readline() != "ready\n":
        raise OSError(process.stderr.read())
    return process.pid


def torchrun(host: int, *command: str) -> list[str]:
    """Two of four ranks, as a job starts torchrun on each of its hosts."""
    where = ["--nnodes", "2", "--node-rank", str(host), "--master-addr", MASTER, "--master-port", str(PORT)]
    return [str(BIN / "torchrun"), *where, "--nproc-per-node", "2", *command]


def deepspeed(host: int, hostfile: str, *command: str) -> list[str]:
    """The same by DeepSpeed's launcher, started on each host by somebody else."""
    where = ["--hostfile", hostfile, "--no_ssh", "--node_rank", str(host)]
    return [str(BIN / "deepspeed"), *where, "--master_addr", MASTER, "--master_port", str(PORT), *command]


def why_no_ssh() -> str | None:
    """Why DeepSpeed's launcher cannot reach the other host by itself; None when it can."""
    missing = [name for name in ("sshd", "ssh-keygen", "pdsh") if _program(name) is None]
    if missing:
        return f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed"
    return None if os.geteuid() == 0 else "only root can answer for other users, as sshd does"


@contextlib.contextmanager
def ssh_between(hosts: Sequence[Host], folder: Path) -> Iterator[dict[str, str]]:
    """An sshd on each host, for one key made on the spot; the environment in which pdsh and DeepSpeed use it."""
    key, config = folder / "key", folder / "ssh_config"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True, timeout=20)
    config.write_text(
        f"Host *\n  IdentityFile {key}\n  StrictHostKeyChecking no\n  UserKnownHostsFile /dev/null\n  LogLevel ERROR\n"
    )
    (folder / "sshd_config").write_text(
        f"HostKey {key}\nAuthorizedKeysFile {key}.pub\nPidFile none\nUsePAM no\nStrictModes no\nPermitRootLogin yes\n"
    )
    # What DeepSpeed hands on to other hosts beside NCCL's and Python's own variables.
    exported = {**LINK_ENVIRON, **ENVIRON}
    (folder / "deepspeed_env").write_text("".join(f"{name}={value}\n" for name, value in exported.items()))
    sshd = _program("sshd")
    assert sshd is not None, "why_no_ssh has been asked"
    servers = [host.start([sshd, "-D", "-e", "-f", str(folder / "sshd_config")]) for host in hosts]
    try:
        yield {"PDSH_SSH_ARGS_APPEND": f"-F {config}", "DS_ENV_FILE": str(folder / "deepspeed_env")}
    finally:
        for server in servers:
            end_processes(server, {*_children(server)})  # type: ignore[arg-type]


def _program(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


def finish(
    processes: Sequence[subprocess.Popen[str]], timeout_s: float, meanwhile: Callable[[], None]
) -> list[Finished]:
    """How commands of several hosts end, `timeout_s` after what is to be done `meanwhile`. Nothing of them is left."""
    started_s = time.perf_counter()
    try:
        meanwhile()
        started_s = time.perf_counter()
        outputs = []
        for process in processes:
            left_s = max(1.0, timeout_s - (time.perf_counter() - started_s))
            try:
                outputs.append(process.communicate(timeout=left_s))
            except subprocess.TimeoutExpired:
                raise AssertionError(f"{process.args} did not end within {timeout_s:g} s") from None
    finally:
        for process in processes:
            end_processes(process, {*_children(process)})  # type: ignore[arg-type]
    wall_s = time.perf_counter() - started_s
    return [Finished(p.returncode, *told, wall_s) for p, told in zip(processes, outputs, strict=True)]


def ranks_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The ranks that a launcher has started, by their interpreters."""
    return [child for child in _children(process) if any("rollout" in word for word in child.cmdline())]


def _children(process: subprocess.Popen[str]) -> list[psutil.Process]:
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
