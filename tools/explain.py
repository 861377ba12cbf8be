"""`cpinfer explain` as a file, for launchers that want one.

python tools/explain.py --config configs/pcp2_dcp2.json
"""

import sys

from cpinfer_tools.cli import run

if __name__ == "__main__":
    sys.exit(run("explain", sys.argv[1:]))
