"""Two cores are shared by all tests and by the ranks they start: one thread each."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402  (reads OMP_NUM_THREADS when it is imported)

torch.set_num_threads(1)
