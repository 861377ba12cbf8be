"""The counter of live memory: what is made, held, viewed and let go."""

import torch
from torch import nn

from live_memory import LiveMemory

KIB = 1024


def kib(n):
    return torch.zeros(n * KIB // 4)


def test_a_tensor_counts_from_its_making_until_nothing_holds_it():
    with LiveMemory() as memory:
        a = kib(4)
        assert memory.live_bytes == 4 * KIB
        b = a + 1
        assert memory.live_bytes == 8 * KIB
        del a
        assert memory.live_bytes == 4 * KIB
        del b
    assert (memory.live_bytes, memory.peak_bytes) == (0, 8 * KIB)


def test_views_and_changes_in_place_take_nothing_and_views_keep_what_they_see():
    before = kib(4)
    with LiveMemory() as memory:
        before[:3].add_(1)
        assert before.view(2, -1).t() is not None
        assert memory.peak_bytes == 0
        part = kib(8)[:2]
        assert memory.live_bytes == 8 * KIB
        del part
        assert memory.live_bytes == 0


def test_scratch_inside_a_module_shows_in_the_peak_alone():
    linear = nn.Linear(64, 1024, bias=False).requires_grad_(False)
    x = torch.ones(1, 64)
    with LiveMemory() as memory:
        y = linear(linear(x)[:, :64])
        assert memory.live_bytes == y.nbytes
    assert y.nbytes < memory.peak_bytes <= 4 * y.nbytes


def test_a_copy_of_a_model_is_caught():
    model = nn.Linear(64, 64)
    with LiveMemory() as memory:
        copies = [x.detach().clone() for x in model.parameters()]
    assert memory.peak_bytes == sum(x.nbytes for x in copies)
