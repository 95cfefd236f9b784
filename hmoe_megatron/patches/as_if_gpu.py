"""What Megatron's checks of arguments look for on a GPU machine, for a configuration that is only checked elsewhere."""

from hmoe_megatron.patches.registry import patch, replace


@patch("check")
def transformer_engine_is_there():
    """Megatron's checks of arguments ask for Transformer Engine's version and kernels, which a machine that only checks
    a configuration for others may lack."""
    from megatron.core.models.common.embeddings import rope_utils
    from megatron.core.transformer import transformer_config
    from megatron.core.transformer.moe import moe_utils

    replace(transformer_config, "is_te_min_version", lambda *args, **named: True)
    for owner, names in (
        (moe_utils, [name for name in vars(moe_utils) if name.startswith("fused_")]),
        (rope_utils, ["fused_apply_rotary_pos_emb"]),
    ):
        for name in names:
            if getattr(owner, name) is None:  # `replace` would find every other None too
                setattr(owner, name, object())
