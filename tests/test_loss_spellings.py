"""Every spelling of linear + cross-entropy is matched; what only looks like it is left alone."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from helpers import gradients, ordered, relative_error, report_of, rewritten
from torch import nn


def loss_plain(h, w, b, y):
    return F.cross_entropy(F.linear(h, w), y)


def loss_bias(h, w, b, y):
    return F.cross_entropy(F.linear(h, w, b), y)


def loss_matmul(h, w, b, y):
    return F.cross_entropy(h @ w.T, y)


def loss_matmul_added_bias(h, w, b, y):
    return F.cross_entropy(torch.matmul(h, w.t()) + b, y)


def loss_addmm(h, w, b, y):
    return F.cross_entropy(torch.addmm(b, h, w.transpose(0, 1)), y)


def loss_einsum(h, w, b, y):
    return F.cross_entropy(torch.einsum("th,vh->tv", h, w), y)


def loss_sum(h, w, b, y):
    return F.cross_entropy(F.linear(h, w).float(), y, reduction="sum") / 7


def loss_module(h, w, b, y):
    return nn.CrossEntropyLoss(ignore_index=3)(F.linear(h, w), y)


def loss_nll(h, w, b, y):
    return F.nll_loss(F.log_softmax(F.linear(h, w), dim=-1), y, ignore_index=-1)


def loss_nll_float32(h, w, b, y):
    return nn.NLLLoss()(torch.log_softmax(F.linear(h, w), dim=1, dtype=torch.float32), y)


def loss_view(h, w, b, y):
    logits = F.linear(h.view(2, 3, 8), w).float()
    return F.cross_entropy(logits.view(-1, logits.size(-1)), y.view(-1))


def loss_flatten(h, w, b, y):
    return F.cross_entropy(F.linear(h.unflatten(0, (2, 3)), w, b).flatten(0, 1).float(), y)


def loss_shifted_logits(h, w, b, y):
    logits, labels = F.linear(h.view(2, 3, 8), w), y.view(2, 3)
    logits = logits[..., :-1, :].contiguous()
    labels = labels[..., 1:].contiguous()
    return F.cross_entropy(logits.view(-1, 11), labels.view(-1))


def loss_shifted_after_upcast(h, w, b, y):
    logits, labels = F.linear(h.view(2, 3, 8), w).float(), y.view(2, 3)
    return F.cross_entropy(logits[:, :-1].reshape(-1, 11), labels[:, 1:].reshape(-1))


def loss_classes_second(h, w, b, y):
    logits = F.linear(h.view(2, 3, 8), w)
    return F.cross_entropy(logits.transpose(1, 2), y.view(2, 3))


def loss_of_sequences_in_columns(h, w, b, y):
    logits = F.linear(h.view(3, 2, 8), w, b).transpose(0, 1).contiguous().float()
    return F.cross_entropy(logits.view(-1, 11), y.view(2, 3).reshape(-1))


def loss_padded_labels(h, w, b, y):
    logits = F.linear(h.view(2, 3, 8), w).float()
    labels = F.pad(y.view(2, 3), (0, 1), value=-100)[..., 1:].contiguous()
    return F.cross_entropy(logits.view(-1, 11), labels.view(-1), ignore_index=-100, reduction="mean")


def loss_in_the_dtype_of(h, w, b, y):
    return F.cross_entropy(F.linear(h, w).to(b), y)


def loss_scaled(h, w, b, y):
    return F.cross_entropy((F.linear(h, w) * 0.25).float(), y)


def loss_divided(h, w, b, y):
    return F.cross_entropy(F.linear(h, w).float() / 8.0, y)


def loss_divided_in_place(h, w, b, y):
    logits = F.linear(h[None], w, b).squeeze(0)
    logits.div_(0.7)
    return F.cross_entropy(logits.float(), y)


def loss_scaled_in_place(h, w, b, y):
    logits = F.linear(h, w)
    logits *= 0.25
    return F.cross_entropy(logits, y)


def loss_softcapped_in_place(h, w, b, y):
    return F.cross_entropy(F.linear(h, w).float().div_(30.0).tanh_().mul_(30.0), y)


def loss_softcapped(h, w, b, y):
    return F.cross_entropy((torch.tanh(F.linear(h, w) / 30.0) * 30.0).float(), y)


def loss_softcapped_in_float32(h, w, b, y):
    return F.cross_entropy(30.0 * torch.tanh(F.linear(h, w).float() / 30.0), y)


def loss_of_rows(h, w, b, y):
    return F.cross_entropy(F.linear(h, w, b).float(), y, ignore_index=3, reduction="none")


def loss_smoothed(h, w, b, y):
    return F.cross_entropy(F.linear(h, w).float(), y, label_smoothing=0.1)


def loss_smoothed_and_capped(h, w, b, y):
    capped = torch.tanh(F.linear(h, w, b) / 30.0) * 30.0
    return nn.CrossEntropyLoss(label_smoothing=0.2, reduction="sum")(capped.float(), y)


def loss_class_weights(h, w, b, y):
    return F.cross_entropy(F.linear(h, w).float(), y, weight=torch.arange(11, device=h.device).float())


def loss_of_some_classes(h, w, b, y):
    return F.cross_entropy(F.linear(h, w, b)[..., :9].float(), y.clamp(max=8))


def loss_of_some_classes_in_the_middle(h, w, b, y):
    logits = F.linear(h.view(2, 3, 8), w)[..., 1:10]
    return F.cross_entropy(logits.reshape(-1, 9).float(), y.clamp(max=8))


def loss_of_some_scaled_classes(h, w, b, y):
    return F.cross_entropy((F.linear(h, w, b) * 0.25).float()[:, :9], y.clamp(max=8))


def loss_scaled_by_class(h, w, b, y):  # Dory
    return F.cross_entropy(F.linear(h, w).float() * (b.float() * 2.0), y)


def loss_scaled_by_class_before_the_upcast(h, w, b, y):
    logits = b * F.linear(h.view(2, 3, 8), w, b)
    return F.cross_entropy(logits.view(-1, 11).float(), y, reduction="none")


def loss_scaled_by_class_of_some(h, w, b, y):
    logits = (F.linear(h, w, b).view(2, 3, 11) * b).float()
    return F.cross_entropy(logits[..., 2:9].flatten(0, 1), y.clamp(max=6))


def loss_scaled_by_class_and_capped(h, w, b, y):
    return F.cross_entropy(torch.tanh(F.linear(h, w).float() * b / 30.0) * 30.0, y)


def loss_scaled_by_a_tensor(h, w, b, y):
    return F.cross_entropy((F.linear(h.view(2, 3, 8), w, b) * b[0].abs()).float().view(-1, 11), y)


def loss_divided_by_a_tensor(h, w, b, y):
    logits = F.linear(h, w, b) / (2.0 + b[:1] * b[:1])
    return F.cross_entropy(logits.float(), y, reduction="sum")


def loss_scaled_by_a_wide_tensor(h, w, b, y):
    return F.cross_entropy(b[3:4].float().exp() * F.linear(h, w), y, reduction="none")


def loss_z(h, w, b, y):
    logits = F.linear(h, w, b).float()
    return F.cross_entropy(logits, y, ignore_index=3) + 1e-2 * torch.logsumexp(logits, dim=-1).square().mean()


def loss_z_in_sequences(h, w, b, y):  # OLMo
    logits = F.linear(h.view(2, 3, 8), w).float()
    z = torch.logsumexp(logits, -1).pow(2) * (y.view(2, 3) != 3)
    return F.cross_entropy(logits.view(-1, 11), y, ignore_index=3, reduction="sum") / 4 + 0.1 * z.sum() / (y != 3).sum()


def loss_z_of_rows(h, w, b, y):  # t5x
    logits = F.linear(h, w, b).float()
    lse = logits.logsumexp(-1)
    return (lse - logits.gather(-1, y[:, None]).squeeze(-1) + 0.1 * lse**2).mean()


def loss_z_of_tokens_that_count(h, w, b, y):
    logits, mask = F.linear(h, w, b).float(), (y > 2).float()
    losses = F.cross_entropy(logits, y, reduction="none") + 0.1 * logits.logsumexp(-1).square()
    return (losses * mask).sum() / mask.sum()


def loss_z_and_scaled(h, w, b, y):
    logits = F.linear(h, w, b) / 4
    return F.cross_entropy(logits.float(), y) + 0.1 * logits.float().logsumexp(-1).square().mean()


def loss_z_and_capped(h, w, b, y):
    logits = 3 * torch.tanh(F.linear(h, w).float() / 3)
    return F.cross_entropy(logits, y, reduction="sum") + 0.1 * logits.logsumexp(-1).square().sum()


def loss_z_of_some_classes(h, w, b, y):
    logits = F.linear(h, w, b).float()[:, :9]
    return F.cross_entropy(logits, y.clamp(max=8)) + 0.1 * logits.logsumexp(-1).square().mean()


def loss_z_and_log_probabilities(h, w, b, y):
    logits = F.linear(h, w, b).float()
    return 0.1 * logits.logsumexp(-1).square().mean() - logits.log_softmax(-1).gather(-1, y[:, None]).mean()


def loss_with_the_maximum_added(h, w, b, y):
    logits = F.linear(h, w).float()
    most = logits.max(-1, keepdim=True).values
    lse = (logits - most).exp().sum(-1).log() + most.squeeze(-1)
    return (lse - logits.gather(-1, y[:, None]).squeeze(-1)).mean()


def loss_capped_by_a_factor(h, w, b, y):
    return F.cross_entropy(20.0 * torch.tanh(F.linear(h, w).float() * 0.05), y)


def loss_divided_and_capped(h, w, b, y):
    return F.cross_entropy(torch.tanh(F.linear(h, w).float() / 3 / 5.0) * 5.0, y)


def loss_of_a_transposed_product(h, w, b, y):
    return F.cross_entropy((h.view(2, 3, 8) @ w.T).mT, y.view(2, 3))


def loss_in_chunks(h, w, b, y):  # litgpt
    parts = zip(F.linear(h, w).split(4, dim=0), y.split(4, dim=0), strict=True)
    losses = [F.cross_entropy(z, t, ignore_index=-1, reduction="none") for z, t in parts]
    return torch.cat(losses).float().sum() / torch.maximum(torch.tensor(1), (y != -1).sum())


def loss_of_scaled_chunks(h, w, b, y):
    logits = F.linear(h, w, b).float() * 0.5
    return torch.cat(
        [F.cross_entropy(z, t, reduction="none") for z, t in zip(logits.chunk(3), y.chunk(3), strict=True)]
    )


def loss_of_rows_in_a_loop(h, w, b, y):  # TRL
    logits, y = F.linear(h.view(2, 3, 8), w).float(), y.view(2, 3)
    picked = logits.gather(-1, y.unsqueeze(-1)).squeeze(-1)
    return picked - torch.stack([torch.logsumexp(z, dim=-1) for z in logits])


def loss_of_log_probabilities_in_a_loop(h, w, b, y):  # TRL, in bfloat16
    rows = zip(F.linear(h.view(2, 3, 8), w), y.view(2, 3), strict=True)
    return torch.stack([F.log_softmax(z, dim=-1).gather(-1, t.unsqueeze(-1)).squeeze(-1) for z, t in rows])


def loss_of_rows_of_two(h, w, b, y):
    logits = F.linear(h.view(2, 3, 8), w).float()
    return F.cross_entropy(logits.transpose(1, 2), y.view(2, 3), reduction="none")


def loss_log_probabilities(h, w, b, y):  # of preferences, of policies
    logits = F.linear(h.view(2, 3, 8), w)
    return torch.gather(logits.log_softmax(-1), dim=2, index=y.view(2, 3).unsqueeze(2)).squeeze(2)


def loss_log_probabilities_of_shifted_logits(h, w, b, y):
    logits = F.linear(h.view(2, 3, 8), w).float()[:, :-1]
    return F.log_softmax(logits, dim=-1).gather(-1, y.view(2, 3)[:, 1:, None])[..., 0]


def loss_log_probabilities_then_shifted(h, w, b, y):
    log_probabilities = F.log_softmax(F.linear(h.view(2, 3, 8), w, b), dim=-1)[:, :-1, :]
    return log_probabilities.gather(2, y.view(2, 3)[:, 1:].unsqueeze(-1)).squeeze(-1).sum(-1)


def loss_log_probabilities_in_rows(h, w, b, y):
    log_probabilities = torch.log_softmax(F.linear(h, w, b).float() / 0.7, dim=-1)
    return -torch.take_along_dim(log_probabilities, y[:, None], dim=-1).squeeze(-1)


def loss_log_probabilities_then_transposed(h, w, b, y):
    return F.nll_loss(torch.log_softmax(F.linear(h.view(2, 3, 8), w), 2).transpose(1, 2), y.view(2, 3))


def loss_of_a_distribution(h, w, b, y):
    return torch.distributions.Categorical(logits=F.linear(h.view(2, 3, 8), w, b)).log_prob(y.view(2, 3))


def loss_of_tokens_that_count(h, w, b, y):
    losses = F.cross_entropy(F.linear(h, w, b).float(), y, reduction="none")
    return (losses * (y > 2)).sum() / (y > 2).sum()


def loss_of_tokens_of_sequences(h, w, b, y):
    logits, mask = F.linear(h.view(2, 3, 8), w).float(), (y.view(2, 3) > 2).float()
    losses = F.cross_entropy(logits.transpose(1, 2), y.view(2, 3), reduction="none")
    return (losses * mask).sum() / mask.sum()


def loss_of_tokens_filled(h, w, b, y):
    losses = F.cross_entropy(F.linear(h, w), y, reduction="none").view(2, 3)
    return losses.float().masked_fill(y.view(2, 3) > 4, 0.0).sum() / 3


def loss_of_tokens_chosen(h, w, b, y):
    losses = F.cross_entropy(F.linear(h, w, b).float() * 0.25, y, reduction="none")
    return torch.where(y > 2, losses, 0.0).mean()


def loss_of_rewards(h, w, b, y):  # of policies: -E[reward log p]
    log_p = F.linear(h.view(2, 3, 8), w).float().log_softmax(-1).gather(-1, y.view(2, 3, 1)).squeeze(-1)
    return -(log_p * b[:2].float().unsqueeze(-1) * (y.view(2, 3) > 2)).sum() / 2


def loss_of_each_sequence(h, w, b, y):
    log_p = F.linear(h.view(2, 3, 8), w).float().log_softmax(-1).gather(-1, y.view(2, 3, 1)).squeeze(-1)
    mask = (y.view(2, 3) > 2).float()
    return -((log_p * mask).sum(-1) / mask.sum(-1).clamp(min=1)).mean()


def loss_mean_of_rows(h, w, b, y):
    return F.cross_entropy(F.linear(h, w, b).float(), y, ignore_index=3, reduction="none").mean()


def loss_by_dot(h, w, b, y):
    return torch.dot(F.cross_entropy(F.linear(h, w).float(), y, reduction="none"), b[:6].float().abs())


def loss_of_weights_twice(h, w, b, y):
    losses = F.cross_entropy(torch.tanh(F.linear(h, w) / 5.0) * 5.0, y, reduction="none").float()
    return 0.5 * (losses * b[:6].float() / (y > 2).sum() * b[:1].float()).sum()


def loss_difference(h, w, b, y):
    logits = F.linear(h.view(2, 3, 8), w).float()
    target = logits.gather(-1, y.view(2, 3, 1)).squeeze(-1)
    return (torch.logsumexp(logits, dim=-1) - target).mean()


def loss_negative_difference(h, w, b, y):
    logits = 30.0 * torch.tanh(F.linear(h.view(2, 3, 8), w, b).float() / 30.0)
    selected = torch.gather(logits, dim=-1, index=y.view(2, 3).unsqueeze(-1))
    return (selected - logits.logsumexp(-1, keepdim=True)).squeeze(-1)


def loss_log_probabilities_upcast(h, w, b, y):
    return F.log_softmax(F.linear(h, w), dim=-1).float().gather(-1, y[:, None]).mean()


def loss_looked_up(h, w, b, y):
    logits = F.linear(h, w)
    return (torch.logsumexp(logits, dim=-1) - logits[torch.arange(y.shape[0]), y]).mean()


def loss_looked_up_in_a_range(h, w, b, y):
    logits = F.linear(h.view(2, 3, 8), w, b).view(-1, 11).float()
    return -F.log_softmax(logits, dim=-1)[range(len(y)), y].mean()


def loss_looked_up_from_zero(h, w, b, y):
    positions = torch.arange(0, 6, 1, dtype=torch.int32)
    return F.log_softmax(F.linear(h, w), dim=-1)[positions, y.int()].sum() + positions.sum()


def loss_less_the_maximum(h, w, b, y):  # as in CS336
    logits = F.linear(h.view(2, 3, 8), w)
    z = logits - logits.max(dim=-1, keepdim=True).values
    return (z.exp().sum(-1).log() - z.gather(-1, y.view(2, 3, 1)).squeeze(-1)).mean()


def loss_less_the_maximum_looked_up(h, w, b, y):
    logits = F.linear(h, w, b)
    logits = logits - torch.max(logits, dim=-1, keepdim=True)[0].detach()
    return torch.mean(-logits[torch.arange(y.size(0)), y] + torch.log(torch.sum(torch.exp(logits), dim=-1)))


def loss_less_the_largest(h, w, b, y):
    logits = F.linear(h, w).float() / 0.7
    z = logits - logits.amax(-1).unsqueeze(-1)
    return (torch.logsumexp(z, -1, keepdim=True) - z.gather(-1, y[:, None])).sum()


def loss_log_probabilities_written_out(h, w, b, y):
    logits = F.linear(h.view(2, 3, 8), w)
    z = logits - logits.amax(-1, keepdim=True)
    log_probabilities = z - torch.log(torch.exp(z).sum(-1, keepdim=True))
    return -log_probabilities.gather(-1, y.view(2, 3).unsqueeze(-1)).squeeze(-1)


def loss_of_exponentials(h, w, b, y):
    logits = F.linear(h, w).float()
    return (logits.exp().sum(dim=-1).log() - logits.gather(-1, y[:, None]).squeeze(-1)).mean()


if hasattr(F, "linear_cross_entropy"):  # torch 2.13

    def loss_of_torch(h, w, b, y):
        return F.linear_cross_entropy(h, w, y, linear_bias=b)

    def loss_of_torch_in_chunks(h, w, b, y):
        options = nn.LinearCrossEntropyOptions(allow_retain_graph=True)
        return F.linear_cross_entropy(h, w, y, linear_bias=b, ignore_index=3, options=options)

    def loss_of_torch_in_chunks_of_rows(h, w, b, y):
        options = nn.LinearCrossEntropyOptions(allow_retain_graph=True)
        return F.linear_cross_entropy(h, w, y, reduction="none", options=options)


LOSSES = [f for name, f in list(globals().items()) if name.startswith("loss_")]
SCALED = [f for f in LOSSES if f.__name__.startswith(("loss_scaled_by", "loss_divided_by_a"))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("function", LOSSES, ids=lambda f: f.__name__)
def test_linear_cross_entropy(function, dtype):
    if function in SCALED and dtype is torch.bfloat16:
        pytest.skip("is left on a CPU: see below")
    h, w, b = torch.randn(6, 8, dtype=dtype), torch.randn(11, 8, dtype=dtype), torch.randn(11, dtype=dtype)
    y = torch.tensor([0, 10, 3, 5, 3, 7])
    report = report_of(function, h, w, b, y)
    assert report.counts == {"linear_cross_entropy": 1}, report
    result = report.graphs[0].after(*ordered(report, h=h, w=w, b=b, y=y))[0]
    torch.testing.assert_close(result, function(h, w, b, y), rtol=2e-2, atol=2e-2)
    assert result.dtype == function(h, w, b, y).dtype


SUMS = [
    f for f in LOSSES if f.__name__.startswith(("loss_of_tokens", "loss_of_rewards", "loss_of_each", "loss_by_dot"))
]


@pytest.mark.parametrize("function", [*SUMS, loss_mean_of_rows, loss_of_weights_twice], ids=lambda f: f.__name__)
def test_sums_of_losses(function):
    """A number is made of the losses, so that its gradient is known when they are computed."""
    h, w, b = (torch.randn(s) for s in ((6, 8), (11, 8), 11))
    y = torch.tensor([0, 10, 3, 5, 3, 7])
    report = report_of(function, h, w, b, y)
    assert [m.replacement for m in report.matches] == ["liger_compile.linear_cross_entropy_sum.default"]
    torch._dynamo.reset()
    compiled = torch.compile(function, backend=rewritten(reports := []), dynamic=True)
    for _ in range(2):
        torch.testing.assert_close(*(gradients(f, h, w, b, y) for f in (compiled, function)))
    assert all(r.counts == {"linear_cross_entropy": 1} for r in reports)


@pytest.mark.parametrize("function", [f for f in LOSSES if f.__name__.startswith("loss_z")], ids=lambda f: f.__name__)
def test_z_losses(function):
    h, w, b, y = torch.randn(6, 8), torch.randn(11, 8), torch.randn(11), torch.tensor([0, 10, 3, 5, 3, 7])
    report = report_of(function, h, w, b, y)
    assert [m.replacement for m in report.matches] == ["liger_compile.linear_cross_entropy_z.default"]
    torch._dynamo.reset()
    compiled = torch.compile(function, backend=rewritten())
    torch.testing.assert_close(*(gradients(f, h, w, b, y) for f in (compiled, function)))


PARTS = {
    "all but the first": lambda z, y: [(z[1:3], y[1:3]), (z[3:], y[3:])],
    "in another order": lambda z, y: [(z[3:], y[3:]), (z[:3], y[:3])],
    "with a gap": lambda z, y: [(z[:2], y[:2]), (z[3:], y[3:])],
    "labels in another order": lambda z, y: [(z[:3], y[3:]), (z[3:], y[:3])],
    "twice": lambda z, y: [(z[:3], y[:3]), (z[:3], y[:3])],
    "with the same labels": lambda z, y: [(z[:3], y[:3]), (z[3:], y[:3])],
    "the same rows": lambda z, y: [(z[:3], y[:3]), (z[:3], y[3:])],
}


@pytest.mark.parametrize("name", PARTS)
def test_parts_of_the_rows(name):
    """Whatever is put together of them: what is rewritten gives eager's losses and gradients."""

    def function(h, w, y):
        parts = PARTS[name](F.linear(h, w).float(), y)
        losses = torch.cat([F.cross_entropy(z, t, reduction="none") for z, t in parts])
        return (losses * torch.arange(1, len(losses) + 1)).sum()

    h, w, y = torch.randn(6, 8), torch.randn(11, 8), torch.tensor([0, 10, 3, 5, 3, 7])
    torch._dynamo.reset()
    compiled = torch.compile(function, backend=rewritten(reports := []))
    torch.testing.assert_close(*(gradients(f, h, w, y) for f in (compiled, function)))
    assert reports[0].counts == ({"linear_cross_entropy": 1} if name == "all but the first" else {}), reports


def test_rows_with_losses_of_their_own_and_a_number():
    """The number is no square of each row."""

    def function(h, w, y):
        logits = F.linear(h, w).float()
        return F.cross_entropy(logits, y, reduction="none") + 0.1 * logits.logsumexp(-1).square().mean()

    report = report_of(function, torch.randn(6, 8), torch.randn(11, 8), torch.randint(11, (6,)))
    assert [m.replacement for m in report.matches] == ["liger_compile.linear_cross_entropy_lse.default"]


@pytest.mark.parametrize("scale", [torch.ones(6, 1), torch.ones(6, 11)], ids=["of rows", "of elements"])
def test_logits_with_a_scale_of_another_kind(scale):
    def function(h, w, y):
        return F.cross_entropy(F.linear(h, w) * scale, y)

    report = report_of(function, torch.randn(6, 8), torch.randn(11, 8), torch.randint(11, (6,)))
    assert not report.counts and not any("Error" in m.reason for m in report.misses), report


def test_z_losses_whose_parts_are_returned_too():
    def function(h, w, y):
        logits = F.linear(h, w).float()
        loss, z = F.cross_entropy(logits, y), 1e-4 * logits.logsumexp(-1).square().mean()
        return loss + z, loss.detach(), z.detach()

    report = report_of(function, torch.randn(6, 8), torch.randn(11, 8), torch.randint(11, (6,)))
    assert [m.replacement for m in report.matches] == ["liger_compile.linear_cross_entropy_lse.default"]


def test_sums_whose_weights_are_trained():
    def function(h, w, s, y):
        return (F.cross_entropy(F.linear(h, w), y, reduction="none") * s).sum()

    h, w, s, y = torch.randn(6, 8), torch.randn(11, 8), torch.randn(6, requires_grad=True), torch.randint(11, (6,))
    report = report_of(function, h, w, s, y)
    assert [m.replacement for m in report.matches] == ["liger_compile.linear_cross_entropy.default"]


def test_sums_of_losses_that_are_returned_too():
    """The losses are not computed again for it."""

    def function(h, w, y):
        losses = F.cross_entropy(F.linear(h, w), y, reduction="none")
        return (losses * y).sum(), losses

    report = report_of(function, torch.randn(6, 8), torch.randn(11, 8), torch.randint(11, (6,)))
    assert [m.replacement for m in report.matches] == ["liger_compile.linear_cross_entropy.default"]
    assert not [n for n in report.graphs[0].after.graph.nodes if n.op == "call_module"]


def test_losses_that_are_weighted_several_times():
    def function(h, w, s, y):
        return (F.cross_entropy(F.linear(h, w), y, reduction="none") * s).sum()

    h, w, s, y = torch.randn(6, 8), torch.randn(11, 8), torch.randn(4, 6), torch.randint(11, (6,))
    report = report_of(function, h, w, s, y)
    assert [m.replacement for m in report.matches] == ["liger_compile.linear_cross_entropy.default"]


@pytest.mark.parametrize("function", SCALED, ids=lambda f: f.__name__)
def test_scaled_by_a_tensor_where_logits_are_rounded(function):
    """What is scaled is rounded for it; a CPU rounds the logits as well, which would be worse than eager."""
    h, w, b, y = torch.randn(6, 8), torch.randn(11, 8), torch.randn(11), torch.randint(11, (6,))
    report = report_of(function, h.bfloat16(), w.bfloat16(), b.bfloat16(), y)
    assert not report.counts and any(
        re.search("are scaled by a tensor|a scale for each class", m.reason) for m in report.misses
    ), report


def looked_up(h, w, y):
    logits = F.linear(h, w)
    return (torch.logsumexp(logits, -1) - logits[torch.arange(y.shape[0]), y]).mean()


def log_probabilities_looked_up(h, w, y):
    return -F.log_softmax(F.linear(h, w).float(), -1)[range(len(y)), y].mean()


def less_the_maximum(h, w, y):
    logits = F.linear(h, w)
    z = logits - logits.max(-1, keepdim=True).values
    return (z.exp().sum(-1).log() - z.gather(-1, y[:, None]).squeeze(-1)).mean()


def less_the_maximum_as_a_constant(h, w, y):
    logits = F.linear(h, w)
    z = logits - logits.amax(-1, keepdim=True).detach()
    return (z.exp().sum(-1).log() - z[torch.arange(len(y)), y]).mean()


WRITTEN_OUT = [looked_up, log_probabilities_looked_up, less_the_maximum, less_the_maximum_as_a_constant]


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("function", WRITTEN_OUT)
def test_gradients_of_a_written_out_loss(function, dtype, autocast):
    h, w, y = torch.randn(6, 8, dtype=dtype), torch.randn(11, 8, dtype=dtype), torch.tensor([0, 10, 3, 5, 3, 7])
    reports = []
    torch._dynamo.reset()
    compiled = torch.compile(function, backend=rewritten(reports))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours, eager = gradients(compiled, h, w, y), gradients(function, h, w, y)
    assert [r.counts for r in reports] == [{"linear_cross_entropy": 1}], reports
    exact = gradients(function, h.double(), w.double(), y)
    for mine, theirs, true in zip(ours, eager, exact, strict=True):
        assert mine.dtype is theirs.dtype
        assert relative_error(mine, true) <= 1.5 * relative_error(theirs, true) + torch.finfo(theirs.dtype).eps


@pytest.mark.parametrize("shape, divided", [((101,), False), ((), False), ((), True), ((1,), True)], ids=str)
def test_gradients_of_a_scale(shape, divided):
    """What the logits are computed from is scaled, and rounded, where the model scales and rounds logits."""

    def step(h, w, s, y):
        logits = F.linear(h, w).float()
        return F.cross_entropy(logits / s if divided else logits * (s.float() * 8), y), logits

    def results(function, *operands):
        operands = [x.detach().requires_grad_() for x in operands]
        loss, logits = function(*operands, y)
        return loss.detach(), *torch.autograd.grad(loss, operands), logits.detach().float()

    h, w, s = (torch.randn(n) for n in ((64, 96), (101, 96), shape))
    w, s, y = w / 10, s.abs() + 0.1, torch.randint(101, (64,))
    torch._dynamo.reset()
    compiled = torch.compile(step, backend=rewritten(reports := []))
    ours, eager, exact = (
        results(compiled, h, w, s),
        results(step, h, w, s),
        results(step, *(x.double() for x in (h, w, s))),
    )
    assert [r.counts for r in reports] == [{"linear_cross_entropy": 1}], reports
    for mine, theirs, true in zip(ours, eager, exact, strict=True):
        assert mine.dtype is theirs.dtype and mine.shape == theirs.shape
        assert relative_error(mine, true) <= 1.5 * relative_error(theirs, true) + 4 * torch.finfo(theirs.dtype).eps


@pytest.mark.parametrize("function", [looked_up, log_probabilities_looked_up])
def test_negative_labels_count_from_the_end_of_a_lookup(function):
    h, w, y = torch.randn(6, 8), torch.randn(101, 8), torch.tensor([0, -1, -100, -101, 3, 100])
    torch._dynamo.reset()
    compiled = torch.compile(function, backend=rewritten(reports := []))
    torch.testing.assert_close(gradients(compiled, h, w, y), gradients(function, h, w, y))
    assert reports[0].counts == {"linear_cross_entropy": 1}
    for outside in (101, -102, torch.iinfo(torch.int64).min):
        with pytest.raises((IndexError, RuntimeError)):
            compiled(h, w, torch.full_like(y, outside))


def test_negative_labels_are_none_of_a_gather():
    h, w, y = torch.randn(6, 8), torch.randn(101, 8), torch.tensor([0, 1, -100, 2, 3, 100])
    torch._dynamo.reset()
    with pytest.raises((IndexError, RuntimeError)):
        torch.compile(less_the_maximum, backend=rewritten())(h, w, y)


def test_lookup_of_a_size_that_only_the_compiler_knows():
    torch._dynamo.reset()
    compiled = torch.compile(looked_up, backend=rewritten(reports := []), dynamic=True)
    w = torch.randn(11, 8)
    for n in (6, 9):
        h, y = torch.randn(n, 8), torch.randint(-11, 11, (n,))
        torch.testing.assert_close(gradients(compiled, h, w, y), gradients(looked_up, h, w, y))
    assert [r.counts for r in reports] == [{"linear_cross_entropy": 1}]


def test_logits_beyond_the_largest_exponential():
    h, w, y = 30 * torch.ones(2, 8), torch.eye(11, 8), torch.tensor([0, 10])

    def plain(h, w, y):
        z = F.linear(h, 4 * w)
        return (z.exp().sum(-1).log() - z.gather(-1, y[:, None]).squeeze(-1)).mean()

    torch._dynamo.reset()
    assert plain(h, w, y).isinf()
    expected = F.cross_entropy(F.linear(h, 4 * w), y)
    torch.testing.assert_close(torch.compile(plain, backend=rewritten())(h, w, y), expected)


OTHER_LOOKUPS = [
    lambda h, w, y: F.log_softmax(F.linear(h, w), -1)[torch.arange(1, 6), y[1:]],
    lambda h, w, y: F.log_softmax(F.linear(h, w), -1)[torch.arange(5), y[:5]],
    lambda h, w, y: F.log_softmax(F.linear(h, w), -1)[torch.arange(0, 12, 2) // 2 * 0, y],
    lambda h, w, y: F.log_softmax(F.linear(h, w), -1)[torch.arange(5, -1, -1), y],
    lambda h, w, y: F.log_softmax(F.linear(h, w), -1)[torch.arange(6), y[:1]],
    lambda h, w, y: F.log_softmax(F.linear(h, w), -1)[torch.arange(6)[:, None], y],
    lambda h, w, y: F.log_softmax(F.linear(h, w), -1)[range(5, -1, -1), y],
    lambda h, w, y: F.log_softmax(F.linear(h, w), -1)[y % 6, y],
    lambda h, w, y: F.log_softmax(F.linear(h, w)[:, :6], -1)[torch.arange(6, dtype=torch.uint8).bool()],
    lambda h, w, y: (lambda z: (z - z.amax(-1, True)).logsumexp(-1) - z[torch.arange(6), y])(F.linear(h, w)),
    lambda h, w, y: (lambda z: (z - z.amax(0)).exp().sum(-1).log() - (z - z.amax(0))[range(6), y])(F.linear(h, w)),
    lambda h, w, y: (lambda z: z.exp().sum(0).log()[y] - z[range(6), y])(F.linear(h, w)),
    lambda h, w, y: (lambda z: (z - z.detach().amax(-1, True)).logsumexp(-1) - (z - z.amax(-1, True))[range(6), y])(
        F.linear(h, w)
    ),
    lambda h, w, y: F.log_softmax(F.linear(h, w), 0).gather(-1, y[:, None]),
    lambda h, w, y: F.log_softmax(F.linear(h, w), -1).gather(-1, y[:, None].expand(-1, 2)),
    lambda h, w, y: F.log_softmax(F.linear(h, w), -1)[:, :9].gather(-1, y[:, None].clamp(max=8)),
    lambda h, w, y: F.log_softmax(F.linear(h, w), -1).gather(0, y[None, :6].clamp(max=5)),
    lambda h, w, y: (lambda z: z.gather(-1, y[:, None]) - z[:, 1:].logsumexp(-1, True))(F.linear(h, w)),
    lambda h, w, y: (lambda z: z.gather(-1, y[:, None]) - z.logsumexp(-1))(F.linear(h, w)),
    lambda h, w, y: (lambda z: z.gather(-1, y[:, None]).squeeze(-1) - z.logsumexp(-1).flip(0))(F.linear(h, w)),
]


@pytest.mark.parametrize("function", OTHER_LOOKUPS)
def test_what_is_no_log_probability(function):
    args = torch.randn(6, 8), torch.randn(11, 8), torch.tensor([0, 10, 3, 5, 3, 7])
    assert report_of(function, *args).counts == {}
