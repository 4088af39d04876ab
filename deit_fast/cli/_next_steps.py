"""What `deit-fast info` ends with: what is missing here, and what to do next."""

import re
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

# the extras that a user meets, and what each is for
EXTRAS = {
    "export": "deit-fast export --format onnx",
    "train": "train --tensorboard, data sets of Hugging Face, plots of analyse",
    "parquet": "classify --out FILE.parquet",
    "hf": "deit_fast.integrations.huggingface",
    "ray": "deit_fast.integrations.ray",
    "serve": "examples/serve_http.py",
}


def extras() -> dict[str, dict[str, str | None]]:
    """{extra: {package: its version, None where it is missing}}; empty without an installation."""
    found: dict[str, dict[str, str | None]] = {name: {} for name in EXTRAS}
    try:
        lines = requires("deit_fast") or []
    except PackageNotFoundError:
        return {}
    for line in lines:
        package = re.match(r"[\w.-]+", line)
        extra = re.search(r"extra == ['\"]([\w-]+)['\"]", line)
        if package and extra and extra[1] in found:
            found[extra[1]][package[0]] = _version(package[0])
    return found


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def next_steps(found: dict[str, Any], has_nvidia_driver: bool) -> list[str]:
    """Sentences about what to do next on this machine.

    Args:
        found: What `deit-fast info --json` writes.
        has_nvidia_driver: Whether the machine has NVIDIA's driver.
    """
    steps = []
    if found["excluded"]:
        names = ", ".join(found["excluded"])
        steps.append(f"DEIT_FAST_EXCLUDE leaves to PyTorch: {names}. Unset it to use the kernels.")
    if found["gpu"] is None:
        if has_nvidia_driver:
            why = "is built without CUDA" if found["cuda"] is None else "cannot use it"
            steps.append(
                f"This machine has NVIDIA's driver, but this PyTorch {why}: install one that "
                "fits the driver (pytorch.org), and see nvidia-smi."
            )
        steps.append(
            "On this CPU PyTorch computes everything: deit-fast demo, deit-fast classify "
            "IMAGE and deit-fast bench MODEL run here. The kernels need an NVIDIA GPU."
        )
    elif tuple(found["capability"]) < (7, 0):
        steps.append("The kernels need compute capability 7.0: PyTorch computes everything here.")
    elif tuple(found["capability"]) >= (8, 0) and not any(t["choices"] for t in found["tuned"]):
        steps.append(
            "No choices are measured for this GPU: deit-fast tune --model deit_base_distilled "
            "(some minutes) finds the fastest. Until then rules decide."
        )
    else:
        steps.append("deit-fast bench deit_base_distilled measures what this GPU gains.")
    for table in found["tuned"]:
        if table["problem"]:
            steps.append(f"The {table['whose']} tuned table is ignored: delete it and tune again.")
    for extra, packages in found["extras"].items():
        if missing := [name for name, installed in packages.items() if installed is None]:
            steps.append(
                f"For {EXTRAS[extra]}: pip install 'deit_fast[{extra}]' "
                f"({', '.join(missing)} missing)."
            )
    return steps
