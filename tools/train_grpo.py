"""The file that launchers want; the tool is `cpinfer_tools.grpo.train_grpo`.

torchrun --nproc-per-node 2 tools/train_grpo.py --config configs/grpo_sentence.json
"""

import sys

from cpinfer_tools.grpo.train_grpo import main

if __name__ == "__main__":
    sys.exit(main())
