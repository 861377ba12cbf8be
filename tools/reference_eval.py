"""The file that launchers want; the tool is `cpinfer_tools.verify.reference_eval`.

python tools/reference_eval.py --config configs/eval_recall.json
"""

import sys

from cpinfer_tools.verify.reference_eval import main

if __name__ == "__main__":
    sys.exit(main())
