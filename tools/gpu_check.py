"""`cpinfer gpu-check` as a file, for launchers that want one.

python tools/gpu_check.py --device cpu
"""

import sys

from cpinfer_tools.cli import run

if __name__ == "__main__":
    sys.exit(run("gpu-check", sys.argv[1:]))
