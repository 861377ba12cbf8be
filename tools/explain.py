"""The file that launchers want; the tool is `cpinfer_tools.explain`.

python tools/explain.py --config configs/pcp2_dcp2.json
"""

import sys

from cpinfer_tools.explain import main

if __name__ == "__main__":
    sys.exit(main())
