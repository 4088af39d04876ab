"""The code blocks of the README and the manual: found, checked, and run.

A page's ```python blocks run in order, in one namespace, in a folder that `prepare` filled. What is
for a GPU runs on the CPU (`on_cpu`); weights that are not in the package are random, of a model two
blocks deep (`without_downloads`). The commands of ```bash blocks are parsed by the programs' own
parsers. A comment of HTML on the line before a block says otherwise:

    <!-- test: run -->              the bash block's commands run as well: `deit-fast` in this
                                    process, so that it finds the random weights, others in bash
    <!-- test: skip, REASON -->     nothing is done with the block
    <!-- test: setup                python that no reader sees, up to the closing arrow
    photos = ...
    -->
"""

import argparse
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import timm

import deit_fast
from benchmarks.stages.plan import NAMES as STAGES
from deit_fast import cli

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
LANGUAGES = {"python", "bash", "text", "json", "toml", "yaml", "dockerfile"}
PHOTOS = Path(deit_fast.__file__).parent / "data"
# of programs that are not ours nothing is checked
OTHERS = {
    ".", "actionlint", "apt", "cd", "chmod", "cp", "curl", "docker", "export", "git", "head",
    "kill", "ln", "ls", "mkdir", "mkdocs", "mypy", "nvidia-smi", "pre-commit", "ray", "rm", "ruff",
    "scp", "source", "ssh", "sudo", "tar", "tensorboard", "unzip", "wget",
}  # fmt: skip


@dataclass
class Block:
    page: Path
    line: int  # of its first line of code
    language: str
    text: str
    directive: str = ""

    def __str__(self):
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page):
    """The page's fenced blocks, and its hidden setups as python blocks."""
    found, directive, lines = [], "", page.read_text().splitlines()
    number = 0
    while number < len(lines):
        line = lines[number].strip()
        number += 1
        if comment := re.fullmatch(r"<!-- test: (.*?)( -->)?", line):
            if comment[2]:
                directive = comment[1]
                continue
            end = lines.index("-->", number)
            found.append(Block(page, number + 1, "python", _dedent(lines[number:end]), "setup"))
            number = end + 1
        elif fence := re.fullmatch(r"(```+)\s*([\w-]*).*", line):
            end = next(i for i in range(number, len(lines)) if lines[i].strip() == fence[1])
            code = _dedent(lines[number:end])
            found.append(Block(page, number + 1, fence[2], code, directive))
            number = end + 1
        if line:
            directive = ""
    return found


def _dedent(lines):
    width = min((len(line) - len(line.lstrip()) for line in lines if line.strip()), default=0)
    return "\n".join(line[width:] for line in lines)


def check_directives(page):
    for block in blocks(page):
        assert block.language in LANGUAGES, f"{block}: a block of {block.language or 'no language'}"
        known = r"run|parse|setup|skip, .+" if block.language == "bash" else r"setup|skip, .+"
        assert re.fullmatch(known, block.directive or "skip, -"), f"{block}: {block.directive}"


# What runs


def prepare(folder):
    """Small files under the names that the pages use."""
    photos = sorted(PHOTOS.glob("*.jpg"))
    (folder / "photos").mkdir()
    for photo in photos:
        shutil.copy(photo, folder / "photos")
    shutil.copy(PHOTOS / "cat.jpg", folder)
    for split, copies in (("train", 8), ("val", 2)):
        for photo in photos[:2]:
            kind = folder / "data" / split / photo.stem
            kind.mkdir(parents=True)
            for i in range(copies):
                shutil.copy(photo, kind / f"{i}.jpg")


def on_cpu(code):
    code = re.sub(r"([\"'])cuda(:\d+)?\1", '"cpu"', code.replace(".cuda()", ".cpu()"))
    return code.replace(".pin_memory()", "").replace("torch.cuda.synchronize()", "pass")


def without_downloads(monkeypatch):
    real = timm.create_model

    def create_model(model_name, pretrained=False, **kwargs):
        if model_name.startswith("local-dir:"):
            return real(model_name, pretrained, **kwargs)
        if pretrained and model_name.startswith(("deit", "vit", "cait")):
            kwargs.setdefault("depth", 2)
        return real(model_name, pretrained=False, **kwargs)

    monkeypatch.setattr(timm, "create_model", create_model)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def run_page(page, folder, monkeypatch):
    prepare(folder)
    monkeypatch.chdir(folder)
    without_downloads(monkeypatch)
    namespace = {"__name__": "__main__"}
    for block in blocks(page):
        if block.language == "python" and not block.directive.startswith("skip"):
            source = "\n" * (block.line - 1) + on_cpu(block.text)
            try:
                exec(compile(source, str(page), "exec"), namespace)
            except BaseException as error:
                pytest.fail(
                    f"{_where(error, block)}: {type(error).__name__}: {error}", pytrace=False
                )
        elif block.language == "bash" and block.directive == "run":
            for line, command in commands(block):
                failed = _run(command)
                assert not failed, f"{page.relative_to(ROOT)}:{line}: {command}\n{failed}"


def _where(error, block):
    trace, line = error.__traceback__, getattr(error, "lineno", None) or block.line
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == str(block.page):
            line = trace.tb_lineno
        trace = trace.tb_next
    return f"{block.page.relative_to(ROOT)}:{line}"


def _run(command):
    words = shlex.split(command, comments=True)
    if words[0] == "deit-fast" and not {"&&", "|", ">"} & set(words):
        try:
            code = cli.main(words[1:])
        except SystemExit as stopped:
            code = stopped.code
        return code and f"exit code {code}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command], capture_output=True, text=True
    )
    return done.returncode and f"exit code {done.returncode}\n{done.stderr[-2000:]}"


# What is parsed


def commands(block):
    """(line, command) of the block's logical lines."""
    text, first = "", block.line
    for number, line in enumerate(block.text.splitlines(), block.line):
        first = first if text else number
        text += line
        if text.endswith("\\"):
            text = text[:-1]
            continue
        if shlex.split(text, comments=True):
            yield first, text
        text = ""


def simple_commands(command):
    """The words of each command of a line: of `A=1 f x && g | h > out`, [f, x], [g], [h]."""
    lexer = shlex.shlex(command, posix=True, punctuation_chars="&|;<>()")
    lexer.whitespace_split = True
    words, skip = [], False
    for token in lexer:
        if set(token) <= set("&|;()"):
            if words:
                yield words
            words = []
        elif skip or set(token) <= set("<>"):
            skip = not skip
        elif words or not re.fullmatch(r"\w+=.*", token):
            words.append(token)
    if words:
        yield words


class _Parsed(BaseException):
    pass


def parse_command(words, monkeypatch):
    """Raises AssertionError where the program does not take these words."""
    program, args = words[0].rpartition("/")[2], words[1:]
    if program == "torchrun":
        rest = args.index("-m")
        program, args = "python", args[rest:]
    if program == "time":
        return parse_command(args, monkeypatch)
    if program in ("python", "python3") and args[:2] == ["-m", "pytest"]:
        program, args = "pytest", args[2:]
    if program == "deit-fast" or args[:2] == ["-m", "deit_fast"] and program == "python":
        return _parsed_by(cli.build_parser().parse_args, args[2:] if program == "python" else args)
    if program == "pytest":
        return _pytest(args)
    if program == "pip":
        return _pip(args)
    if program == "on_gpu.sh":
        return _stages(args)
    if program == "python" and args[0] == "-m":
        name = args[1]
        if name == "benchmarks.stages":
            return _stages(args[2:])
        if name.split(".")[0] in ("benchmarks", "studies", "deit_fast"):
            return _module(name, args[2:], monkeypatch)
        return None
    if program == "python" and args[0].endswith(".py"):
        if (ROOT / args[0]).exists():
            return _program(ROOT / args[0], args[1:], monkeypatch)
        assert "/" not in args[0], f"no program {args[0]}"
        return None
    assert program in OTHERS or program.startswith("python"), f"unknown program {program}"


def _parsed_by(parse, args):
    if "..." in args:  # of a command that is shown elsewhere
        return
    try:
        parse(args)
    except SystemExit as error:
        assert not error.code, f"does not parse: {' '.join(args)}"


def _stages(names):
    unknown = set(names).difference(STAGES)
    assert not unknown, f"no stage {', '.join(unknown)}"


def _module(name, args, monkeypatch):
    file = ROOT.joinpath(*name.split("."))
    file = file / "__main__.py" if file.is_dir() else file.with_suffix(".py")
    assert file.exists(), f"no module {name}"
    _program(file, args, monkeypatch, name)


def _program(file, args, monkeypatch, module=None):
    """Run the program as far as its parser's answer."""
    real = argparse.ArgumentParser.parse_args

    def parse_args(parser, args=None, namespace=None):
        real(parser, args, namespace)
        raise _Parsed

    parsers = ("argparse", "parser_of(")
    if file.name != "__main__.py" and not any(p in file.read_text() for p in parsers):
        # it would run
        assert not args, f"{file.name} takes no arguments"
        return
    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        patch.setattr(sys, "argv", [str(file), *args])
        patch.syspath_prepend(ROOT)
        try:
            if module is None:
                runpy.run_path(str(file), run_name="__main__")
            else:
                runpy.run_module(module, run_name="__main__")
        except _Parsed:
            return
        except SystemExit as error:
            assert not error.code, f"does not parse: {' '.join(args)}"
    raise AssertionError(f"{file.relative_to(ROOT)} parsed nothing")


def _pip(args):
    text = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1]
    extras = re.findall(r"(?m)^(\w+) = \[", text.split("\n[")[0])
    for arg in args:
        for names in re.findall(r"(?:^\.|deit_fast)\[([\w,-]+)\]", arg):
            unknown = set(names.split(",")).difference(extras)
            assert not unknown, f"no extra {', '.join(unknown)}"


def _pytest(args):
    """Options and paths exist. The options of benchmarks/ are among them only for its tests."""
    known = pytest_options() if any(arg.startswith("--") for arg in args) else ()
    for arg in args:
        option = arg.split("=")[0]
        if option.startswith("--"):
            assert any(option == name or name.startswith(option) for name in known), option
        elif re.match(r"(benchmarks|tests)/", arg):
            assert (ROOT / arg.split("::")[0]).exists(), arg


_OPTIONS = []


def pytest_options():
    if not _OPTIONS:
        for folder in ("benchmarks", "tests"):
            command = [sys.executable, "-m", "pytest", "--help", folder]
            done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
            _OPTIONS.extend(re.findall(r"(?<![\w-])--[\w-]+", done.stdout))
    return _OPTIONS
