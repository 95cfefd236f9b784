"""Behind tools/profile_hardware.py: times the experts' compute and the all-to-all, and fits the cost model.

layers.py    layers to time: a grid to fit, and one kept apart
timing.py    the least time of each, in turns
fit.py       the profile with the least error
links.py     all-to-all inside a node and across
cpu.py       the processor's name
machine.py   all of it, on the machine at hand

What is there for a GPU (bf16, events, cache flush) has never been run on one.
"""
