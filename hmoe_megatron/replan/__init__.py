"""Experts move to other ranks while training (--hmoe-replan-interval).

    proposal    a plan for measured loads, near the one in force
    decision    when a plan is looked for, and whether it is worth its moves
    transfer    the numbers of one weight from the ranks that hold them to those that will
    states      what an optimizer keeps of a weight
    moves       a change of plan: staged, checked, agreed on and switched layer by layer
    replanner   all of it between two training steps, and what is said of it

Parameters keep their shapes: every rank has room for more width than its share (--hmoe-replan-room), so buffers,
optimizers and their groups stay as they are.
"""
