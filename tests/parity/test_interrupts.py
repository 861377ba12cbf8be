"""An interrupt may come anywhere: it is what the caller sees, and the engine goes on as if nothing had been.

Interrupts are raised at seeded places of a call, counted in lines of the engine and of the layout floor.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import cpinfer
from cpinfer.config import SamplingParams, parse_config
from cpinfer.engine.engine import Engine
from tiny_models import FAMILIES, TINY, make_model, prompts_of

ROOT = Path(cpinfer.__file__).parent
ANYWHERE = (str(ROOT / "engine"), str(ROOT / "layout"), str(ROOT / "kv_cache"))
# Where blocks are taken, and written down.
BOOKKEEPING = tuple(
    str(ROOT / name)
    for name in (
        "engine/scheduler.py",
        "engine/request.py",
        "kv_cache/home.py",
        "kv_cache/block_pool.py",
        "kv_cache/free_block_tree.py",
        "kv_cache/prefix_cache.py",
    )
)
# A tight pool and few tokens at once: chunks, forks with blocks to copy, preemption, evicted prefixes.
CONFIG = parse_config(
    {"dtype": "float32", "block_size": 4, "kv_cache_gib": 2**-18, "max_num_seqs": 4, "max_num_batched_tokens": 12}
)
SAMPLING = SamplingParams(temperature=0, max_new_tokens=8, n=2)
PROMPTS = prompts_of((9, 6, 14), vocab_size=128)


class Interrupter:
    """Raises KeyboardInterrupt in the `at`-th line that runs in files of these places; counts them."""

    def __init__(self, places: tuple[str, ...], at: int | None = None) -> None:
        self.places, self.at, self.num_lines = places, at, 0
        self.where = "nowhere"

    def interrupts(self, call: Callable[[], Any]) -> bool:
        """Whether the interrupt came before the call had ended; it is then what the call raises."""
        try:
            self.run(call)
        except KeyboardInterrupt:
            return True
        except BaseException as error:
            raise AssertionError(f"an interrupt at {self.where} was masked") from error
        assert self.where == "nowhere", f"an interrupt at {self.where} was swallowed"
        return False

    def run(self, call: Callable[[], Any]) -> Any:
        before = sys.gettrace()
        sys.settrace(self._enter)
        try:
            return call()
        finally:
            sys.settrace(before)

    def _enter(self, frame: FrameType, event: str, arg: Any) -> Any:
        return self._line if frame.f_code.co_filename.startswith(self.places) else None

    def _line(self, frame: FrameType, event: str, arg: Any) -> Any:
        if event == "line":
            self.num_lines += 1
            if self.num_lines == self.at:
                self.where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
                raise KeyboardInterrupt
        return self._line


def generate(engine: Engine) -> list[tuple[int, ...]]:
    return [result.token_ids for result in engine.generate(PROMPTS, SAMPLING)]


def check_nothing_is_lost(engine: Engine) -> None:
    """Between calls a block is free or remembered."""
    for home in engine._core.homes:
        home.check_integrity([], {})
        assert home.pool.num_free + len(set(home.prefixes.references())) == home.pool.num_blocks


def photograph(model: Any) -> dict[str, Any]:
    """What attaching changes."""
    return {
        "configs": {name: id(vars(module).get("config")) for name, module in model.named_modules()},
        "training": {name: module.training for name, module in model.named_modules()},
        "forwards": {name: vars(module).get("forward") for name, module in model.named_modules()},
        "attention": model.config._attn_implementation,
    }


def one_layer() -> Any:
    return make_model(type(FAMILIES["llama"])(**{**TINY, "num_hidden_layers": 1}))


@pytest.mark.parametrize(
    "places, num_interrupts",
    [
        pytest.param(ANYWHERE, 40, id="anywhere"),
        pytest.param(BOOKKEEPING, 40, id="blocks"),
        pytest.param(ANYWHERE, 400, id="anywhere, often", marks=(pytest.mark.slow, pytest.mark.timeout(600))),
        pytest.param(BOOKKEEPING, 400, id="blocks, often", marks=(pytest.mark.slow, pytest.mark.timeout(600))),
    ],
)
def test_after_an_interrupt_anywhere_the_next_call_is_right(places: tuple[str, ...], num_interrupts: int) -> None:
    model = one_layer()
    model.train()
    before = photograph(model)
    chance = random.Random(num_interrupts)
    with cpinfer.attach(model, config=CONFIG) as engine:
        expected = generate(engine)
        assert engine.stats.num_preemptions > 0
        counter = Interrupter(places)
        assert counter.run(lambda: generate(engine)) == expected
        num_raised = 0
        for _ in range(num_interrupts):
            interrupter = Interrupter(places, chance.randint(1, counter.num_lines))
            num_raised += interrupter.interrupts(lambda: generate(engine))
            if chance.random() < 0.3:
                engine.weights_changed()  # as a trainer would that goes on behind it
            assert generate(engine) == expected, interrupter.where
            check_nothing_is_lost(engine)
    assert num_raised > 0.9 * num_interrupts  # a call that finds more remembered has fewer lines
    assert photograph(model) == before


def test_after_an_interrupt_while_prefixes_are_forgotten_the_next_call_is_right() -> None:
    with cpinfer.attach(one_layer(), config=CONFIG) as engine:
        expected = generate(engine)
        counter = Interrupter(ANYWHERE)
        counter.run(engine.weights_changed)
        for at in range(1, counter.num_lines + 1, 4):
            assert generate(engine) == expected and len(engine._core.homes[0].prefixes) > 0
            Interrupter(ANYWHERE, at).interrupts(engine.weights_changed)
            assert generate(engine) == expected
            engine.weights_changed()
            assert len(engine._core.homes[0].prefixes) == 0
            check_nothing_is_lost(engine)
