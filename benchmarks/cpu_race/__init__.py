"""DeiT on a CPU, in fp32: timm, torch.compile, ONNX Runtime, OpenVINO and ours, in turn.

    python -m benchmarks.cpu_race                       DeiT-Ti, S and B distilled, batch 1 and 8
    python -m benchmarks.cpu_race --models tiny --batches 1 --rounds 5 --out race.json

Each contender is a process of its own with the same number of threads. A contender's threads spin
for some milliseconds after a call, and would take a core from the next one; so between turns all
other processes are stopped. In a round each contender has one turn, in an order drawn anew: a call
that is not timed, which brings its weights back into the caches, then timed calls, whose median is
the turn's figure. Ratios are taken within a round.

    contenders   what is compared, and how each is built
    worker       the process of one contender
    turns        the driver: starts workers, gives them turns
    machine      what the CPU is, and what else ran on it meanwhile
    figures      the figures, their file
    operators    a command of its own: where a contender's time goes
"""
