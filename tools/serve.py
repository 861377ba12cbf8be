"""`cpinfer serve` as a file, for launchers that want one.

deepspeed --num_gpus 8 tools/serve.py --config configs/pcp2_dcp2.json
"""

import sys

from cpinfer_tools.cli import run

if __name__ == "__main__":
    sys.exit(run("serve", sys.argv[1:]))
