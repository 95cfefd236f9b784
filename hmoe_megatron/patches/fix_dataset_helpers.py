"""Compiled dataset helpers, in a wheel without what compiles them."""

import os

from hmoe_megatron.patches.registry import patch, replace


@patch("fix")
def dataset_helpers():
    """compile_helpers() runs `make` in the package, and the wheel of Megatron has the compiled helpers but no Makefile:
    the run would end there. Without a Makefile there is nothing to compile."""
    from megatron.core.datasets import utils

    if os.path.exists(os.path.join(os.path.dirname(utils.__file__), "Makefile")):
        return False
    return replace(utils, "compile_helpers", lambda: None)
