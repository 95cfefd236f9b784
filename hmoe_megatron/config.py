"""The settings HMoE adds to Megatron's: one frozen dataclass and its flags."""

import argparse
import dataclasses
import math
import typing

from hmoe_megatron.widths import layer_widths

LOSS_NAMES = ("p_penalty_loss", "load_balance_loss", "router_entropy_loss")
PAPER_P_PENALTY_COEFF = 0.1
PAPER_ROUTER_ENTROPY_COEFF = 0.03


def _setting(default, help_text: str, choices: tuple[str, ...] | None = None):
    return dataclasses.field(default=default, metadata={"help": help_text, "choices": choices})


@dataclasses.dataclass(frozen=True)
class HMoEConfig:
    """What the user says with ``--hmoe-*``. Every field is one flag; its help text is the flag's."""

    widths: str = _setting(
        "arithmetic:9:23",
        "FFN widths of the experts of a layer: arithmetic:FIRST:LAST, geometric:RATIO, hybrid:1,1,2,4 or equal "
        "(ratios, scaled to --hmoe-total-width), or the widths themselves as 864,1056,... Layers (from 0) may "
        "differ: '0-3=arithmetic:9:23;*=equal'.",
    )
    total_width: int | None = _setting(
        None,
        "Sum of the expert widths of one layer; ratios are scaled to it. Or give their mean, --moe-ffn-hidden-size.",
    )
    width_multiple: int | None = _setting(
        None, "Round every width to a multiple of this, keeping the sum. Off unless given; 128 suits GPU tiles."
    )
    router: str = _setting(
        "topk",
        "topk: --moe-router-topk experts a token. topp: the fewest experts whose probability reaches --hmoe-top-p.",
        ("topk", "topp"),
    )
    top_p: float | None = _setting(None, "Probability that the experts of a token must reach (paper: 0.6). topp only.")
    max_experts_per_token: int | None = _setting(None, "Most experts a token may use. topp only; default: all.")
    p_penalty_coeff: float = _setting(
        PAPER_P_PENALTY_COEFF,
        "Coefficient of the P-Penalty N * sum_i M_i Phat_i, M_i = tokens of expert i / T * width_i / mean width. "
        "As in the paper it is not divided by the experts a token: at equal widths with Top-K it is K times "
        "Megatron's --moe-aux-loss-coeff.",
    )
    router_entropy_coeff: float | None = _setting(
        None,
        "Coefficient of the router's mean entropy -sum_i P_i log P_i (natural logarithm). topp only; default "
        f"{PAPER_ROUTER_ENTROPY_COEFF} with topp. Positive values sharpen the routing.",
    )
    load_balance_coeff: float = _setting(
        0.0,
        "Coefficient of the paper's load-balance loss N * sum_i T_i Phat_i (baseline: 0.01). Not divided by the "
        "experts a token: with Top-K it is K times Megatron's --moe-aux-loss-coeff.",
    )
    placement: str = _setting(
        "auto",
        "Where experts live on the expert-parallel ranks: auto (FLOPs balanced, experts cut by width where one is "
        "the bottleneck), contiguous (whole experts in order, as Megatron), checkpoint (the plan in the checkpoint "
        "that --load names), or a plan file (.json).",
    )
    max_cuts: int | None = _setting(
        None, "Most cuts a layer that --hmoe-placement auto may make; default: ranks - 1. 0: whole experts only."
    )
    cut_multiple: int = _setting(16, "Experts are cut at multiples of this width (--hmoe-placement auto).")
    replan_interval: str | None = _setting(
        None,
        "Look every so many steps whether experts should be on other ranks, by the tokens that came since, and move "
        "them with their optimizer state where that pays. auto: after 10 steps, and then after twice as many each time "
        "that nothing was moved. Off unless given.",
    )
    replan_max_loss: float = _setting(
        0.015, "Share of the run's time that --hmoe-replan-interval may lose: by looks, moves and wrong plans."
    )
    replan_room: float = _setting(
        0.25,
        "Room that every rank keeps for experts that may come, as a share of an even share of each layer's width: so "
        "much more memory for experts' weights, gradients and optimizer state. With --hmoe-replan-interval.",
    )
    gemm_backend: str = _setting(
        "auto",
        "Compute of the experts: reference (linear layers, one expert at a time), cpu (one autograd node a layer, bf16 "
        "computed in fp32; for machines without a GPU), triton (all experts of a rank in one launch a product; compute "
        "capability 8.0 or later; widths a multiple of 8, hidden size of 16, other layers by the reference), auto (cpu "
        "without a GPU; on one triton if it passes a self-test on the device at start, else reference).",
        ("auto", "reference", "cpu", "triton"),
    )
    keep_hidden: bool = _setting(
        False,
        "Keep the experts' activations silu(gate) * up * probability for the backward pass instead of computing them "
        "again: a third more memory for experts' activations. triton only.",
    )
    idle_expert_steps: int = _setting(
        1000, "Warn once of an expert that got no token for this many steps (looked at every --log-interval steps)."
    )
    run_dir: str | None = _setting(
        None, "Directory for the placement plan and telemetry.jsonl; default: --save, without it nothing is written."
    )
    check_only: bool = _setting(
        False,
        "Check everything, print the plan, the parameters and the memory of the fullest rank, and stop; nothing is "
        "written. With --world-size N for N ranks with GPUs, whatever this machine has.",
    )
    console: str = _setting(
        "short",
        "short: what is trained and where, a line every --log-interval steps, what is saved, what goes wrong. "
        "Megatron's own output goes to megatron.log in the run's directory. megatron: all of it.",
        ("short", "megatron"),
    )
    skip_integrity: bool = _setting(
        False,
        "Load a checkpoint without comparing the SHA-256 of its files (a read of all of them), also one without a "
        "manifest, which other programs write. Pickled objects are still restricted to those of a checkpoint.",
    )
    verify_data: bool = _setting(
        False,
        "Compare the SHA-256 of the data's files with what tools/preprocess_data.py noted, before the first step; the "
        "ranks share the reading. Lengths and the tokenizer are always compared.",
    )
    default_signals: bool = _setting(
        False,
        "Leave SIGTERM and Ctrl-C as Python has them: the run ends at once and saves nothing. Unless given, they end "
        "it after its step, with a checkpoint where --save is given (Megatron's --exit-signal-handler, which is on).",
    )
    max_failed_saves: int = _setting(
        3,
        "Failed saves in a row that end the run. Before that a failed save is reported and training goes on; the last "
        "good checkpoint stays as it is.",
    )

    def __post_init__(self):
        problems = list(self._problems())
        if problems:
            raise ValueError("\n".join(problems))

    def _problems(self):
        for name in ("p_penalty_coeff", "load_balance_coeff", "router_entropy_coeff"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                yield f"{flag_of(name)} {value}: give a finite number, 0 or more (0 turns the loss off)"
        counts = "total_width width_multiple max_experts_per_token cut_multiple idle_expert_steps max_failed_saves"
        for name in counts.split():
            value = getattr(self, name)
            if value is not None and value < 1:
                yield f"{flag_of(name)} {value}: give a whole number of at least 1"
        if (interval := self.replan_interval) not in (None, "auto") and not (interval.isdecimal() and int(interval)):
            yield f"--hmoe-replan-interval {interval:.40}: give a whole number of at least 1, or auto"
        for name, most in (("replan_max_loss", 1.0), ("replan_room", 100.0)):
            if not 0 <= (value := getattr(self, name)) <= most:
                yield f"{flag_of(name)} {value}: give a number from 0 to {most:g}"
        if self.max_cuts is not None and self.max_cuts < 0:
            yield f"--hmoe-max-cuts {self.max_cuts}: give 0 or more"
        if self.top_p is not None and not 0 < self.top_p <= 1:
            yield f"--hmoe-top-p {self.top_p}: give a probability above 0, at most 1"
        if self.router == "topp" and self.top_p is None:
            yield "--hmoe-router topp needs --hmoe-top-p (the paper uses 0.6)"
        if self.router == "topk":
            for name in ("top_p", "max_experts_per_token"):
                if getattr(self, name) is not None:
                    yield (
                        f"{flag_of(name)} {getattr(self, name)} has no effect with --hmoe-router topk: "
                        f"remove it, or use --hmoe-router topp"
                    )
            if self.router_entropy_coeff:
                yield (
                    f"--hmoe-router-entropy-coeff {self.router_entropy_coeff} contradicts --hmoe-router topk: the "
                    "entropy loss limits how many experts Top-P uses; remove it, or use --hmoe-router topp"
                )
        if self.keep_hidden and self.gemm_backend not in ("auto", "triton"):
            yield f"--hmoe-keep-hidden has no effect with --hmoe-gemm-backend {self.gemm_backend}: remove it"
        if self.placement not in ("auto", "contiguous"):
            if self.placement != "checkpoint" and not self.placement.endswith(".json"):
                yield (
                    f"--hmoe-placement {self.placement!r}: give auto, contiguous, checkpoint, or the path of a "
                    "plan file (.json)"
                )
            if self.max_cuts is not None and self.replan_interval is None:  # else it is of the plans to come
                yield (
                    f"--hmoe-max-cuts {self.max_cuts} contradicts --hmoe-placement {self.placement}: "
                    "a plan already says where experts are cut; remove one of them"
                )
        elif self.placement == "contiguous" and self.max_cuts:
            yield (
                f"--hmoe-max-cuts {self.max_cuts} contradicts --hmoe-placement contiguous, which cuts nothing: "
                "remove it, or use --hmoe-placement auto"
            )

    @property
    def entropy_coeff(self) -> float:
        """Coefficient of the router entropy in force: the paper's with Top-P, none with Top-K."""
        if self.router_entropy_coeff is not None:
            return self.router_entropy_coeff
        return PAPER_ROUTER_ENTROPY_COEFF if self.router == "topp" else 0.0

    @property
    def loss_coeffs(self) -> dict[str, float]:
        """Name (of LOSS_NAMES) to coefficient, of the losses that are on."""
        coeffs = (self.p_penalty_coeff, self.load_balance_coeff, self.entropy_coeff)
        return {name: coeff for name, coeff in zip(LOSS_NAMES, coeffs, strict=True) if coeff}


def flag_of(name: str) -> str:
    """The command line's name of a field."""
    return "--hmoe-" + name.replace("_", "-")


class _Help(argparse.HelpFormatter):
    """Some of Megatron 0.19.2's help texts hold a bare %, at which argparse raises: show those as they are."""

    def _expand_help(self, action):
        try:
            return super()._expand_help(action)
        except (ValueError, TypeError):
            return action.help


def add_hmoe_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add one ``--hmoe-*`` flag for each field of HMoEConfig (Megatron's ``extra_args_provider``)."""
    parser.formatter_class = _Help
    group = parser.add_argument_group("hmoe", "heterogeneous mixture of experts")
    hints = typing.get_type_hints(HMoEConfig)
    for field in dataclasses.fields(HMoEConfig):
        kind = next(t for t in (typing.get_args(hints[field.name]) or (hints[field.name],)) if t is not type(None))
        takes = {"action": "store_true"} if kind is bool else {"type": kind, "choices": field.metadata["choices"]}
        group.add_argument(
            flag_of(field.name),
            dest=f"hmoe_{field.name}",
            default=field.default,
            help=field.metadata["help"].replace("%", "%%"),
            **takes,
        )
    return parser


def hmoe_config_from_args(args: argparse.Namespace) -> HMoEConfig:
    """HMoEConfig of parsed arguments. Raises ValueError with every contradiction among the ``--hmoe-*`` flags."""
    return HMoEConfig(**{f.name: getattr(args, f"hmoe_{f.name}") for f in dataclasses.fields(HMoEConfig)})


def expert_hidden_size(args: argparse.Namespace) -> int:
    """Numbers of a token that routed experts get: --moe-latent-size, where it is given."""
    return args.moe_latent_size or args.hidden_size


def mtp_layers(args: argparse.Namespace) -> range:
    """Numbers of the multi-token-prediction layers: they go on from the decoder layers'. With --mtp-use-repeated-layer
    one layer predicts every token."""
    count = args.mtp_num_layers or 0
    return range(args.num_layers, args.num_layers + (min(count, 1) if args.mtp_use_repeated_layer else count))


def moe_layers(args: argparse.Namespace) -> list[int]:
    """Layers (from 0) that hold experts, by ``--moe-layer-freq``; multi-token-prediction layers are as the last decoder
    layer."""
    decoder = _moe_decoder_layers(args)
    return decoder + (list(mtp_layers(args)) if decoder and decoder[-1] == args.num_layers - 1 else [])


def _moe_decoder_layers(args: argparse.Namespace) -> list[int]:
    freq = args.moe_layer_freq
    if isinstance(freq, int):
        return [i for i in range(args.num_layers) if i % freq == 0]
    if len(freq) != args.num_layers:
        raise ValueError(
            f"--moe-layer-freq {freq} names {len(freq)} layers, --num-layers is {args.num_layers}: "
            "give one entry a layer"
        )
    return [i for i, is_moe in enumerate(freq) if is_moe]


def _total_width(args: argparse.Namespace, hmoe: HMoEConfig) -> int | None:
    """Of a layer: as given, or of experts that are as wide in the mean as Megatron's would be."""
    mean = getattr(args, "moe_ffn_hidden_size", None)
    if mean and hmoe.total_width:
        raise ValueError(
            f"--moe-ffn-hidden-size {mean} and --hmoe-total-width {hmoe.total_width}: one is the mean width of an "
            "expert, the other the sum of a layer's: remove one"
        )
    return mean * args.num_experts if mean else hmoe.total_width


def widths_from_args(args: argparse.Namespace, hmoe: HMoEConfig) -> dict[int, tuple[int, ...]]:
    """Widths of the experts of each MoE layer: decoder layer (from 0) -> width of each logical expert.

    Raises ValueError for widths that can't be, and where no layer has experts.
    """
    layers = moe_layers(args)
    if not layers:
        raise ValueError(f"--moe-layer-freq {args.moe_layer_freq}: no layer has experts; use 1 for all layers")
    count = args.num_layers + len(mtp_layers(args))
    total = _total_width(args, hmoe)
    try:
        widths_LE = layer_widths(hmoe.widths, count, args.num_experts, total, hmoe.width_multiple)
    except ValueError as error:
        if total == hmoe.total_width:
            raise
        raise ValueError(f"{error} (it is --num-experts times --moe-ffn-hidden-size)") from None
    return {layer: tuple(widths_LE[layer]) for layer in layers}


def flags_document() -> str:
    """docs/flags.md: every ``--hmoe-*`` flag with its default, from HMoEConfig."""
    lines = ["# `--hmoe-*` flags", "", "Made by `python -m hmoe_megatron.config > docs/flags.md`.", ""]
    for field in dataclasses.fields(HMoEConfig):
        default = "not set" if field.default is None else f"`{field.default}`"
        lines += [f"## `{flag_of(field.name)}`", f"{field.metadata['help']} Default: {default}.", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    print(flags_document(), end="")
