"""Processes that spare the seconds of importing PyTorch, timm and pytest: each is forked from one
that has imported these, with the environment and the arguments that it is given.

    (done,) = forked.run(["pytest", "-q", ...])     # as python -m pytest -q ..., in folder cwd

As a script it is the process that they are forked from: it has no threads, and knows nothing of
deit_fast, Triton or the tests.
"""

import atexit
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

PRELOADED = "pytest", "timm", "torch.distributed", "torchvision"


def run(*commands, cwd=None, envs=None) -> list[subprocess.CompletedProcess]:
    """Start the commands at the same time and wait for all. A command is a module or the path of a
    script, and its arguments; `envs`: the environment of each, this process's by default. None may
    take more than five minutes."""
    with tempfile.TemporaryDirectory() as folder:
        asked = []
        for i, command in enumerate(commands):
            files = [os.path.join(folder, f"{i}.{name}") for name in ("out", "err")]
            env = dict(os.environ if envs is None else envs[i])
            asked.append([list(map(str, command)), files, env, str(cwd or os.getcwd())])
        server = _server()
        server.stdin.write(json.dumps(asked) + "\n")
        server.stdin.flush()
        codes = json.loads(server.stdout.readline())
        outputs = [[Path(file).read_text() for file in files] for _, files, _, _ in asked]
    return [
        subprocess.CompletedProcess(command, code, *texts)
        for command, code, texts in zip(commands, codes, outputs, strict=True)
    ]


_servers = []


def _server():
    if not _servers:
        drop = ("TRITON_INTERPRET", "PYTEST_")  # what the tests and xdist set
        env = {k: v for k, v in os.environ.items() if not k.startswith(drop)}
        started = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env,
            text=True, start_new_session=True,
        )  # fmt: skip
        atexit.register(started.wait)
        atexit.register(started.stdin.close)
        _servers.append(started)
    return _servers[0]


def _become(command, files, env, cwd):
    """In the child: what `python -m module ...` or `python script.py ...` is."""
    for fd, path in ((1, files[0]), (2, files[1]), (0, os.devnull)):
        flags = os.O_RDONLY if fd == 0 else os.O_WRONLY | os.O_CREAT
        opened = os.open(path, flags)
        os.dup2(opened, fd)
        os.close(opened)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", buffering=1)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    script = command[0].endswith(".py")
    first = str(Path(command[0]).parent) if script else cwd
    sys.path[0:1] = [first, *filter(None, env.get("PYTHONPATH", "").split(os.pathsep))]
    sys.argv = list(command)
    signal.alarm(300)
    if script:
        runpy.run_path(command[0], run_name="__main__")
    else:
        runpy.run_module(command[0], run_name="__main__", alter_sys=True)


def _serve():
    for module in PRELOADED:
        __import__(module)
    for line in sys.stdin:
        children = []
        for asked in json.loads(line):
            sys.stdout.flush()
            child = os.fork()
            if child == 0:
                return asked
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print(json.dumps(codes), flush=True)
    return None


if __name__ == "__main__":
    asked = _serve()
    if asked:
        _become(*asked)
