"""docs/megatron_flags.md: which of Megatron's flags are taken in another way, change nothing, or are refused."""

from hmoe_megatron.flag_files import flag_named
from hmoe_megatron.validate_args.required import MET, REQUIRED, REQUIRED_TOPP, REQUIRED_WITH_LOSSES

_PAGE = """# Megatron's flags here

Made by `python -m hmoe_megatron.validate_args.page > docs/megatron_flags.md`. Megatron's flags work as in Megatron,
but for these. The layouts in [parallelism.md](parallelism.md) show what was compared with Megatron bit by bit.

## Taken in a way of their own

| flag | here |
|---|---|
{own}

## Change nothing
A line says so at the start.

| flag | why |
|---|---|
{met}

## Refused
Before anything starts. `set` stands for a switch that is given.

| what | works | why, and what to do |
|---|---|---|
{refused}

### With `--hmoe-router topp`

| what | works | why, and what to do |
|---|---|---|
{topp}

### With P-Penalty or load balance on

| what | works | why, and what to do |
|---|---|---|
{losses}
"""
_OWN = {
    "--moe-ffn-hidden-size N": "the mean width of an expert, where --hmoe-widths gives ratios",
    "--moe-expert-capacity-factor F": (
        "an expert takes F x rows / experts x mean width / its width tokens at most: each may compute as much as the "
        "others. At equal widths as in Megatron; with Top-P rows are those that were chosen"
    ),
    "--moe-latent-size N": "experts and the plan count N in place of the hidden size; works without Transformer Engine",
    "--mtp-num-layers N": "their experts have widths of their own, numbered after the decoder layers",
    "--overlap-moe-expert-parallel-comm": "also without a GPU, where nothing is gained by it",
    "--activation-func-clamp-value, --glu-linear-offset": "experts are computed by the reference backend",
    "--sft": (
        "conversations, a line of JSON each ([data.md](data.md#conversations)), kept apart by a mask: with Megatron's "
        "own attention, over two pipeline stages at most"
    ),
    "--use-checkpoint-args, --use-mp-args-from-checkpoint-args": (
        "the flags of the model, and of its layout, from the run that --load names ([checkpoints.md](checkpoints.md))"
    ),
    "--spec MODULE NAME": "each MoELayer of that spec becomes ours; parameters and FLOPs are counted as without it",
    "--fp8-format, --fp4-format": "of attention, dense layers, shared experts; routed ones keep the model's precision",
    "--rerun-mode report_stats": "works; Megatron 0.19.2 ends with a ValueError",
}


def _table(rows) -> str:
    return "\n".join(f"| `{given}` | {_values(allowed)} | {remedy} |" for _, allowed, given, remedy in rows)


def _values(allowed) -> str:
    words = {True: "set", False: "not set"} if allowed & {True, False} == allowed else {None: "not set"}
    return ", ".join(sorted({words.get(value) or f"`{value}`" for value in allowed}))


def megatron_flags_document() -> str:
    """docs/megatron_flags.md."""
    return _PAGE.format(
        own="\n".join(f"| `{flag}` | {what} |" for flag, what in _OWN.items()),
        met="\n".join(f"| `{flag_named(name)}` | {why} |" for name, _, why in MET),
        refused=_table(REQUIRED),
        topp=_table(REQUIRED_TOPP),
        losses=_table(REQUIRED_WITH_LOSSES),
    )


if __name__ == "__main__":
    print(megatron_flags_document(), end="")
