"""The file that launchers want; the tool is `cpinfer_tools.rollout`.

deepspeed --num_gpus 8 tools/rollout.py --config configs/pcp2_dcp2.json
"""

import sys

from cpinfer_tools.rollout import main

if __name__ == "__main__":
    sys.exit(main())
