"""The file that launchers want; the tool is `cpinfer_tools.verify.mismatch`.

python tools/mismatch.py --config configs/single.json
"""

import sys

from cpinfer_tools.verify.mismatch import main

if __name__ == "__main__":
    sys.exit(main())
