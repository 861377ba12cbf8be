"""Modules that take tensors: nothing reads memory that was given back, and one thread at a time is in them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from typing import Any

import pytest
import tvm_ffi

from interpreted_cuda.modules import LOCK

CALLS = """
from types import SimpleNamespace
import torch
from interpreted_cuda import modules
if {tampered}:
    import inspect
    source = inspect.getsource(modules._called_with_views)
    assert "given.clear()" in source
    exec(source.replace("given.clear()", "pass"), modules.__dict__)
module = modules.Module(SimpleNamespace(run=lambda *given: None))
for _ in range(50):
    module.run(torch.ones(3), torch.ones(2, 2))
"""


@pytest.mark.parametrize("is_tampered", [False, True])
def test_nothing_of_a_call_is_read_after_it_was_given_back(is_tampered: bool) -> None:
    """The debug allocator fills what is given back; a function called by an address from there ends the process."""
    command = [sys.executable, "-c", CALLS.format(tampered=is_tampered)]
    environment = {**os.environ, "PYTHONMALLOC": "debug"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == (-signal.SIGSEGV if is_tampered else 0), done.stderr[-2000:]


def test_no_module_is_loaded_while_another_thread_runs_a_kernel() -> None:
    """A module brings its kernels into the table that launches look through."""
    ended: list[Any] = []

    def load() -> None:
        with pytest.raises(Exception, match="no_module") as caught:
            tvm_ffi.load_module("/no_module.so")
        ended.append(caught.value)

    loading = threading.Thread(target=load)
    with LOCK:  # as a kernel has it that runs
        loading.start()
        loading.join(0.5)
        assert not ended
    loading.join(60)
    assert ended
