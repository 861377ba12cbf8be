"""Which process started this one, asked when the package is first imported.

Importing torch and its neighbours takes seconds. A launcher that ends in them leaves this process another parent, and
nothing would show that it ever had one before.
"""

from __future__ import annotations

import os

_PROCESS, _PARENT = os.getpid(), os.getppid()


def first_parent() -> int:
    """The id of the process that started this one; in a process that was forked since, that of its parent now."""
    return _PARENT if os.getpid() == _PROCESS else os.getppid()
