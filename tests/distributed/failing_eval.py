"""tools/eval_longctx.py with a fault put into one rank, as failing_rollout.py has it for rollouts.

torchrun --nproc-per-node 2 tests/distributed/failing_eval.py {raise|kill} --config ...
"""

from __future__ import annotations

import sys

from failing_rollout import put_fault

from cpinfer_tools.evaluation import eval_longctx

if __name__ == "__main__":
    put_fault(sys.argv[1])
    sys.exit(eval_longctx.main(sys.argv[2:]))
