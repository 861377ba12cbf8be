"""`cpinfer reference-eval` as a file, for launchers that want one.

python tools/reference_eval.py --config configs/eval_recall.json
"""

import sys

from cpinfer_tools.cli import run

if __name__ == "__main__":
    sys.exit(run("reference-eval", sys.argv[1:]))
