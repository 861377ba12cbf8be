"""`cpinfer check-rollout` as a file, for launchers that want one.

python tools/check_rollout.py
"""

import sys

from cpinfer_tools.cli import run

if __name__ == "__main__":
    sys.exit(run("check-rollout", sys.argv[1:]))
