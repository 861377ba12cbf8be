"""`cpinfer eval` as a file, for launchers that want one.

accelerate launch tools/eval_longctx.py --config configs/eval_recall.json
"""

import sys

from cpinfer_tools.cli import run

if __name__ == "__main__":
    sys.exit(run("eval", sys.argv[1:]))
