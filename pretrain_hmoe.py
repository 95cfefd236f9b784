"""Train a language model whose experts differ in width.

    torchrun --nproc-per-node 2 pretrain_hmoe.py --num-experts 8 --hmoe-widths arithmetic:9:23 ...

Flags: Megatron's own and ``--hmoe-*`` (``--help``). Without a GPU it runs on the CPU with gloo by itself.
"""

import sys

# Everything else is imported under the guard: a saving process may import this file again.
if __name__ == "__main__":
    from hmoe_megatron import host

    host.prepare_environment()

    from hmoe_megatron.training import main

    sys.exit(main())
