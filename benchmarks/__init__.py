"""The benchmarks: programs that need a checkout. README.md says which."""
