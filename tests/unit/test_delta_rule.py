"""The gated delta rule over pieces equals the rule over the whole sequence, token by token, in float64."""

import pytest
import torch

from cpinfer.ops.delta_rule import DeltaTokens, advance, convolve_pieces, read_past, run_pieces
from reference_delta_rule import delta_rule as rule

G, H, K, V, W = 2, 4, 5, 3, 4


def random_tokens(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(n, h, d, generator=generator).double() for h, d in ((G, K), (G, K), (H, V)))
    g = -torch.rand(n, H, generator=generator).double()
    return DeltaTokens(q, k, v, g, torch.rand(n, H, generator=generator).double())


def whole(tokens, start):
    out, end = rule(
        *(x[None] for x in (tokens.q, tokens.k, tokens.v)),
        g=tokens.g[None],
        beta=tokens.beta[None],
        initial_state=start[None],
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )
    return out[0], end[0]


def composed(tokens, lens, start, *, order=None):
    """Output and end state by pieces of which no one knows its start but the first."""
    found = run_pieces(rule, tokens, lens, [start, *[None] * (len(lens) - 1)])
    state, before = None, []
    for i in order or range(len(lens)):
        before.append(state)
        state = advance(state, found.ends[i], found.maps[i])
    out, first = found.out.clone(), 0
    for length, read, past in zip(lens, found.reads, before, strict=True):
        if read is not None:
            out[first : first + length] += read_past(read, past)
        first += length
    return out, state


@pytest.mark.parametrize("lens", [[9], [4, 5], [1, 1, 1], [1, 8, 64, 2], [65, 1, 130, 3, 3], [63, 64, 65]])
@pytest.mark.parametrize("fresh", [True, False])
def test_pieces_at_any_cut_compose_to_the_whole_sequence(lens, fresh):
    tokens = random_tokens(sum(lens))
    start = torch.zeros(H, K, V).double() if fresh else torch.randn(H, K, V, generator=torch.manual_seed(1)).double()
    out, end = composed(tokens, lens, start)
    want, want_end = whole(tokens, start)
    torch.testing.assert_close(out, want, atol=1e-12, rtol=0)
    torch.testing.assert_close(end, want_end, atol=1e-12, rtol=0)


def test_pieces_composed_in_another_order_are_not_the_sequence():
    tokens, start = random_tokens(30), torch.zeros(H, K, V).double()
    _, end = composed(tokens, [6, 9, 15], start, order=[0, 2, 1])
    assert (end - whole(tokens, start)[1]).abs().max() > 1e-2


def test_pieces_of_several_sequences_do_not_meet():
    lens, starts = [3, 70, 5, 1], [torch.randn(H, K, V, generator=torch.manual_seed(i)).double() for i in range(4)]
    tokens = random_tokens(sum(lens))
    found = run_pieces(rule, tokens, lens, starts)
    first = 0
    for i, length in enumerate(lens):
        part = DeltaTokens(*(getattr(tokens, x)[first : first + length] for x in ("q", "k", "v", "g", "beta")))
        want, want_end = whole(part, starts[i])
        torch.testing.assert_close(found.out[first : first + length], want, atol=1e-12, rtol=0)
        torch.testing.assert_close(found.ends[i], want_end, atol=1e-12, rtol=0)
        assert found.maps[i] is None
        assert found.reads[i] is None
        first += length


def test_pieces_of_as_many_chunks_are_one_call_of_the_rule():
    calls = []

    def counted(*args, **kwargs):
        calls.append(args[0].shape[:2])
        return rule(*args, **kwargs)

    lens = [3, 64, 65, 1, 100]
    run_pieces(counted, random_tokens(sum(lens)), lens, [torch.zeros(H, K, V).double()] * 4 + [None])
    assert sorted(calls) == [(1, 65), (1, 100), (3, 64)]


def test_no_pieces_are_no_call():
    found = run_pieces(rule, random_tokens(0), [], [])
    assert found.out.shape == (0, H, V)
    assert found.ends == []


def causal(weight):
    """A convolution of each channel over its last inputs, zeros before the first."""
    return lambda x: torch.nn.functional.conv1d(x, weight[:, None], padding=W - 1, groups=len(weight))[
        ..., : x.shape[-1]
    ]


@pytest.mark.parametrize("lens", [[10], [1, 2, 3, 4], [7, 1, 2]])
def test_a_convolution_over_pieces_with_the_inputs_before_them_is_that_of_the_whole_sequence(lens):
    generator = torch.Generator().manual_seed(3)
    x, weight = (torch.randn(*s, generator=generator).double() for s in ((10, 6), (6, W)))
    before = torch.cat([x.new_zeros(W - 1, 6), x])
    firsts = [sum(lens[:i]) for i in range(len(lens))]
    tails = torch.stack([before[first : first + W - 1] for first in firsts])
    want = causal(weight)(x.T[None])[0].T
    torch.testing.assert_close(convolve_pieces(causal(weight), x, lens, tails), want, atol=1e-12, rtol=0)
    if len(lens) > 1:  # a dropped tail shows
        tails[1:] = 0
        assert (convolve_pieces(causal(weight), x, lens, tails) - want).abs().max() > 1e-2
