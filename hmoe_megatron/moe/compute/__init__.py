"""Compute of one rank's expert pieces: one signature (``compute``), three backends, and the choice among them.

``reference``: one linear layer after the other. ``cpu``: one autograd node a layer, for machines without a GPU.
``ragged``: all pieces in one launch a product, for GPUs (``--hmoe-gemm-backend triton``).
"""
