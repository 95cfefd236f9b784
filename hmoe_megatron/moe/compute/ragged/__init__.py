"""Experts of unequal width in one launch a product, on a GPU: Triton kernels, their schedule, their autograd node.

Of a rank's piece e with m rows and width F, rows x [m, H], probabilities p [m], weights W1 [2 F, H] (gate above up) and
W2 [H, F], all pieces of a matrix one behind the other in one tensor:

    up             [g | u] = x W1^T, h = p silu(g) u      one product of depth H, SwiGLU before it is stored
    down           y = h W2^T                             depth F
    hidden grad    dh = dy W2                             depth H
    activation     dg, du, dp, h again                    by element, a program owns whole rows
    fc2 grad       dW2 = dy^T h                           depth m; written, or added to Megatron's main_grad
    fc1 grad       dW1 = [dg | du]^T x                    depth m; likewise
    input grad     dx = [dg | du] W1                      depth 2 F

Files: ``tiles`` (what layers, with which tiles), ``schedule`` (which program computes which tile), ``blocks`` (what
kernels share), ``row_products``, ``weight_products`` and ``activation`` (kernels), ``launches`` (their arguments),
``experts`` (the autograd node and the backend), ``self_test`` (whether this device computes them right).

Letters in kernels: E pieces, H hidden size, F width of a piece, m its rows, BM x BN a tile, BK its step in depth.
"""
