"""pytest benchmarks/ --benchmark-only [options]: Table 5, latency and kernels on this machine."""

import pytest

from benchmarks import kernel_rows, suite
from benchmarks.measured import Chip
from benchmarks.operations import Operation
from benchmarks.options import Options, suits
from benchmarks.progress import Reporter
from benchmarks.report import comparison
from deit_fast.bench import results, tables
from deit_fast.kernels.cases import deit_cases

FLAGS = {
    "quick": "a small set that shows that the suite works, with some rows of Table 5; without a "
    "GPU the default",
    "all": "every row; on a CPU in fp32, unless --modes says otherwise",
    "again": "measure rows anew that this build has measured on this chip",
    "profile": "after each row: a trace, and the time of one step by kind of kernel",
    "against-playbook": "at the end: each kernel's predicted time beside the measured one",
}
NUMBERS = {
    "batch": "images a batch in the protocol of that name, or the largest that fits (256; on a CPU "
    "1 to 8, by the network's size); in training, instead of 64 and 256",
    "max-batch": "no batch is larger; ends the search for the largest (8 on a CPU)",
    "runs": "timed calls a row (30; on a CPU 10, of a slow network 5)",
    "warmup": "calls before them (10; on a CPU 1)",
}
NAMES = {
    "rows": "rows of Table 5 by network, timm name or family (convnet, transformer), or relatives",
    "modes": "modes, of deit_fast/bench/modes.py (all; on a CPU eager and deit_fast in fp32)",
    "protocols": "batch (a given batch, median), paper (largest batch that fits, mean); both, on a "
    "CPU batch",
    "out": "folder of the results (benchmarks/results; of the quick set on a CPU its folder quick)",
}


def pytest_addoption(parser):
    """The options of the suite."""
    group = parser.getgroup("deit_fast")
    for name, text in FLAGS.items():
        group.addoption(f"--{name}", action="store_true", help=text)
    for name, text in NUMBERS.items():
        group.addoption(f"--{name}", type=int, metavar="N", help=text)
    for name, text in NAMES.items():
        group.addoption(f"--{name}", metavar="NAMES" if name != "out" else "DIR", help=text)
    group.addoption("--minutes", type=float, metavar="N", help="start no new row after that")


def pytest_configure(config):
    """Reads the options; a bad one ends pytest."""
    try:
        config.bench_options = Options.parse(lambda name: config.getoption(f"--{name}"))
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None
    config.pluginmanager.register(Reporter(config), "deit_fast_progress")


def _label(value):
    return getattr(value, "network", getattr(value, "name", str(value)))


def pytest_generate_tests(metafunc):
    """Networks, modes, batches and implementations that the options choose."""
    options, requested = metafunc.config.bench_options, metafunc.fixturenames
    if "protocol" in requested:
        found = options.table5_rows()
        metafunc.parametrize(("protocol", "entry", "mode"), found, ids=_label)
    elif "entry" in requested:  # a network's modes one after the other: it is built once
        train = "train_batch" in requested
        relatives = metafunc.module.__name__.endswith("bench_relatives")
        modes = [m for m in options.modes if m.train == train]
        pairs = [
            (entry, mode)
            for entry in (options.relatives if relatives else options.networks(train))
            for mode in modes
            if suits(entry, mode) and options.compiles(entry, "", mode)
        ]
        metafunc.parametrize(("entry", "mode"), pairs, ids=_label)
    if "latency_batch" in requested:
        batches = [b for b in options.latency_batches if b <= options.max_batch]
        metafunc.parametrize("latency_batch", batches)
    if "train_batch" in requested:
        metafunc.parametrize("train_protocol", ("batch", "step"))
        metafunc.parametrize("train_batch", options.train_batches)
    if "compare" in requested:
        op = metafunc.module.__name__.rpartition("bench_")[2]
        others = getattr(metafunc.module, "OTHERS", ())
        cases = [
            (network, label, implementation, backward)
            for network in options.kernel_networks()
            for label in deit_cases(op, network, 1)
            for backward in ("", kernel_rows.FORWARD_BACKWARD)
            for implementation in options.implementations(op, others, bool(backward))
        ]
        ids = ["-".join(filter(None, case)) for case in cases]
        metafunc.parametrize("compare", cases, ids=ids, indirect=True)


def pytest_collection_modifyitems(config, items):
    """Gives pytest-benchmark the timer that replays the device's clock; Table 5 first if quick."""
    if config.bench_options.quick:
        items.sort(key=lambda item: item.path.stem != "bench_table5")
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=suite.REPLAY))


@pytest.fixture(scope="session")
def session(pytestconfig):
    """The run that all tests share."""
    try:
        pytestconfig.bench_suite = suite.Suite.start(pytestconfig.bench_options)
        for path in results.paths(pytestconfig.bench_suite.folder):
            results.load(path)  # before anything is measured
    except results.CorruptResults as error:
        pytest.exit(f"{error}; left untouched", returncode=4)
    return pytestconfig.bench_suite


@pytest.fixture
def compare(request, session, benchmark):
    """A function that times one implementation of an operation on one of DeiT's shapes.

    Its arguments are those of `operations.Operation`, without the name; `name` is another than the
    file's. Forward, or forward and backward.
    """
    network, label, implementation, backward = request.param
    op = request.module.__name__.rpartition("bench_")[2]
    batch = min(session.options.batch, session.options.max_batch)
    case = deit_cases(op, network, batch)[label]

    def run(fn, reference, make_inputs, name=op, reads=None, exact=None):
        def inputs(device):
            return make_inputs(**case, device=device)

        operation = Operation(name, fn, reference, make_inputs, reads, exact)
        session.measure_operation(
            benchmark, operation, inputs, network, label, implementation, bool(backward)
        )

    return run


def pytest_unconfigure(config):
    """Prints the tables last, after pytest's own summaries."""
    session = getattr(config, "bench_suite", None)
    if session is None:
        return
    console = tables.console()
    for title, shares, trace in session.profiles:
        console.print(tables.shares(title, shares))
        console.print(f"trace: {trace}", soft_wrap=True)
    kernels = [r for r in session.measured if isinstance(r, results.KernelRow)]
    models = [r for r in session.measured if isinstance(r, results.ModelRow)]
    if kernels and config.getoption("--against-playbook"):
        console.print(tables.kernels(kernels))
    if models:
        console.print(tables.models(models))
    if session.limits:
        limits = ", ".join(f"{name} {value:,.4g}" for name, value in session.limits.items())
        console.print(f"peak rates: {limits}", soft_wrap=True)
    if "table5" in session.files:
        chip = Chip(session.folder, {"table5": session.files["table5"]})
        for part in comparison.for_terminal(chip, session.table5_entries):
            console.print(part, soft_wrap=isinstance(part, str))
    name = session.hardware["gpu"] or f"{session.hardware['cpu']} (CPU)"
    console.print(f"measured on: {name}; results in {session.folder}", soft_wrap=True)
