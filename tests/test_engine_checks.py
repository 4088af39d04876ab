"""What an engine notices of its model, and what a call of one takes."""

import os
import sys
import threading

import pytest
import torch
from checking import assert_close, assert_differ
from fake_cuda import FakeCuda
from modelling import tiny_pair
from torch import nn

import deit_fast
from deit_fast import InferenceEngine, _engine_checks, _engine_images, engine


@pytest.fixture
def fake(monkeypatch):
    """An engine on a CPU runs as on a GPU, and data races are errors."""
    cuda = FakeCuda(monkeypatch)
    monkeypatch.setattr(engine, "has_graphs", lambda device: True)
    monkeypatch.setattr(_engine_images, "on_host", lambda images: False)
    with cuda:
        yield cuda


def model(**kwargs):
    return tiny_pair(depth=1, img_size=32, **kwargs)[1]


def images(count=2, dtype=torch.float32):
    return torch.linspace(-1, 1, count * 3 * 32 * 32).view(count, 3, 32, 32).to(dtype)


def replace_parameter(m):
    m.head.weight = nn.Parameter(m.head.weight.detach().clone())


def replace_by_hand(m):
    m.norm._parameters["bias"] = nn.Parameter(m.norm.bias.detach().clone())


def replace_data(m):
    m.blocks[0].attn.qkv.weight.data = m.blocks[0].attn.qkv.weight.data.clone()


def other_dtype_same_memory(m):
    m.head.weight.data = m.head.weight.data.view(torch.float16)


def replace_data_and_keep_it(m):
    m.kept = m.pos_embed.data
    m.pos_embed.data = m.pos_embed.data.clone()


def resize(m):
    m.head.weight.data.resize_(1000, 64)


def remove_parameter(m):
    del m.norm.bias


def remove_and_add(m):
    del m.patch_embed.img_size
    m.patch_embed.forward = lambda x: x


def other_class(m):
    m.blocks[0].mlp.act.__class__ = type("Other", (nn.GELU,), {})


def other_child(m):
    m.blocks[0].mlp.act = nn.ReLU().eval()


def one_more_child(m):
    m.blocks[0].mlp.more = nn.Identity().eval()


def own_forward(m):
    m.blocks[0].norm1.forward = lambda x: 2 * x


def compiled_call(m):
    m.blocks[0].mlp.fc1._compiled_call_impl = lambda x: x


def training_dropout(m):
    m.blocks[0].mlp.drop1.train()


WEIGHTS = {
    "replaced": replace_parameter,
    "replaced by hand": replace_by_hand,
    "other data": replace_data,
    "other data, the old kept": replace_data_and_keep_it,
    "assigned": lambda m: m.load_state_dict(
        {name: t.clone() for name, t in m.state_dict().items()}, assign=True
    ),
    "resized": resize,
    "cast": lambda m: m.to(torch.bfloat16),
    "other dtype, same memory": other_dtype_same_memory,
    "one cast": lambda m: m.norm.to(torch.float64),
    "gone": remove_parameter,
    "quantized": lambda m: deit_fast.quantize(m, "int8"),
}
MODULES = {
    "class": other_class,
    "child": other_child,
    "one more child": one_more_child,
    "forward": own_forward,
    "one attribute for another": remove_and_add,
    "compiled": compiled_call,
    "dropout's mode": training_dropout,
    "dropout": lambda m: setattr(m.blocks[0].mlp.drop1, "p", 0.1),
    "fused attention": lambda m: setattr(m.blocks[0].attn, "fused_attn", False),
    "GELU": lambda m: setattr(m.blocks[0].mlp.act, "approximate", "tanh"),
    "heads": lambda m: deit_fast.set_heads(m, "class"),
    "forward hook": lambda m: m.head.register_forward_hook(lambda *_: None),
    "forward pre-hook": lambda m: m.blocks[0].register_forward_pre_hook(lambda *_: None),
    "backward hook": lambda m: m.norm.register_full_backward_hook(lambda *_: None),
    "restored": deit_fast.restore,
}
CHANGES = {
    **{name: (change, "its weights lie elsewhere") for name, change in WEIGHTS.items()},
    **{name: (change, "other modules, heads or hooks") for name, change in MODULES.items()},
    "train": (lambda m: m.train(), "in train mode since"),
    "train, the model alone": (lambda m: setattr(m, "training", True), "in train mode since"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_noticed(fake, name):
    """By a first call and by one like an earlier one, whose check comes after the replay."""
    change, message = CHANGES[name]
    m = model()
    run = InferenceEngine(m, batch_size=2, prepare=("float",))
    for _ in range(3):
        run(images())
    change(m)
    for count in (2, 1):  # like an earlier call, and the first one
        for _ in range(2):
            with pytest.raises(RuntimeError, match=message):
                run(images(count))
    if name in ("assigned", "cast", "quantized", "child", "heads", "restored", "train"):
        m.eval()
        run.refresh()
        with torch.no_grad():
            assert_close(run(images()), m(images().to(run.dtype)))


def test_a_global_hook_is_noticed(fake):
    run = InferenceEngine(model(), batch_size=2, prepare=("float",))
    run(images())
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        with pytest.raises(RuntimeError, match="other modules, heads or hooks"):
            run(images())
    finally:
        handle.remove()
    run(images())


def test_another_forward_of_a_class_is_noticed(fake, monkeypatch):
    run = InferenceEngine(model(), batch_size=2, prepare=("float",))
    run(images())
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: 2 * x)
    with pytest.raises(RuntimeError, match="other modules, heads or hooks"):
        run(images())


def test_one_number_for_another(fake):
    """Equal ones too: comparing dictionaries of tensors with one number would not tell."""
    m = model()
    m.register_buffer("scale", torch.ones(()))
    run = InferenceEngine(m, batch_size=2, prepare=("float",))
    run(images())
    m.scale = torch.ones(())
    with pytest.raises(RuntimeError, match="its weights lie elsewhere"):
        run(images())


def harmless(m):
    nn.Linear(1, 1).register_forward_hook(lambda *_: None)  # of another model


def same_memory(m):
    m.head.weight = nn.Parameter(m.head.weight.detach())


@pytest.mark.parametrize("change", [harmless, same_memory])
def test_what_changes_nothing_is_looked_at_once(fake, monkeypatch, change):
    m = model()
    run = InferenceEngine(m, batch_size=2, prepare=("float",))
    before = run(images())
    change(m)
    assert_close(run(images()), before)
    monkeypatch.setattr(_engine_checks, "_addresses", None)  # the long way would fail
    assert_close(run(images()), before)


def test_a_model_with_hooks_of_its_own_runs(fake):
    m = model()
    handle = m.head.register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match="hooks on head ran"):
        run = InferenceEngine(m, batch_size=2, prepare=("float",))
    before = run(images())
    assert_close(run(images()), before)
    handle.remove()
    with pytest.raises(RuntimeError, match="other modules, heads or hooks"):
        run(images())
    m.head.register_forward_hook(lambda *_: None)
    run(images())  # as many as before
    m.norm.register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match="other modules, heads or hooks"):
        run(images())


def test_no_graph_is_captured_of_a_changed_model(fake):
    """It would be replayed once the change is undone."""
    m = model()
    run = InferenceEngine(m, batch_size=2, prepare=("float",))
    before = run(images())
    deit_fast.set_heads(m, "class")
    pixels = torch.zeros(2, 32, 32, 3, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="other modules, heads or hooks"):
        run(pixels)
    assert set(run._graphs.pairs) == {("float", 2)}
    deit_fast.set_heads(m, "joint")
    assert_close(run(images()), before)
    with torch.no_grad():
        assert_close(run(pixels), m(pixels))


def test_memory_that_a_graph_reads_stays_reserved(monkeypatch):
    """A graph is replayed before the check: what it reads may not belong to others by then."""
    without_cuda(monkeypatch)
    m = model()
    run = InferenceEngine(m, batch_size=2, prepare=("float",))
    addresses = {p.data_ptr() for p in m.parameters()}
    for dtype in (torch.bfloat16, torch.float32, torch.bfloat16, torch.float32):
        m.to(dtype)
        others = [torch.empty(p.shape) for p in m.parameters() for _ in range(3)]
        now = {t.data_ptr() for t in (*m.parameters(), *others)}
        assert not addresses & now
        with pytest.raises(RuntimeError, match="its weights lie elsewhere"):
            run(images())
    run.refresh()
    held = {t.data_ptr() for t in run._check._reserved}
    assert not addresses & held


def test_weights_changed_in_place_raise_nothing(fake):
    m = model()
    run = InferenceEngine(m, batch_size=2, prepare=("float",))
    before = run(images())
    with torch.no_grad():
        for p in m.parameters():
            p.add_(0.05)
        assert_close(run(images()), m(images()))
    assert_differ(run(images()), before)
    m.load_state_dict({name: t + 0.1 for name, t in m.state_dict().items()})
    with torch.no_grad():
        assert_close(run(images()), m(images()))


def calls_of(function):
    """Python functions that a call enters."""
    found = []

    def profile(frame, event, argument):
        if event == "call":
            found.append(f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_code.co_name}")

    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(None)
    return found


class Stand:
    """Streams, events and a graph without FakeCuda's own Python."""

    def __init__(self, *args, **options):
        pass

    def nothing(self, *args, **options):
        pass

    __enter__ = __exit__ = nothing
    record = wait_event = wait_stream = synchronize = replay = nothing


def without_cuda(monkeypatch):
    stand = Stand()
    monkeypatch.setattr(engine, "has_graphs", lambda device: True)
    monkeypatch.setattr(_engine_images, "on_host", lambda images: False)
    monkeypatch.setattr("deit_fast._cuda_graph.stream_handle", lambda index: 0)
    for name in ("Stream", "Event", "CUDAGraph", "graph", "stream", "device"):
        monkeypatch.setattr(torch.cuda, name, Stand)
    for name in ("current_stream", "graph_pool_handle"):
        monkeypatch.setattr(torch.cuda, name, lambda *args: stand)
    for name in ("synchronize", "empty_cache", "memory_reserved"):
        monkeypatch.setattr(torch.cuda, name, lambda *args: 0)


@pytest.mark.parametrize("depth", [1, 3])
def test_a_call_is_a_few_python_functions(monkeypatch, depth):
    """Whatever the machine does: as many for a deep model as for another, none for each weight."""
    without_cuda(monkeypatch)
    monkeypatch.setattr(_engine_checks.Unchanged, "_same_objects", lambda self: True)  # in C++
    m = tiny_pair(depth=depth, img_size=32)[1]
    run = InferenceEngine(m, batch_size=1, prepare=("float",))
    given = images(1)
    for _ in range(2):
        run(given)
    found = calls_of(lambda: run(given))[1:]  # without the lambda
    assert len(found) <= 12, found
    assert sum(name.startswith("_engine_checks") for name in found) <= 4, found
    other = calls_of(lambda: run(images(1, torch.float64)))
    assert len(other) > len(found)  # the first of its dtype


def test_four_threads_call_one_engine(monkeypatch):
    """Each gets its own result while the model stays, and none once it changed."""
    without_cuda(monkeypatch)
    m = model()
    run = InferenceEngine(m, batch_sizes=(1, 2, 4), prepare=("float",))
    for count in (1, 2, 4):
        run(images(count))
    barrier, shapes, errors = threading.Barrier(4), [], []

    def call(count):
        barrier.wait()
        for _ in range(50):
            shapes.append((count, len(run(images(count)))))
        barrier.wait()
        if count == 1:
            m.heads = "class"
        barrier.wait()
        for _ in range(20):
            try:
                shapes.append(run(images(count)))
            except RuntimeError as error:
                errors.append(str(error))

    threads = [threading.Thread(target=call, args=(count,)) for count in (1, 2, 3, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(shapes) == 200 and all(count == length for count, length in shapes)
    assert len(errors) == 80 and all("other modules, heads or hooks" in e for e in errors)
