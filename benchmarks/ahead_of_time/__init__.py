"""The ahead-of-time gate: every shipped kernel configuration compiled for chips that are not here.

kernel_modules.py  finds a kernel or a rule of an operation by its name
case.py            `Case`: one kernel in one configuration
cases/             every case, a module for each family of operations
compile.py         compiles a case and reads what ptxas reports
__main__.py        the command: a table, JSON, or a check
"""
