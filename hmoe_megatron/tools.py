"""tools/ as ``hmoe_megatron.tools``: a wheel has that directory here, a checkout beside the package."""

from pathlib import Path

_HERE = Path(__file__).resolve().parent
__path__ = [str(_HERE / "tools"), str(_HERE.parent / "tools")]
