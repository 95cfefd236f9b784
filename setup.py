"""Packaging. Ranges are here, the exact versions that were tried are in requirements.lock."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "hmoe_megatron/__init__.py").read_text(), re.M)[1]

INSTALL_REQUIRES = [
    "torch>=2.10",
    "megatron-core[training]>=0.19.2,<0.20",
    "numpy>=2.0",
    "scipy>=1.12",
    "sentencepiece>=0.2",
    "matplotlib>=3.9",
    "psutil>=5.9",
    "tensorboard>=2.17",
    "tqdm>=4.66",
]
# NVIDIA's Apex is built from its source; the package of that name in the registry is another project.
EXTRAS_REQUIRE = {
    "te": ["transformer-engine[pytorch]>=2.3"],
    "hf": ["transformers>=5.4", "safetensors>=0.5", "tokenizers>=0.22"],
    "data": ["pyarrow>=15"],
    # One version: its prompts are what makes numbers comparable.
    "eval": ["lm-eval==0.4.13"],
    "mpi": ["mpi4py>=4.0"],
    "dev": [
        "pytest>=8.3",
        "pytest-xdist>=3.6",
        "hypothesis>=6.100",
        "ruff>=0.9",
        "packaging>=24.2",
        "mpi4py>=4.0",
        "mpich>=4.2",
        "pyarrow>=15",
    ],
}

setup(
    name="hmoe-megatron",
    version=VERSION,
    description="Heterogeneous Mixture of Experts on Megatron-Core",
    license="Apache-2.0",
    python_requires=">=3.12",
    packages=[
        *find_packages(include=["hmoe_megatron", "hmoe_megatron.*"]),
        *("hmoe_megatron." + name for name in ["tools", *(f"tools.{room}" for room in find_packages("tools"))]),
    ],
    package_dir={"hmoe_megatron.tools": "tools"},
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS_REQUIRE,
)
