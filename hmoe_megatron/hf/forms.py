"""Which form a checkpoint or a Hugging Face directory has."""

from collections.abc import Mapping, Sequence

from hmoe_megatron.hf.architectures import Llama, Mixtral, Native, Qwen3, Qwen3Moe
from hmoe_megatron.hf.deepseek_v3 import DeepSeekV3
from hmoe_megatron.hf.model_settings import from_checkpoint
from hmoe_megatron.widths import MAX_EXPERTS, MAX_LAYERS

FORMS = {form.model_type: form for form in (Native, Mixtral, Qwen3Moe, DeepSeekV3, Llama, Qwen3)}
# Field of a config.json -> the least and the most of it.
_RANGES = dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), (1, MAX_EXPERTS))
_RANGES |= dict.fromkeys(("n_group", "topk_group", "n_shared_experts"), (1, MAX_EXPERTS))
_RANGES |= dict.fromkeys(("num_nextn_predict_layers", "num_mtp_layers"), (0, 64))
_RANGES |= {"num_hidden_layers": (1, MAX_LAYERS), "first_k_dense_replace": (0, MAX_LAYERS)}


def form_of(config: Mapping) -> Native:
    """The form of a directory by its config.json, untrusted. Raises ValueError for one that is not known or lacks a
    field."""
    kind = config.get("model_type")
    if type(kind) is not str or kind not in FORMS:
        raise ValueError(f"config.json: model_type {kind!r:.60}: only {', '.join(FORMS)} become HMoE checkpoints")
    for name, (least, most) in _RANGES.items():  # before lists of that length are made
        value = config.get(name, least)
        if type(value) is not int or not least <= value <= most:
            raise ValueError(f"config.json: {name} {value!r:.40}: {least} to {most}")
    try:
        model = FORMS[kind].settings(config)
        model.check()
        return FORMS[kind].stored(model, config)
    except (KeyError, TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"config.json of a {kind}: {error}: missing or of the wrong type") from None


def form_for(kind: str, settings: Mapping, shapes: Mapping, flags: Sequence[str]) -> Native:
    """The form `kind` of a checkpoint; settings, shapes, flags as `from_checkpoint` takes them. Raises ValueError that
    lists what it lacks, and names the form that does not."""
    form = FORMS[kind]
    try:
        return form(from_checkpoint(settings, shapes, flags, form.exported))
    except ValueError as error:
        if form is DeepSeekV3 or not settings.get("multi_latent_attention"):
            raise
        try:
            form_for(DeepSeekV3.model_type, settings, shapes, flags)
        except ValueError as other:
            raise ValueError(f"{error}; --padded {DeepSeekV3.model_type} can't either: {other}") from None
        raise ValueError(f"{error}; give --padded {DeepSeekV3.model_type}") from None
