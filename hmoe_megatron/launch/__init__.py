"""How a run is started, on one node or many, and started again after a fault: torchrun's agent, with limits of its own.

`nodes`: which nodes there are; `mpi`: ranks that mpirun started. Behind `tools/launch.py`, in the order of a run:
`process` (signals, environment), `supervise` (a store at node 0, an agent on every node), `rendezvous` (all nodes meet
before an attempt, node 0 decides by `policy`), `agent` (starts and ends the ranks of a node, each through `rank`).
"""
