"""Launch plans: a function that runs in Python once, and after that as a list of steps in C++.

    @planned()          a method of a module whose calls become plans
    in_python()         a context without plans
    why_not(module)     why calls of its methods run in Python

The second call of a kind runs as written, like the first, and is recorded
(`deit_fast.kernels._plans`): the launches of Triton's kernels, PyTorch's operators below autograd,
and the tensors between them. The next calls of that kind run the steps without Python, the
dispatcher or Triton's launcher (kernels/csrc/plan.h): outputs come from PyTorch's allocator,
launches go to the current stream. In training a plan is one node of the autograd graph, and the
backward of the second call is recorded as well (`calls`).

A kind of call is (`guards`): the shapes, strides, dtypes, devices and alignment of the tensors and
of the parameters; the other arguments; grad mode, inference mode, autocast and PyTorch's
choice of attention; this package's settings; the classes, attributes, children, parameters and
hooks of the modules. A call that differs in any of them runs in Python. Parameters are read where
they lie at each call, so changes of their values are seen.

Python runs, and `why_not` says so: hooks inside a module, modules of other libraries, tensor
subclasses, operators whose result the host needs. It also runs under torch.compile and torch.jit,
torch.func, TorchDispatchModes, hooks for saved tensors, and for a gradient of a gradient.
"""

from .decorator import in_python, planned
from .kept import plans_of, why_not

__all__ = ["in_python", "planned", "plans_of", "why_not"]
