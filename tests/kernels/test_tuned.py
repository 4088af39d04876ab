"""Tuned tables: what is found in them; unusable ones are named and ignored."""

import json
import warnings
from pathlib import Path

import pytest
import torch

from deit_fast.kernels import _tuned, linear
from deit_fast.kernels._chips import Chip, simulate_device
from deit_fast.kernels.attention.configs import RESIDENT_CONFIG
from deit_fast.kernels.layer_norm_linear import uses_row_stats
from deit_fast.kernels.layer_norm_mlp.configs import HOPPER_CONFIGS as FUSED_CONFIGS
from deit_fast.kernels.linear import configs
from deit_fast.kernels.linear.configs import AMPERE_CONFIGS, HOPPER_CONFIGS, epilogue_name

CHIP = Chip("NVIDIA H9000", (9, 0), 132)
BEFORE = Path(__file__).parents[1] / "data" / "before_0.1" / "tuned" / "h100-80gb-hbm3.json"
SHAPE = {"K": 64, "N": 128, "dtype": "float16", "epilogue": "bias"}
CUBLAS = {"implementation": "cublas"}


def row(M=1000, op="linear", shape=SHAPE, choice=CUBLAS):
    shape = {"M": M} | shape if isinstance(shape, dict) else shape
    return {"op": op, "shape": shape, "choice": choice, "ms": 0.1, "others": {}}


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes the user's table, for CHIP."""
    monkeypatch.setenv("DEIT_FAST_CACHE", str(tmp_path))
    path = tmp_path / "tuned" / "h9000.json"
    path.parent.mkdir()

    def write(*rows, **header):
        table = {"gpu": CHIP.name, "capability": [9, 0], "choices": list(rows)} | header
        path.write_text(json.dumps(table))
        _tuned.forget()
        return path

    yield write
    _tuned.forget()


def linear_name(activation, bias=False, residual=False, row_stats=False):
    return epilogue_name(activation, bias, residual, False, False, row_stats)


def find(M, op="linear", **changed):
    return _tuned.lookup(op, {"M": M} | SHAPE | changed, CHIP)


def test_nearest_within_a_factor_of_two(write):
    triton = {"implementation": "triton", **HOPPER_CONFIGS[0]}
    write(row(1000), row(3000, choice=triton))
    assert find(1000) == find(500) == find(1700) == CUBLAS
    assert find(1800) == find(6000) == triton
    assert find(499) is find(6001) is find(0) is None
    assert find(1000, N=256) is find(1000, op="attention") is None
    shape = tuple(SHAPE.items())
    with simulate_device(CHIP):
        assert _tuned._implementation("linear", shape, "cpu", None) == "triton"
        assert _tuned._implementation("linear", (*shape, ("x", 1)), "cpu", None) is None


def test_the_users_table_comes_before_the_shipped_one(write, tmp_path, monkeypatch):
    shipped = tmp_path / "shipped"
    shipped.mkdir()
    monkeypatch.setattr(_tuned, "SHIPPED", shipped)
    triton = {"implementation": "triton", **HOPPER_CONFIGS[0]}
    table = {"gpu": CHIP.name, "capability": [9, 0]}
    table["choices"] = [row(1000, choice=triton), row(9000, choice=triton)]
    (shipped / "h9000.json").write_text(json.dumps(table))
    write(row(1000))
    assert find(1000) == CUBLAS and find(9000) == triton


@pytest.mark.cpu("the table's chip is simulated")
def test_the_table_serves_the_operation(write, monkeypatch):
    """auto follows it; an implementation that is asked for only takes its configuration."""
    chosen = []
    real = configs.choose
    monkeypatch.setattr(configs, "choose", lambda *a: chosen.append(real(*a)) or chosen[-1])
    x, weight, bias = torch.randn(1000, 64).half(), torch.randn(128, 64).half(), torch.zeros(128)
    with simulate_device(CHIP):
        for choice, asked, expected in (
            (CUBLAS, "auto", "cublas"),
            (CUBLAS, "triton", "triton"),
            ({"implementation": "triton", **HOPPER_CONFIGS[8]}, "auto", "triton"),
            ({"implementation": "triton", **HOPPER_CONFIGS[8]}, "cublas", "cublas"),
        ):
            write(row(choice=choice))
            linear(x, weight, bias.half(), implementation=asked)
            assert chosen[-1][0] == expected
            if expected == choice["implementation"] == "triton":
                assert chosen[-1][1] == HOPPER_CONFIGS[8]
        with _tuned.disabled():
            linear(x, weight, bias.half())
            assert chosen[-1][1] == HOPPER_CONFIGS[2]


ATTENTION = {"N": 198, "L": 198, "d": 64, "dtype": "float16", "bias": False}
MLP = {"D": 192, "hidden": 768, "dtype": "bfloat16"}


def test_every_kind_of_choice(write):
    resident = {"implementation": "triton", **RESIDENT_CONFIG}
    fused = {"implementation": "fused", **FUSED_CONFIGS[0]}
    write(
        row(op="attention", shape=ATTENTION, choice=resident),
        row(op="layer_norm_mlp", shape=MLP, choice=fused),
        row(op="layer_norm_linear", shape={"K": 64}, choice={"implementation": "separate"}),
    )
    assert _tuned.lookup("attention", {"M": 768} | ATTENTION, CHIP) == resident
    assert _tuned.lookup("layer_norm_mlp", {"M": 1000} | MLP, CHIP) == fused


@pytest.mark.parametrize(
    "bad, reason",
    [
        (row(op="softmax"), r"choices\[1\] of softmax: no operation of that name"),
        (row(op=["linear"]), r"choices\[1\] is malformed \(TypeError"),
        (row(shape=[["K", 64]]) | {"shape": [["M", 1], ["K", [64]]]}, "is malformed"),
        (
            row(choice={"implementation": "triton", **HOPPER_CONFIGS[0], "BLOCK_M": 128.0}),
            "not made of whole numbers",
        ),
        (
            row(
                shape=SHAPE | {"epilogue": "bias+residual+row_stats"},
                choice={"implementation": "triton", **HOPPER_CONFIGS[2]},
            ),
            "narrower than the 64 columns of row statistics",
        ),
        ({"op": "linear"}, r"choices\[1\] is malformed \(KeyError\('shape'\)\)"),
        (row(M="many"), "M is 'many'"),
        (row(choice={"implementation": "cutlass"}), "implementation 'cutlass', expected one of"),
        (row(choice={"implementation": "triton"}), "no configuration"),
        (
            row(choice={"implementation": "triton", **AMPERE_CONFIGS[3]}),
            "a configuration that 'triton' does not offer",
        ),
        (row(shape=SHAPE | {"dtype": "int7"}), "dtype 'int7'"),
        (row(shape=SHAPE | {"epilogue": "folded+bias"}), "cuBLAS rounds the matmul.s result"),
        (
            row(
                op="attention", shape=ATTENTION | {"L": 578},
                choice={"implementation": "triton", **RESIDENT_CONFIG},
            ),
            "does not offer",
        ),
        (
            row(
                op="layer_norm_mlp", shape=MLP | {"D": 384},
                choice={"implementation": "fused", **FUSED_CONFIGS[0]},
            ),
            "expected D in",
        ),
    ],
)  # fmt: skip
def test_a_table_with_a_choice_that_cannot_be_is_ignored(write, bad, reason):
    path = write(row(), bad)
    with pytest.warns(UserWarning, match=reason) as caught:
        assert find(1000) is None
    assert str(path) in str(caught[0].message)


@pytest.mark.parametrize(
    "header, reason",
    [
        ({"gpu": "NVIDIA A100"}, "another chip's: gpu is 'NVIDIA A100', this one's 'NVIDIA H9000'"),
        ({"capability": [8, 0]}, r"another chip's: capability is \[8, 0\]"),
        ({"choices": None}, "expected an object with"),
    ],
)
def test_foreign_and_shapeless_tables_are_ignored(write, header, reason):
    path = write(row(), **header)
    with pytest.warns(UserWarning, match=reason) as caught:
        assert find(1000) is None
    assert str(path) in str(caught[0].message)


def test_a_table_under_compile(write):
    """It decides for parameters; a weight that is an input, whose sizes may be symbols, has the
    rule's choice."""
    shape = {"K": 64, "N": 48, "dtype": "float16"}
    write(row(op="layer_norm_linear", shape=shape, choice={"implementation": "separate"}))
    weight, x = torch.nn.Parameter(torch.zeros(48, 64)), torch.zeros(2, 64).half()

    def uses(x, w):
        return x + 1 if uses_row_stats(x, w) else x - 1

    def of_parameter(x):
        return uses(x, weight)

    with simulate_device(CHIP):
        for dynamic in (False, True):
            torch.compiler.reset()
            options = {"fullgraph": True, "dynamic": dynamic, "backend": "eager"}
            assert (torch.compile(of_parameter, **options)(x) == -1).all()
            compiled = torch.compile(uses, **options)
            assert (compiled(x, weight.detach()) == 1).all()
        assert (of_parameter(x) == -1).all()


@pytest.mark.parametrize("content", [b"", b'{"gpu": "NVID', b"\xff\xfe\x00", b"[1, 2]"])
def test_a_corrupt_table_is_ignored_once(write, content):
    path = write()
    path.write_bytes(content)
    _tuned.forget()
    with pytest.warns(UserWarning, match="h9000.json is ignored: "):
        assert find(1000) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert find(2000) is None


def test_where_tables_are(monkeypatch, tmp_path):
    monkeypatch.delenv("DEIT_FAST_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert _tuned.folder() == tmp_path / "deit_fast" / "tuned"
    assert _tuned.slug("NVIDIA H200") == "h200"
    assert _tuned.slug("NVIDIA A100-SXM4-80GB") == "a100-sxm4-80gb"


def test_shipped_tables_are_right():
    """Each is read as its own chip would; there may be none yet."""
    for path in _tuned.SHIPPED.glob("*.json"):
        header = json.loads(path.read_text())
        chip = Chip(header["gpu"], tuple(header["capability"]), 1)
        assert path.stem == _tuned.slug(chip.name)
        assert _tuned.read(path, chip)


def test_a_table_written_before_its_epilogues_were_renamed(tmp_path, monkeypatch):
    """Every row serves under today's name; the file keeps its own."""
    table = json.loads(BEFORE.read_text())
    chip = Chip(table["gpu"], tuple(table["capability"]), 132)
    rows = _tuned.read_rows(BEFORE, chip)
    assert len(rows) == len(table["choices"]) == 7
    names = {row["shape"].get("epilogue") for row in rows}
    assert names == {
        None, "folded+bias", "folded+bias+gelu",
        linear_name("none", bias=True, residual=True, row_stats=True),
    }  # fmt: skip
    for row in rows:
        (entries,) = _tuned._index([row], chip).values()
        assert entries == [(row["shape"]["M"], row["choice"])]
    monkeypatch.setattr(_tuned, "SHIPPED", BEFORE.parent)
    monkeypatch.setenv("DEIT_FAST_CACHE", str(tmp_path))
    _tuned.forget()
    for row in rows:
        assert _tuned.lookup(row["op"], row["shape"], chip) == row["choice"]
    written = [json.loads(shape).get("epilogue") for _, shape, _ in _tuned.chosen(chip.name)]
    assert written.count("bias+residual+moments") == 2
    _tuned.forget()


def test_an_old_name_does_not_let_a_choice_pass_that_cannot_be(write):
    narrow = {"implementation": "triton", **HOPPER_CONFIGS[2]}
    path = write(row(shape=SHAPE | {"epilogue": "bias+moments"}, choice=narrow))
    with pytest.raises(ValueError, match="narrower than the 64 columns of row statistics"):
        _tuned.read(path, CHIP)
