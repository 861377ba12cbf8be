import pytest

from cpinfer.layout.advice import for_long_prompt, for_many_sequences, legal_layouts
from cpinfer.layout.capacity import KVLayout


@pytest.mark.parametrize("kv, dcp", [(8, 2), (4, 2), (2, 4), (1, 8)])
def test_the_published_advice_is_pcp_2_and_all_copies_of_a_head_made_shards(kv, dcp):
    """GQA: tp / num_kv_heads shards per pcp rank; MLA, one head: all tp ranks."""
    best = for_long_prompt(legal_layouts(8, 64, kv, tp_size=4))[0]
    assert best.is_advised
    assert (best.sizes.pcp_size, best.sizes.dcp_size) == (2, dcp)


def test_layouts_that_store_copies_rank_below_those_that_do_not_for_many_sequences():
    order = for_many_sequences(legal_layouts(8, 64, 2))
    totals = [option.total_tokens for option in order]
    assert totals == sorted(totals, reverse=True)
    assert totals[0] == 4 * totals[-1]


def test_mixed_groups_hold_no_longer_sequences_and_come_after_unmixed_ones_of_equal_merit():
    for num_ranks, q, kv in ((8, 64, 8), (8, 64, 2), (12, 12, 2), (12, 12, 3), (16, 64, 4)):
        options = legal_layouts(num_ranks, q, kv)
        assert any(option.is_mixed for option in options)
        for option in (o for o in options if o.is_mixed):
            same = [
                o for o in options if (o.sizes.tp_size, o.grid.pcp_size) == (option.sizes.tp_size, option.grid.pcp_size)
            ]
            rival = max((o for o in same if not o.is_mixed), key=lambda o: o.longest_sequence)
            assert rival.longest_sequence >= option.longest_sequence
            assert rival.sizes.dcp_size == rival.grid.pcp_size * rival.heads.rep
        order = for_long_prompt(options)
        merit = [(-o.grid.ranks_per_replica, -o.longest_sequence, o.is_mixed) for o in order]
        assert merit == sorted(merit)
        assert not order[0].is_mixed and not for_many_sequences(options)[0].is_mixed


def test_what_a_mixed_layout_holds_and_moves_counts_all_heads_of_its_groups():
    (unmixed,) = legal_layouts(4, 8, 2, tp_size=2, pcp_size=2, dcp_size=2)
    (mixed,) = legal_layouts(4, 8, 2, tp_size=2, pcp_size=2, dcp_size=4)
    assert (unmixed.longest_sequence, mixed.longest_sequence) == (2, 2)
    all_reduces = 4 * 8 * 1 / 2
    assert unmixed.prefill_values == (1 * 2 + all_reduces) / 2
    assert mixed.prefill_values == (3 * 2 + all_reduces) / 2
    # Without pcp an unmixed group has new K and V everywhere, a mixed one does not.
    assert legal_layouts(2, 8, 1, tp_size=2, dcp_size=2)[0].decode_values == 1 * 2 * 4 + all_reduces
    assert legal_layouts(2, 8, 2, tp_size=2, dcp_size=2)[0].decode_values == 1 * (2 * 4 + 2) + all_reduces
    assert legal_layouts(2, 8, 2, tp_size=2, dcp_size=2)[0].prefill_values == 1 * 2 + all_reduces


def test_what_a_latent_moves_is_counted_in_its_own_widths():
    latent = KVLayout(1, 576, 512, v_is_prefix_of_k=True)
    (option,) = legal_layouts(8, 128, 1, tp_size=4, pcp_size=2, dcp_size=8, kv_head=latent, hidden_size=7168)
    all_reduces = 4 * 7168 * 3 / 4
    assert option.prefill_values == (576 + all_reduces) / 2
    assert option.decode_values == (7 * (32 * (576 + 512) + 576) + all_reduces) / 2
    # By the widths of heads a latent would be taken for two times one of them.
    (as_heads,) = legal_layouts(8, 128, 1, tp_size=4, pcp_size=2, dcp_size=8)
    assert as_heads.decode_values / as_heads.prefill_values != option.decode_values / option.prefill_values
    # Where no config says how wide a token is, the rotated part of its heads stands for it: 8,192 values here.
    (unknown,) = legal_layouts(8, 128, 1, tp_size=4, pcp_size=2, dcp_size=8, kv_head=latent)
    assert unknown.prefill_values == (576 + 4 * 128 * 64 * 3 / 4) / 2


def test_tp_across_hosts_comes_last_whatever_else_it_has():
    options = legal_layouts(16, 64, 8, ranks_per_host=8)
    for order in (for_long_prompt(options), for_many_sequences(options)):
        assert {o.sizes.tp_size for o in order if o.tp_spans_hosts} == {16}
        assert [o.tp_spans_hosts for o in order] == sorted(o.tp_spans_hosts for o in order)
    assert not any(o.tp_spans_hosts for o in legal_layouts(16, 64, 8))
