"""The file that launchers want; the tool is `cpinfer_tools.verify.compare`.

python tools/compare.py --config configs/compare_recall.json
"""

import sys

from cpinfer_tools.verify.compare import main

if __name__ == "__main__":
    sys.exit(main())
