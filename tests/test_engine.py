"""InferenceEngine: the model's own outputs, for any batch, from any stream, in any order."""

import copy
import pickle
import threading
import warnings

import pytest
import selection
import timm
import torch
from checking import assert_close, assert_differ, seeded
from fake_cuda import FakeCuda, Race, Stream
from modelling import TINY, tiny_pair
from tiers import slow
from torch import nn

import deit_fast
from deit_fast import InferenceEngine, _engine_images, engine
from deit_fast.engine import data_config, plan_batches


def model(**kwargs):
    return tiny_pair(**kwargs)[1]


def floats(count, size=64):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seeded(count)))


def uint8s(count, size=64):
    generator = torch.Generator().manual_seed(seeded(count))
    return torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8, generator=generator)


def doubles(count, size=64):
    return floats(count, size).double()


def outputs(m, images):
    with torch.inference_mode():
        return m(images)


def assert_outputs(got, m, images):
    assert_close(got, outputs(m, images))


@pytest.fixture
def fake(monkeypatch):
    """An engine on a CPU runs as on a GPU, and data races are errors."""
    cuda = FakeCuda(monkeypatch)
    monkeypatch.setattr(engine, "has_graphs", lambda device: True)
    monkeypatch.setattr(_engine_images, "on_host", lambda images: False)
    with cuda:
        yield cuda


@pytest.mark.parametrize("make", [floats, uint8s])
@pytest.mark.parametrize("count", [0, 1, 3, 4, 9])
def test_any_number_of_images(make, count):
    m = model()
    got = InferenceEngine(m, batch_size=4)(make(count))
    assert_outputs(got, m, make(count))
    assert not got.is_inference()


def put(fake, monkeypatch, place):
    """Images count as lying in that place from now on; returns who may write to them there."""
    monkeypatch.setattr(_engine_images, "on_host", lambda images: place != "gpu")
    fake.pinned = place == "pinned"
    return fake.caller if place == "gpu" else fake.host_actor


@pytest.mark.parametrize("make", [floats, uint8s, doubles])
@pytest.mark.parametrize("place", ["gpu", "pinned", "pageable"])
@pytest.mark.parametrize("count", [0, 1, 3, 7, 24])
def test_graphs_give_the_outputs_in_order(fake, monkeypatch, make, place, count):
    owner = put(fake, monkeypatch, place)
    m = model()
    run = InferenceEngine(m, batch_sizes=(1, 2, 8))
    assert len(run._graphs.pairs) == 6
    with fake.on(owner):
        images = make(count)
    for repeat in range(4):  # both slots of each size, twice
        with fake.on(owner):
            images.add_(1)  # in the memory that the last call read
            given = images.clone()
        expected = outputs(m, given.float() if make is doubles else given)
        got = run(images)
        assert_close(got, expected, f"call {repeat}")
        assert not got.is_inference()


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("format", ["fp8", "int8"])
def test_a_quantized_model(request, graphs, format):
    """Float and uint8 images; the memory is that of the quantized weights."""
    if graphs:
        request.getfixturevalue("fake")
    m = model()
    before = InferenceEngine(m, 4, prepare=()).memory.weights
    deit_fast.quantize(m, format)
    run = InferenceEngine(m, batch_sizes=(1, 4))
    for make in (floats, uint8s):  # one size, whose sums BLAS rounds alike
        assert torch.equal(run(make(4)), outputs(m, make(4)))
    weights = 2 * 12 * 64 * 64
    scales = 2 * 4 * (3 + 1 + 4 + 1) * 64 + 2 * 2 * 4 * (format == "fp8")
    assert before - run.memory.weights == 3 * weights - scales
    deit_fast.restore(m)
    if graphs:
        with pytest.raises(RuntimeError, match=r"call engine.refresh\(\)"):
            run(floats(1))
    else:
        assert_outputs(run(floats(1)), m, floats(1))


def test_callers_on_streams_of_their_own(fake):
    m = model()
    run = InferenceEngine(m, batch_size=2, prepare=("float",))
    results, streams = [], [Stream("a"), Stream("b")]
    for stream in streams:
        stream.wait_stream(fake.caller)  # the weights
    for turn in range(6):
        fake.caller = streams[turn % 2]
        images = floats(turn + 1)
        expected = outputs(m, images)
        results.append((fake.caller, run(images), expected))
    for stream, got, expected in results:  # an overwritten one would differ
        with fake.on(stream):
            assert_close(got, expected)


def test_the_next_images_are_copied_while_the_last_are_computed(fake, monkeypatch):
    put(fake, monkeypatch, "pageable")
    run = InferenceEngine(model(), batch_size=2, prepare=("float",))
    copies, caller = run._graphs._copies, fake.caller
    with fake.host():
        images = floats(2)
    before = caller.clock[caller.name]
    for _ in range(2):
        run(images)
    assert copies.clock.get(caller.name, 0) <= before < caller.clock[caller.name]
    assert fake.host_actor.clock.get(copies.name, 0) < copies.clock[copies.name]  # nobody waited
    run(images)  # into the first one's buffer
    assert copies.clock[caller.name] > before


def test_inference_mode_or_not(fake):
    m = model()
    with torch.inference_mode():
        run = InferenceEngine(m, batch_size=2, prepare=("uint8",))
        inside = run(floats(2)), run(uint8s(2))
    for make, got in zip((floats, uint8s), inside, strict=True):
        assert_outputs(run(make(2)), m, make(2))
        assert_close(got, outputs(m, make(2)))


def test_parameters_that_are_gone(fake):
    m = model()
    run = InferenceEngine(m, batch_size=2, prepare=("float",))
    del m.blocks[0].norm1.weight
    with pytest.raises(RuntimeError, match="refresh"):
        run(floats(2))
    assert run.memory.weights > 0


@pytest.mark.parametrize(
    "method, place",
    [
        ("wait_event", "gpu"), ("wait_event", "pinned"), ("wait_event", "pageable"),
        ("synchronize", "pinned"), ("synchronize", "pageable"),
    ],
)  # fmt: skip
def test_without_its_order_it_races(fake, monkeypatch, method, place):
    """The other tests would notice: each kind of waiting, omitted, is an error. A pinned buffer
    would be overwritten while it is copied, and graphs that share memory would run at once."""
    put(fake, monkeypatch, place)
    run = InferenceEngine(model(), batch_size=2, prepare=("float",))
    streams = [Stream("a"), Stream("b")]
    for stream in streams:
        stream.wait_stream(fake.caller)  # the weights

    def calls():
        for turn in range(4):
            fake.caller = streams[turn % 2]
            actor = fake.caller if place == "gpu" else fake.host_actor
            with fake.on(actor):
                images = floats(2)
            got = run(images)
            with fake.on(actor):
                images.zero_()
            got.sum()

    calls()
    owner = Stream if method == "wait_event" else torch.cuda.Event
    monkeypatch.setattr(owner, method, lambda *args: None)
    with pytest.raises(Race):
        calls()


def test_a_kind_that_was_not_prepared_is_captured_when_it_comes(fake):
    m = model()
    run = InferenceEngine(m, batch_size=2, prepare=("uint8",))
    before = run.memory
    assert set(run._graphs.pairs) == {("uint8", 2)} and before.workspace == 2000
    assert_outputs(run(floats(3)), m, floats(3))
    assert set(run._graphs.pairs) == {("uint8", 2), ("float", 2)}
    assert run.memory.workspace == 4000
    assert run.memory.buffers - before.buffers == 2 * 2 * (3 * 64 * 64 + 11) * 4
    assert before.weights == sum(p.nbytes for p in m.parameters())
    assert "weights 0.6 MB" in repr(run)
    run.refresh()
    assert set(run._graphs.pairs) == {("uint8", 2), ("float", 2)} and run.memory.workspace == 4000


def test_a_graph_is_one_replay_a_batch(fake):
    run = InferenceEngine(model(), batch_sizes=(1, 8), prepare=("float",))
    for count, replays in ((1, 1), (5, 1), (8, 1), (9, 2), (16, 2)):
        fake.replays = 0
        run(floats(count))
        assert fake.replays == replays, count


def test_no_batch_is_larger_than_asked_for():
    m, sizes = model(), []
    m.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    InferenceEngine(m, batch_sizes=(1, 4))(floats(10))
    assert sizes == [4, 4, 2]


@pytest.mark.parametrize("graphs", [False, True])
def test_no_gradients(request, graphs):
    if graphs:
        request.getfixturevalue("fake")
    m = model()
    run = InferenceEngine(m, batch_size=2, prepare=("float",))
    for _ in range(3):
        got = run(floats(3).requires_grad_())
        assert not got.requires_grad
        pairs = run._graphs.pairs.values() if graphs else ()
        assert not any(graph.images.requires_grad for pair in pairs for graph in pair)
        assert_close(got, outputs(m, floats(3)))


def test_plan_batches():
    sizes = (1, 8, 32, 256)
    for count in (*range(1, 300), 1000):
        chosen = plan_batches(sizes, count)
        assert sum(chosen) >= count and set(chosen) <= set(sizes)
        assert sum(chosen[:-1]) < count  # nothing runs for padding alone
    assert plan_batches(sizes, 40) == (32, 8)
    assert plan_batches(sizes, 200) == (256,)
    assert plan_batches(sizes, 513) == (256, 256, 1)
    assert plan_batches((4,), 0) == ()


@pytest.mark.parametrize("graphs", [False, True])
def test_weights_changed_in_place_are_seen(request, graphs):
    if graphs:
        request.getfixturevalue("fake")
    m = model()
    run = InferenceEngine(m, batch_size=2, prepare=("float",))
    before = run(floats(2))
    other = model(num_classes=11)
    with torch.no_grad():
        for p, q in zip(m.parameters(), other.parameters(), strict=True):
            p.copy_(q + 0.1)
    after = run(floats(2))
    assert_differ(after, before)
    assert_outputs(after, m, floats(2))


def test_replaced_weights_need_refresh(fake):
    m = model()
    run = InferenceEngine(m, batch_size=2, prepare=("float",))
    m.load_state_dict({k: v + 0.1 for k, v in m.state_dict().items()}, assign=True)
    with pytest.raises(RuntimeError, match="refresh"):
        run(floats(2))
    run.refresh()
    assert_outputs(run(floats(3)), m, floats(3))


@pytest.mark.parametrize("what", ["layer", "hook", "dropout", "other hooks dictionary", "heads"])
def test_a_changed_model_needs_refresh(fake, what):
    """A graph runs no hook, and no module that came in after it."""
    m = model()
    run = InferenceEngine(m, batch_size=2, prepare=("float",))
    act, seen = m.blocks[0].mlp.act, []
    if what == "layer":
        m.blocks[0].mlp.act = nn.ReLU().eval()
    elif what == "dropout":
        m.blocks[0].mlp.drop1.p = 0.5
    elif what == "heads":
        m.heads = "class"
    else:
        if what == "other hooks dictionary":
            act._forward_hooks = type(act._forward_hooks)()
        act.register_forward_hook(lambda *_: seen.append(1))
    with pytest.raises(RuntimeError, match="other modules, heads or hooks .* engine.refresh"):
        run(floats(2))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.refresh()
    warned = [str(w.message) for w in caught if "hooks on blocks.0.mlp.act ran" in str(w.message)]
    assert len(warned) == len(seen[:1]) == ("hook" in what)
    captured = len(seen)
    assert_outputs(run(floats(2)), m, floats(2))
    assert len(seen) == captured + ("hook" in what)  # by the model's own call


def test_a_model_of_another_dtype_needs_refresh():
    m = model()
    run = InferenceEngine(m, batch_size=2)
    m.double()
    with pytest.raises(RuntimeError, match="float64 on cpu now, torch.float32 .*refresh"):
        run(floats(1))
    run.refresh()
    assert run(floats(1)).dtype == torch.float64


def test_refresh_sees_other_heads(fake):
    m = model()
    run = InferenceEngine(m, batch_size=2, prepare=("float",))
    deit_fast.set_heads(m, "distill")
    run.refresh()
    assert_outputs(run(floats(2)), m, floats(2))
    assert_differ(m.head(torch.ones(64)), m.head_dist(torch.ones(64)))


@pytest.mark.parametrize("graphs", [False, True])
def test_threads_get_their_own_outputs(request, graphs):
    if graphs:
        request.getfixturevalue("fake")
    m = model()
    run = InferenceEngine(m, batch_size=4)
    expected = {count: outputs(m, floats(count)) for count in range(1, 9)}
    found = []

    def call(count):
        for _ in range(20):
            found.append((count, run(floats(count))))

    threads = [threading.Thread(target=call, args=(count,)) for count in expected]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(found) == 20 * len(expected)
    for count, got in found:
        assert_close(got, expected[count])


def test_one_call_at_a_time():
    """The buffers are one call's: another waits until it is over."""
    m, inside, most = model(), [0], [0]

    def hook(*_):
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        threading.Event().wait(0.02)
        inside[0] -= 1

    m.register_forward_pre_hook(hook)
    run = InferenceEngine(m, batch_size=4)
    threads = [threading.Thread(target=run, args=(floats(1),)) for _ in range(5)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert most[0] == 1


@pytest.mark.parametrize("distilled", [True, False])
def test_features_are_timms_pre_logits(distilled):
    reference, fast = tiny_pair(distilled=distilled)
    with torch.no_grad():
        expected = reference.forward_head(reference.forward_features(floats(3)), pre_logits=True)
    for m in (fast, reference):
        got = InferenceEngine(m, batch_size=2, output="features")(floats(3))
        assert_close(got, expected)


def test_features_of_a_model_without_classes():
    reference, fast = tiny_pair(num_classes=0)
    got = InferenceEngine(fast, batch_size=2, output="features")(floats(2))
    assert_close(got, outputs(reference, floats(2)))


def test_uint8_images_of_a_model_that_takes_floats_alone():
    reference, fast = tiny_pair()
    got = InferenceEngine(reference, batch_size=2)(uint8s(3))
    assert_close(got, outputs(fast, uint8s(3)))


def test_uint8_images_with_a_hook_on_the_patch_embedding():
    m = model()
    expected = outputs(m, uint8s(2))
    m.patch_embed.register_forward_hook(lambda *_: None)
    assert_close(outputs(m, uint8s(2)), expected)


def test_other_floating_images_and_autocast():
    m = model()
    run = InferenceEngine(m, batch_size=2)
    assert_outputs(run(floats(2).double()), m, floats(2))
    with torch.autocast("cpu", torch.bfloat16):
        got = run(floats(2))
    assert got.dtype == torch.float32
    assert_outputs(got, m, floats(2))


def test_image_size():
    m = deit_fast.create_model("deit_tiny_patch16_224", **TINY | {"dynamic_img_size": True}).eval()
    assert_outputs(InferenceEngine(m, 2, image_size=96)(floats(3, 96)), m, floats(3, 96))
    with pytest.raises(ValueError, match=r"expected \(B, 3, 64, 32\)"):
        InferenceEngine(m, 2, image_size=(64, 32))(floats(1))


def test_data_config_is_of_the_model_as_built():
    built = timm.create_model("deit_tiny_patch16_224", **TINY | {"in_chans": 1})
    assert data_config(built)["input_size"] == (1, 64, 64)
    plain = timm.create_model("deit_tiny_patch16_224", embed_dim=64, depth=1, num_heads=2)
    assert data_config(plain) == timm.data.resolve_model_data_config(plain)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_are_engines(copied):
    m = model()
    run = InferenceEngine(m, batch_sizes=(2, 5), output="features", prepare=("float",))
    again = copied(run)
    assert again.batch_sizes == (2, 5) and again.model is not m and again._prepare == ("float",)
    assert_close(again(floats(3)), run(floats(3)))


def test_models_that_cannot_run():
    with pytest.raises(ValueError, match=r"train mode \(\(the model\) first\)"):
        InferenceEngine(model().train(), 1)
    m = model()
    m.blocks[1].attn.train()
    with pytest.raises(ValueError, match=r"train mode \(blocks.1.attn first\)"):
        InferenceEngine(m, 1)
    m = model()
    m.head.double()
    with pytest.raises(ValueError, match="float32, torch.float64, expected one dtype"):
        InferenceEngine(m, 1)
    with pytest.raises(TypeError, match="float32, dtype asks for torch.float16"):
        InferenceEngine(model(), 1, dtype=torch.float16)
    with pytest.raises(ValueError, match="on cpu, device asks for cuda"):
        InferenceEngine(model(), 1, device="cuda")
    with pytest.raises(ValueError, match="on meta"):
        InferenceEngine(model().to("meta"), 1)
    m = model()
    run = InferenceEngine(m, 1, dtype=torch.float32, device="cpu")
    m.train()
    with pytest.raises(RuntimeError, match="train mode since"):
        run(floats(1))


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "batch_size: None, batch_sizes: None"),
        ({"batch_size": 1, "batch_sizes": (1,)}, "expected one of them"),
        ({"batch_size": 0}, r"batch_size: \(0,\)"),
        ({"batch_sizes": ()}, r"batch_sizes: \(\)"),
        ({"batch_sizes": (1, 2.0)}, "whole numbers"),
        ({"batch_size": 1, "output": "probabilities"}, "output: 'probabilities'"),
        ({"batch_size": 1, "prepare": ("bytes",)}, r"prepare: \('bytes',\)"),
    ],
)
def test_options_that_are_none(options, message):
    with pytest.raises(ValueError, match=message):
        InferenceEngine(model(), **options)


@pytest.mark.cpu("the graph is simulated")
@pytest.mark.parametrize("make", [floats, uint8s])
@pytest.mark.parametrize("format", [None, slow("fp8"), "int8"])
def test_a_captured_forward_is_all_there_is(format, make, monkeypatch):
    """All that the operators do to the images is in the graph; nothing was done on the host at
    capture time."""
    m = model(backend="triton", img_size=32, depth=2)
    if format is not None:
        deit_fast.quantize(m, format)
    x = make(3, 32)
    with FakeCuda(monkeypatch), torch.no_grad():
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = m(x)
        expected = out.clone()
        x.copy_(x.flip(0))
        graph.replay()
        assert_close(out, expected.flip(0))
    assert_differ(out, expected)


@pytest.mark.gpu("real streams, graphs and pinned memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_real_graphs(dtype):
    m = model(backend="auto").to("cuda", dtype)
    run = InferenceEngine(m, batch_sizes=(1, 4, 16))
    for count in (0, 1, 3, 16, 41):
        for images in (floats(count).to(dtype), uint8s(count)):
            expected = outputs(m, images.cuda())
            for given in (images, images.pin_memory(), images.cuda()):
                for _ in range(3):  # other batch sizes may go through other tiles
                    assert_close(run(given), expected)
    assert run.memory.workspace > 0


@pytest.mark.gpu("real streams, graphs and pinned memory")
def test_real_graphs_see_weights_and_serve_threads():
    m = model(backend="auto").cuda()
    run = InferenceEngine(m, batch_size=4)
    with torch.no_grad():
        for p in m.parameters():
            p.add_(0.05)
    assert_close(run(floats(3)), outputs(m, floats(3).cuda()))
    expected = {count: outputs(m, floats(count).cuda()) for count in range(1, 7)}
    torch.cuda.synchronize()
    found = []

    def call(count):
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(50):
                found.append((count, run(floats(count).pin_memory())))

    threads = [threading.Thread(target=call, args=(count,)) for count in expected]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    torch.cuda.synchronize()
    assert len(found) == 50 * len(expected)
    for count, got in found:
        assert_close(got, expected[count])
    m.half()
    with pytest.raises(RuntimeError, match="refresh"):
        run(floats(1))
    run.refresh()
    assert run(floats(1)).dtype == torch.float16


@pytest.mark.slow
def test_compiled_on_a_cpu():
    selection.compiler()
    m = model(depth=1)
    fast = InferenceEngine(m, batch_sizes=(1, 3), prepare=("float",), compile=True)
    for count in (0, 1, 2, 4):
        assert_outputs(fast(floats(count)), m, floats(count))
    with torch.inference_mode():
        inside = floats(2)
        assert_outputs(fast(inside), m, inside)
    assert set(fast._compiled) == {("float", 1), ("float", 3)}
    before = fast(floats(1))
    with torch.no_grad():
        for p in m.parameters():
            p.data.mul_(1.1)  # without a new version of the parameter
    assert_outputs(fast(floats(1)), m, floats(1))
    assert_differ(before, fast(floats(1)))
    with torch.no_grad():
        m.head.bias = torch.nn.Parameter(m.head.bias + 1)
    with pytest.raises(RuntimeError, match="its weights lie elsewhere"):
        fast(floats(1))
    fast.refresh()
    assert_outputs(fast(floats(1)), m, floats(1))
    m.heads = "distill"  # as set_heads does
    with pytest.raises(RuntimeError, match="other modules, heads or hooks"):
        fast(floats(1))
    m.heads = "joint"
    m.blocks[0].mlp.register_forward_hook(lambda module, args, result: 2 * result)
    with pytest.raises(RuntimeError, match="its graphs don't run them"):
        fast(floats(1))
    fast.refresh()
    assert_outputs(fast(floats(1)), m, floats(1))


def test_only_a_cpu_compiles(monkeypatch):
    on_gpu = (torch.device("cuda"), torch.float32)
    monkeypatch.setattr(engine, "device_and_dtype", lambda model, **expected: on_gpu)
    with pytest.raises(ValueError, match="compile: True with a model on cuda, expected a CPU"):
        InferenceEngine(model(), 1, compile=True)
