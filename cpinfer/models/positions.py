"""How many positions a model has: what its kind of RoPE says.

default, llama3, ...   max_position_embeddings; beyond them RoPE goes on, and the model was not made for it
yarn                   factor x original_max_position_embeddings where that is more: published recipes stretch a
                       model to it and leave max_position_embeddings as they are (32,768 x 4)
linear                 the same where the original length is said; else nobody knows whether the maximum has the
                       factor in it
dynamic                max_position_embeddings, and no more: beyond them its frequencies are those of the longest
                       sequence so far, so that K of one sequence would be rotated by several
a table                as many rows as it has
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from cpinfer.errors import UserError
from cpinfer.refusals import refuse


@dataclass(frozen=True)
class Positions:
    """Positions of a model, prompt and answer together.

    Attributes:
        made_for: as many as it was made for.
        ends_by: what makes that the most there can be; None where there may be more.
    """

    made_for: int
    ends_by: Literal["dynamic", "table"] | None = None

    @classmethod
    def of(cls, config: Mapping[str, Any], *, has_table: bool) -> Positions:
        """Those that a config, whose values have been looked at, gives; `has_table`: they are learned, a row each."""
        most: int = config["max_position_embeddings"]
        if has_table:
            return cls(most, "table")
        sets = rope_sets(config)
        if any(_kind(rope) == "dynamic" for rope in sets):
            return cls(most, "dynamic")
        return cls(max([most, *(_stretched(rope) for rope in sets)]))

    def most(self, max_model_len: int | None) -> int:
        """How many there are where so many are asked for, `made_for` by default. UserError where that is too many."""
        if max_model_len is None:
            return self.made_for
        if self.ends_by is not None and max_model_len > self.made_for:
            found = f"max_model_len={max_model_len} for a model of {self.made_for} positions"
            if self.ends_by == "dynamic":
                raise refuse("length_dependent_rope", f'{found} with rope_type "dynamic"')
            raise UserError(f"{found}, which it has learned one by one. Lower max_model_len, or leave it out.")
        return max_model_len


def rope_sets(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The sets of RoPE parameters in a config, whole or as its file has it: one, or one for each kind of layer."""
    rope = config.get("rope_parameters") or config.get("rope_scaling")
    candidates = [rope, *rope.values()] if isinstance(rope, Mapping) else []
    return [inner for inner in candidates if isinstance(inner, Mapping)]


def rope_types(config: Mapping[str, Any]) -> list[Any]:
    """The kind of each set of RoPE parameters."""
    return [_kind(rope) for rope in rope_sets(config)]


def _kind(rope: Mapping[str, Any]) -> Any:
    return rope.get("rope_type", rope.get("type"))


def _stretched(rope: Mapping[str, Any]) -> int:
    """Positions that a set stretches the original ones to; 0 where it does not say, or does no such thing."""
    factor, original = rope.get("factor"), rope.get("original_max_position_embeddings")
    if _kind(rope) not in ("yarn", "linear") or not isinstance(factor, (int, float)) or not isinstance(original, int):
        return 0
    return int(factor * original)
