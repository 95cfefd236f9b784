"""``make gpu``: one command on a machine with a GPU that proves and measures the project there.

``__main__`` runs the items in the order of their value, each in processes of its own with its own limit, prints every
row as soon as it is there, and writes gpu.json and gpu.md: ``correctness``, ``ffn``, ``steps``, ``runs``, ``rates``.
With ``--tiny`` every item runs on a CPU, on small shapes, for the tests.
"""
