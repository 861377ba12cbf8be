"""What was reported of other engines, what is so here, and the test that shows it: docs/reference/reports.md.

Every report was read where its address says. Symptoms are in our words, and may be mended there by now.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

# The tests that were written for these reports; others are named where they show the same.
_OWN = "parity/test_public_reports.py::"
_ENGINE = "parity/test_engine_parity.py::"
_FAMILIES = "parity/test_family_parity.py::"
_BEYOND = "parity/test_beyond_positions.py::"
_REQUESTS = "integrations/test_lm_eval_requests.py::"
_QUANTIZED = "unit/test_quantization.py::"
_ATTENTION = "parity/test_attention_parity.py::"
_ADDRESS = re.compile(r"https://github\.com/([\w.-]+/[\w.-]+)/(?:issues|pull)/(\d+)")


@dataclass(frozen=True)
class Report:
    """A public report: its address, what was seen there, what is so here, and `file::function` below tests/."""

    address: str
    symptom: str
    here: str
    test: str

    def __post_init__(self) -> None:
        if not _ADDRESS.fullmatch(self.address):
            raise ValueError(f"{self.address!r} is no address of an issue or a pull request on GitHub")

    @property
    def row(self) -> str:
        """Its line of a Markdown table."""
        found = _ADDRESS.fullmatch(self.address)
        assert found is not None, "an address was checked when it came"
        path, _, function = self.test.partition("::")
        test = f"[{path}](../../tests/{path}) `{function}`"
        return f"| [{found[1]}#{found[2]}]({self.address}) | {self.symptom} | {self.here} | {test} |"


_INTRODUCTION = """\
# What was reported of other engines

Faults that users of other engines met, in our own words, each tried here: where cpinfer had it, the table says so. A
test compares with Transformers, as a rule on one rank and with a prompt and its KV split over two. Many of these are
fixed where they were found. Printed by `make docs` from `tools/dev/public_reports.py`.
"""


def reports_page() -> str:
    """The page: all reports, a Markdown table below the title of each kind."""
    head = "| report | what was seen there | here | shown by |\n|---|---|---|---|"
    tables = ("\n".join([f"## {kind}", "", head, *(r.row for r in rows)]) for kind, rows in REPORTS.items())
    return "\n".join([_INTRODUCTION, *(f"{table}\n" for table in tables)])


def _github(path: str) -> str:
    return f"https://github.com/{path}"


REPORTS: dict[str, tuple[Report, ...]] = {
    "Where an answer ends": (
        Report(
            _github("vllm-project/vllm/issues/2123"),
            "A stop string that is a special token never stops: it is looked for in text that leaves them out.",
            "Was so here too. Stop strings are looked for in text with special tokens; `text` leaves these out.",
            _OWN + "test_a_stop_string_with_a_special_token_ends_the_answer",
        ),
        Report(
            _github("huggingface/text-generation-inference/issues/1039"),
            "A stop string works only where it ends with the end of a token.",
            "It is found wherever it begins and ends; it is cut off the text, and its tokens are kept.",
            _OWN + "test_a_stop_string_may_begin_and_end_within_tokens",
        ),
        Report(
            _github("vllm-project/vllm/pull/3672"),
            "A stop string of several tokens is not cut off the text whole.",
            "It is, also where one character of it takes several tokens.",
            _OWN + "test_characters_of_several_tokens_may_be_stop_strings",
        ),
        Report(
            _github("vllm-project/vllm/pull/3150"),
            "A special token ends an answer, and the text loses as many characters at its end as that token has.",
            "The special token is left out of the text, and nothing else.",
            _OWN + "test_a_special_token_that_ends_an_answer_costs_its_text_no_character",
        ),
        Report(
            _github("exo-explore/exo/pull/1691"),
            "Characters of several tokens come out as replacement characters: each token is decoded alone.",
            "An answer is decoded as a whole, also for stop strings.",
            _OWN + "test_characters_of_several_tokens_come_out_as_the_tokenizer_reads_them",
        ),
        Report(
            _github("vllm-project/vllm/issues/21987"),
            "A stop string ends an answer before its minimum of tokens.",
            "It counts only where a token after the minimum completes it. It cut the text here.",
            _OWN + "test_a_stop_string_before_the_minimum_neither_ends_nor_cuts_an_answer",
        ),
        Report(
            _github("vllm-project/vllm/pull/5849"),
            "Of several end-of-text tokens the minimum holds back one.",
            "All are held back, for as many tokens as by Transformers. It was one token less here.",
            _OWN + "test_no_token_that_ends_an_answer_is_chosen_before_the_minimum",
        ),
        Report(
            _github("NVIDIA/TensorRT-LLM/issues/4776"),
            "Stop tokens of a request end an answer before its minimum, and nothing says which of both wins.",
            "The minimum wins, for the stop tokens of a request as for those of the model.",
            _OWN + "test_no_token_that_ends_an_answer_is_chosen_before_the_minimum",
        ),
        Report(
            _github("huggingface/lighteval/pull/1279"),
            "The tokenizer's end token replaces the model's list, and chats run to the length limit.",
            "The model's list counts (generation_config.json, else config.json), as in Transformers.",
            _OWN + "test_an_answer_ends_at_the_end_tokens_that_the_model_names_and_at_no_other",
        ),
        Report(
            _github("Blaizzy/mlx-vlm/pull/2112"),
            "The model's list lacks the tokenizer's end token, by which its chats end: they run to the length limit.",
            "As in Transformers the list alone counts. A warning says so once, and what to do.",
            "unit/test_input_processor.py::test_an_end_of_text_token_that_the_model_does_not_know_is_said_once",
        ),
    ),
    "Log-probabilities": (
        Report(
            _github("huggingface/trl/issues/4159"),
            "At another temperature than 1 the engine's logprobs are not those that the trainer computes.",
            "A result has both: `logprobs` of the model, `processed_logprobs` of what was drawn from.",
            _OWN + "test_logprobs_are_those_of_the_model_and_processed_ones_those_of_what_is_drawn_from",
        ),
        Report(
            _github("huggingface/trl/issues/6789"),
            "With top_p the engine's logprobs are of the tokens that were left, the trainer's of all.",
            "`kept_mass` is what lies between them, token by token; the kept ids come on request.",
            "parity/test_kept_mass.py::test_processed_logprob_and_kept_mass_give_the_logprob_before_the_cut",
        ),
        Report(
            _github("vllm-project/vllm/issues/3251"),
            "Logprobs of a prompt, of which a prefix is cached, end the run: there are no logits of the cached part.",
            "The whole prompt has logprobs, cached or not.",
            _OWN + "test_logprobs_of_a_prompt_do_not_depend_on_what_is_cached_of_it",
        ),
        Report(
            _github("vllm-project/vllm/pull/42245"),
            "Logprobs of the cached part of a prompt are what earlier requests left in the buffer.",
            "The whole prompt has the logprobs of one forward, also when it comes in chunks.",
            _OWN + "test_logprobs_of_a_prompt_do_not_depend_on_what_is_cached_of_it",
        ),
        Report(
            _github("vllm-project/vllm/issues/10234"),
            "Logprobs with top_k are -inf, which JSON does not have: the request fails.",
            "`logprobs` and `top_logprobs` are of the whole distribution, and finite.",
            _OWN + "test_logprobs_can_be_written_as_json_whatever_may_be_drawn",
        ),
        Report(
            _github("genlm/genlm-backend/pull/66"),
            "A softmax in bfloat16 loses the tail of the distribution.",
            "Logits become float32 first; what is left is the rounding of the model itself.",
            _ENGINE + "test_bfloat16_logprobs_are_as_good_as_those_of_transformers_generate",
        ),
    ),
    "Which tokens are chosen": (
        Report(
            _github("vllm-project/vllm/pull/1424"),
            "The repetition penalty leaves the prompt out, which Transformers counts.",
            "Prompt and answer count.",
            _OWN + "test_a_repetition_penalty_counts_the_prompt_cached_or_not",
        ),
        Report(
            _github("ggml-org/llama.cpp/issues/8971"),
            "The penalty counts the prompt or not, depending on whether the prompt is cached.",
            "It always counts, also when the prompt comes in chunks.",
            _OWN + "test_a_repetition_penalty_counts_the_prompt_cached_or_not",
        ),
        Report(
            _github("vllm-project/vllm/issues/15241"),
            "The temperature of a request is ignored: the model's generation_config.json had set top_k to 1.",
            "Of that file only the end-of-text tokens are read, unless one asks for more.",
            _OWN + "test_a_generation_config_does_not_sample_unasked",
        ),
        Report(
            _github("Blaizzy/mlx-vlm/issues/1331"),
            "Of the generation_config.json nothing but the end-of-text tokens is read, in silence.",
            "So here, by rule; `default_sampling_params()` of an engine and the key `generation_config` read the rest.",
            _OWN + "test_a_generation_config_that_is_asked_for_is_followed",
        ),
        Report(
            _github("EleutherAI/lm-evaluation-harness/issues/3154"),
            "A score is another by engine: one of them leaves out the repetition penalty of generation_config.json.",
            "Asked for, it is followed as by Transformers; what is unknown in it is refused by name.",
            _OWN + "test_a_generation_config_that_is_asked_for_is_followed",
        ),
        Report(
            _github("vllm-project/vllm/issues/10852"),
            "The n samples of a request are identical.",
            "They differ, and a seed draws each of them again, in any batch.",
            _OWN + "test_samples_of_one_call_differ_and_each_is_drawn_again_by_its_seed",
        ),
        Report(
            _github("vllm-project/vllm/issues/6449"),
            "A seed does not reproduce a text when the model is spread over processes: its state is on another one.",
            "A random number is a function of seed, prompt, sample and place; no layout has a say.",
            _ENGINE + "test_sampled_text_does_not_depend_on_layout_or_company",
        ),
    ),
    "The ends of the vocabulary": (
        Report(
            _github("vllm-project/vllm/pull/16529"),
            "A logit bias of a token beyond the vocabulary ends the engine, for all requests.",
            "It is refused before anything runs, and the engine goes on.",
            _OWN + "test_a_token_beyond_the_vocabulary_is_refused_and_the_engine_goes_on",
        ),
        Report(
            _github("sgl-project/sglang/issues/7670"),
            "The same, as an IndexError in the middle of a batch.",
            "It is refused before anything runs, and the engine goes on.",
            _OWN + "test_a_token_beyond_the_vocabulary_is_refused_and_the_engine_goes_on",
        ),
        Report(
            _github("vllm-project/vllm/issues/13175"),
            "In RL the padding of a vocabulary gets likely enough to be drawn; a mask of -inf is the remedy.",
            "A hook on the head may mask by -inf. It was taken for a fault of the model here.",
            _OWN + "test_tokens_of_a_padded_vocabulary_may_be_masked_by_minus_infinity",
        ),
        Report(
            _github("pegainfer-project/pegainfer/issues/673"),
            "A token of the padding is drawn, and the request fails, where Transformers decodes it to nothing.",
            "The text is what Transformers decodes.",
            _OWN + "test_a_token_that_the_tokenizer_does_not_know_is_text_as_transformers_decodes_it",
        ),
    ),
    "Caches and schedules": (
        Report(
            _github("tenstorrent/vllm/issues/415"),
            "A cached prefix gives another answer than the same prompt computed anew.",
            "The same tokens and logprobs.",
            _FAMILIES + "test_what_is_reused_of_a_prefix_is_what_was_computed",
        ),
        Report(
            _github("ovg-project/kvcached/issues/446"),
            "The same with sliding windows alone.",
            "The same tokens and logprobs for every family, those with windows among them.",
            _FAMILIES + "test_what_is_reused_of_a_prefix_is_what_was_computed",
        ),
        Report(
            _github("vllm-project/vllm/issues/26042"),
            "Latent attention with prompts in chunks loses a third of a benchmark's score.",
            "The same tokens and logprobs for every family, in chunks that end within blocks.",
            _FAMILIES + "test_prompts_may_come_in_chunks",
        ),
        Report(
            _github("lablup/mlxcel/issues/678"),
            "Prompts in chunks spoil the cache of sliding windows; answers end in padding.",
            "The same tokens and logprobs for every family, in chunks longer than the window.",
            _FAMILIES + "test_prompts_may_come_in_chunks",
        ),
        Report(
            _github("vllm-project/vllm/issues/16832"),
            "A request that was preempted and computed again gives an incomplete answer.",
            "It gives the answer that it gives undisturbed.",
            _FAMILIES + "test_a_tight_pool_preempts_and_changes_no_answer",
        ),
        Report(
            _github("InternLM/lmdeploy/issues/4917"),
            "After an update of the weights cached prefixes of the old ones are reused.",
            "`weights_changed()` forgets them; a rollout phase begins with none.",
            _OWN + "test_after_new_weights_nothing_of_the_old_ones_is_reused",
        ),
        Report(
            _github("vllm-project/vllm/issues/17103"),
            "After sleep and wake-up answers make no sense: prefixes are found whose KV is gone.",
            "What sleeps forgets its prefixes; the same prompt has the same answer afterwards.",
            _ENGINE + "test_asleep_the_pool_is_freed_and_awake_it_is_back",
        ),
    ),
    "Several ranks": (
        Report(
            _github("vllm-project/vllm/issues/41623"),
            "With decode context parallelism answers drift, and end as gibberish.",
            "Greedy tokens are those of Transformers and logprobs agree to 1e-4, on 1 to 4 KV shards.",
            _ENGINE + "test_greedy_tokens_and_logprobs_equal_transformers",
        ),
        Report(
            _github("vllm-project/vllm/pull/47079"),
            "Partial attention is merged by log-sum-exps of two bases.",
            "They are natural logarithms everywhere; a backend with another base fails this test, and at the start.",
            _ATTENTION + "test_an_lse_in_base_2_fails",
        ),
        Report(
            _github("vllm-project/vllm-ascend/pull/5647"),
            "With prefill context parallelism chunks write to slots that an earlier call left in a buffer.",
            "No text depends on chunks, shards, homes or preemption.",
            _ENGINE + "test_text_does_not_depend_on_chunks_prefixes_homes_or_preemption",
        ),
        Report(
            _github("vllm-project/vllm/issues/43962"),
            "Tensor parallelism over 2 or 4 ranks answers wrongly, in silence.",
            "The same tokens and logprobs for every family, also where KV heads are copied or mixed.",
            _FAMILIES + "test_greedy_tokens_and_logprobs_equal_transformers",
        ),
    ),
    "Positions and windows": (
        Report(
            _github("vllm-project/vllm/issues/49795"),
            "A config names a window that none of its layers has; all of them get it, and forget what lies beyond.",
            "A layer has the window of its kind of layer.",
            _OWN + "test_a_window_that_no_layer_has_hides_nothing",
        ),
        Report(
            _github("vllm-project/vllm/issues/2064"),
            "Prompts longer than the sliding window give nonsense.",
            "The same tokens and logprobs as Transformers at six times the window.",
            _FAMILIES + "test_greedy_tokens_and_logprobs_equal_transformers",
        ),
        Report(
            _github("vllm-project/vllm/issues/2518"),
            "RoPE is scaled by the `dynamic` kind, and prompts still end at the positions that the model had before.",
            "They end there, with the reason: beyond, Transformers' own answers differ with the way that led there.",
            _BEYOND + "test_dynamic_is_refused_beyond_them_because_no_two_ways_of_transformers_agree",
        ),
        Report(
            _github("vllm-project/vllm/issues/2565"),
            "The engine does not go beyond the config's maximum, though the model is known to.",
            "Was so here too. `max_model_len` goes beyond it, as exact as before; yarn does by itself.",
            _BEYOND + "test_tokens_and_logprobs_equal_transformers",
        ),
        Report(
            _github("vllm-project/vllm/pull/56446"),
            "A maximum that has yarn's factor in it is multiplied by it again: there are no such positions.",
            "The factor multiplies the original length alone.",
            "unit/test_positions.py::test_a_maximum_that_has_the_factor_in_it_already_stays",
        ),
        Report(
            _github("huggingface/open-r1/issues/645"),
            "Prompts that are too long are passed over with a warning while training goes on.",
            "They are refused by name, with the numbers, before anything runs.",
            "unit/test_prompts.py::test_a_prompt_needs_one_position_for_an_answer",
        ),
    ),
    "Chats, evaluation, loading": (
        Report(
            _github("sgl-project/sglang/pull/888"),
            "A chat gets two BOS tokens: one from its template, one from the tokenizer.",
            "It gets the template's.",
            _OWN + "test_a_template_that_writes_the_first_token_gets_no_second_one",
        ),
        Report(
            _github("lang-uk/ukrainian-llm-leaderboard/issues/5"),
            "The same in lm-eval with a chat template.",
            "A context that begins with BOS gets no second one, as with lm-eval's `hf`.",
            "integrations/test_lm_eval.py::test_texts_are_read_scored_and_cut_as_by_lm_evals_own_model",
        ),
        Report(
            _github("EleutherAI/lm-evaluation-harness/issues/1297"),
            "A choice whose text makes one token with the end of its context has none of its own, and ends the run.",
            "Was so here too. It is certain, as lm-eval's `hf` has it beside other choices.",
            _REQUESTS + "test_a_choice_without_a_token_of_its_own_is_certain_as_to_lm_evals_own_model",
        ),
        Report(
            _github("mlfoundations/evalchemy/pull/125"),
            "Repeats of a question are whole evaluations, one after the other.",
            "They are samples of one prompt, which is computed once.",
            _REQUESTS + "test_repeats_of_a_prompt_are_samples_of_one_prefill",
        ),
        Report(
            _github("ml-explore/mlx-examples/issues/1195"),
            "Messages whose content comes in parts fail in templates that expect text.",
            "Such a template gets one text, its parts joined by newlines. They became a Python repr here.",
            _OWN + "test_text_in_parts_is_the_text",
        ),
        Report(
            _github("Blaizzy/mlx-vlm/pull/1137"),
            "Of several parts of text all but the last are dropped.",
            "All of them count.",
            _OWN + "test_text_in_parts_is_the_text",
        ),
        Report(
            _github("huggingface/transformers/pull/33198"),
            "An assistant's message at the end of a chat is closed, and another one begun.",
            "It is continued. It was closed here.",
            _OWN + "test_an_assistant_message_at_the_end_is_continued",
        ),
        Report(
            _github("ggml-org/llama.cpp/issues/14353"),
            "Such a message is continued only where its content is no list of parts.",
            "It is continued in either form.",
            _OWN + "test_an_assistant_message_at_the_end_is_continued",
        ),
        Report(
            _github("sgl-project/sglang/issues/7089"),
            "A model's thinking is to be switched off, and no switch is found but words in the prompt.",
            "`chat_template_kwargs` of a prompt reach its template; one that the template does not read is refused.",
            "unit/test_chats.py::test_what_else_a_template_reads_it_is_given",
        ),
        Report(
            _github("EleutherAI/lm-evaluation-harness/issues/2880"),
            "A text as long as the model's positions cannot be scored: the engine wants room for one token more.",
            "It is scored to its last token.",
            "parity/test_score_parity.py::test_a_text_that_fills_every_position_is_scored_to_its_last_token",
        ),
        Report(
            _github("tenstorrent/tt-forge-models/pull/443"),
            "A checkpoint in mxfp4 is loaded as if it were not: its experts are random numbers.",
            "Was refused here. Checkpoints in mxfp4 and fp8 are dequantized as they load.",
            _QUANTIZED + "test_a_quantized_checkpoint_is_the_plain_one_that_it_stands_for_and_can_be_saved_as_that",
        ),
        Report(
            _github("NVIDIA/TensorRT-Model-Connect/pull/1115"),
            "Weights in fp8 are read without their scales, and nothing tells them from real ones.",
            "Each has its scales, or is refused by name.",
            _QUANTIZED + "test_files_that_are_not_quantized_as_the_config_says_are_refused_by_name",
        ),
        Report(
            _github("neuralmagic/deepsparse/pull/474"),
            "A tokenizer_config.json alone passes for a tokenizer, and fails later in words that say nothing of it.",
            "It passed here too, with garbage for tokens. It is refused, with the files that are there.",
            "unit/test_tokenizer_files.py::test_a_tokenizer_without_its_vocabulary_is_refused_with_the_files_that_are_there",
        ),
        Report(
            _github("huggingface/transformers/issues/45399"),
            "A model whose attention is to be FlashAttention does not load where that is not installed.",
            "Attention is the engine's own; what a config asks for is not looked at.",
            _OWN + "test_attention_that_is_not_installed_is_not_missed",
        ),
    ),
}
