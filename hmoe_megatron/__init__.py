"""HMoE, a Mixture of Experts whose experts differ in width (arXiv 2408.10681), on Megatron-Core.

Imports nothing: `tools/doctor.py` and `setup.py` read this where torch is missing or broken.
"""

__version__ = "0.1.0"
