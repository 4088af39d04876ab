"""Steps in child processes: what one of them breaks, it breaks alone.

The parent imports everything and never touches the GPU; each step is a fork of it, in a session of
its own, that is killed when its time is over. A step that has parts tells which it has begun: when
the process dies, another one goes on with the parts that are left, and tries the broken one once
more at the end.
"""

import faulthandler
import importlib
import json
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from .context import Context, NotReady
from .plan import Step

LEAST_KILL = 15.0  # seconds that a part has before it is killed, others waiting behind it
GRACE = 10.0  # seconds over its budget that a step may take to end what it has begun


@dataclass
class Outcome:
    """How a step ended.

    Attributes:
        status: "done", "partial" (its time was over before its work), "failed" or "not begun".
        seconds: How long it took.
        summary: What its parts returned.
        notes: One line for each part that failed.
        broken: The parts that failed.
    """

    status: str
    seconds: float
    summary: str = ""
    notes: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)  # the parts that failed


def resolve(target: str) -> Callable:
    """The function that "module:name" names."""
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


def run(
    step: Step, make: Callable[[float], Context], budget: float, limit: float, log: Path,
    lost: Callable[[BaseException], bool], cores: set[int] | None = None,
) -> Outcome:  # fmt: skip
    """Run one step.

    Args:
        step: The step.
        make: `make(deadline)` is its context.
        budget: Seconds until it begins nothing new.
        limit: Seconds until it is killed.
        log: File for what it prints.
        lost: `lost(error)`: whether the device is of no more use to the process.
        cores: What it is pinned to; None: any.
    """
    began = time.monotonic()
    soft, hard = began + budget, began + limit
    context = make(soft)
    try:
        function = resolve(step.target)
        parts = resolve(step.parts)(context.small) if step.parts else [None]
    except Exception as error:
        return Outcome("failed", time.monotonic() - began, notes=[_line(error)])
    todo, done, failed, later, tried = list(parts), {}, {}, {}, set()
    while todo and time.monotonic() < soft:
        now = time.monotonic()
        kill = hard if len(todo) == 1 else min(hard, now + max(LEAST_KILL, 0.6 * budget))
        ended = _fork(function, context, todo, kill, log, lost, cores)
        done, later = done | ended.done, later | ended.later
        failed = {part: why for part, why in failed.items() if part not in ended.done}
        failed |= ended.failed
        todo = [p for p in todo if p not in {*ended.done, *ended.failed, *ended.later}]
        if ended.broke is not None and len(parts) > 1 and ended.broke not in tried:
            tried.add(ended.broke)
            todo.append(ended.broke)  # once more, in a process that it has not broken
    status = "failed" if failed else "done"
    if status == "done" and (todo or later or time.monotonic() >= soft):
        status = "partial"
    notes = [f"{part}: {why}" if part else why for part, why in failed.items()]
    notes += [f"{part}: {why}" if part else why for part, why in later.items()]
    notes += [f"{part}: not begun, no time left" for part in todo if part not in failed]
    summary = "; ".join(f"{part}: {text}" if part else text for part, text in done.items() if text)
    return Outcome(status, time.monotonic() - began, summary, notes, [p for p in failed if p])


@dataclass
class _Ended:
    done: dict = field(default_factory=dict)  # part -> summary
    failed: dict = field(default_factory=dict)  # part -> why
    later: dict = field(default_factory=dict)  # part -> why it was not ready
    broke: object = None  # the part that took its process with it, and was not killed


def _fork(function, context, parts, kill, log, lost, cores) -> _Ended:
    """One process for all `parts`, until it ends or `kill` passes."""
    read_end, write_end = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        os.close(read_end)
        _child(function, context, parts, write_end, kill, log, lost, cores)  # never returns
    os.close(write_end)
    ended, current, buffer, code = _Ended(), None, b"", None
    try:
        while True:
            left = kill - time.monotonic()
            ready, _, _ = select.select([read_end], [], [], max(0.0, min(left, 0.2)))
            if ready:
                chunk = os.read(read_end, 1 << 16)
                buffer += chunk
                *lines, buffer = buffer.split(b"\n")
                for line in lines:
                    current = _hear(json.loads(line), ended, current)
                if not chunk:
                    code = os.waitpid(pid, 0)[1]
                    break
            elif left <= 0:
                break
            else:  # a grandchild may hold the pipe when the process is long dead
                done, code_now = os.waitpid(pid, os.WNOHANG)
                if done:
                    code = code_now
                    break
    finally:
        _kill(pid)
        if code is None:
            os.waitpid(pid, 0)
        os.close(read_end)
    why = "killed: its time was over" if code is None else _death(code)
    if current is None and not (ended.done or ended.failed or ended.later):
        current = (parts[0],)  # died before it began
    if current is not None:
        ended.failed.setdefault(current[0], why)
        ended.broke = None if code is None else current[0]
    return ended


def _hear(message, ended, current):
    """One line of the child's. Returns (part,) while one is running, None between parts."""
    part = message["part"]
    if message["what"] == "begin":
        return (part,)
    if message["what"] == "end":
        ended.done[part] = message["summary"]
        return None
    if message["what"] == "later":
        ended.later[part] = message["why"]
        return None
    ended.failed[part] = message["why"]
    return (part,) if message["lost"] else None


def _death(code):
    if os.WIFSIGNALED(code):
        return f"the process died of {signal.Signals(os.WTERMSIG(code)).name}"
    return f"the process ended with status {os.WEXITSTATUS(code)}"


def _kill(pid):
    """The child and all of its session's group."""
    for victim in (lambda: os.killpg(pid, signal.SIGKILL), lambda: os.kill(pid, signal.SIGKILL)):
        try:
            victim()
        except (ProcessLookupError, PermissionError):
            pass


def _child(function, context, parts, pipe, kill, log, lost, cores):
    code = 1
    try:
        become_child(log, cores)
        faulthandler.enable()  # says where, in the log
        faulthandler.dump_traceback_later(max(0.1, kill - time.monotonic() - 0.5))

        def send(**message):
            os.write(pipe, json.dumps(message).encode() + b"\n")

        for i, part in enumerate(parts):
            if i and context.left() <= 0:
                break
            send(what="begin", part=part)
            try:
                summary = function(context) if part is None else function(context, part)
                send(what="end", part=part, summary=str(summary or ""))
            except NotReady as error:
                send(what="later", part=part, why=str(error))
            except BaseException as error:
                traceback.print_exc()
                gone = lost(error) or not isinstance(error, Exception)
                send(what="error", part=part, why=_line(error), lost=gone)
                if gone:
                    break
        else:
            code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # no exit handlers: they would wait for a device that may hang


def become_child(log: Path, cores: set[int] | None = None) -> None:
    """Of a process just forked: a session of its own, its output into the log, its cores."""
    os.setsid()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    if cores:
        os.sched_setaffinity(0, cores)


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[0][:300]
