"""Training with the triton backend, in Triton's interpreter, beside training with the cpu backend."""

import pytest

from tests.distributed.ranks import run_ranks
from tests.distributed.training_run import losses, steps
from tests.rows import rarely

MODEL = "--num-layers 1 --hmoe-widths 16,32,48,64"
# fp32: sums of products in another order, over two steps.
BOUND = 1e-5


@pytest.mark.parametrize(
    ("ranks", "flags"),
    [
        (2, "--expert-model-parallel-size 2 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"),
        *rarely(
            (1, ""),
            (2, "--tensor-model-parallel-size 2 --sequence-parallel --moe-token-dispatcher-type alltoall"),
            (1, "--recompute-granularity selective --recompute-modules moe"),
            (1, "--hmoe-router topp --hmoe-top-p 0.6 --hmoe-keep-hidden"),
            (2, "--expert-model-parallel-size 2 --grad-reduce-in-bf16"),
        ),
    ],
)
def test_two_steps_are_those_of_the_cpu_backend(ranks, flags):
    run = f"{MODEL} {flags} --hmoe-gemm-backend"
    triton = run_ranks(ranks, steps, f"{run} triton", 2, timeout_s=300)
    cpu = run_ranks(ranks, steps, f"{run} cpu".replace("--hmoe-keep-hidden", ""), 2)
    assert losses(triton) == pytest.approx(losses(cpu), rel=BOUND)
    for ours, theirs in zip(triton, cpu, strict=True):
        assert ours["grad_norms"] == pytest.approx(theirs["grad_norms"], rel=BOUND)
        for name, weight in ours["experts"].items():
            assert (weight - theirs["experts"][name]).abs().max() < 2e-4, name
