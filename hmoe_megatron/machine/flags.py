"""Megatron's flags by what a machine has: what is set for the user, and what it cannot have."""

import itertools

from hmoe_megatron.machine.fused_kernels import Kernels, implementation, switched_off

# Without a GPU.
NEEDED = (
    ("--transformer-impl", "local"),
    ("--distributed-backend", "gloo"),
    ("--attention-backend", "unfused"),
    ("--async-strategy", "mcore"),
    # Kernels of Apex or Transformer Engine. SwiGLU's is compiled by torch.compile, which is off.
    ("--no-gradient-accumulation-fusion",),
    ("--no-masked-softmax-fusion",),
    ("--no-bias-swiglu-fusion",),
    ("--no-rope-fusion",),
    ("--no-persist-layer-norm",),
)

# Flag: (values it may have, reason, remedy). No values: a switch that cannot be given.
_LEAVE_OUT = "leave it out"
_NEEDED_ENGINE = "it needs Transformer Engine"
_NEEDS_TE = f"{_NEEDED_ENGINE}, which needs a GPU"
_ONE_ATTENTION = "only Transformer Engine's attention runs context parallel"
_NEEDS_KERNELS = "its kernels run on GPUs only"
_COPIES_FROM_GPU = "nvidia-resiliency-ext copies from GPU memory"
_OFFLOADS = "it moves to CPU memory what is there already"
LIMITED = {
    "--transformer-impl": (("local",), _NEEDS_TE, "use local"),
    "--distributed-backend": (("gloo",), "NCCL moves GPU memory only", "use gloo"),
    "--attention-backend": (("unfused", "auto"), _NEEDS_KERNELS, "use unfused"),
    "--async-strategy": (("mcore",), _COPIES_FROM_GPU, "use mcore"),
    "--async-ckpt-use-cpu-shm": ((), _COPIES_FROM_GPU, _LEAVE_OUT),
    "--context-parallel-size": (("1",), _ONE_ATTENTION, "use 1"),
    "--hybrid-context-parallel": ((), _ONE_ATTENTION, _LEAVE_OUT),
    "--moe-token-dispatcher-type": (("alltoall", "allgather"), _NEEDS_KERNELS, "use alltoall or allgather"),
    "--moe-enable-deepep": ((), _NEEDS_KERNELS, _LEAVE_OUT),
    "--moe-permute-fusion": ((), _NEEDS_TE, _LEAVE_OUT),
    "--moe-router-fusion": ((), _NEEDS_TE, _LEAVE_OUT),
    "--cross-entropy-fusion-impl": (("native",), _NEEDS_TE, "use native"),
    "--use-transformer-engine-op-fuser": ((), _NEEDS_TE, _LEAVE_OUT),
    "--fused-residual-rmsnorm": ((), _NEEDS_TE, _LEAVE_OUT),
    "--use-te-activation-func": ((), _NEEDS_TE, _LEAVE_OUT),
    "--te-rng-tracker": ((), _NEEDS_TE, _LEAVE_OUT),
    "--use-precision-aware-optimizer": ((), _NEEDS_TE, _LEAVE_OUT),
    "--tp-comm-overlap": ((), _NEEDS_TE, _LEAVE_OUT),
    "--fp8-format": ((), _NEEDS_TE, "use --bf16 or fp32"),
    "--fp4-format": ((), _NEEDS_TE, "use --bf16 or fp32"),
    "--cuda-graph-impl": (("none",), "there is no CUDA to record", "use none"),
    "--enable-cuda-graph": ((), "there is no CUDA to record", _LEAVE_OUT),
    "--external-cuda-graph": ((), "there is no CUDA to record", _LEAVE_OUT),
    "--optimizer-cuda-graph": ((), "there is no CUDA to record", _LEAVE_OUT),
    "--use-megatron-fsdp": ((), "it is written for CUDA", "use --use-distributed-optimizer"),
    "--use-torch-fsdp2": ((), "Megatron builds its mesh on CUDA", "use --use-distributed-optimizer"),
    "--use-nccl-ub": ((), "there is no NCCL", _LEAVE_OUT),
    "--use-sharp": ((), "there is no NCCL", _LEAVE_OUT),
    "--nccl-communicator-config-path": ((), "there is no NCCL", _LEAVE_OUT),
    "--high-priority-stream-groups": ((), "there is no NCCL", _LEAVE_OUT),
    "--pipeline-model-parallel-comm-backend": ((), "there is no NCCL", _LEAVE_OUT),
    "--optimizer-cpu-offload": ((), _OFFLOADS, _LEAVE_OUT),
    "--cpu-offloading-num-layers": (("0",), _OFFLOADS, "use 0"),
    "--fine-grained-activation-offloading": ((), _OFFLOADS, _LEAVE_OUT),
    "--log-straggler": ((), "it measures GPU kernels", _LEAVE_OUT),
    "--record-memory-history": ((), "it records CUDA's allocator", _LEAVE_OUT),
}


def cpu_argv(argv):
    """NEEDED, less what the user gave, followed by `argv`. ValueError for what LIMITED does not allow."""
    given = _given(argv)
    for flag, value in given:
        if flag in LIMITED and value not in LIMITED[flag][0]:
            _, reason, remedy = LIMITED[flag]
            raise _refusal(
                flag, value, f"this machine has no GPU (torch.cuda.is_available() is False), and {reason}", remedy
            )
    names = {flag for flag, _ in given}
    if "--profile" in names and "--use-pytorch-profiler" not in names:
        raise ValueError(
            "--profile: this machine has no GPU, and Megatron's own profiling starts CUDA's "
            "profiler. Remedy: add --use-pytorch-profiler."
        )
    return [word for flag in NEEDED if flag[0] not in names for word in flag] + list(argv)


def _given(argv):
    """[(flag, value or None)] of `argv`, as `--flag value` or `--flag=value`."""
    given = []
    for word, following in itertools.pairwise([*argv, "--"]):
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            given.append((flag, value if equals else None if following.startswith("--") else following))
    return given


def _refusal(flag, value, reason, remedy):
    shown = flag if value is None else f"{flag} {value}"
    return ValueError(f"{shown}: {reason}. Remedy: {remedy}.")


def gpu_argv(argv, kernels: Kernels):
    """`argv` with the implementation and the switches of kernels that are not there put before the user's flags.

    ValueError for a flag of the user's that needs a Transformer Engine that is not there."""
    given = dict(_given(argv))
    if not kernels.engine:
        for flag, value in given.items():
            allowed, reason, remedy = LIMITED.get(flag, (None, None, None))
            if reason in (_NEEDS_TE, _ONE_ATTENTION) and value not in allowed:
                raise _refusal(
                    flag,
                    value,
                    f"{_NEEDED_ENGINE}, and Transformer Engine is {kernels.no_engine}",
                    f"{remedy}, or complete it (make doctor)",
                )
    ours = [] if "--transformer-impl" in given else ["--transformer-impl", implementation(kernels, given)]
    ours += [off.flag for off in switched_off(kernels, given) if off.flag not in given]
    return ours + list(argv)
