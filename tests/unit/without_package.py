"""Import a module as where a package is not installed; the error goes to stderr.

python tests/unit/without_package.py PACKAGE MODULE
"""

from __future__ import annotations

import importlib
import sys

package, module = sys.argv[1:]
for name in [name for name in sys.modules if name.partition(".")[0] == "cpinfer_integrations"]:
    del sys.modules[name]  # of a process that was forked: see `fork_server`
sys.modules[package] = None  # type: ignore[assignment]
importlib.import_module(module)
