"""The process that started this one is asked for before slow imports begin."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from cpinfer.comm.parent import first_parent

# The first import of torch ends the process, and says whether the parent had been asked for.
AT_TORCH = """
import importlib, os, sys

class AtTorch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print("cpinfer.comm.parent" in sys.modules, flush=True)
            os._exit(0)

sys.meta_path.insert(0, AtTorch())
importlib.import_module(sys.argv[1])
"""


def test_the_first_parent_is_who_started_the_process():
    assert first_parent() == os.getppid()
    code = "import os, cpinfer; os.getppid = None; from cpinfer.comm.parent import first_parent; print(first_parent())"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(found.stdout) == os.getpid()


def test_a_process_that_was_forked_since_has_a_parent_of_its_own():
    code = (
        "import os, cpinfer\nfrom cpinfer.comm.parent import first_parent\nparent = os.getpid()\n"
        "if os.fork() == 0:\n    os._exit(first_parent() != parent)\nprint(os.wait()[1])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "0\n"


TOOLS = [
    "cpinfer_tools.rollout",
    "cpinfer_tools.evaluation.eval_longctx",
    "cpinfer_tools.grpo.train_grpo",
    "cpinfer_tools.verify.mismatch",
    "cpinfer_tools.gpu.gpu_check",
    "cpinfer_integrations.lm_eval",
]


@pytest.mark.parametrize("module", TOOLS)
def test_what_ends_with_its_launcher_knows_it_before_torch_is_imported(module):
    found = subprocess.run([sys.executable, "-c", AT_TORCH, module], capture_output=True, text=True, check=True)
    assert found.stdout == "True\n", found.stderr
