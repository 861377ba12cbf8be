"""`cpinfer rollout` as a file, for launchers that want one.

deepspeed --num_gpus 8 tools/rollout.py --config configs/pcp2_dcp2.json
"""

import sys

from cpinfer_tools.cli import run

if __name__ == "__main__":
    sys.exit(run("rollout", sys.argv[1:]))
