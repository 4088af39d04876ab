"""`kernels/` installs as `deit_fast.kernels`; the rest of the packaging is in pyproject.toml."""

from setuptools import find_packages, setup

kernels = ["kernels", *(f"kernels.{name}" for name in find_packages("kernels"))]

setup(
    packages=find_packages(include=["deit_fast", "deit_fast.*"])
    + [f"deit_fast.{name}" for name in kernels],
    package_dir={"deit_fast": "deit_fast", "deit_fast.kernels": "kernels"},
)
