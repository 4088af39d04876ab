"""Compiles a case without a GPU and reads what the compiler and ptxas report of it."""

import io
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from deit_fast.kernels._chips import SHARED_MEMORY_LIMIT, THREADS_LIMIT

from .case import Case
from .cases import cases
from .dtypes import TRITON_TYPE
from .kernel_modules import kernel_module

ARCHS = (70, 80, 89, 90)
ALIGNED = ("N", "K", "D", "C")  # sizes that are multiples of 16 in every DeiT
ALIGNED_STRIDES = ("_batch", "_row", "_head")
NOT_ALIGNED = (("attention", "N"), ("talking_heads", "N"))  # numbers of tokens
REGISTERS = 65_536  # of an SM
MOST_CTAS = 32  # of an SM


@dataclass(frozen=True)
class Row:
    """What the compiler made of a case.

    Attributes:
        op: Name of the operation.
        label: What tells the case from the operation's others.
        arch: Compute capability, 90 for 9.0.
        triton: Version of Triton.
        registers: Registers a thread.
        spill_bytes: Bytes a thread spills, loads and stores.
        shared_bytes: Shared memory of a CTA.
        ctas_per_sm: CTAs that an SM holds at once; 0 where the shared memory does not fit.
        wgmma: Asynchronous matrix instructions (sm_90).
        operands: Types that the other matrix instructions multiply, as PTX names them.
        waits_for_all: Dots that wait for every outstanding one.
        serialized: ptxas's remarks C75xx: it serialised asynchronous matrix instructions.
        asynchronous: Whether the matmuls must overlap the loads of their operands.
        megabytes: What one DeiT call at batch 256 must move.
        gflop: What its matmuls compute.
    """

    op: str
    label: str
    arch: int
    triton: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    ctas_per_sm: int
    wgmma: int
    operands: tuple[str, ...]
    waits_for_all: int
    serialized: tuple[str, ...]
    asynchronous: bool
    megabytes: float
    gflop: float


def compile_case(case: Case) -> Row:
    """Compile one case for its chip and read the report."""
    meta = dict(case.meta)
    options = {k: meta.pop(k) for k in ("num_warps", "num_stages", "maxnreg") if k in meta}
    source = _source(case, meta)
    said = io.StringIO()
    with knobs.compilation.scope(), knobs.nvidia.scope(), redirect_stdout(said):
        knobs.compilation.always_compile = True  # a cached kernel has no log
        knobs.nvidia.dump_ptxas_log = True
        compiled = triton.compile(source, target=GPUTarget("cuda", case.arch, 32), options=options)
    log, ptx, ttgir = said.getvalue(), compiled.asm["ptx"], compiled.asm["ttgir"]
    registers = int(re.search(r"Used (\d+) registers", log)[1])
    shared, threads = compiled.metadata.shared, 32 * compiled.metadata.num_warps
    return Row(
        op=case.op, label=case.label, arch=case.arch, triton=triton.__version__,
        registers=registers, spill_bytes=sum(map(int, re.findall(r"(\d+) bytes spill", log))),
        shared_bytes=shared, ctas_per_sm=_ctas(case.arch, registers, shared, threads),
        wgmma=ptx.count("wgmma.mma_async"),
        operands=tuple(sorted(set(re.findall(r"mma\S*\.sync\.\S*?\.(\w+)\.\1\b", ptx)))),
        waits_for_all=len(re.findall(r"warp_group_dot_wait.*pendings = 0", ttgir)),
        serialized=tuple(sorted(set(re.findall(r"C75\d\d", log)))),
        asynchronous=case.asynchronous, megabytes=case.bytes / 1e6, gflop=case.flops / 1e9,
    )  # fmt: skip


def _source(case, meta):
    kernel = getattr(kernel_module(case.op), case.kernel)
    constexprs = case.constexprs | meta
    signature = {}
    for name in kernel.arg_names:
        kind = case.signature.get(name)
        if kind is None:
            signature[name] = "constexpr"
            constexprs.setdefault(name, None)  # an optional pointer left out
        elif isinstance(kind, tuple):  # a tensor descriptor of a block
            dtype, *block = kind
            signature[name] = f"tensordesc<{TRITON_TYPE[dtype]}{block}>".replace(" ", "")
        else:
            signature[name] = kind if isinstance(kind, str) else f"*{TRITON_TYPE[kind]}"
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(signature.items())
        if _is_aligned(case.op, name, kind)
    }
    return ASTSource(kernel, signature, constexprs=constexprs, attrs=aligned)


def _is_aligned(op, name, kind):
    """Whether 16 divides the argument: torch's pointers, and the sizes of these shapes."""
    if kind.startswith("*"):
        return True
    is_size = name in ALIGNED or name.endswith(ALIGNED_STRIDES)
    return kind == "i32" and is_size and (op, name) not in NOT_ALIGNED


def _ctas(arch, registers, shared, threads):
    limit = SHARED_MEMORY_LIMIT[arch]
    if shared > limit:
        return 0
    by_memory = limit // max(shared, 1)
    return min(
        REGISTERS // (registers * threads), by_memory, MOST_CTAS, THREADS_LIMIT[arch] // threads
    )


def rows(
    archs: Iterable[int], ops: Iterable[str] | None = None, every: int = 1, in_turn: bool = False
) -> Iterator[Row]:
    """Compile the cases on all cores.

    Args:
        archs: Compute capabilities, 90 for 9.0.
        ops: Names of operations; None for all.
        every: Of a kernel's cases on a chip, compile the first of every so many.
        in_turn: Compile each kernel for one chip only, the next kernel for the next chip.

    Yields:
        A row for each case, in the cases' order.
    """
    chosen, seen = [], Counter()
    for case in cases(archs):
        kind = case.kernel, case.arch
        if (not ops or case.op in ops) and seen[kind] % every == 0:
            chosen.append(case)
        seen[kind] += 1
    if in_turn:
        chips = {kernel: sorted({arch for k, arch in seen if k == kernel}) for kernel, _ in seen}
        turns = {kernel: chips[kernel][i % len(chips[kernel])] for i, kernel in enumerate(chips)}
        chosen = [case for case in chosen if case.arch == turns[case.kernel]]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        yield from pool.map(compile_case, chosen, chunksize=1)
