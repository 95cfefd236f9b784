"""The triton backend in Triton's interpreter, on a CPU: values and all gradients against float64."""

from functools import partial

import pytest
import torch

from hmoe_megatron.moe.compute import ragged
from hmoe_megatron.moe.compute.cpu import cpu_experts
from hmoe_megatron.moe.compute.ragged import experts, launches, schedule, self_test, tiles
from hmoe_megatron.moe.compute.ragged.self_test import (
    Case,
    Variants,
    errors,
    problem,
    problem_without_gradients,
    results,
)
from tests.rows import rarely
from tests.unit.ragged import cases

pytestmark = cases.INTERPRETED
CPU = torch.device("cpu")
FP32, FP16 = torch.float32, torch.float16
check = partial(problem, device=CPU, exact=torch.float64)
# fp32 keeps 24 bits; sums of some hundred products of about 1.
FP32_BOUND = 3e-6


# Case -> whether its weight gradients are in one flat loop. The campaign has all, both ways.
SUITE = {"no rows, added": False, "widths of 8 times odd numbers": False}


def in_suite(name, flat):
    return name in cases.QUICK or SUITE.get(name) == flat


@pytest.mark.parametrize(
    ("name", "flat"),
    [
        pytest.param(
            name,
            flat,
            id=f"{name}, {'flat' if flat else 'by tile'}",
            marks=[] if in_suite(name, flat) else pytest.mark.campaign,
        )
        for name in cases.QUICK | cases.MORE
        for flat in (False, True)
    ],
)
def test_against_float64(name, flat):
    case = (cases.QUICK | cases.MORE)[name]
    found = errors(case, FP32, CPU, cases.backend(ragged, cases.tiles(flat=flat)), torch.float64)
    assert max(norm for norm, _ in found.values()) < FP32_BOUND, found
    assert max(largest for _, largest in found.values()) < 10 * FP32_BOUND, found


@pytest.mark.parametrize("accumulate", [False, True])
def test_fp16(accumulate):
    case = Case(128, (128, 64, 192), (70, 0, 33), accumulate)
    assert check(case, FP16, compute=cases.backend(ragged, cases.tiles(64, 128, 64, flat=accumulate))) == ""


@pytest.mark.parametrize("programs", [1, 40])
def test_any_number_of_programs(programs, monkeypatch):
    monkeypatch.setattr(launches, "multiprocessors", lambda device: programs)
    assert check(cases.QUICK["widest first, none, one row"], FP32, compute=cases.backend(ragged, cases.tiles())) == ""


def test_the_tiles_of_a_training_run():
    """As the backend itself chooses them on a CPU: fp32, and what fits a small shared memory."""
    assert check(Case(64, (72, 200), (70, 3)), FP32, compute=experts.ragged_experts) == ""
    assert check(Case(64, (72, 200), (70, 3)), FP16, compute=experts.ragged_experts) == ""


def layer_and_inputs(hidden=32, widths=(40, 16, 24), rows=(18, 0, 5)):
    case = Case(hidden, widths, rows)
    tensors, dy = self_test.drawn(case, CPU)
    return case, [tensor.requires_grad_() for tensor in tensors], dy


def test_a_batch_leaves_nothing_for_the_next():
    """One Layer, two batches of other rows: both as if they were alone."""
    layer = schedule.Layer((32, 64), 32, cases.tiles(), CPU)
    for rows in ((9, 20), (20, 0)):
        case, (x, probs, fc1, fc2), _ = layer_and_inputs(widths=(32, 64), rows=rows)
        y = experts.ragged_swiglu(x, probs, fc1, fc2, torch.tensor(rows), layer, 9 * 32 + 20 * 64)
        alone = cases.backend(ragged, cases.tiles())(x, probs, list(rows), fc1, fc2, (32, 64))
        assert torch.equal(y, alone)


@pytest.mark.parametrize("keep_hidden", [False, True])
def test_a_second_backward_pass_is_right_though_the_first_wrote_over_what_was_kept(keep_hidden):
    case, tensors, dy = layer_and_inputs()
    y = cases.backend(ragged, cases.tiles(), keep_hidden)(*tensors[:2], list(case.rows), *tensors[2:], case.widths)
    first = torch.autograd.grad(y, tensors, dy, retain_graph=True)
    second = torch.autograd.grad(y, tensors, dy)
    assert all(map(torch.equal, first, second))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(y, tensors, dy)


def test_without_gradients_the_result_is_the_same_and_nothing_is_kept():
    case, tensors, _ = layer_and_inputs()
    compute = cases.backend(ragged, cases.tiles())
    y = compute(*tensors[:2], list(case.rows), *tensors[2:], case.widths)
    with torch.no_grad():
        assert torch.equal(compute(*tensors[:2], list(case.rows), *tensors[2:], case.widths), y)
    frozen = [tensor.detach() for tensor in tensors]
    z = compute(*frozen[:2], list(case.rows), *frozen[2:], case.widths)
    assert torch.equal(z, y) and z.grad_fn is None


@pytest.mark.parametrize("learns", [0, 2, *rarely(1, 3)])  # of x, probabilities, fc1, fc2
def test_gradients_of_what_learns_only(learns):
    case, tensors, dy = layer_and_inputs()
    compute = cases.backend(ragged, cases.tiles())
    y = compute(*tensors[:2], list(case.rows), *tensors[2:], case.widths)
    expected = torch.autograd.grad(y, tensors[learns], dy)[0]
    tensors = [tensor.detach() for tensor in tensors]
    tensors[learns].requires_grad_()
    compute(*tensors[:2], list(case.rows), *tensors[2:], case.widths).backward(dy)
    assert [tensor.grad is not None for tensor in tensors] == [index == learns for index in range(4)]
    assert torch.equal(tensors[learns].grad, expected)


def test_rows_that_do_not_begin_at_16_bytes_are_copied():
    case, (x, probs, fc1, fc2), dy = layer_and_inputs()
    wide = torch.zeros(x.shape[0], x.shape[1] + 1)
    wide[:, 1:] = x.detach()
    compute = cases.backend(ragged, cases.tiles())
    assert torch.equal(
        compute(wide[:, 1:], probs, list(case.rows), fc1, fc2, case.widths),
        compute(x, probs, list(case.rows), fc1, fc2, case.widths),
    )


def test_gradients_go_to_main_grad_and_autograd_gets_an_empty_shell():
    case, tensors, dy = layer_and_inputs()
    weights = tensors[2:]
    for weight in weights:
        weight.main_grad = torch.ones_like(weight.detach())
        weight.grad_added_to_main_grad = False
    y = cases.backend(ragged, cases.tiles())(*tensors[:2], list(case.rows), *weights, case.widths)
    y.backward(dy)
    for weight in weights:
        assert weight.grad_added_to_main_grad and weight.grad.shape == weight.shape
        assert weight.grad.untyped_storage().size() == 0, "as large as the weights of a layer, for nothing"
        assert (weight.main_grad != 1).any()


@pytest.mark.parametrize("backend", ["triton", "cpu"])
def test_the_parameter_is_marked_whatever_hooks_of_saved_tensors_return(backend):
    """Activation offloading saves copies: a mark on one of them would have Megatron add the gradient again."""
    case, tensors, dy = layer_and_inputs()
    weights = tensors[2:]
    for weight in weights:
        weight.main_grad = torch.zeros_like(weight.detach())
    compute = cases.backend(ragged, cases.tiles()) if backend == "triton" else cpu_experts
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda saved: saved):
        y = compute(*tensors[:2], list(case.rows), *weights, case.widths)
    y.backward(dy)
    assert all(weight.grad_added_to_main_grad and weight.main_grad.any() for weight in weights)


@pytest.mark.parametrize("backend", ["triton", "cpu"])
def test_nothing_of_the_shell_is_read_where_autograd_looks_for_nan(backend):
    case, tensors, dy = layer_and_inputs()
    for weight in tensors[2:]:
        weight.main_grad = torch.zeros_like(weight.detach())
    compute = cases.backend(ragged, cases.tiles()) if backend == "triton" else cpu_experts
    with torch.autograd.detect_anomaly(check_nan=True):
        compute(*tensors[:2], list(case.rows), *tensors[2:], case.widths).backward(dy)
    assert all(not weight.grad.any() and weight.main_grad.any() for weight in tensors[2:])


def test_a_main_grad_that_the_kernels_cannot_write_is_left_to_megatrons_hook():
    case, tensors, dy = layer_and_inputs()
    for weight in tensors[2:]:
        weight.main_grad = torch.ones(weight.numel() + 1)[1:].view(weight.shape)  # at no multiple of 16 bytes
    y = cases.backend(ragged, cases.tiles())(*tensors[:2], list(case.rows), *tensors[2:], case.widths)
    y.backward(dy)
    assert all(weight.grad.any() and (weight.main_grad == 1).all() for weight in tensors[2:])


def test_layers_that_the_kernels_cannot_take_go_to_the_reference(monkeypatch):
    seen = []
    monkeypatch.setattr(experts, "reference_experts", lambda *given: seen.append(given))
    for hidden, widths, dtype in ((32, (8, 12), FP32), (24, (8, 16), FP32), (32, (8, 16), torch.float64)):
        _, (x, probs, fc1, fc2), _ = layer_and_inputs(hidden=hidden, widths=widths, rows=(3, 2))
        experts.ragged_experts(x.to(dtype), probs, [3, 2], fc1.to(dtype), fc2.to(dtype), widths)
    _, (x, probs, fc1, fc2), _ = layer_and_inputs(widths=(8, 16), rows=(3, 2))
    crooked = torch.empty(fc1.numel() + 1)[1:].view(fc1.shape)
    experts.ragged_experts(x, probs, [3, 2], crooked, fc2, (8, 16))
    assert len(seen) == 4
    assert tiles.unsupported((8, 1 << 20), 2048, FP32) == "2 pieces of up to 1048576 x 2048"


def test_the_self_test_passes_here_and_names_what_is_wrong(monkeypatch):
    monkeypatch.setattr(self_test, "ROWS", ((5, 0, 2),))
    assert self_test.self_test(Variants(32, FP32, frozenset({16})), CPU) == ""

    def wrong(*given, keep_hidden):
        y = experts.ragged_experts(*given)
        if y.requires_grad:
            y.register_hook(lambda grad: grad * 1.1)  # so that y alone is right
        return y

    monkeypatch.setattr(self_test, "ragged_experts", wrong)
    said = self_test.self_test(Variants(32, FP32, frozenset({8, 16})), CPU)
    assert said.startswith("dx is off by 1.0e-01 of its norm") and "widths=(8, 24, 520)" in said


def test_the_self_test_has_each_variant_that_a_run_needs(monkeypatch):
    kept = []
    for check_ in ("problem", "problem_without_gradients"):
        monkeypatch.setattr(self_test, check_, lambda case, dtype, device, compute: kept.append(compute.keywords))
    variants = Variants(32, FP16, frozenset({8, 64}), pieces=65, grad_dtype=FP16, keep_hidden=True)
    cases_ = list(variants.cases())
    assert {case.accumulate for case in cases_} == {False, True} and {case.grad_dtype for case in cases_} == {
        FP16,
        FP32,
    }
    assert {self_test.alignment(case.widths) for case in cases_} == {8, 64}
    assert {len(case.widths) for case in cases_} == {3, 65} and all(len(c.widths) == len(c.rows) for c in cases_)
    assert self_test.self_test(variants, CPU) == "" and kept == [{"keep_hidden": True}] * 2 * len(cases_)


def test_gradients_of_bf16_buffers():
    """As --grad-reduce-in-bf16 has them. fp16 weights: Triton's interpreter has no right bf16."""
    case = Case(32, (40, 16), (18, 5), accumulate=True, grad_dtype=torch.float16)
    assert check(case, FP16, compute=cases.backend(ragged, cases.tiles())) == ""


def test_a_result_that_is_wrong_without_gradients_only_is_seen():
    def wrong(*given):
        return experts.ragged_experts(*given) * (1 if torch.is_grad_enabled() else 2)

    case = layer_and_inputs()[0]
    assert problem_without_gradients(case, FP32, CPU, wrong).startswith("y without gradients is off by 1.0e+00")
    assert problem_without_gradients(case, FP32, CPU, experts.ragged_experts) == ""


def test_new_memory_is_poisoned_while_it_is_checked():
    with self_test.poisoned():
        assert torch.empty(3).isnan().all() and torch.ones(2).new_empty(5).isnan().all()
        assert torch.empty_like(torch.ones(2, 2)).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_an_error_of_one_element_is_seen():
    case, tensors, dy = layer_and_inputs()

    def spoilt(*given):
        y = experts.ragged_experts(*given).clone()
        y.data[3, 5] += 1e-3
        return y

    assert errors(case, FP32, CPU, spoilt)["y"][1] > 1e-4
    assert results(case, tensors, dy, spoilt)[0].shape == (23, 32)
