"""The file that launchers want; the tool is `cpinfer_tools.verify.check_rollout`.

python tools/check_rollout.py
"""

import sys

from cpinfer_tools.verify.check_rollout import main

if __name__ == "__main__":
    sys.exit(main())
