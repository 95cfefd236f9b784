"""The model card of an export: what it is, how it was trained, how it is used."""

from collections.abc import Sequence
from itertools import takewhile

from hmoe_megatron.hf.architectures import Native

# Of the run's flags those that say where files are on the machine that trained it; they stay there.
_PATHS = (
    "--save",
    "--load",
    "--data-path",
    "--train-data-path",
    "--valid-data-path",
    "--test-data-path",
    "--data-cache-path",
    "--tokenizer-model",
    "--vocab-file",
    "--merge-file",
    "--tensorboard-dir",
    "--wandb-save-dir",
    "--hmoe-run-dir",
    "--data-args-path",
    "--per-split-data-args-path",
    "--pretrained-checkpoint",
)


def model_card(form: Native, flags: Sequence[str], iteration: int, size_bytes: int, dtype: str, digest: str) -> str:
    """README.md of the exported directory."""
    model = form.model
    code = (
        "# modeling_hmoe.py and hmoe_layer.py in this directory are the model; read them before you trust them.\n"
        if form.code
        else f"# Every expert is padded with zeros to the widest: a stock {form.stock_name}.\n"
    )
    trust = ", trust_remote_code=True" if form.code else ""
    router = f"Top-{model.experts_per_token}" if model.router == "topk" else f"Top-P, p = {model.top_p}"
    layers = "\n".join(
        f"| {layer} | {', '.join(map(str, widths_E)) or 'dense'} |" for layer, widths_E in enumerate(model.widths)
    )
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [mixture-of-experts, hmoe]
---
# Heterogeneous mixture of experts

A decoder whose experts differ in width (HMoE, arXiv 2408.10681): {model.layers} layers, hidden size {model.hidden},
router {router}. Exported from iteration {iteration} of a training run of hmoe-megatron, {size_bytes / 1e6:,.1f} MB of
{dtype.removeprefix("torch.")}; SHA-256 over all tensors `{digest}`, of each tensor in `hmoe_export.json`.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

{code}model = AutoModelForCausalLM.from_pretrained(DIRECTORY{trust})
tokenizer = AutoTokenizer.from_pretrained(DIRECTORY, trust_remote_code=False)
print(tokenizer.decode(model.generate(**tokenizer("Once", return_tensors="pt"), max_new_tokens=50)[0]))
```

| layer | widths of its experts |
|---|---|
{layers}

## Training
Flags of the run, without paths:
```
{" ".join(_public(flags))}
```
"""


def _public(flags: Sequence[str]) -> list[str]:
    kept = []
    for at, word in enumerate(flags):
        if word.startswith("--"):
            hidden = word.partition("=")[0] in _PATHS or any("/" in value for value in _values(flags, at))
        if not hidden:
            kept.append(word)
    return kept


def _values(flags: Sequence[str], at: int) -> list[str]:
    """Of the flag at `at`, in its own word too."""
    return [flags[at], *takewhile(lambda word: not word.startswith("--"), flags[at + 1 :])]
