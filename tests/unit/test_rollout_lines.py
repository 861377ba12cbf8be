"""What lines of a rollout's input say of themselves: how they are sampled, and what the template of a chat reads."""

import shutil
from functools import partial
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import tool_folder
from cpinfer_tools import rollout
from cpinfer_tools.verify import check_rollout
from tool_folder import ToolFolder, summary_of

MODEL = Path(__file__).parents[2] / "configs" / "recall-tiny"
PROMPTS = [{"prompt": "The door waited."}, {"prompt_token_ids": [70, 71, 72], "id": "mine"}, {"prompt": "It was"}]
SAMPLING = {"temperature": 0, "max_new_tokens": 4, "ignore_eos": True}
OWN = {"n": 3, "max_new_tokens": 2, "temperature": 1, "seed": 5}


@pytest.fixture
def folder(tmp_path, capsys, monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    data = {"model": str(MODEL), "dtype": "float32", "kv_cache_gib": 0.01, "input": "in.jsonl", "sampling": SAMPLING}
    return ToolFolder(tmp_path, capsys, rollout, data)


def samples(lines):
    return sorted((x["prompt_index"], x["sample_index"], tuple(x["token_ids"])) for x in lines)


def test_a_line_is_sampled_as_it_says_and_its_results_repeat_that(folder):
    folder.file("in.jsonl", {**PROMPTS[0], "sampling": OWN}, *PROMPTS[1:])
    code, out, err = folder.run()
    assert code == 0 and "3 prompts, 5 samples" in err
    results = {(x["prompt_index"], x["sample_index"]): x for x in folder.lines()}
    assert sorted(results) == [(0, 0), (0, 1), (0, 2), (1, 0), (2, 0)]
    assert {index for (index, _), line in results.items() if "sampling" in line} == {0}
    assert results[0, 0]["sampling"] == OWN
    assert [len(results[key]["token_ids"]) for key in sorted(results)] == [2, 2, 2, 4, 4]
    summary = summary_of(out)
    assert (summary["num_prompts"], summary["num_samples"], summary["num_generated_tokens"]) == (3, 5, 14)

    said = {key: results[0, key]["token_ids"] for key in range(3)}
    folder.file("in.jsonl", PROMPTS[0])
    assert folder.run("--overwrite", sampling={**SAMPLING, **OWN})[0] == 0
    assert {x["sample_index"]: x["token_ids"] for x in folder.lines()} == said, "as if the config had said it"


def test_a_line_with_sampling_of_its_own_is_resumed_and_another_one_is_not(folder):
    folder.file("in.jsonl", PROMPTS[0], {**PROMPTS[1], "sampling": OWN})
    assert folder.run()[0] == 0
    undisturbed = folder.lines()
    folder.output.write_bytes(b"".join(folder.output.read_bytes().splitlines(keepends=True)[:2]))
    code, out, _ = folder.run("--resume")
    assert code == 0 and summary_of(out)["num_samples_resumed"] == 2
    assert samples(folder.lines()) == samples(undisturbed)
    folder.file("in.jsonl", PROMPTS[0], {**PROMPTS[1], "sampling": {**OWN, "seed": 6}})
    tool_folder.assert_refused(folder.run("--resume"), "the prompts differ", "--overwrite", tool="rollout")


def test_results_of_lines_with_sampling_of_their_own_are_checked_with_it(folder):
    biased = {"logit_bias": {"70": 8.5}, "max_new_tokens": 6, "repetition_penalty": 1.2}
    folder.file("in.jsonl", {**PROMPTS[0], "sampling": biased}, {**PROMPTS[1], "sampling": OWN}, PROMPTS[2])
    assert folder.run()[0] == 0
    folder.capsys.readouterr()
    assert check_rollout.main(["--output", str(folder.output)]) == 0
    summary = summary_of(folder.capsys.readouterr().out)
    assert summary["ok"] and (summary["num_samples"], summary["num_greedy"], summary["num_same_tokens"]) == (5, 2, 2)
    lines = folder.lines()
    for line in lines:
        line.pop("sampling", None)
    folder.file("out.jsonl", *lines)
    assert check_rollout.main(["--output", str(folder.output)]) == 1, "which needs to know it"


def test_a_stop_string_of_a_line_ends_its_answers_alone(folder):
    plain = {"prompt": "The door waited."}
    folder.file("in.jsonl", plain, {**plain, "id": "x"})
    longer = {**SAMPLING, "max_new_tokens": 8}
    assert folder.run(sampling=longer)[0] == 0
    text = folder.lines()[0]["text"]
    stop = text[3]
    folder.file("in.jsonl", plain, {**plain, "id": "x", "sampling": {"stop": stop}})
    assert folder.run("--overwrite", sampling=longer)[0] == 0
    texts = {x["id"]: (x["text"], x["finish_reason"]) for x in folder.lines()}
    assert texts == {"0": (text, "length"), "x": (text[: text.index(stop)], "stop")}


def test_a_chat_of_an_input_line_is_rendered_as_transformers_renders_it(folder, tmp_path):
    own_model = shutil.copytree(MODEL, tmp_path / "own")
    tokenizer = AutoTokenizer.from_pretrained(own_model)
    tokenizer.chat_template = (
        "{{ 'Tools: ' ~ tools[0].name ~ '. ' if tools }}{% for m in messages %}{{ m.content }}{{ '.' }}{% endfor %}"
        "{{ ' Think!' if add_generation_prompt and thinking }}"
    )
    tokenizer.save_pretrained(own_model)
    chat = [{"role": "user", "content": "A door"}, {"role": "assistant", "content": "It"}]
    tools = [{"name": "key"}]
    folder.file(
        "in.jsonl",
        {"messages": chat[:1], "tools": tools, "chat_template_kwargs": {"thinking": True}},
        {"messages": [{**chat[0], "content": [{"type": "text", "text": "A door"}]}, chat[1]]},
    )
    assert folder.run(model=str(own_model))[0] == 0
    prompts = {x["prompt_index"]: x["prompt_token_ids"] for x in folder.lines()}
    render = partial(tokenizer.apply_chat_template, return_dict=False)
    assert prompts == {
        0: render(chat[:1], tools=tools, thinking=True, add_generation_prompt=True),
        1: render(chat, continue_final_message=True),
    }
    assert [tokenizer.decode(prompts[i]) for i in (0, 1)] == ["Tools: key. A door. Think!", "A door.It"]


def test_odd_special_tokens_are_said_once_where_people_look(folder):
    ended = {"prompt": "It was;"}
    folder.file("in.jsonl", ended, ended)
    code, _, err = folder.run()
    assert code == 0 and err.count("ends in an end-of-text token of the model") == 1
