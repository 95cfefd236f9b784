"""The language-model loss: which tokens count, and what is handed to Megatron to divide and average."""

import pytest
import torch

from hmoe_megatron.data import batches as data


@pytest.fixture(autouse=True)
def no_checks(monkeypatch):
    monkeypatch.setattr(data, "_validate", lambda loss: None)


def test_masked_tokens_do_not_count():
    mask_BS = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 0.0]])
    losses_BS = torch.tensor([[2.0, 3.0, 100.0], [100.0, 5.0, 100.0]], requires_grad=True)
    loss, num_tokens, logged = data.loss_func(mask_BS, losses_BS)
    assert (loss.item(), num_tokens.item()) == (10.0, 3)
    assert logged["lm loss"].tolist() == [10.0, 3.0] and not logged["lm loss"].requires_grad
    loss.backward()
    assert losses_BS.grad.tolist() == mask_BS.tolist()


def test_bf16_losses_are_summed_in_fp32():
    loss, _, _ = data.loss_func(torch.ones(1, 4096), torch.full((1, 4096), 3.0, dtype=torch.bfloat16))
    assert loss.dtype == torch.float32 and loss.item() == 3 * 4096
