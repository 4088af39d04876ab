"""The parsers of deit-fast: light, of one screen, and helpful about what is wrong."""

import argparse
import os
import resource
import shlex
import subprocess
import sys

import pytest

import deit_fast
from deit_fast import _names
from deit_fast._argparse import Parser
from deit_fast.cli import build_parser, main
from deit_fast.distill import evaluate
from deit_fast.kernels.classifier import FUSIONS
from deit_fast.kernels.distillation_loss import DISTILLATIONS
from deit_fast.kernels.quantize import FORMATS
from deit_fast.tune import options as tune_options

LINES, WIDTH = 50, 100  # a screen


def parsers(parser):
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from parsers(command)


@pytest.fixture(autouse=True)
def width(monkeypatch):
    monkeypatch.setenv("COLUMNS", str(WIDTH))


def fails(args, capsys):
    """What is printed about a wrong call."""
    with pytest.raises(SystemExit) as stopped:
        main(shlex.split(args))
    printed = capsys.readouterr()
    assert stopped.value.code == 2 and not printed.out
    return printed.err


EVERY = {parser.prog: parser for parser in parsers(build_parser())}


@pytest.mark.parametrize("prog", EVERY)
def test_help_fits_a_screen_and_ends_with_an_example(prog):
    lines = EVERY[prog].format_help().splitlines()
    assert len(lines) <= LINES and max(map(len, lines)) <= WIDTH
    examples = EVERY[prog].epilog.splitlines()
    assert examples[0] in ("Example:", "Examples:") and examples == lines[-len(examples) :]
    assert any(f"{prog} ".removeprefix("deit-fast ") in f"{line} " for line in examples[1:])


def example_lines():
    for prog, parser in EVERY.items():
        text = parser.epilog.replace("\\\n", " ")
        found = [line.strip() for line in text.splitlines()[1:] if line.startswith("  ")]
        assert found, prog
        yield from found


@pytest.mark.parametrize("line", list(example_lines()))
def test_examples_are_calls(line):
    """They parse: every option and choice in them exists."""
    words = shlex.split(line.split(" > ")[0])
    while words[0] != "deit-fast":
        assert words[0] in ("torchrun", "-m", "deit_fast", "--nproc-per-node", "8"), line
        words = words[1:] if words[0] != "deit_fast" else ["deit-fast", *words[1:]]
    assert build_parser().parse_args(words[1:]).command in line


def test_every_option_is_explained_somewhere(capsys):
    """--help names the settings of a recipe, --help-all explains them."""
    brief, full = (EVERY["deit-fast train"].format_help(brief) for brief in (True, False))
    assert "--weight-decay" in brief and "of matrices; not of biases and norms" not in brief
    assert "of matrices; not of biases and norms" in full
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--help-all"])
    assert stopped.value.code == 0 and capsys.readouterr().out == full
    for parser in EVERY.values():
        for action in parser._actions:
            assert not action.option_strings or action.option_strings[0] in parser.format_help()


def test_names_are_those_of_the_modules():
    """The kernels know torch and Triton alone: theirs are listed twice."""
    assert _names.HEADS == FUSIONS and set(_names.HEADS) == set(evaluate.HEADS)
    assert _names.DISTILLATIONS == DISTILLATIONS
    assert list(_names.QUANTIZED_FORMATS) == list(FORMATS)
    assert set(tune_options.DTYPES) < set(_names.DTYPES)
    assert _names.MODELS is deit_fast.NAMES
    assert all(name in dir(deit_fast) for name in (*_names.MODELS, _names.NANO))


@pytest.mark.parametrize(
    "args, message",
    [
        ("clasify", "argument COMMAND: invalid choice: 'clasify' (did you mean classify?)"),
        ("zzz", "'zzz', expected one of demo, classify, "),
        ("analyse tabel", "argument ANALYSIS: invalid choice: 'tabel' (did you mean table?)"),
        ("eval data --modle m", "unrecognized arguments: --modle (did you mean --model?)"),
        ("eval data --modle=m", "--modle=m (did you mean --model?)"),
        ("eval data --model m --zzz", "unrecognized arguments: --zzz\n"),
        ("bench m more", "unrecognized arguments: more\n"),
        ("export m --out o --format onxx", "argument --format: invalid choice: 'onxx' (did you"),
        ("export m --out o --format x", "'x', expected one of torch-export, aoti, onnx"),
        ("distill-store info", "the following arguments are required: STORE"),
        ("train data --out o --epochs x", "argument --epochs: invalid int value: 'x'"),
        ("", "the following arguments are required: COMMAND"),
    ],
)
def test_errors_suggest_what_was_meant(args, message, capsys):
    printed = fails(args, capsys)
    assert message in printed and printed.startswith("usage: deit-fast")
    assert len(printed.splitlines()) <= 3


def test_what_follows_two_dashes_is_no_option():
    args = build_parser().parse_args(["classify", "--topk", "3", "--", "--cat.jpg"])
    assert args.images == ["--cat.jpg"] and args.topk == 3


def test_help_comes_before_a_wrong_option(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["eval", "--modle", "--help"])
    assert stopped.value.code == 0 and "--model NAME" in capsys.readouterr().out


def test_usage_names_what_is_required():
    parser = Parser(prog="p")
    parser.add_argument("data", metavar="DATA")
    parser.add_argument("--out", required=True)
    parser.add_argument("--rare")
    assert parser.format_usage() == "usage: p --out OUT DATA [options]\n"


CODE = """
import sys, contextlib, io
from deit_fast import cli
from deit_fast.cli import build_parser, main
build_parser().format_help()
codes = []
for args in %r:
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        try:
            main(args.split())
        except SystemExit as stopped:
            codes.append(stopped.code)
print(codes, sorted({name.partition(".")[0] for name in sys.modules} & %r))
"""
HEAVY = {"torch", "timm", "numpy", "triton", "torchvision", "PIL", "rich", "safetensors"}


def test_torch_is_not_imported():
    calls = ["--help", "--version", "train --help", "train --help-all", "eval", "bench m --runs x"]
    calls += ["train d --out o --distill no", "clasify", "export m --format x --out o", "tune"]
    command = [sys.executable, "-c", CODE % (calls, HEAVY)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == "[0, 0, 0, 0, 2, 2, 2, 2, 2, 2] []\n", done.stdout + done.stderr


def test_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    printed = capsys.readouterr().out
    assert stopped.value.code == 0 and f"deit_fast {deit_fast.__version__}, torch 2." in printed
    assert "triton 3." in printed and f"Python {sys.version.split()[0]}" in printed


@pytest.mark.slow
@pytest.mark.parametrize("module", ["deit_fast", "deit_fast.tune"])
@pytest.mark.parametrize("args, code", [("--help", 0), ("--none", 2)])
def test_half_a_second(module, args, code):
    """Of CPU time, which a busy machine does not lengthen."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-m", module, args], capture_output=True, env=os.environ)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert done.returncode == code and seconds < 0.5
