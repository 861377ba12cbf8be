"""`cpinfer mismatch` as a file, for launchers that want one.

python tools/mismatch.py --config configs/single.json
"""

import sys

from cpinfer_tools.cli import run

if __name__ == "__main__":
    sys.exit(run("mismatch", sys.argv[1:]))
