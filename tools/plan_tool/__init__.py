"""Behind tools/plan_placement.py: what to plan for, from flags, a run or measured loads. Imports no torch.

model_flags.py  the flags of a model that matter
model.py        the layers and ranks that they describe
loads.py        measured loads from JSON lines
command.py      from the tool's flags to what it prints and writes
compare.py      plans for the same loads beside each other, as tables
picture.py      a layer's plans as PNG
"""
