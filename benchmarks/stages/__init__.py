"""`benchmarks/on_gpu.sh STAGE...`: what needs a GPU, in stages meant to take ten minutes each.

    plan.py      the stages: what each of them runs
    runner.py    runs them: environment, time left, logs
    __main__.py  the command

Standard library only: `deit_fast` need not be installed, and a checkout has no kernels in it.
"""
