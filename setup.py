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

COMMANDS = {
    "hmoe-pretrain": "pretrain_hmoe",
    "hmoe-launch": "hmoe_megatron.tools.launch",
    "hmoe-doctor": "hmoe_megatron.tools.doctor",
    "hmoe-get-corpus": "hmoe_megatron.tools.get_corpus",
    "hmoe-train-tokenizer": "hmoe_megatron.tools.train_tokenizer",
    "hmoe-preprocess": "hmoe_megatron.tools.preprocess_data",
    "hmoe-inspect-data": "hmoe_megatron.tools.inspect_data",
    "hmoe-plan": "hmoe_megatron.tools.plan_placement",
    "hmoe-profile": "hmoe_megatron.tools.profile_hardware",
    "hmoe-convert": "hmoe_megatron.tools.convert_checkpoint",
    "hmoe-evaluate": "hmoe_megatron.tools.evaluate",
    "hmoe-generate": "hmoe_megatron.tools.generate",
    "hmoe-run-report": "hmoe_megatron.tools.run_report",
    "hmoe-routing-report": "hmoe_megatron.tools.routing_report",
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
    py_modules=["pretrain_hmoe"],
    # A checkout has tools/ beside the package, a wheel in it: hmoe_megatron/tools.py.
    package_dir={"hmoe_megatron.tools": "tools"},
    package_data={"hmoe_megatron": ["py.typed"]},
    entry_points={"console_scripts": [f"{name} = {module}:main" for name, module in COMMANDS.items()]},
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS_REQUIRE,
)
