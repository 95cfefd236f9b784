"""Imports no torch, so that a process that has only this to do starts at once."""

import os


def in_another_process(source, asked):
    """Instead of `work.evaluate`."""
    if source.path == "dies":
        os._exit(9)
    if source.path == "refused":
        raise ValueError("this model is refused")
    return {"process": os.getpid(), "offline": os.environ["HF_HUB_OFFLINE"]}
