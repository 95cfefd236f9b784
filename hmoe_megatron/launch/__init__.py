"""How a run is started, on one node or many, and started again after a fault.

`nodes`: which nodes there are; `mpi`: ranks that mpirun started. Behind `tools/launch.py`, none of which needs torch:

    node 0                                   every node, 0 too
    coordinator ── JSON lines over TCP ───── node ── processes ── ranks
    when to start, `policy`: again or not    starts, watches and ends them

The coordinator alone counts attempts and decides, so that no two nodes can differ; it outlives every attempt.
"""
