"""Checkpoints: written atomically, with a manifest of their settings and hashes, which a load checks.

A checkpoint is Megatron's torch_dist directory with two more files: the placement plan, and the manifest, which holds
the model's settings and the SHA-256 of every other file. `directory` knows names and order on disk, `lock` keeps a
second run out, `manifest` and `settings` are what is compared, `reader` unpickles nothing it doesn't know, `together`
makes ranks fail as one. `saving` and `loading` stand around Megatron's save and load; `session` puts them in place.
"""
