"""Long-context samples: an exact token budget, needles where the grid says, RULER's wording, nothing left to chance."""

import collections
import doctest
import importlib
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from cpinfer.errors import UserError
from cpinfer_tools.evaluation.longctx import haystack
from cpinfer_tools.evaluation.longctx.local_files import read_task_file
from cpinfer_tools.evaluation.longctx.recall_text import DOES, NAMES, THINGS, filler_sentence
from cpinfer_tools.evaluation.longctx.ruler import frequent_words
from cpinfer_tools.evaluation.longctx.tasks import TASKS, find_task, make_sample, make_samples
from cpinfer_tools.evaluation.longctx.words import distinct_pairs, distinct_words

ROOT = Path(__file__).parents[2]
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
WITH_DEPTH = sorted(name for name, task in TASKS.items() if task.has_depth)


class Pieces:
    """A tokenizer of whole words, single signs and white space, with a token before everything."""

    def __call__(self, text):
        return {"input_ids": [0, *(hash(piece) % 1000 for piece in re.findall(r" ?\w+|[^\w]", text))]}

    def decode(self, ids):
        return f"<{len(ids)} tokens>"

    def apply_chat_template(self, messages, **_):
        return [0] * sum(len(message["content"]) for message in messages)


class Lumps:
    """A tokenizer that pads every text to a multiple of sixteen tokens: no budget but those can be hit."""

    def __call__(self, text):
        return {"input_ids": [1] * (-(-len(text) // 16) // 16 * 16 + 16)}


@pytest.fixture(scope="module")
def bytes_and_words():
    """The shipped models' tokenizer: its words are tokens, everything else is spelled in bytes."""
    return AutoTokenizer.from_pretrained(ROOT / "configs" / "recall-tiny")


@pytest.mark.parametrize("length", [2048, 4096, 4099, 8192])
@pytest.mark.parametrize("name", sorted(TASKS))
def test_prompt_and_answer_together_have_exactly_the_budget(name, length):
    for index in range(3):
        sample = make_sample(TASKS[name], length, index, DEPTHS, Pieces())
        assert len(sample.prompt_token_ids) + sample.max_new_tokens == length
        assert sample.prompt_token_ids == tuple(Pieces()(sample.prompt)["input_ids"])


@pytest.mark.parametrize("name", sorted(TASKS.keys() - {"cwe"}))
def test_a_tokenizer_that_spells_words_in_bytes_hits_the_budget_too(name, bytes_and_words):
    sample = make_sample(TASKS[name], 4096, 1, DEPTHS, bytes_and_words)
    assert len(sample.prompt_token_ids) + sample.max_new_tokens == 4096


@pytest.mark.parametrize("name", sorted(TASKS))
def test_a_sample_is_a_function_of_seed_task_length_and_index(name):
    def make(index=0, seed=0, length=3000):
        return make_sample(TASKS[name], length, index, DEPTHS, Pieces(), seed)

    assert make() == make()
    assert len({make().references, make(index=1).references, make(seed=1).references}) == 3
    # More samples of a task do not change the first ones.
    assert make_samples([name], [3000], 2, DEPTHS, Pieces())[0] == make()


@pytest.mark.parametrize("name", sorted(TASKS))
def test_what_is_asked_for_stands_in_the_prompt(name):
    sample = make_sample(TASKS[name], 3000, 2, DEPTHS, Pieces())
    assert sample.references
    assert all(reference in sample.prompt for reference in sample.references)
    assert not any(sample.prompt.endswith(reference) for reference in sample.references)


@pytest.mark.parametrize("name", WITH_DEPTH)
def test_needles_lie_on_the_grid_of_depths(name):
    samples = make_samples([name], [8192], len(DEPTHS) + 1, DEPTHS, Pieces())
    assert [sample.depth for sample in samples] == [*DEPTHS, DEPTHS[0]]
    for sample in samples:
        place = sample.prompt.index(sample.references[0]) / len(sample.prompt)
        assert place == pytest.approx(sample.depth, abs=0.06), sample.depth


def test_tasks_with_several_needles_have_no_depth():
    for name in TASKS.keys() - set(WITH_DEPTH):
        assert make_sample(TASKS[name], 3000, 0, DEPTHS, Pieces()).depth is None


def test_niah_single_has_rulers_words():
    sample = make_sample(TASKS["niah_single_1"], 512, 0, (0.0,), Pieces())
    opening, needle, first_noise, *_ = sample.prompt.split("\n")
    (value,) = sample.references
    key = re.fullmatch(rf"One of the special magic numbers for (.+) is: {value}\.", needle)[1]
    assert opening == (
        "A special magic number is hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the number afterwards."
    )
    assert first_noise == haystack.NOISE
    assert sample.prompt.endswith(
        f"\nWhat is the special magic number for {key} mentioned in the provided text? "
        f"The special magic number for {key} mentioned in the provided text is"
    )


@pytest.mark.parametrize("name, num_asked", [("niah_multivalue", 1), ("niah_multiquery", 4)])
def test_several_values_or_keys_are_asked_for_together(name, num_asked):
    sample = make_sample(TASKS[name], 2048, 0, DEPTHS, Pieces())
    asked = re.search(
        r"What are all the special magic numbers for (.+) mentioned in the provided text\?", sample.prompt
    )[1]
    keys = asked.replace(", and ", ", ").split(", ")
    assert len(keys) == num_asked and len(sample.references) == 4
    found = re.findall(r"One of the special magic numbers for (\S+) is: (\d+)\.", sample.prompt)
    assert {key for key, _ in found} == set(keys)
    assert {value for _, value in found} == set(sample.references)


def test_only_one_needle_of_a_haystack_of_needles_has_the_key():
    for name in ("niah_multikey_2", "niah_multikey_3"):
        sample = make_sample(TASKS[name], 4096, 0, DEPTHS, Pieces())
        key = re.search(r"for (\S+) mentioned in the provided text\?", sample.prompt)[1]
        values = re.findall(rf"for {key} is: (\S+)\.", sample.prompt)
        assert tuple(values) == sample.references
        assert sample.prompt.count(" is: ") > 30


def test_a_chain_of_variables_leads_from_the_value_to_every_name():
    sample = make_sample(TASKS["vt"], 4096, 0, DEPTHS, Pieces())
    value = re.findall(r"assigned the value (\d+)", sample.prompt)[-1]
    text = sample.prompt[sample.prompt.rindex("Memorize and track") :]
    assignments = re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", text)
    assert [source for _, source in assignments] == [value, *(name for name, _ in assignments[:-1])]
    assert tuple(name for name, _ in assignments) == sample.references


def test_common_words_are_the_commonest_of_the_list():
    sample = make_sample(TASKS["cwe"], 8192, 0, DEPTHS, Pieces())
    listed = sample.prompt[sample.prompt.rindex("Below is") :].split("\n")[1]
    counted = collections.Counter(re.findall(r"\d+\. (\S+)", listed))
    assert {word for word, _ in counted.most_common(10)} == set(sample.references)
    assert {counted[word] for word in sample.references} == {30}


@pytest.mark.parametrize("num_units", range(40))
def test_frequent_words_can_be_told_apart_however_short_the_text(num_units):
    draft = frequent_words(random.Random(0), 1024)
    words = draft.render(num_units, "").partition("coded words. ")[2].partition("\n")[0].split()
    counts = collections.Counter(word for word in words if word != "...")
    first, second, third, fourth, *_ = *(count for _, count in counts.most_common(4)), 0
    assert first > second > third > fourth
    assert [word for word, _ in counts.most_common(3)] == list(draft.references)


def test_frequent_words_are_the_commonest_but_for_dots():
    sample = make_sample(TASKS["fwe"], 8192, 0, DEPTHS, Pieces())
    text = sample.prompt.partition("coded words. ")[2].partition("\n")[0]
    (dots, _), *others = collections.Counter(text.split()).most_common(4)
    assert dots == "..."
    assert tuple(word for word, _ in others) == sample.references


def test_no_word_is_in_two_records():
    sample = make_sample(TASKS["recall_multikey"], 2048, 0, DEPTHS, Pieces())
    records = re.findall(r"Remember: (\w+) (\w+) (\w+);", sample.prompt)
    assert len(records) == 32
    for column, words in zip(zip(*records, strict=True), (NAMES, DOES, THINGS), strict=True):
        assert len(set(column)) == 32 and set(column) <= set(words)
    assert f"{sample.prompt.split()[-1]} {sample.references[0]};" in sample.prompt


@pytest.mark.parametrize("name", sorted(TASKS))
def test_a_budget_too_small_for_the_template_is_refused_with_the_numbers(name):
    with pytest.raises(UserError, match=rf"task {name} at length 8, of which \d+ tokens .* the template alone has \d+"):
        make_sample(TASKS[name], 8, 0, DEPTHS, Pieces())


def test_a_tokenizer_that_cannot_hit_the_budget_is_refused():
    with pytest.raises(UserError, match="the tokenizer cannot hit 2040 tokens: it came to 2032"):
        make_sample(TASKS["passkey"], 2056, 0, DEPTHS, Lumps())
    near = make_sample(TASKS["passkey"], 2050, 0, DEPTHS, Lumps())  # two short of 2034 is within the slack
    assert len(near.prompt_token_ids) == 2032


def test_an_unknown_task_names_the_nearest():
    with pytest.raises(UserError, match='unknown task "niah_singel_1"; the nearest is "niah_single_1"'):
        find_task("niah_singel_1")


def test_words_do_not_run_out():
    rng = haystack.random.Random(0)
    assert len(set(distinct_words(rng, 5000))) == 5000
    assert len(set(distinct_pairs(rng, 3000))) == 3000


def test_haystacks_grow_without_changing_what_was_there():
    units = haystack.synthetic_essay(haystack.random.Random(1))
    few = units.first(3)
    assert units.first(10)[:3] == few
    assert few[0] == filler_sentence(haystack.random.Random(1))


@pytest.mark.parametrize("name", ["evaluation.longctx.haystack", "evaluation.longctx.metrics", "evaluation.questions"])
def test_examples_in_docstrings_are_true(name):
    found = doctest.testmod(importlib.import_module(f"cpinfer_tools.{name}"))
    assert found.attempted and not found.failed


def test_no_torch_is_needed():
    code = "import sys; from cpinfer_tools.evaluation.longctx import tasks; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


@pytest.fixture
def file(tmp_path):
    def write(*lines):
        path = tmp_path / "mine.jsonl"
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return path

    return write


def test_a_file_of_prompts_becomes_a_task_of_its_name(file):
    path = file('{"prompt": "What is 1 + 1?", "references": ["2", "two"]}', "", '{"prompt": "b", "references": ["x"]}')
    task, samples = read_task_file(path, Pieces(), 7)
    assert (task.name, task.metrics, task.stop) == ("mine", ("string_match_all",), ())
    assert [sample.references for sample in samples] == [("2", "two"), ("x",)]
    assert samples[0].prompt_token_ids == tuple(Pieces()("What is 1 + 1?")["input_ids"])
    assert (samples[0].length, samples[0].max_new_tokens, samples[1].sample_index) == (0, 7, 1)
    assert len(read_task_file(path, Pieces(), 7, num_samples=1)[1]) == 1


def test_parts_of_a_message_are_its_text(file):
    parts = '[{"type": "text", "text": "fo"}, {"type": "text", "text": "ur"}]'
    image = '[{"type": "image", "image": "x.png"}]'
    line = '{"messages": [{"role": "user", "content": %s}], "references": ["4"]}'
    _, (sample,) = read_task_file(file(line % parts), Pieces(), 8)
    assert len(sample.prompt_token_ids) == len("fo\nur")
    with pytest.raises(UserError, match=r"line 1: .*messages\[0\].content\[0\].*multimodal models"):
        read_task_file(file(line % image), Pieces(), 8)


def test_messages_go_through_the_chat_template_and_a_metric_may_be_named(file):
    line = '{"messages": [{"role": "user", "content": "four"}], "references": ["4"], "metric": "string_match_part"}'
    task, (sample,) = read_task_file(file(line), Pieces(), 7)
    assert sample.prompt_token_ids == (0,) * 4 and task.metric == "string_match_part"


GSM8K = [f'{{"question": "What is {i} + 1?", "answer": "One more. #### {i + 1}"}}' for i in range(4)]


def test_gsm8k_is_asked_with_worked_examples_from_the_same_file(file):
    task, samples = read_task_file(file(*GSM8K), Pieces(), 64, num_shots=2)
    assert task.metrics == ("exact_match_flexible", "exact_match_strict") and "Question:" in task.stop
    assert [sample.references for sample in samples] == [("3",), ("4",)]
    assert samples[0].prompt == (
        "Question: What is 0 + 1?\nAnswer: One more. #### 1\n\n"
        "Question: What is 1 + 1?\nAnswer: One more. #### 2\n\n"
        "Question: What is 2 + 1?\nAnswer:"
    )


@pytest.mark.parametrize(
    "lines, words",
    [
        ([], "the file is empty"),
        (["{"], "line 1: not valid JSON"),
        (["[1]"], "line 1: found \\[1\\]; an object was wanted"),
        (['{"prompt": "x"}'], 'line 1: "references" is null; a list of texts'),
        (['{"prompt": "x", "references": []}'], 'line 1: "references" is \\[\\]'),
        (['{"references": ["x"]}'], "line 1: .*exactly one of prompt, messages"),
        (['{"prompt": "", "references": ["x"]}'], 'line 1: "prompt" is ""'),
        (['{"prompt": "x", "references": ["x"], "metric": "f1"}'], 'line 1: unknown metric "f1"'),
        (
            [
                '{"prompt": "x", "references": ["x"]}',
                '{"prompt": "x", "references": ["x"], "metric": "string_match_part"}',
            ],
            'line 2: the metric is "string_match_part"',
        ),
        ([*GSM8K, '{"question": "Why?", "answer": "Because."}'], 'line 5: .*"#### number"'),
        (GSM8K[:2], "the file ends after 2 examples"),
        (['{"prompt": "x", "references": ["x"], "metrics": "f1"}'], 'unknown key "metrics"; the nearest .* "metric"'),
        (['{"prompt": "x", "references": ["x"], "references": ["y"]}'], 'the key "references" stands twice'),
        (["[" * 10**5], "line 1: the JSON is nested too deeply"),
        ([r'{"prompt": "\ud83d", "references": ["x"]}'], 'line 1: "prompt" is '),
        ([r'{"prompt": "x", "references": ["\ud83d"]}'], 'line 1: "references" is '),
        (['{"prompt": "x", "references": ["x"], "metric": ["f1"]}'], "line 1: unknown metric"),
        (['{"messages": 5, "references": ["x"]}'], "line 1: .*messages"),
        ([*GSM8K, r'{"question": "\ud83d", "answer": "#### 1"}'], 'line 5: .*"#### number"'),
        (['{"prompt": [' + '"a",' * 10**4 + '"a"], "references": ["x"]}'], 'line 1: "prompt" is '),
    ],
)
def test_a_bad_file_is_refused_with_the_line(file, lines, words):
    with pytest.raises(UserError, match=f"task file .*mine.jsonl.*{words}") as caught:
        read_task_file(file(*lines), Pieces(), 7, num_shots=2)
    assert len(str(caught.value)) < 600, "whatever the line holds"


def test_a_dataset_may_say_more_than_its_question(file):
    """gsm8k's lines are the dataset's, which others have added to."""
    path = file(*GSM8K[:2], '{"question": "Why?", "answer": "#### 7", "id": 3}')
    assert [sample.references for sample in read_task_file(path, Pieces(), 7, num_shots=2)[1]] == [("7",)]


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        read_task_file(tmp_path / "nowhere.jsonl", Pieces(), 7)
