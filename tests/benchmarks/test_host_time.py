"""What calls cost the host, without a GPU: the command, its stand-ins and its clock."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import selection
import torch

import deit_fast
from benchmarks.host_time import __main__ as command
from benchmarks.host_time import rows as rows_module
from benchmarks.host_time import stages, stand_ins, table, turns, where
from benchmarks.host_time.turns import Contender, compare
from deit_fast.bench import launches
from deit_fast.kernels._chips import Chip

ROOT = Path(__file__).parents[2]


def started(*command, **env):
    path = os.pathsep.join(
        [str(ROOT), str(ROOT / "tests" / "helpers"), os.environ.get("PYTHONPATH", "")]
    )
    env = (
        {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "DEIT_FAST_PLANS")}
        | {"PYTHONPATH": path}
        | env
    )
    return subprocess.run(
        [sys.executable, *map(str, command)], env=env, cwd=ROOT, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """What the quick run printed, and its data."""
    selection.compiler()
    file = tmp_path_factory.mktemp("host_time") / "data.json"
    done = started("-m", "benchmarks.host_time", "--quick", "--rounds", 2, "--json", file)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(file.read_text())


@pytest.mark.slow
def test_every_row_has_its_figures(quick):
    _, data = quick
    rows = {row["call"]: row for row in data["rows"]}
    ways = ("forward", "forward + backward")
    expected = {"inference", "forward + backward", "an engine's call"}
    expected |= {
        f"{op}, {way}"
        for op in ("linear qkv", "layer_norm_linear qkv", "attention")
        for way in ways
    }
    extra = " call of another batch size, beyond one in Python"
    assert set(rows) == expected | {"first" + extra, "second" + extra}
    for call in expected:
        row = rows[call]
        for who in ("timm_us", "ours_us"):
            assert 0 < row[who]["least"] <= row[who]["median"] < 1e7
            assert 0 <= row[who]["spread"] < math.inf
        assert 0 < row["ratio"] < math.inf and row["timm_launches"] >= 1
    assert rows["an engine's call"]["ratio"] < rows["inference"]["ratio"]
    assert data["settings"]["plans"] == "ready"


@pytest.mark.slow
def test_a_plain_call_costs_the_host_little(quick):
    """The targets of launch plans: shares of timm's time, and us of an engine's call."""
    rows = {row["call"]: row for row in quick[1]["rows"]}
    assert rows["inference"]["ratio"] <= 0.25 and rows["forward + backward"]["ratio"] <= 0.5
    assert rows["an engine's call"]["ours_us"]["least"] <= 40
    first = rows["first call of another batch size, beyond one in Python"]
    assert first["ours_us"]["median"] <= 2000


@pytest.mark.slow
def test_where_the_time_of_operations_goes(tmp_path):
    selection.compiler()
    file = tmp_path / "data.json"
    done = started(
        "-m", "benchmarks.host_time", "--where", "--quick", "--rounds", 2, "--json", file
    )
    assert done.returncode == 0, done.stderr
    data = json.loads(file.read_text())
    assert done.stdout == table.where_markdown(data) + "\n"
    rows = {row["call"]: row for row in data["rows"]}
    assert {"linear qkv", "layer_norm_linear fc1", "attention"} <= set(rows)
    for row in rows.values():
        assert row["why_not"] is None and row["launches"] >= 1
        assert row["plan_us"]["median"] < row["python_us"]["median"] / 4
        assert sum(row["shares"].values()) == pytest.approx(1)
        assert all(share > 0 for part, share in row["shares"].items() if part != where.DESCRIPTORS)


@pytest.mark.parametrize(
    "file, function, part",
    [
        ("/x/triton/runtime/jit.py", "run", where.LAUNCHER),
        ("~", "<built-in method triton._C.libtriton.native_specialize_impl>", where.LAUNCHER),
        ("~", "<built-in method cuda_utils.launch>", where.LAUNCHER),
        ("/x/triton/tools/tensor_descriptor.py", "from_tensor", where.DESCRIPTORS),
        ("~", "<method 'new_empty' of 'torch._C.TensorBase' objects>", where.ALLOCATION),
        ("/x/kernels/linear/op.py", "linear", where.OURS),
        ("/x/torch/_ops.py", "__call__", where.TORCH),
        ("~", "<method 'view' of 'torch._C.TensorBase' objects>", where.TORCH),
    ],
)
def test_the_part_of_a_function(file, function, part):
    assert where.part_of(file, function) == part


@pytest.mark.slow
def test_the_launches_are_the_models(quick):
    """Ours as a forward pass on the meta device has them, timm's as they can be counted by hand."""
    rows = {row["call"]: row for row in quick[1]["rows"]}
    with torch.device("meta"):
        model = deit_fast.create_model("deit_tiny_distilled")
    h100 = Chip("NVIDIA H100 80GB HBM3", (9, 0), 132)
    recorder = launches.record(model, 1, torch.bfloat16, h100)
    triton = len(recorder.calls)
    assert rows["inference"]["ours_launches"]["triton"] == triton <= 66
    # a block: two norms, four GEMMs, attention, GELU, two sums. The patches, two tokens with
    # them, positions, the last norm, two heads, their mean
    assert rows["inference"]["timm_launches"] == 12 * 10 + 1 + 1 + 1 + 1 + 2 + 2 + 1
    training = rows["forward + backward"]["ours_launches"]["triton"]
    assert training > 2.5 * triton
    assert training <= 190 and rows["forward + backward"]["ours_launches"]["pytorch"] <= 130
    assert rows["an engine's call"]["ours_launches"] == {"triton": 0, "pytorch": 2}  # the copies
    assert rows["linear qkv, forward"]["timm_launches"] == 1


STEP = """
import torch
from benchmarks.host_time.rows import NETWORKS
from benchmarks.host_time.stand_ins import StandIns
from benchmarks.host_time.turns import Contender
from deit_fast.bench.modes import Mode
from deit_fast.bench.network import Network
from deit_fast.bench.step import Step

stand_ins = StandIns.install()
network = Network(NETWORKS["Ti"], None, torch.device("cpu"))
for mode in (
    Mode("", torch.bfloat16, fast=True, train=True),
    Mode("", torch.float32, autocast=torch.bfloat16, fast=True, train=True),
):
    step = Step(network, mode)
    images = step.cast(network.batch(1))
    contender = Contender(lambda: step(images))
    with stand_ins.operators.idle():
        stand_ins.launches(contender)
        assert stand_ins.working(contender) == []
        print(*stand_ins.launches(contender))
"""


@pytest.mark.slow
def test_the_launches_of_a_training_step():
    """Of DeiT-Ti distilled: in bf16, and under autocast, which casts weights and heads."""
    selection.compiler()
    done = started("-W", "ignore", "-c", STEP)
    assert done.returncode == 0, done.stderr
    (triton, torchs), (amp_triton, amp_torchs) = (
        map(int, line.split()) for line in done.stdout.splitlines()
    )
    assert 170 < triton <= 190 and 100 < torchs <= 130
    assert amp_triton == triton and torchs + 24 < amp_torchs <= 165


@pytest.mark.slow
def test_the_table_is_the_data(quick):
    out, data = quick
    assert out == table.markdown(data) + "\n"
    lines = [line for line in out.splitlines() if line.startswith("| DeiT-")]
    assert len(lines) == len(data["rows"])
    cells = [cell.strip() for cell in lines[0].split("|")[1:-1]]
    row = data["rows"][0]
    assert cells[0] == f"DeiT-Ti: {row['call']}"
    assert cells[1] == f"{row['timm_us']['median']:,.0f}" and cells[7] == f"{row['ratio']:.2f}"
    assert cells[4] == f"{row['ours_us']['median']:,.0f}"
    assert data["settings"]["rounds"] == 2 and data["hardware"]["triton"] in out


@pytest.mark.slow
def test_the_stages_of_an_engines_call(tmp_path):
    selection.compiler()
    file = tmp_path / "data.json"
    done = started(
        "-m", "benchmarks.host_time", "--stages", "--quick", "--rounds", 2, "--json", file
    )
    assert done.returncode == 0, done.stderr
    data = json.loads(file.read_text())
    assert done.stdout == table.stages_markdown(data) + "\n"
    rows = {row["stage"]: row["us"]["median"] for row in data["rows"]}
    assert len(rows) == 9 and list(rows)[0] == stages.CALL and list(rows)[-1] == stages.BETWEEN
    assert rows["check of the model"] == max(us for name, us in rows.items() if name != stages.CALL)
    assert 0 < rows["copy in"] < rows[stages.CALL] < 1e4


def test_what_the_stages_leave_of_the_call():
    times = {stages.CALL: [10.0, 20.0], "a": [1.0, 2.0], "b": [3.0, 3.0]}
    rows = stages.rows_of("S", times)
    assert [row["stage"] for row in rows] == [*times, stages.BETWEEN]
    assert {row["network"] for row in rows} == {"S"}
    assert rows[-1]["us"]["median"] == 10.5 and rows[-1]["us"]["least"] == 6.0
    us = {"cpu": "C", "python": "3", "torch": "2", "triton": "3", "timm": "1"}
    settings = {"dtype": "bf16", "autocast": False, "rounds": 2, "plans": "ready"}
    lines = table.stages_markdown({"hardware": us, "settings": settings, "rows": rows}).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[-4:]]
    assert cells[0] == [f"DeiT-S: {stages.CALL}", "15.0", "10.0"]
    assert cells[3] == [f"DeiT-S: {stages.BETWEEN}", "10.5", "6.0"]


def test_an_engine_without_the_short_way_has_no_stages():
    engine = deit_fast.InferenceEngine(deit_fast.create_model("deit_tiny").eval(), 1)
    with pytest.raises(RuntimeError, match="expected what the engine runs unchecked"):
        stages.stages(engine, torch.zeros(0, 3, 224, 224))


class Gpu:
    """Counts, as the stand-in does."""

    compiled = 0

    def loads(self):
        return self.compiled

    def forget(self):
        pass


class Clock:
    now = 0

    def __call__(self):
        return self.now


def costing(clock, order, name, nanoseconds):
    def call():
        order.append(name)
        clock.now += nanoseconds

    return Contender(call)


def test_calls_take_turns():
    """In blocks that last alike, and in another order every round."""
    clock, order = Clock(), []
    costs = {"a": 1000, "b": 2000, "c": 4000}
    contenders = {name: costing(clock, order, name, cost) for name, cost in costs.items()}
    times = compare(contenders, 3, block_us=8.0, gpu=Gpu(), clock=clock)
    assert times == {"a": [1.0] * 3, "b": [2.0] * 3, "c": [4.0] * 3}
    a, b, c = "a" * 9, "b" * 5, "c" * 3  # each with one that is not timed
    assert "".join(order) == "abc" + a + b + c + b + c + a + c + a + b


def test_a_context_is_not_timed():
    clock, order = Clock(), []
    one = costing(clock, order, "call", 1000)

    class Slow:
        def __enter__(self):
            clock.now += 10**9

        def __exit__(self, *error):
            clock.now += 10**9

    assert turns.timed(Contender(one.call, Slow), 4, clock) == 1.0


def test_nothing_is_compiled_while_it_is_timed():
    gpu = Gpu()

    def compiles():
        gpu.compiled += len(calls) == 4
        calls.append(0)

    calls = []
    with pytest.raises(RuntimeError, match="1 kernels were compiled while calls were timed"):
        compare({"a": Contender(compiles)}, 4, 1e-3, gpu)


def test_first_calls_that_compile_do_not_count():
    gpu, seen = Gpu(), []

    def step(images):
        gpu.compiled += len(images) == 1 and not seen
        seen.append(len(images))

    batches = [torch.zeros(size, 1) for size in (1, 2, 3)]
    first, second = turns.first_calls(step, batches, gpu)
    assert len(first) == len(second) == 2 and len(seen) == 3 * (2 + turns.IN_PYTHON)
    gpu.compiled, seen[:] = 0, []
    with pytest.raises(RuntimeError, match="every batch size had kernels of its own"):
        turns.first_calls(step, batches[:1], gpu)


def test_summary_and_ratio():
    row = rows_module.row("Ti", "call", [10.0, 20.0, 40.0], [5.0, 40.0, 20.0], (0, 3), (2, 1))
    assert row["timm_us"]["median"] == 20.0 and row["timm_us"]["least"] == 10.0
    assert row["timm_us"]["spread"] == pytest.approx((32 - 14) / 20)
    assert row["ratio"] == 0.5, "of the rounds' ratios, not of the medians"
    assert row["timm_launches"] == 3 and row["ours_launches"] == {"triton": 2, "pytorch": 1}


IDLE = """
import torch
from stand_in_cuda.operators import Operators
operators = Operators()
torch.manual_seed(0)
x, w = torch.randn(4, 6, requires_grad=True), torch.randn(8, 6, requires_grad=True)
before = torch.nn.functional.linear(x, w).sum()
def step():
    normed = torch.nn.functional.layer_norm(x @ w.T, (8,))
    torch.nn.functional.gelu(normed).backward(torch.ones(4, 8))
def other():
    torch.softmax(x, -1)
def working(call):
    return operators.working(call)
assert "aten::mm" in working(step)
with operators.idle():
    calls = operators.calls
    step()
    # a GEMM, a norm and GELU, their gradients, and two GEMMs
    assert operators.calls - calls >= 7 and x.grad.shape == x.shape and w.grad.shape == w.shape
    assert working(step) == [], working(step)
    assert working(other) == ["aten::_softmax"]
    huge = torch.empty(20000, 20000)
    (huge @ huge) @ huge  # would take minutes
    try:
        x @ w
        raise SystemExit("shapes that do not fit")
    except RuntimeError as error:
        assert "cannot be multiplied" in str(error)
assert torch.equal(torch.nn.functional.linear(x, w).sum(), before), "as before"
print("idle")
"""


@pytest.mark.slow
def test_idle_operators_keep_shapes_and_autograd(tmp_path):
    selection.compiler()
    script = tmp_path / "script.py"
    script.write_text(IDLE)
    done = started(script)
    assert done.stdout == "idle\n", done.stdout + done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rounds", "0"], "--rounds: 0, expected 1 or more"),
        (["--networks", "L"], "argument --networks: invalid choice: 'L'"),
        (["--json", "nowhere/data.json"], "--json: nowhere is no folder"),
        ([], "TRITON_INTERPRET is 1, expected it unset"),
        (["CC", "no_such_compiler"], "no compiler 'no_such_compiler', expected one of C and C++"),
        (["CC", "false"], "false failed, expected compilers of C and C++"),
    ],
)
def test_bad_input_is_one_line(monkeypatch, tmp_path, capsys, arguments, said):
    if arguments[:1] == ["CC"]:
        monkeypatch.setenv(*arguments)
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        arguments = []
    monkeypatch.setattr(stand_ins._chips, "INTERPRET", "TRITON" in said)
    with pytest.raises(SystemExit, match="2"):
        command.main(arguments)
    out, error = capsys.readouterr()
    assert said in error and error.count("\n") == 1 and not out


def test_a_checkout_is_needed(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(stand_ins, "HELPERS", tmp_path)
    monkeypatch.setattr(stand_ins._chips, "INTERPRET", False)
    with pytest.raises(SystemExit, match="2"):
        command.main([])
    assert f"no stand_in_cuda in {tmp_path}, expected a checkout" in capsys.readouterr().err
