"""Launch plans in training: the gradients of Python, hooks, second derivatives, DDP."""

import pytest
import torch
from checking import assert_close
from planning import assert_equal, small, stepped
from torch import nn

from deit_fast.layers import _plans

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
pytest_plugins = ["planning"]


@pytest.mark.parametrize("grads", ["all", "frozen", "images"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "autocast"])
def test_training(plans, device, dtype, grads):
    amp = dtype == "autocast"
    model, x = small(device, torch.float32 if amp else dtype, depth=2, init_values=1e-2)
    model.train()
    if grads == "frozen":
        for name, p in model.named_parameters():
            p.requires_grad_("qkv" not in name and "norm" not in name)
    x.requires_grad_(grads == "images")

    def step():
        with torch.autocast(x.device.type, torch.bfloat16, enabled=amp):
            return [*stepped(model, x), x.grad]

    with _plans.in_python():
        expected = step()
    x.grad = None
    plans.warm(step)
    x.grad = None
    assert_equal(plans.called(step), expected)


@pytest.mark.parametrize("when", ["before", "recorded", "after"])
def test_hooks_of_parameters_run_once(plans, device, when):
    """Those of a graph around the recorded one: not in it, and not in the plan."""
    model, x = small(device, distilled=False)
    model.train()
    weight, calls = model.blocks[0].mlp.fc1.weight, []

    def step(between=lambda: None):
        loss = model(x).float().square().sum()
        between()
        model.zero_grad()
        loss.backward()
        return weight.grad.clone()

    def register():
        handles.append(weight.register_hook(lambda grad: calls.append(0) or 2 * grad))

    handles = []
    with _plans.in_python():
        expected = step()
    if when == "before":
        register()
    scale = 2 if handles else 1
    assert_equal([step()], [scale * expected])
    assert_equal([step(register if when == "recorded" else lambda: None)],
                 [(1 if when == "after" else 2) * expected])  # fmt: skip
    if when == "after":
        register()
    assert_equal([plans.called(step)], [2 * expected])
    assert len(calls) == {"before": 3, "recorded": 2, "after": 1}[when]
    handles[0].remove()
    assert_equal([plans.called(step)], [expected])


def test_upstream_gradients_at_any_address(plans, device):
    model, x = small(device, distilled=False)
    model.train()

    def step():
        y, buffer = model(x), torch.ones(1 + 2 * 11, dtype=x.dtype, device=device)
        model.zero_grad()
        y.backward(buffer[1:].view_as(y))
        return [p.grad.clone() for p in model.parameters()]

    with _plans.in_python():
        expected = step()
    plans.warm(lambda: stepped(model, x))
    assert_equal(plans.called(step), expected)


def test_backward_twice(plans, device):
    model, x = small(device)
    model.train()

    def forward():
        return sum(t.float().sum() for t in model(x))

    plans.warm(lambda: forward().backward())
    loss = plans.called(forward)
    model.zero_grad()
    loss.backward(retain_graph=True)
    once = model.head.weight.grad.clone()
    loss.backward()
    assert_equal([model.head.weight.grad], [2 * once])
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_saved_tensors_that_were_written_to(plans, device):
    model, x = small(device)
    model.train()

    def forward():
        return sum(t.float().sum() for t in model(x))

    plans.warm(lambda: forward().backward())
    loss = forward()
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("drop_path_rate", [0.0, 0.5])
def test_second_derivatives(plans, device, drop_path_rate):
    model, x = small(device, torch.float32, drop_path_rate=drop_path_rate)
    model.train()
    x.requires_grad_()

    def penalty():
        torch.manual_seed(5)
        loss = sum(t.square().sum() for t in model(x))
        (first,) = torch.autograd.grad(loss, x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), model.blocks[0].attn.qkv.weight)

    with _plans.in_python():
        expected = penalty()
    for _ in range(2):
        stepped(model, x)
    for _ in range(2):  # its terms are added in another order
        assert_close(penalty(), expected)


def test_checkpoint(plans, device):
    model, x = small(device)
    model.train()
    with _plans.in_python():
        expected = stepped(model, x)
    model.set_grad_checkpointing(True)
    for _ in range(3):
        assert_equal(plans.called(lambda: stepped(model, x), plan=False), expected)


def test_drop_path_draws_as_in_python(plans, device):
    model, x = small(device, drop_path_rate=0.5, depth=2)
    model.train()

    def step():
        torch.manual_seed(3)
        return stepped(model, x)

    with _plans.in_python():
        expected = step()
    plans.warm(step)
    assert_equal(plans.called(step), expected)


def test_gradients_under_ddp(plans, device, tmp_path):
    model, x = small(device)
    model.train()
    with _plans.in_python():
        expected = [p.grad.clone() for p in _stepped(model, x)]
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    try:
        parallel = nn.parallel.DistributedDataParallel(model)
        plans.warm(lambda: _stepped(parallel, x))
        assert_equal([p.grad for p in plans.called(lambda: _stepped(parallel, x))], expected)
    finally:
        torch.distributed.destroy_process_group()


def _stepped(model, x):
    stepped(model, x)
    return list(model.parameters())
