"""The call of a kind that is recorded: it runs in Python and becomes a launch plan."""

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from deit_fast.kernels import _plan_library, _plans
from deit_fast.kernels._plan_recorder import Recorder, Step

from .guards import Seen, why_no_tensor
from .kept import plans_of

MOST_STALE = 8  # times that a method's modules may change before its calls stay in Python


def recorded_call(
    method: Callable, module: nn.Module, args: tuple, planned: Any, without: Sequence[str]
) -> Any:
    """`method(module, *args)`, after which there is a plan, or a reason why not."""
    if not any(map(_plans.has_kernels, args)):
        return method(module, *args)
    call = Call(method, module, args, planned, without)
    why = call.why_not()
    if why is not None:
        result = method(module, *args)
        call.refuse(why)
        return result
    if torch.is_grad_enabled() and any(t.requires_grad for t in call.inputs):
        results = _Recorded.apply(call, *call.inputs)
        return _put(call.shape, results)
    recorder = Recorder(call.inputs)
    result = _plans.record(recorder, method, module, *args)
    call.see()
    call.shape = recorder.end_forward(result)
    call.finish(recorder)
    return result


def _put(shape, results):
    """A result with tensors in the place of their numbers."""
    if isinstance(shape, tuple):
        return tuple(None if one is None else results[one] for one in shape)
    return results[shape]


class _Recorded(torch.autograd.Function):
    """A call with gradients: forward is recorded, and later its backward."""

    @staticmethod
    def forward(ctx, call, *inputs):
        ctx.save_for_backward(*call.tensors)
        aliases = [t.detach().requires_grad_(t.requires_grad) for t in call.tensors]
        recorder = Recorder([*aliases, *call.held])
        args = _filled(call.args, aliases)
        with torch.enable_grad():
            result = _plans.record(recorder, call.method, call.module, *args)
            call.see()
        flat = result if isinstance(result, tuple) else (result,)
        results = [t for t in flat if t is not None]
        call.shape = recorder.end_forward(result)
        ctx.call, ctx.recorder, ctx.inputs = call, recorder, [*aliases, *call.held]
        ctx.random = list(recorder.random.values())
        ctx.results = [t for t in results if t.requires_grad]
        if len(ctx.results) < len(results):
            recorder.refuse("some of its results have no gradient")
            ctx.mark_non_differentiable(*(t for t in results if not t.requires_grad))
        if not ctx.results:
            call.finish(recorder)
        ctx.which = [t.requires_grad for t in results]
        return tuple(t.detach() if t.requires_grad else t for t in results)

    @staticmethod
    def backward(ctx, *given):
        call, inputs = ctx.call, ctx.inputs
        upstream = [g.contiguous() for g, one in zip(given, ctx.which, strict=True) if one]
        if torch.is_grad_enabled():
            saved = [*ctx.saved_tensors, *ctx.random, *call.held]
            return None, *call.again(len(ctx.random), saved, upstream)
        if ctx.results is None:
            raise RuntimeError(
                "backward runs a second time through a graph that was freed: "
                "expected retain_graph=True the first time"
            )
        keep = torch._C._autograd._get_current_graph_task_keep_graph()
        wanted = [t for t in inputs if t.requires_grad]
        gradients = partial(
            torch.autograd.grad, ctx.results, wanted, upstream, keep, allow_unused=True
        )
        recorder, ctx.recorder = ctx.recorder, None
        with _without_hooks(call.held):
            if recorder is None:
                found = iter(gradients())
            else:
                recorder.start_backward(upstream)
                found = iter(_plans.record(recorder, gradients))
        grads = [next(found) if t.requires_grad else None for t in inputs]
        if recorder is not None:
            call.finish(recorder, grads)
        if not keep:
            ctx.results = None
        return None, *grads


@contextmanager
def _without_hooks(tensors: Iterable[Tensor]) -> Iterator[None]:
    """No hooks of these tensors run: the graph around this one will run them."""
    kept = [(t, t._backward_hooks) for t in tensors if t._backward_hooks]
    try:
        for t, _ in kept:
            t._backward_hooks = None
        yield
    finally:
        for t, hooks in kept:
            t._backward_hooks = hooks


class Call:
    """A call of a kind that has no plan yet.

    Args:
        method: of the module's class, as written.
        module: whose method it is.
        args: positional.
        planned: the method's plans, kernels/csrc/planned.h.
        without: names of children that the method does not touch.
    """

    def __init__(self, method, module, args, planned, without):
        self.method, self.module, self.args, self.planned = method, module, args, planned
        self.without = without
        self.tensors = [a for a in args if isinstance(a, Tensor)]
        self.held = self.seen().held
        self.inputs = [*self.tensors, *self.held]
        self.kind: Any = None
        self.shape: Any = None  # of the result: numbers in the place of tensors

    def see(self) -> None:
        """Note what the plan depends on, as it is now: before grad mode or a module changes."""
        device = self.tensors[0].device
        self.kind = _plan_library.loaded.Kind(device, self.args, self.seen().guards)

    def seen(self) -> Seen:
        """What the method reads of its modules, as they are now."""
        kept, name = plans_of(self.module).seen, self.method.__name__
        seen = kept.get(name)
        if seen is None or not seen.guards.hold():
            seen = kept[name] = Seen(self.module, name, self.without)
        return seen

    def why_not(self) -> str | None:
        """Why no plan can be made of it; None: it can be tried."""
        if self.planned.stale > MOST_STALE:
            return "its modules changed at nearly every call"
        return self.seen().why_not or next(filter(None, map(why_no_tensor, self.tensors)), None)

    def refuse(self, why: str) -> None:
        """Calls of this kind run in Python."""
        plans_of(self.module).reasons[self.method.__name__] = why
        if self.planned.stale <= MOST_STALE:
            if self.kind is None:
                self.see()
            self.planned.add(self.kind, None, [], None)

    def finish(self, recorder: Recorder, grads: Sequence | None = None) -> None:
        """Make the plans of what was recorded.

        Args:
            recorder: of forward, and of backward where there are gradients.
            grads: the gradient of each input; None: inference.
        """
        slots = grads and [None if g is None else recorder.slot_of(g) for g in grads]
        pair, held = None, []
        if recorder.why_not is None:
            try:
                pair, held = self._pair(recorder, slots)
            except RuntimeError as error:  # an argument that C++ does not take
                recorder.refuse(str(error))
        if pair is None:
            self.refuse(recorder.why_not or "")
        else:
            self.planned.add(self.kind, pair, held, self.shape)

    def _pair(self, recorder, grads):
        device, arguments = self.tensors[0].device, len(self.tensors)
        boundary = len(recorder.steps) if grads is None else recorder.backward_from
        forward, backward = recorder.steps[:boundary], recorder.steps[boundary:]
        saved: list[int] = []
        ends = [] if grads is None else [s for s in grads if s is not None]
        if grads is not None:
            made = {*recorder.upstream, *(slot for step in backward for slot in step.makes)}
            read = [slot for step in backward for slot in step.reads] + ends
            first = [*range(arguments), *recorder.random]
            saved = list(dict.fromkeys([*first, *(s for s in read if s not in made)]))
        used = {slot for step in forward for slot in step.reads} | set(saved)
        wanted = [i for i, s in enumerate(grads or ()) if s is not None]
        kept = [i for i in range(arguments, len(self.inputs)) if i in used or i in wanted]
        inputs = [*range(arguments), *kept]
        plan = _build(forward, inputs, recorder.outputs, saved, device)
        again = second = None
        if grads is not None:
            outputs = [-1 if grads[i] is None else grads[i] for i in inputs]
            second = _build(backward, [*saved, *recorder.upstream], outputs, (), device)
            again = partial(self.again, len(recorder.random))
            numbers = {slot: i for i, slot in enumerate(_numbered(forward, inputs))}
            saved = [numbers[slot] for slot in saved]
        held = [self.inputs[i] for i in kept]
        needed = arguments + len(recorder.random)
        return _plan_library.loaded.make_pair(plan, second, saved, needed, again), held

    @property
    def again(self) -> Callable:
        """Gradients that can be differentiated again: see `_again`, from `randoms` on."""
        constants = tuple(None if isinstance(a, Tensor) else a for a in self.args)
        places = [i for i, a in enumerate(self.args) if isinstance(a, Tensor)]
        return partial(_again, self.method, weakref.ref(self.module), constants, places)


def _again(method, module, constants, places, randoms, given, upstream):
    """Gradients of a call, with a graph of their own.

    Args:
        method: as in `Call`.
        module: a weak reference to it.
        constants: the arguments; a tensor's place holds None.
        places: of the tensors among the arguments.
        randoms: how many tensors of random numbers there are.
        given: the tensors among the arguments, the random ones, and last the parameters.
        upstream: the gradients of the results.
    """
    count = len(places)
    tensors, random = given[:count], given[count : count + randoms]
    others = given[count + randoms :]
    args = list(constants)
    for place, tensor in zip(places, tensors, strict=True):
        args[place] = tensor
    inputs = [*tensors, *others]
    with torch.enable_grad(), _Redrawn(random):
        result = method(module(), *args)
    results = [t for t in (result if isinstance(result, tuple) else (result,)) if t is not None]
    wanted = [t for t in inputs if t.requires_grad]
    with _without_hooks(others):
        found = torch.autograd.grad(results, wanted, upstream, create_graph=True, allow_unused=True)
    grads = iter(found)
    return [next(grads) if t.requires_grad else None for t in inputs]


class _Redrawn(TorchDispatchMode):
    """A mode in which random masks are those of an earlier call: 0 where they were 0."""

    def __init__(self, random: Iterable[Tensor]) -> None:
        super().__init__()
        self.random = iter(random)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.bernoulli_.float:
            return args[0].copy_(next(self.random) != 0)
        return func(*args, **(kwargs or {}))


def _filled(args, tensors):
    """The arguments with other tensors."""
    given = iter(tensors)
    return tuple(next(given) if isinstance(a, Tensor) else a for a in args)


# Steps


def _numbered(steps: Sequence[Step], inputs: Sequence[int]) -> list[int]:
    """The recorder's slots in the order in which a plan of these steps numbers them."""
    return [*inputs, *(slot for step in steps for slot in step.makes)]


def _build(steps, inputs, outputs, saved, device):
    """The plan of some steps.

    Args:
        steps: a part of the recorder's.
        inputs: the slots that are given, in order.
        outputs: the slots that are wanted; -1: none.
        saved: other slots that are read after it.
        device: the tensors'.
    """
    order = _numbered(steps, inputs)
    number = {slot: i for i, slot in enumerate(order)} | {-1: -1}
    after = {*outputs, *saved}
    last: list[list[int]] = []
    for step in reversed(steps):
        ended = [s for s in dict.fromkeys((*step.reads, *step.makes)) if s not in after]
        after.update(ended)
        last.append([number[slot] for slot in ended])
    builder = _plan_library.loaded.Builder(len(inputs), len(order), device)
    ranges = []
    for step, ended in zip(steps, reversed(last), strict=True):
        data = step.data
        if step.kind == "begin":
            ranges.append(builder.begin_range(*data))
        elif step.kind == "end":
            builder.end_range(ranges.pop())
        elif step.kind == "alloc":
            builder.alloc(ended, number[step.makes[0]], *data)
        elif step.kind == "view":
            builder.view(ended, number[step.makes[0]], number[data.slot], *data[1:])
        elif step.kind == "call":
            name, overload, arguments, makes = data
            arguments = [_renumbered(one, number) for one in arguments]
            builder.call(ended, name, overload, arguments, [number[slot] for slot in makes])
        elif step.kind == "launch":
            one = dict(data[0])
            one["pointers"] = [(at, number[slot], size) for at, slot, size in one["pointers"]]
            one["maps"] = [m | {"slot": number[m["slot"]]} for m in one["maps"]]
            builder.launch(ended, one)
        else:
            slots, run = data
            builder.interpreted(ended, [number[slot] for slot in slots], run)
    return builder.done([number[slot] for slot in outputs])


def _renumbered(argument, number):
    if isinstance(argument, tuple):
        return (number[argument[0]],)
    if isinstance(argument, list):
        return [_renumbered(one, number) for one in argument]
    return argument
