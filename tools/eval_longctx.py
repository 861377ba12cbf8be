"""The file that launchers want; the tool is `cpinfer_tools.evaluation.eval_longctx`.

accelerate launch tools/eval_longctx.py --config configs/eval_recall.json
"""

import sys

from cpinfer_tools.evaluation.eval_longctx import main

if __name__ == "__main__":
    sys.exit(main())
