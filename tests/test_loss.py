"""The loss in pieces against torch's own, and what it costs."""

import pytest
import torch
from torch.nn import functional

from offload.loss import ROWS_AT_ONCE, next_token_loss


def reference(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """What transformers does: shift, upcast everything, take torch's cross entropy."""
    return functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), tokens[:, 1:].flatten())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("batch", "length"), [(1, 2), (3, ROWS_AT_ONCE), (2, 50)])
def test_loss_and_gradient_are_those_of_torch(dtype: torch.dtype, batch: int, length: int) -> None:
    torch.manual_seed(0)
    ours = (torch.randn(batch, length, 97) * 4).to(dtype).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    tokens = torch.randint(0, 97, (batch, length))
    loss = next_token_loss(ours, tokens)
    expected = reference(theirs, tokens)
    torch.autograd.backward([loss, expected])
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    assert ours.grad is not None and ours.grad.dtype == dtype
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 8e-3}[dtype]  # of one bf16 rounding
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=tolerance, atol=1e-8)


def test_the_gradient_is_scaled_by_what_comes_after() -> None:
    tokens = torch.tensor([[1, 2, 0]])
    plain = torch.randn(1, 3, 5, requires_grad=True)
    scaled = plain.detach().clone().requires_grad_()
    torch.autograd.backward(next_token_loss(plain, tokens))
    torch.autograd.backward(next_token_loss(scaled, tokens) / 4)
    assert plain.grad is not None and scaled.grad is not None
    assert torch.equal(plain.grad / 4, scaled.grad)


def test_no_gradient_is_kept_without_grad() -> None:
    logits = torch.randn(1, 3, 5, requires_grad=True)
    with torch.no_grad():
        assert not next_token_loss(logits, torch.tensor([[1, 2, 0]])).requires_grad
