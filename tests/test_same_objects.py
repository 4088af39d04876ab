"""Whether objects in dictionaries are still there: the function in C, and its definition."""

import sys

import pytest
import selection
from tiers import slow

from deit_fast import _same_objects


class A:
    pass


class B:
    pass


@pytest.fixture(params=["python", slow("c")])
def same(request):
    if request.param == "python":
        return _same_objects.same_objects_reference
    selection.compiler()
    found = _same_objects.same_objects()
    assert found is not _same_objects.same_objects_reference
    return found


def state():
    """Arguments, and what a test changes: an instance, a dictionary without keys, an owner."""
    a, without, owner = A(), {"x": 1}, {"w": [1], "b": None}
    arguments = (
        [a, B()], [A, B], [{}, without], ["forward", "call"],
        [owner, owner, {"p": 0.0, "q": 1}], ["w", "b", "p"], [owner["w"], None, 0.0], [2, 2, None],
    )  # fmt: skip
    arguments[6][2] = arguments[4][2]["p"]
    return arguments, a, without, owner


CHANGES = {
    "class": lambda a, without, owner: setattr(a, "__class__", B),
    "first key": lambda a, without, owner: without.update(forward=None),
    "second key": lambda a, without, owner: without.update(call=1),
    "one key for another": lambda a, without, owner: (without.pop("x"), without.update(call=1)),
    "an equal object": lambda a, without, owner: owner.update(w=[1]),
    "something for None": lambda a, without, owner: owner.update(b=0),
    "gone": lambda a, without, owner: owner.pop("w"),
    "renamed": lambda a, without, owner: owner.update(v=owner.pop("w")),
    "one more": lambda a, without, owner: owner.update(more=1),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change(same, name):
    arguments, *things = state()
    assert same(*arguments) is True
    CHANGES[name](*things)
    assert same(*arguments) is False


def test_other_keys_where_their_number_is_free(same):
    arguments, *_ = state()
    arguments[4][2]["r"] = 2
    assert same(*arguments) is True
    arguments[4][2]["p"] = 0
    assert same(*arguments) is False


def test_references_are_not_kept(same):
    arguments, a, without, owner = state()
    things = (a, without, owner, owner["w"], arguments[0], A)
    before = [sys.getrefcount(thing) for thing in things]
    for _ in range(100):
        assert same(*arguments)
    assert [sys.getrefcount(thing) for thing in things] == before


@pytest.mark.parametrize("error", [RuntimeError, OSError])
def test_without_a_compiler_it_is_python(monkeypatch, error):
    def fails(*args):
        raise error("Failed to find C compiler")

    monkeypatch.setattr("triton.runtime.build.compile_module_from_src", fails)
    _same_objects.same_objects.cache_clear()
    try:
        assert _same_objects.same_objects() is _same_objects.same_objects_reference
    finally:
        _same_objects.same_objects.cache_clear()


@pytest.mark.slow
def test_wrong_arguments_raise():
    selection.compiler()
    same = _same_objects.same_objects()
    with pytest.raises(TypeError, match="expected 8 arguments"):
        same([])
    with pytest.raises(TypeError, match="expected lists"):
        same(*[()] * 8)
