import pytest
import torch

from verl.models.logprobs import token_log_probs


@pytest.mark.parametrize("chunk_rows", [1, 3, 64])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_chunked_log_probs_equal_full_logits_in_value_and_gradient(chunk_rows, temperature):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 5, generator=g, dtype=torch.float64).float().requires_grad_()
    head = torch.randn(11, 5, generator=g).requires_grad_()
    labels = torch.randint(0, 9, (7,), generator=g)
    weight = torch.randn(7, generator=g)
    forbidden = torch.tensor([9, 10])

    logp, entropy = token_log_probs(
        hidden,
        head,
        labels,
        temperature=temperature,
        forbidden_ids=forbidden,
        chunk_rows=chunk_rows,
    )
    (logp * weight).sum().backward()
    got = hidden.grad.clone(), head.grad.clone()

    hidden.grad = head.grad = None
    full = torch.log_softmax((hidden @ head.T)[:, :9] / temperature, -1)
    expected = full.gather(1, labels[:, None]).squeeze(1)
    (expected * weight).sum().backward()
    torch.testing.assert_close(logp, expected)
    torch.testing.assert_close(entropy, -(full.exp() * full).sum(1))
    torch.testing.assert_close(got, (hidden.grad, head.grad))


def test_a_row_without_targets_still_has_a_gradient():
    hidden, head = torch.randn(0, 5, requires_grad=True), torch.randn(11, 5, requires_grad=True)
    logp, entropy = token_log_probs(hidden, head, torch.zeros(0, dtype=torch.long))
    logp.sum().backward()
    assert len(logp) == len(entropy) == 0
    assert head.grad is not None and not head.grad.any()
