from dataclasses import replace

import pytest

from cpinfer.layout.advice import legal_layouts
from cpinfer.layout.capacity import KVLayout, StateLayout
from cpinfer.layout.machines import MACHINES, RUNTIME_BYTES
from cpinfer.layout.planning import PlannedModel, Work, plan_layouts, rank_memory
from cpinfer.layout.step_traffic import ModelSizes

GIB = 2**30
# As large as Llama's 70 billion.
SIZES = ModelSizes(
    num_layers=80,
    hidden_size=8192,
    vocab_size=128_256,
    num_q_heads=64,
    num_kv_heads=8,
    kv_head=KVLayout(1, 128, 128),
    layer_params=80 * 855_638_016,
    windows=(None,) * 80,
)
MODEL = PlannedModel(SIZES, layer_bytes=2 * SIZES.layer_params, other_bytes=4 * 128_256 * 8192, mlp_size=28_672)
H100 = MACHINES["h100"]
WORK = Work(prompt_tokens=32_768, new_tokens=1024, num_sequences=64)


def options(num_gpus, model=MODEL, **sizes):
    return legal_layouts(
        num_gpus,
        model.sizes.num_q_heads,
        model.sizes.num_kv_heads,
        kv_head=model.sizes.kv_head,
        hidden_size=model.sizes.hidden_size,
        ranks_per_host=8,
        **sizes,
    )


def plans(num_gpus, work=WORK, model=MODEL, machine=H100, **sizes):
    return plan_layouts(options(num_gpus, model, **sizes), model, machine, work)


def test_a_whole_replica_of_141_gb_per_rank_does_not_fit_80_gb_and_says_so():
    (plan,) = plans(8, tp_size=1, pcp_size=8, dcp_size=8)
    assert plan.unfit == "does not fit: a GPU would hold 131.4 GiB of weights, and has 74.5 GiB."
    assert plan.seconds is plan.prefill is plan.decode is plan.tokens_per_s is None
    order = [each.unfit is None for each in plans(8)]
    assert order == sorted(order, reverse=True), "what fits comes first"
    assert {each.option.sizes.tp_size for each in plans(8) if each.unfit is None} == {2, 4, 8}


def test_memory_is_all_of_the_gpu_once():
    for plan in plans(16):
        memory = plan.memory
        assert memory.weights + memory.activations + memory.workspace + memory.runtime == memory.kept
        assert memory.kept + memory.kv_pool == memory.gpu == 80_000_000_000
        assert memory.runtime == RUNTIME_BYTES
    (tp8,) = plans(8, tp_size=8, dcp_size=1)
    assert tp8.memory.weights == MODEL.layer_bytes // 8 + MODEL.other_bytes
    # 33,791 tokens in blocks of 16, one KV head of 128 + 128 values in two bytes, 80 layers
    assert tp8.memory.kv_of_sequence == 33_792 * 256 * 2 * 80


def test_a_sequence_that_does_not_fit_alone_fits_over_more_shards():
    work = replace(WORK, prompt_tokens=1_400_000, num_sequences=1)
    found = {plan.option.sizes.dcp_size: plan.unfit for plan in plans(16, work, tp_size=8, pcp_size=2)}
    assert found[1] is not None and "of KV on a rank, where there are" in found[1]
    assert found[2] is None


def test_a_pool_that_is_given_is_the_pool_and_has_to_fit_beside_the_weights():
    (plan,) = plans(8, replace(WORK, kv_cache_gib=20), tp_size=8, dcp_size=1)
    assert plan.memory.kv_pool == 20 * GIB
    assert plan.sequences_at_once == 20 * GIB // plan.memory.kv_of_sequence
    (plan,) = plans(8, replace(WORK, kv_cache_gib=60), tp_size=8, dcp_size=1)
    assert plan.unfit is not None and "a KV pool of 60.0 GiB" in plan.unfit


def test_what_does_not_fit_at_once_is_answered_in_turns_and_told():
    few, many = (plans(8, replace(WORK, num_sequences=n), tp_size=4, pcp_size=2, dcp_size=2)[0] for n in (8, 512))
    assert few.sequences_at_once == 8 and "at once" not in few.reason
    assert many.sequences_at_once < 256 and "the KV pool has room for" in many.reason
    (bound,) = plans(8, replace(WORK, num_sequences=512, max_num_seqs=4), tp_size=4, pcp_size=2, dcp_size=2)
    assert bound.sequences_at_once == 4 and "max_num_seqs allows 4" in bound.reason


def test_the_quickest_layout_has_tp_within_a_host_and_the_slow_network_is_named():
    order = [plan for plan in plans(16) if plan.unfit is None]
    assert [plan.seconds for plan in order] == sorted(plan.seconds or 0 for plan in order)
    assert not order[0].option.tp_spans_hosts
    slow = replace(H100, network_bandwidth=1e9)
    across = next(plan for plan in plans(16, machine=slow) if plan.option.tp_spans_hosts and plan.unfit is None)
    assert "all-reduces over tp, between hosts" in across.reason and "tp spans hosts" in across.reason


def test_a_long_prompt_is_prefilled_sooner_by_more_ranks():
    work = replace(WORK, prompt_tokens=131_072, num_sequences=1)
    one, two = (plans(8 * n, work, tp_size=8, pcp_size=n, dcp_size=n)[0] for n in (1, 2))
    assert one.prefill.seconds > 1.7 * two.prefill.seconds


def test_a_latent_in_shards_holds_more_sequences():
    sizes = replace(
        SIZES,
        num_q_heads=128,
        num_kv_heads=1,
        kv_head=KVLayout(1, 576, 512, v_is_prefix_of_k=True),
        expanded_head=(192, 128),
    )
    model = replace(MODEL, sizes=sizes)
    one, eight = (plans(8, model=model, tp_size=8, dcp_size=dcp)[0] for dcp in (1, 8))
    assert one.memory.kv_of_sequence == 33_792 * 576 * 2 * 80
    assert eight.memory.kv_of_sequence <= one.memory.kv_of_sequence / 8 + 16 * 576 * 2 * 80


def test_states_of_linear_attention_are_divided_over_tp_unless_who_shards_leaves_them_whole():
    states = StateLayout(num_layers=60, num_k_heads=16, num_v_heads=32, k_dim=128, v_dim=128, conv_width=4)
    cut = replace(MODEL, sizes=replace(SIZES, windows=(None,) * 20, states=states))
    whole = replace(cut, sizes=replace(cut.sizes, cuts_states=False))
    one, eight = (plans(8, model=model, tp_size=8, dcp_size=1)[0] for model in (cut, whole))
    size = states.bytes_per_sequence("bfloat16")
    assert eight.memory.kv_of_sequence - one.memory.kv_of_sequence == size - size // 8
    assert one.decode.seconds < eight.decode.seconds and one.prefill.seconds < eight.prefill.seconds


def test_graphs_take_the_hosts_launches_out_of_decode_and_not_out_of_prefill():
    work = replace(WORK, num_sequences=1, prompt_tokens=64)
    eager, graphs = (
        plans(8, replace(work, cuda_graphs=on), tp_size=8, dcp_size=1, dp_size=1)[0] for on in (False, True)
    )
    assert eager.decode.limit == "host" and "decode for the host's launches" in eager.reason
    assert graphs.decode.seconds < eager.decode.seconds and graphs.prefill == eager.prefill


@pytest.mark.parametrize("name", MACHINES)
def test_every_figure_of_a_preset_has_a_source(name):
    machine = MACHINES[name]
    assert {"memory", "flops", "link", "network"} == set(machine.sources)
    assert all("nvidia.com" in source for source in machine.sources.values())
    rates = machine.rates("bfloat16")
    assert rates.product_flops[0][1] < machine.flops_16 and rates.memory_bandwidth < machine.memory_bandwidth
    assert machine.rates("float32").attention_flops < rates.attention_flops


def test_activations_and_buffers_shrink_with_the_tokens_of_a_step():
    (option,) = options(8, tp_size=8, dcp_size=1)
    small, large = (rank_memory(option, MODEL, H100, replace(WORK, step_tokens=n)) for n in (512, 8192))
    assert small.activations < large.activations and small.workspace <= large.workspace
