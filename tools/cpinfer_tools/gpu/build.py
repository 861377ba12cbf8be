"""FlashInfer's kernels for the stages, compiled before any of them begins: what that takes is no part of their time."""

from __future__ import annotations

from collections.abc import Iterable

from cpinfer.attention.backends.base import AttentionNeeds
from cpinfer.attention.backends.flashinfer.backend import chip_of, unfit
from cpinfer.attention.backends.flashinfer.building import build_modules
from cpinfer.attention.backends.flashinfer.kernels import kernel_modules
from cpinfer_tools.gpu.stage import Figure, Found, Setting
from cpinfer_tools.measuring.harness import say


def run(setting: Setting, needs: Iterable[AttentionNeeds]) -> Found:
    """Seconds of each module that was not there. What is refused by name is left out, as the stages leave it out."""
    chip = chip_of(setting.device)
    asked = (kernel_modules(each, chip) for each in needs if unfit(setting.device, each) is None)
    modules = list(dict.fromkeys(module for each in asked for module in each))
    built = list(build_modules(modules, lambda what: say(f"  {what}")))
    compiled = [each for each in built if each.seconds]
    figures = [Figure(f"compiled {each.module}", each.seconds, "s") for each in compiled]
    total_s = sum(each.seconds for each in compiled)
    return Found(tuple(figures), (f"{len(compiled)} of {len(built)} modules compiled, in {total_s:.0f} s",))
