"""tools/train_grpo.py with a fault put into a rollout phase of one rank.

torchrun --nproc-per-node 2 tests/distributed/failing_training.py {raise|kill} --config ...
"""

from __future__ import annotations

import sys

from failing_rollout import put_fault

from cpinfer_tools.grpo import train_grpo

if __name__ == "__main__":
    put_fault(sys.argv[1])
    sys.exit(train_grpo.main(sys.argv[2:]))
