"""The one list of what is changed in Megatron and torch. A patch is a function whose docstring is its reason and whose
body calls `replace`; it runs when it is called, once a process."""

import functools
import sys
from collections.abc import Callable
from typing import NamedTuple

KINDS = {
    "cpu": "only where there is no GPU",
    "fix": "always: a defect of this Megatron, where it is there",
    "check": "only for --hmoe-check-only --world-size",
    "hook": "always: Megatron has no seam for it",
}


class Patch(NamedTuple):
    """kind: one of KINDS; reason: what fails without it."""

    kind: str
    reason: str
    run: Callable


class Replacement(NamedTuple):
    """`owner.attribute` was `before` until the patch of that name ran; "": what a test replaced."""

    patch: str
    owner: object
    attribute: str
    before: object


PATCHES: dict[str, Patch] = {}
REPLACED: list[Replacement] = []
DONE: dict[str, bool] = {}  # by name: whether it was needed. False put here before it runs leaves a patch out
_running: list[str] = []


def patch(kind: str, each: bool = False):
    """Decorator: register the function under its name. The docstring says what fails without it.

    Calling it runs it unless it has run in this process, and returns whether it is in force: a body returns False where
    nothing needs it. each: it changes the object that it is called with, so it runs at every call.
    """
    assert kind in KINDS, kind

    def register(function):
        name = function.__name__
        assert function.__doc__, f"patch {name} gives no reason"

        @functools.wraps(function)
        def run(*args, **named) -> bool:
            if each or name not in DONE:
                _running.append(name)
                try:
                    DONE[name] = function(*args, **named) is not False
                finally:
                    _running.pop()
            return DONE[name]

        PATCHES[name] = Patch(kind, " ".join(function.__doc__.split()), run)
        return run

    return register


def replace(owner, attribute: str, after) -> None:
    """Set owner.attribute; that of a module also where one of Megatron's took the old value by `from x import y`."""
    before = getattr(owner, attribute)
    bindings = [(owner, attribute)]
    names_a_thing = not isinstance(owner, type) and not isinstance(before, bool | None)  # True is what others are too
    for name, module in list(sys.modules.items()) if names_a_thing else []:
        if name.startswith("megatron."):
            bindings += [
                (module, key)
                for key, value in list(vars(module).items())
                if value is before and (module, key) != (owner, attribute)
            ]
    for bound, key in bindings:
        REPLACED.append(Replacement(_running[-1] if _running else "", bound, key, before))
        setattr(bound, key, after)


def around(owner, attribute: str, function) -> None:
    """`replace` by `function`, which is handed the value before as its first argument."""
    stock = getattr(owner, attribute)
    replace(owner, attribute, functools.wraps(stock)(functools.partial(function, stock)))


def around_method(owner: type, attribute: str, function) -> None:
    """`around` for a method: `function` is handed the method before, bound to the object."""
    stock = getattr(owner, attribute)

    @functools.wraps(stock)
    def method(self, *args, **named):
        return function(functools.partial(stock, self), *args, **named)

    replace(owner, attribute, method)
