"""The file that launchers want; the tool is `cpinfer_tools.gpu.gpu_check`.

python tools/gpu_check.py --device cpu
"""

import sys

from cpinfer_tools.gpu.gpu_check import main

if __name__ == "__main__":
    sys.exit(main())
