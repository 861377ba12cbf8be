"""lm-eval on the engine: what its own `hf` model answers, on one process and on several, and one voice for the results.

The tasks lie in lm_eval_tasks/; their data are prompts of configs/recall-tiny-prompts.jsonl.
"""

from __future__ import annotations

import copy
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
import yaml
from lm_eval.api.instance import Instance
from lm_eval.api.metrics import exact_match_fn
from lm_eval.filters.extraction import RegexFilter
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval_offline import offline as offline
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

import cpinfer
from cpinfer.comm.threads import run_ranks
from cpinfer.config import JobConfig, parse_config
from cpinfer.layout.grid import RankGrid
from cpinfer.models.loading import load_model, load_tokenizer
from cpinfer_integrations.lm_eval import CpinferLM, _timeout_s
from cpinfer_tools.evaluation.longctx.local_files import GSM8K_STOP
from cpinfer_tools.evaluation.longctx.metrics import METRICS, strict_answer
from launching import accelerate, deepspeed, launch, torchrun

TASKS = ["recall_choice", "recall_generate", "recall_perplexity"]
INCLUDE = "tests/integrations/lm_eval_tasks"
MODEL = "configs/recall-tiny"
MODULE = "cpinfer_integrations.lm_eval"
GSM8K = Path(lm_eval.__file__).parent / "tasks" / "gsm8k" / "gsm8k.yaml"
# Shorter than the texts of recall_perplexity, so that they are read in windows, and than no question.
MAX_LENGTH = 256
TOLERANCE = 1e-4


def evaluate(model: Any, **args: Any) -> dict[str, Any]:
    results = lm_eval.simple_evaluate(
        model, args or None, TASKS, task_manager=TaskManager(include_path=INCLUDE), bootstrap_iters=0
    )
    assert results is not None
    return {"results": results["results"], "samples": results["samples"]}


@pytest.fixture(scope="module")
def reference() -> dict[str, Any]:
    return evaluate("hf", pretrained=MODEL, dtype="float32", max_length=MAX_LENGTH, device="cpu")


def assert_same(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    for task in TASKS:
        scores = expected["results"][task]
        numbers = [key for key, value in scores.items() if isinstance(value, float) and not math.isnan(value)]
        assert numbers
        for key in numbers:
            assert found["results"][task][key] == pytest.approx(scores[key], rel=1e-5), (task, key)
        samples = zip(by_document(found["samples"][task]), by_document(expected["samples"][task]), strict=True)
        for sample, wanted in samples:
            assert sample["doc_id"] == wanted["doc_id"] and sample["doc"] == wanted["doc"]
            # With replicas lm-eval asks some of them the last request again, to make their numbers equal.
            first = [[answers[0]] for answers in sample["resps"]]
            for answer, right in zip(flat(first), flat(wanted["resps"]), strict=True):
                if isinstance(right, (str, bool)):
                    assert answer == right
                else:
                    # `hf` sums a text in float32, whose grain is 1.2e-4 beyond 1024.
                    assert answer == pytest.approx(right, abs=TOLERANCE, rel=2**-22), (task, sample["doc_id"])


def by_document(samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(samples, key=lambda sample: sample["doc_id"])


def flat(answers: Any) -> list[Any]:
    """Texts, log-probabilities and flags in order; in a file lm-eval writes some of them as text."""
    if isinstance(answers, (list, tuple)):
        return [value for answer in answers for value in flat(answer)]
    written = isinstance(answers, str) and (
        answers in ("True", "False") or answers.lstrip("-").replace(".", "").isdigit()
    )
    return [json.loads(answers.lower()) if written else answers]


def test_one_process_gives_the_scores_and_likelihoods_of_lm_evals_own_model(reference: dict[str, Any]) -> None:
    assert reference["results"]["recall_choice"]["acc,none"] == 1
    assert_same(evaluate("cpinfer", config="configs/single.json", max_length=MAX_LENGTH, block_size=4), reference)


def tokenizer_of(kind: str) -> Any:
    """The model's own, which adds nothing, or one that begins every text with a token of its own."""
    plain = load_tokenizer(MODEL)
    assert plain is not None
    if kind == "plain":
        return plain
    backend = Tokenizer.from_str(plain.backend_tokenizer.to_str())
    backend.post_processor = TemplateProcessing(single="<pad> $A", special_tokens=[("<pad>", plain.pad_token_id)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<pad>", eos_token=";", pad_token="<pad>")


@pytest.fixture(scope="module")
def engine() -> Iterator[cpinfer.Engine]:
    # The engine's own tokenizer reads stop strings; it decodes as the others do.
    config = parse_config({"dtype": "float32", "block_size": 4})
    with cpinfer.attach(load_model(MODEL, torch.float32), None, config, tokenizer=load_tokenizer(MODEL)) as engine:
        yield engine


def models(engine: cpinfer.Engine, tokenizer: Any, max_length: int = 96, **args: Any) -> tuple[CpinferLM, HFLM]:
    args = {"max_length": max_length, **args}
    theirs = HFLM(load_model(MODEL, torch.float32), tokenizer=tokenizer, batch_size=1, **args)
    return CpinferLM(engine, cpinfer.Topology.single(), tokenizer, **args), theirs


def requests(kind: str, all_args: Sequence[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=args, idx=i) for i, args in enumerate(all_args)]  # type: ignore[arg-type]


def prompts() -> list[str]:
    lines = Path("configs/recall-tiny-prompts.jsonl").read_text(encoding="utf-8").splitlines()
    return sorted((json.loads(line)["prompt"] for line in lines), key=len)


SHORT = "Remember: Amos keeps lanterns; Remember: Tomas owns clocks; Recall: Amos"
VARIANTS = [("plain", None), ("plain", True), ("with_bos", None), ("with_bos", False), ("with_bos", True)]


@pytest.mark.parametrize(("kind", "add_bos_token"), VARIANTS)
def test_texts_are_read_scored_and_cut_as_by_lm_evals_own_model(
    kind: str, add_bos_token: bool | None, engine: cpinfer.Engine
) -> None:
    ours, theirs = models(engine, tokenizer_of(kind), add_bos_token=add_bos_token)
    long = prompts()[6]
    pairs = [
        (SHORT, " keeps lanterns;"),
        (SHORT, " owns clocks;"),
        (SHORT + " ", "keeps lanterns"),
        ("", "Remember: Amos"),
        ("", "<pad>Remember: Amos"),
        ("<pad>" + SHORT, " keeps"),
        (long, " keeps lanterns;"),
        (long, " owns"),
        (SHORT, " keeps lanterns;"),
    ]
    for found, wanted in zip(
        ours.loglikelihood(requests("loglikelihood", pairs)),
        theirs.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True),
        strict=True,
    ):
        assert found[0] == pytest.approx(wanted[0], abs=TOLERANCE) and found[1] == wanted[1]
    texts = [(SHORT,), (long,), ("",), ("<pad>" + SHORT,)]
    totals = [model.loglikelihood_rolling(requests("loglikelihood_rolling", texts)) for model in (ours, theirs)]
    assert totals[0] == pytest.approx(totals[1], abs=TOLERANCE)
    contexts = [
        (SHORT, {"until": ["\n"], "max_gen_toks": 8}),
        (SHORT, {"until": " lanterns", "max_gen_toks": 8}),
        (SHORT, {"until": ["s la", "clocks"], "max_gen_toks": 8}),
        (SHORT, {"until": [";"], "max_new_tokens": 8}),
        (SHORT, {"until": [], "max_gen_toks": 1, "do_sample": False, "temperature": 0.7}),
        (long, {"until": ["\n"], "max_gen_toks": 60}),
        ("The wild garden", {"until": ["\n\n"], "max_gen_toks": 20}),
        ("<pad>" + SHORT, {"max_gen_toks": 4}),
    ]
    assert ours.generate_until(requests("generate_until", contexts)) == theirs.generate_until(
        requests("generate_until", contexts), disable_tqdm=True
    )


def test_chats_are_written_as_by_lm_evals_own_model(engine: cpinfer.Engine) -> None:
    ours, theirs = models(engine, tokenizer_of("plain"))
    chat = [
        {"role": "system", "content": "Remember: Amos keeps lanterns;"},
        {"role": "user", "content": "Recall: Amos"},
    ]
    assert ours.apply_chat_template(chat) == theirs.apply_chat_template(chat)
    open_end = [*chat, {"role": "assistant", "content": "keeps"}]
    assert ours.apply_chat_template(open_end, False) == theirs.apply_chat_template(open_end, False)
    assert ours.tokenizer_name == theirs.tokenizer_name
    assert ours.chat_template(True) == theirs.chat_template(True)
    ours.tokenizer.chat_template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}X"
    assert ours.apply_chat_template(chat) == theirs.apply_chat_template(chat) == "X"


def test_samples_of_one_prompt_differ_and_do_not_depend_on_company(engine: cpinfer.Engine) -> None:
    ours, _ = models(engine, tokenizer_of("plain"))
    sampled = ("The wild garden", {"do_sample": True, "temperature": 2.0, "top_k": 50, "max_gen_toks": 6})
    first = ours.generate_until(requests("generate_until", [sampled, sampled, (SHORT, {"max_gen_toks": 2})]))
    assert first[0] != first[1]
    assert ours.generate_until(requests("generate_until", [sampled])) == first[:1]


def test_choices_of_a_question_share_its_prefill_in_calls_that_the_pool_holds(
    engine: cpinfer.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, _ = models(engine, tokenizer_of("plain"))
    calls = []
    score = engine.score
    monkeypatch.setattr(engine, "score", lambda pairs: calls.append(pairs) or score(pairs))
    small = replace(engine._needs.pool_size, num_blocks=12)  # 48 tokens
    monkeypatch.setattr(engine, "_needs", replace(engine._needs, pool_size=small))
    pairs = [(context, choice) for context in (SHORT, "a" + SHORT, "Recall: Amos") for choice in (" keeps", " owns")]
    ours.loglikelihood(requests("loglikelihood", pairs[::-1]))
    assert [len({tuple(context) for context, _ in call}) for call in calls] == [2, 1]
    lengths = [len(context) for call in calls for context, _ in call]
    assert lengths == sorted(lengths, reverse=True) and len(lengths) == 6


def test_what_cannot_be_done_is_refused_by_name(engine: cpinfer.Engine, tmp_path: Path) -> None:
    ours, _ = models(engine, tokenizer_of("plain"))
    for gen_kwargs, complaint in (
        ({"num_beams": 4}, r"generation arguments \['num_beams'\] are not known; known are temperature"),
        ({"max_gen_toks": 96}, "max_gen_toks=96 leaves no room for a prompt; max_length=96 must be larger"),
    ):
        with pytest.raises(cpinfer.UserError, match=complaint):
            ours.generate_until(requests("generate_until", [(SHORT, gen_kwargs)]))
    with pytest.raises(cpinfer.UserError, match="a continuation has 200 tokens, max_length=96"):
        ours.loglikelihood(requests("loglikelihood", [(SHORT, ";" * 200)]))
    with pytest.raises(cpinfer.UserError, match="max_length=40000 was asked for; the model has 32768 positions"):
        models(engine, tokenizer_of("plain"), max_length=40000)
    (tmp_path / "config.json").write_text(Path(MODEL, "config.json").read_text(encoding="utf-8"), encoding="utf-8")
    for model_args, complaint in (
        ("dtype=float32", "no model is named; give --model_args config=FILE"),
        (f"pretrained={MODEL},blok_size=4", 'unknown key "blok_size"; the nearest known key is "block_size"'),
        (f"pretrained={MODEL},max_length=32769", "max_length=32769 was asked for.* Lower it, or raise max_model_len"),
        (f"pretrained={MODEL},generation_config=yes", '"generation_config" is "yes"; it must be "ignore" or "model"'),
        (f"pretrained={MODEL},dtype=auto", '"dtype" is "auto"; one of "float32"'),
        ("config=configs/pcp2.json", "1 process.* were started, the layout needs a multiple of 2"),
        (f"pretrained={tmp_path}", "has no tokenizer; lm-eval's tasks are text"),
    ):
        with pytest.raises(cpinfer.UserError, match=complaint):
            CpinferLM.create_from_arg_string(model_args)


def test_ranks_that_are_asked_for_different_things_say_so_instead_of_waiting() -> None:
    model, tokenizer = load_model(MODEL, torch.float32), load_tokenizer(MODEL)
    config = parse_config({"dtype": "float32", "prefill_context_parallel_size": 2})

    def body(topology: cpinfer.Topology) -> str:
        with cpinfer.attach(copy.deepcopy(model), topology, config, tokenizer=tokenizer) as engine:
            asked = requests("loglikelihood", [(SHORT, " keeps")] * (1 + topology.rank))
            with pytest.raises(RuntimeError, match=r"different loglikelihood requests.*use_cache") as caught:
                CpinferLM(engine, topology, tokenizer).loglikelihood(asked)
            return str(caught.value)

    assert all("on rank" in complaint for complaint in run_ranks(RankGrid(1, 2, 2), body))


@pytest.mark.parametrize(
    "answer",
    [
        "7 + 5 = 12. #### 12", "#### 12.", "#### 12..", "#### 1,200", "#### -3 or #### 12", "#### 12\nNo, 13.",
        "####12", "It is $1,200.", "It is 12", "It is 12...", "It is 12..", "so 5, then 12 .. ", "12$", "-12", "--12",
        "3-12", "1/12", "12 , 13", "12.0", "$.12", "..", "none", "", "12\n",
    ],
)  # fmt: skip
@pytest.mark.parametrize("truth", ["so 10 + 2 = <<10+2=12>>12\n#### 12", "#### 1,200"])
def test_gsm8k_is_scored_as_lm_eval_scores_it(answer: str, truth: str) -> None:
    settings = yaml.safe_load(GSM8K.read_text(encoding="utf-8"))
    [match] = settings["metric_list"]
    options = {key: match[key] for key in ("regexes_to_ignore", "ignore_case", "ignore_punctuation")}
    reference = strict_answer(truth)
    assert reference is not None
    for filters, metric in zip(settings["filter_list"], ("exact_match_strict", "exact_match_flexible"), strict=True):
        extract = {key: value for key, value in filters["filter"][0].items() if key != "function"}
        [[found]] = RegexFilter(**extract).apply([[answer]], [{}])
        wanted = exact_match_fn(predictions=[found], references=[truth], **options)["exact_match"]
        assert METRICS[metric](answer, [reference]) == wanted, (metric, found)
    assert set(settings["generation_kwargs"]["until"]) == set(GSM8K_STOP)


@pytest.mark.parametrize(
    "argv, seconds",
    [
        (["--model_args", "config=configs/pcp2.json,collective_timeout_s=33,max_length=90", "--tasks", "t"], 33),
        (["run", "-a", f"pretrained={MODEL}", "collective_timeout_s=5"], 5),
        (["--model_args", "config=configs/pcp2.json"], JobConfig.collective_timeout_s),
        (["--model_args", "config=no-such-file.json"], JobConfig.collective_timeout_s),  # who parses it will say so
        ([], JobConfig.collective_timeout_s),
    ],
)
def test_collectives_wait_as_long_as_the_model_arguments_say(argv: list[str], seconds: float) -> None:
    assert _timeout_s(["lm_eval", *argv]) == seconds


def arguments(model_args: str, output: Path) -> list[str]:
    of_the_model = ["--model", "cpinfer", "--model_args", f"{model_args},max_length={MAX_LENGTH}"]
    of_the_tasks = ["--include_path", INCLUDE, "--tasks", ",".join(TASKS)]
    return [*of_the_model, *of_the_tasks, "--output_path", str(output), "--log_samples"]


def written(output: Path) -> dict[str, Any]:
    """What lm-eval wrote, once."""
    [results] = output.rglob("results_*.json")
    samples = {}
    for task in TASKS:
        [file] = output.rglob(f"samples_{task}_*.jsonl")
        samples[task] = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return {"results": json.loads(results.read_text(encoding="utf-8"))["results"], "samples": samples}


def check_cli(
    command: Sequence[str], output: Path, reference: dict[str, Any], timeout_s: float = 110, **env: str
) -> None:
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_DATASETS_CACHE": str(output / "datasets")}
    finished = launch(command, timeout_s=timeout_s, env={**offline, **env})
    assert finished.returncode == 0, finished
    assert finished.stdout.count("|recall_choice") == 1, finished
    assert_same(written(output), reference)


def test_two_ranks_of_one_replica_see_all_documents_and_write_once(reference: dict[str, Any], tmp_path: Path) -> None:
    model_args = "config=configs/pcp2.json,decode_context_parallel_size=2,block_size=4"
    check_cli(torchrun(2, "-m", MODULE, *arguments(model_args, tmp_path)), tmp_path, reference)


@pytest.mark.slow
def test_two_replicas_share_the_documents(reference: dict[str, Any], tmp_path: Path) -> None:
    command = accelerate(2, "-m", MODULE, *arguments("config=configs/single.json", tmp_path))
    check_cli(command, tmp_path, reference, ACCELERATE_USE_CPU="true")


@pytest.mark.slow
@pytest.mark.timeout(300)  # four processes, each with DeepSpeed, on what may be two cores
def test_two_replicas_of_two_ranks_under_deepspeed(reference: dict[str, Any], tmp_path: Path) -> None:
    model_args = f"pretrained={MODEL},dtype=float32,tensor_parallel.tp_size=2"
    check_cli(deepspeed(4, "--module", MODULE, *arguments(model_args, tmp_path)), tmp_path, reference, 280)


@pytest.mark.slow
def test_the_command_on_one_process(reference: dict[str, Any], tmp_path: Path) -> None:
    check_cli([sys.executable, "-m", MODULE, *arguments("config=configs/single.json", tmp_path)], tmp_path, reference)


@pytest.mark.slow
def test_a_document_that_another_replica_refuses_is_named(tmp_path: Path) -> None:
    task = yaml.safe_load(Path(INCLUDE, "recall_generate.yaml").read_text(encoding="utf-8"))
    documents = tmp_path / "documents.jsonl"
    documents.write_text("".join(json.dumps({"prompt": text, "answer": "x"}) + "\n" for text in (SHORT, "")))
    task.update(task="half_empty", dataset_kwargs={"data_files": {"test": str(documents)}})
    (tmp_path / "half_empty.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
    of_the_task = ["--include_path", str(tmp_path), "--tasks", "half_empty"]
    of_the_model = ["--model", "cpinfer", "--model_args", f"config=configs/single.json,max_length={MAX_LENGTH}"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "datasets")}
    finished = launch(torchrun(2, "-m", MODULE, *of_the_model, *of_the_task), timeout_s=110, env=offline)
    assert finished.returncode != 0
    assert finished.stderr.count("lm_eval: task half_empty, document 1: the prompt is empty") == 1, finished
