"""The exchanges that there are, by the name that the config's `decode_exchange` has for them.

A new one is a file beside this one and a row here.
"""

from __future__ import annotations

from collections.abc import Mapping

from cpinfer.attention.exchanges.all_to_all import AllToAllExchange
from cpinfer.attention.exchanges.base import StateExchange
from cpinfer.attention.exchanges.reduce_scatter import ReduceScatterExchange
from cpinfer.attention.exchanges.replicated_rows import ReplicatedRowsExchange
from cpinfer.errors import UserError, unknown_word

EXCHANGES: Mapping[str, type[StateExchange]] = {
    "a2a": AllToAllExchange,
    "ag_rs": ReduceScatterExchange,
    "replicate_q": ReplicatedRowsExchange,
}


def decode_exchange(name: str) -> type[StateExchange]:
    """The exchange of decode rows. UserError for a name that no row has."""
    if name not in EXCHANGES:
        raise UserError(unknown_word("decode_exchange", name, EXCHANGES))
    return EXCHANGES[name]


def context_exchange(name: str) -> type[StateExchange]:
    """What the same choice means for the queries of a prefill: they are split over ranks, whatever decode rows are."""
    exchange = decode_exchange(name)
    return AllToAllExchange if exchange.replicates_rows else exchange
