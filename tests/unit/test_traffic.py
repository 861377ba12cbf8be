from cpinfer.layout.capacity import KVLayout, StateLayout
from cpinfer.layout.prefill import zigzag_split
from cpinfer.layout.states import PromptStates, plan_states
from cpinfer.layout.traffic import decode_bytes, decode_collectives, prefill_bytes, prefill_state_bytes


def test_traffic_formulas_are_those_of_the_design():
    S, R, hq, kvl, D, b = 4, 3, 8, 2, 64, 2
    kv = KVLayout(kvl, D, D)
    for sends_new_kv, w in ((False, 0), (True, 2 * kvl)):
        got = decode_bytes(S, R, hq, kv, b, sends_new_kv)
        assert got == ((S - 1) * R * (hq + w) * D * b, (S - 1) * R * hq * (D * b + 4))
        assert got.total == sum(got)
    assert decode_bytes(S, R, hq, kv, b, False, wire_bytes=4).all_to_all == (S - 1) * R * hq * (D * 4 + 4)
    assert decode_bytes(1, R, hq, kv, b, True).total == 0
    assert [decode_collectives(s) for s in (1, 2, 8)] == [0, 2, 2]
    assert prefill_bytes(4, 100, kv, b) == 3 * 100 * 2 * kvl * D * b
    assert prefill_bytes(1, 100, kv, b) == 0


def test_a_latent_travels_as_576_values_in_512_out_and_576_for_keys_and_values_together():
    latent = KVLayout(1, 576, 512, v_is_prefix_of_k=True)
    S, R, hq, b = 8, 2, 16, 2
    assert decode_bytes(S, R, hq, latent, b, False) == (7 * R * hq * 576 * b, 7 * R * hq * (512 * b + 4))
    assert decode_bytes(S, R, hq, latent, b, True).gather == 7 * R * (hq + 1) * 576 * b
    assert prefill_bytes(4, 100, latent, b) == 3 * 100 * 576 * b


def test_states_travel_in_as_many_bytes_for_a_short_prompt_as_for_a_long_one():
    layout = StateLayout(num_layers=3, num_k_heads=2, num_v_heads=4, k_dim=8, v_dim=6, conv_width=4)
    assert layout.num_channels == 2 * 2 * 8 + 4 * 6
    assert layout.bytes_per_sequence("bfloat16") == 3 * (4 * 8 * 6 * 4 + 3 * 56 * 2)
    for n in (1024, 32768):
        plan = plan_states(zigzag_split([n], 2), [PromptStates(None, ())], pcp_rank=0, num_tail=layout.num_tail)
        # A rank has at most two spans, of which one is open.
        assert prefill_state_bytes(2, plan, layout, 2) == 2 * 3 * 56 * 2 + (2 * 4 * 8 * 6 + 1 * 4 * 8 * 8) * 4
        assert prefill_state_bytes(1, plan, layout, 2) == 0
