"""Starts two of four ranks as `srun --distribution=cyclic` does: consecutive ranks on different hosts.

cyclic.py HOST SCRIPT ARGUMENTS: ranks HOST and HOST + 2. Ends with the first code that is not 0.
"""

from __future__ import annotations

import os
import subprocess
import sys

from two_hosts import MASTER, PORT

if __name__ == "__main__":
    host, *command = sys.argv[1:]
    world = {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": MASTER, "MASTER_PORT": str(PORT)}
    ranks = [
        subprocess.Popen(
            [sys.executable, *command],
            env={**os.environ, **world, "RANK": str(int(host) + 2 * local_rank), "LOCAL_RANK": str(local_rank)},
        )
        for local_rank in range(2)
    ]
    sys.exit(next((code for code in [rank.wait() for rank in ranks] if code), 0))
