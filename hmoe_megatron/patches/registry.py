"""The list of patches. A patch is a function whose docstring is its reason and whose body calls `replace`."""
import sys
from collections.abc import Callable
from typing import NamedTuple

PATCHES: dict[str, Callable[[], None]] = {}


class Replacement(NamedTuple):
    """`owner.attribute` was `before` until the patch of that name ran."""
    patch: str
    owner: object
    attribute: str
    before: object


REPLACED: list[Replacement] = []
_running = ""


def patch(function):
    """Register `function` under its name. The docstring says what fails without it."""
    assert function.__doc__, f"patch {function.__name__} gives no reason"
    PATCHES[function.__name__] = function
    return function


def run(name):
    """Run one patch and note what it replaced in REPLACED."""
    global _running
    _running = name
    PATCHES[name]()


def replace(owner, attribute, after):
    """Set owner.attribute, also where a Megatron module already took the old value by `from x import y`."""
    before = getattr(owner, attribute)
    bindings = [(owner, attribute)]
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron."):
            bindings += [(module, key) for key, value in list(vars(module).items())
                         if value is before and (module, key) != (owner, attribute)]
    for bound, key in bindings:
        REPLACED.append(Replacement(_running, bound, key, before))
        setattr(bound, key, after)
