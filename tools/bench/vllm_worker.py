"""vLLM in a process of its own Python, for engine.py: it answers what stands on its stdin, a line for a line.

    PYTHON tools/bench/vllm_worker.py '{"model": FOLDER, "tp_size": 1, "max_model_len": 16448}'

First it says {"version": ...}; then each line `{"prompts": [[ids]], "max_new_tokens": [n]}` is answered by
{"tokens": [[ids]]}, greedily. Nothing of this project is imported: PYTHON has vLLM and nothing else.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any


def main() -> int:
    given = json.loads(sys.argv[1])
    # What vLLM prints is for people.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(told: dict[str, Any]) -> None:
        answers.write(json.dumps(told) + "\n")
        answers.flush()

    import vllm

    engine = vllm.LLM(
        model=given["model"],
        skip_tokenizer_init=True,
        dtype="float32",
        tensor_parallel_size=given["tp_size"],
        max_model_len=given["max_model_len"],
        enforce_eager=True,
        seed=0,
    )
    answer({"version": vllm.__version__})
    for line in sys.stdin:
        asked = json.loads(line)
        sampling = [
            vllm.SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, detokenize=False)
            for n in asked["max_new_tokens"]
        ]
        prompts = [{"prompt_token_ids": prompt} for prompt in asked["prompts"]]
        results = engine.generate(prompts, sampling, use_tqdm=False)
        answer({"tokens": [list(result.outputs[0].token_ids) for result in results]})
        engine.reset_prefix_cache()  # the same prompts come again in every round
    return 0


if __name__ == "__main__":
    sys.exit(main())
