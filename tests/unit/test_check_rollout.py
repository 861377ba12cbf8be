"""What Transformers answers alone is what the model says, whatever its own settings for chats say."""

import check_rollout
from tiny_models import FAMILIES, make_model, prompts_of


def test_the_penalty_that_a_chat_model_asks_for_is_left_out():
    model = make_model(FAMILIES["qwen2"])
    [prompt] = prompts_of((40,), vocab_size=128)
    plain = check_rollout.generate_greedy(model, prompt, 12)
    model.generation_config.update(repetition_penalty=1.8, do_sample=True, temperature=0.7, top_k=20)
    assert check_rollout.generate_greedy(model, prompt, 12) == plain
