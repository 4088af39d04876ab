"""The tasks of each operation, made from one recorded call of it: a module for each operation."""
