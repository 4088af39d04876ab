"""Whether objects in many dictionaries are still those that were there, compared in C.

The state of a model's modules is some 1400 things in 390 dictionaries: 5 us in C, 60 us in Python.
Triton compiles the function with the compiler that its own launchers need, once on a machine.
"""

import functools
import subprocess
from collections.abc import Callable
from operator import getitem, is_
from typing import Any

SOURCE = r"""
#include <Python.h>

/* Lists of the same length in pairs; returns True, False or NULL. Nothing of it runs Python. */
static PyObject *same_objects(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    if (count != 8) {
        PyErr_SetString(PyExc_TypeError, "expected 8 arguments");
        return NULL;
    }
    for (Py_ssize_t i = 0; i < 8; i++)
        if (!PyList_Check(args[i])) {
            PyErr_SetString(PyExc_TypeError, "expected lists");
            return NULL;
        }
    PyObject *typed = args[0], *types = args[1], *without = args[2], *absent = args[3];
    PyObject *owners = args[4], *keys = args[5], *values = args[6], *sizes = args[7];
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(typed); i++)
        if ((PyObject *)Py_TYPE(PyList_GET_ITEM(typed, i)) != PyList_GET_ITEM(types, i))
            Py_RETURN_FALSE;
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(without); i++)
        for (Py_ssize_t j = 0; j < PyList_GET_SIZE(absent); j++) {
            int found = PyDict_Contains(PyList_GET_ITEM(without, i), PyList_GET_ITEM(absent, j));
            if (found < 0)
                return NULL;
            if (found)
                Py_RETURN_FALSE;
        }
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(owners); i++) {
        PyObject *owner = PyList_GET_ITEM(owners, i);
        PyObject *size = PyList_GET_ITEM(sizes, i);
        if (size != Py_None && PyDict_Size(owner) != PyLong_AsSsize_t(size))
            Py_RETURN_FALSE;
        PyObject *value = PyDict_GetItemWithError(owner, PyList_GET_ITEM(keys, i));
        if (value == NULL && PyErr_Occurred())
            return NULL;
        if (value != PyList_GET_ITEM(values, i))
            Py_RETURN_FALSE;
    }
    Py_RETURN_TRUE;
}

static PyMethodDef methods[] = {
    {"same_objects", (PyCFunction)(void (*)(void))same_objects, METH_FASTCALL, NULL},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "deit_fast_same_objects", NULL, -1, methods,
};

PyMODINIT_FUNC PyInit_deit_fast_same_objects(void)
{
    return PyModule_Create(&module);
}
"""


def same_objects_reference(
    typed: list[Any],
    types: list[type],
    without: list[dict[str, Any]],
    absent: list[str],
    owners: list[dict[str, Any]],
    keys: list[str],
    values: list[Any],
    sizes: list[int | None],
) -> bool:
    """The definition of right, and what runs where there is no C compiler.

    Args:
        typed: objects.
        types: their classes.
        without: dictionaries.
        absent: keys that none of them has.
        owners: dictionaries, of which one may come several times.
        keys: one of each.
        values: what has to be there, itself.
        sizes: how many keys each of `owners` has; None: any number.
    """
    if list(map(type, typed)) != types or any(key in own for own in without for key in absent):
        return False
    lengths = (len(o) == size for o, size in zip(owners, sizes, strict=True) if size is not None)
    try:
        return all(lengths) and all(map(is_, map(getitem, owners, keys), values))
    except KeyError:
        return False


@functools.cache
def same_objects() -> Callable[..., bool]:
    """The function in C; in Python where the machine has no compiler."""
    from triton.runtime.build import compile_module_from_src

    try:
        module = compile_module_from_src(SOURCE, "deit_fast_same_objects")
    except (OSError, RuntimeError, ImportError, subprocess.CalledProcessError):
        return same_objects_reference
    return module.same_objects
