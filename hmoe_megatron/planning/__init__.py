"""Behind tools/plan_placement.py: what to plan for, from flags, a run or measured loads. Imports no torch.

    model.py     the layers and ranks that a model's flags describe
    loads.py     measured loads from JSON lines
"""
