"""`cpinfer train-grpo` as a file, for launchers that want one.

torchrun --nproc-per-node 2 tools/train_grpo.py --config configs/grpo_sentence.json
"""

import sys

from cpinfer_tools.cli import run

if __name__ == "__main__":
    sys.exit(run("train-grpo", sys.argv[1:]))
