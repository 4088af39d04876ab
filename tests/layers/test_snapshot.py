"""A plan that was remembered is used only while nothing was done to the modules."""

import copy
import pickle

import pytest
import torch
from checking import assert_close, assert_differ, assert_equal, assert_gradients_close
from modelling import gradients
from small_models import Doubled, small_models, small_models_that_ran
from torch import nn

from deit_fast.layers._fusion import FUSED

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of modules that are not fused


def test_copies_do_not_share_a_snapshot(device):
    """Copies, pickles and replicas have parts of their own."""
    _, fast, x = small_models("deit", device)
    expected = fast(x)
    for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)), copy.copy(fast)):
        assert_equal(twin(x), expected)
    twin = copy.deepcopy(fast)
    twin.blocks[0].mlp.act = nn.ReLU()
    assert_differ(twin(x), expected)
    assert_equal(fast(x), expected)
    block = fast.blocks[0]
    replica = block._replicate_for_data_parallel()  # shares the cached plan
    replica._modules["mlp"] = Doubled()
    assert "mlp" in replica.plan(x).unfused and block.plan(x) is FUSED


def test_replicas_of_data_parallel_stay_fused(device):
    """Their weights are attributes that are no parameters."""
    _, fast, x = small_models("deit", device)

    def replicated(module):
        made = module._replicate_for_data_parallel()
        for name, child in module._modules.items():
            made._modules[name] = None if child is None else replicated(child)
        for name, p in module._parameters.items():
            made.__dict__[name] = p
        return made

    twin = replicated(fast)
    assert twin.blocks[0].plan(x) is FUSED
    assert_equal(twin(x), fast(x))


def test_hook_dictionaries_that_were_replaced(device):
    """A common way to remove hooks leaves other dictionaries than those seen before."""
    _, fast, x = small_models("deit", device)
    fast(x)
    act, seen = fast.blocks[0].mlp.act, []
    act._forward_hooks = type(act._forward_hooks)()
    fast(x)
    act.register_forward_hook(lambda m, a, y: seen.append(1))
    fast(x)
    assert seen == [1]


def forward_in_place_of_a_tag(model):
    """As many entries as before, and another among them."""
    act = model.blocks[0].mlp.act
    del act.tag
    act.forward = lambda x: -x


def test_a_forward_set_while_a_tag_is_deleted():
    reference, fast, x = small_models_that_ran("vit")
    for model in (reference, fast):
        model.blocks[0].mlp.act.tag = 1
        model(x)
        forward_in_place_of_a_tag(model)
    with torch.no_grad():
        assert_close(fast(x), reference(x))
        assert_close(fast.forward_features(x), reference.forward_features(x))
    for model in (reference, fast):
        model.train()
    assert_gradients_close(gradients(fast, x), gradients(reference, x))
