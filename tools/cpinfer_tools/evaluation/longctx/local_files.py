"""Tasks from a local JSON Lines file.

    {"prompt": "...", "references": ["..."]}                     or "messages" instead of "prompt"; maybe "metric"
                                                                 and "id", which nobody reads
    {"question": "...", "answer": "... #### 12"}                 gsm8k: the first `num_shots` lines are the examples

gsm8k is asked as lm-eval asks it ("Question: ...\\nAnswer:", examples with their worked answers before it, the answer
ends at the same texts); lm-eval draws its examples from the training split, here they come from the same file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from cpinfer.engine.chats import chat_token_ids
from cpinfer.errors import UserError, quoted, unknown_word
from cpinfer.strict_json import is_unicode, parse_json, read_text
from cpinfer_tools.evaluation.longctx.metrics import METRICS, strict_answer
from cpinfer_tools.evaluation.longctx.tasks import Sample, Task

LINE_KEYS = ("prompt", "messages", "references", "metric", "id")
GSM8K_METRICS = ("exact_match_flexible", "exact_match_strict")
GSM8K_STOP = ("Question:", "</s>", "<|im_end|>")


def read_task_file(
    path: str | Path, tokenizer: Any, max_new_tokens: int, num_samples: int | None = None, num_shots: int = 5
) -> tuple[Task, list[Sample]]:
    """The task that a file holds, named after it, and its first `num_samples` samples (None: all of them).

    UserError, with the line, for anything that is none.
    """
    path = Path(path)
    lines = _read_lines(path)
    metrics: tuple[str, ...]
    is_gsm8k = {"question", "answer"} <= lines[0][1].keys()
    try:
        if is_gsm8k:
            metrics, found = GSM8K_METRICS, _gsm8k(lines, num_shots)
        else:
            metrics, found = _metrics(lines), [_question(number, line, tokenizer) for number, line in lines]
    except UserError as error:
        raise UserError(f"task file {path}, {error}") from error
    stop = GSM8K_STOP if is_gsm8k else ()
    task = Task(path.stem, f"from {path.name}", max_new_tokens, draft=None, metrics=metrics, stop=stop)
    samples = []
    for index, (prompt, references) in enumerate(found[:num_samples]):
        ids = tuple(tokenizer(prompt)["input_ids"]) if isinstance(prompt, str) else prompt
        text = prompt if isinstance(prompt, str) else tokenizer.decode(prompt)
        samples.append(Sample(task.name, 0, index, None, ids, text, references, max_new_tokens))
    return task, samples


Line = tuple[int, Mapping[str, Any]]
Question = tuple[str | tuple[int, ...], tuple[str, ...]]


def _read_lines(path: Path) -> list[Line]:
    try:
        text = read_text(path)
    except (OSError, ValueError) as error:
        raise UserError(f"task file {path}: {getattr(error, 'strerror', None) or error}.") from error
    lines: list[Line] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            data = parse_json(line)
        except UserError as error:
            raise UserError(f"task file {path}, line {number}: {error}") from error
        if not isinstance(data, dict):
            raise UserError(f"task file {path}, line {number}: found {quoted(data)}; an object was wanted.")
        lines.append((number, data))
    if not lines:
        raise UserError(f"task file {path}: the file is empty; one JSON object per line was wanted.")
    return lines


def _question(number: int, line: Mapping[str, Any], tokenizer: Any) -> Question:
    references = line.get("references")
    if not isinstance(references, list) or not references or not all(map(_is_text, references)):
        raise UserError(f'line {number}: "references" is {quoted(references)}; a list of texts was wanted.')
    forms = [form for form in ("prompt", "messages") if form in line]
    if len(forms) != 1:
        keys = quoted(sorted(line), limit=120)
        raise UserError(f"line {number}: found the keys {keys}; exactly one of prompt, messages was wanted.")
    for key in line:
        if key not in LINE_KEYS:
            raise UserError(f"line {number}: {unknown_word('key', key, LINE_KEYS)}")
    given = line[forms[0]]
    if forms[0] == "prompt":
        if not _is_text(given):
            raise UserError(f'line {number}: "prompt" is {quoted(given)}; a text was wanted.')
        return given, tuple(references)
    try:
        return chat_token_ids(given, tokenizer), tuple(references)
    except UserError as error:
        raise type(error)(f"line {number}: {error}") from error


def _is_text(value: Any) -> TypeGuard[str]:
    return isinstance(value, str) and value != "" and is_unicode(value)


def _metrics(lines: Sequence[Line]) -> tuple[str, ...]:
    """The one metric of a file."""
    first = lines[0][1].get("metric", "string_match_all")
    for number, line in lines:
        metric = line.get("metric", "string_match_all")
        if not isinstance(metric, str) or metric not in METRICS:
            raise UserError(f"line {number}: unknown metric {quoted(metric)}; one of {', '.join(METRICS)} was wanted.")
        if metric != first:
            raise UserError(
                f'line {number}: the metric is "{metric}", that of the first line "{first}". Use two files.'
            )
    return (first,)


def _gsm8k(lines: Sequence[Line], num_shots: int) -> list[Question]:
    if len(lines) <= num_shots:
        raise UserError(f"line {lines[-1][0]}: the file ends after {num_shots} examples; questions were wanted too.")
    asked: list[tuple[str, str, str]] = []
    for number, line in lines:
        question, answer = line.get("question"), line.get("answer")
        number_of = strict_answer(answer) if isinstance(answer, str) else None
        if not _is_text(question) or not _is_text(answer) or number_of is None:
            raise UserError(f'line {number}: "question" and an "answer" that ends with "#### number" were wanted.')
        asked.append((question, answer, number_of))
    shots = "".join(f"Question: {question}\nAnswer: {answer}\n\n" for question, answer, _ in asked[:num_shots])
    return [(f"{shots}Question: {question}\nAnswer:", (number_of,)) for question, _, number_of in asked[num_shots:]]
