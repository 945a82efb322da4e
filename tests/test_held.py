"""What a measurement of memory says, and that nothing of what was measured stays."""

import gc
import weakref

import pytest
import torch

from funcscope.core.held import peak_bytes, saved_bytes

KEEPS_ITS_OUTPUT = (
    torch.tanh,
    torch.exp,
    torch.sigmoid,
    torch.relu,
    torch.sqrt,
    lambda x: x.softmax(0),
    lambda x: x.log_softmax(0),
)


@pytest.mark.parametrize("operation", KEEPS_ITS_OUTPUT)
@pytest.mark.parametrize("measure", [saved_bytes, peak_bytes])
def test_nothing_of_a_call_outlives_its_measurement(operation, measure):
    """An operation that saves its own result would hold itself, if what is saved were that very tensor."""
    x, made = torch.ones(1000, requires_grad=True), []

    def call():
        middle = operation(2 * x)
        made.append(weakref.ref(middle))
        return middle.sum()

    held = measure(call)
    gc.collect()
    assert made[0]() is None
    assert 4000 <= held <= 12010
    # the graph can be gone through: what is saved is what the operation needs, each storage once
    assert measure(call) == held


def test_storages_count_once_whatever_their_views():
    x = torch.ones(1000, requires_grad=True)
    assert saved_bytes(lambda: (x.view(10, 100) * x.view(10, 100)).sum()) == 4000
    assert saved_bytes(lambda: torch.autograd.grad((x * x).exp().sum(), x)[0].sum()) >= 8000
