"""`cpinfer compare` as a file, for launchers that want one.

python tools/compare.py --config configs/compare_recall.json
"""

import sys

from cpinfer_tools.cli import run

if __name__ == "__main__":
    sys.exit(run("compare", sys.argv[1:]))
