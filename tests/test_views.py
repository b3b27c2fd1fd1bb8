"""Shapes that are changed in place."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from helpers import capture, relative_error, report_of

from liger_compile.graph_terms import value_of
from liger_compile.views import settle


def turned(x, w):
    h = F.linear(x, w)
    before = F.rms_norm(h * 2, (14,))
    h.unsqueeze_(0)
    behind = F.rms_norm(h, (14,))
    h = h + 1
    h.transpose_(0, 1).squeeze_(1)
    return before.sum() + behind.square().mean(), h


def inputs():
    return torch.randn(10, 12).requires_grad_(), torch.randn(14, 12).requires_grad_()


def test_what_is_read_before_and_after():
    args = inputs()
    report = report_of(turned, *args)
    assert report.counts == {"rms_norm": 2}, report
    results = []
    for function in (report.graphs[0].after, turned):
        loss, h = function(*args)
        results.append((loss, h, *torch.autograd.grad(loss + h.square().sum(), args)))
    for ours, eager in zip(*results, strict=True):
        assert ours.shape == eager.shape and relative_error(ours.detach(), eager.detach()) < 1e-6


def test_every_shape_is_what_the_tensor_has_there():
    gm = capture(turned, *inputs())
    settle(gm.graph)
    shapes = {n.name: tuple(value_of(n).shape) for n in gm.graph.nodes if isinstance(value_of(n), torch.Tensor)}
    assert [shapes[name] for name in ("h", "unsqueeze_", "h_1", "transpose_", "squeeze_")] == [
        *((10, 14), (1, 10, 14), (1, 10, 14), (10, 1, 14), (10, 14))
    ]
    settled = str(gm.graph)
    settle(gm.graph)
    assert str(gm.graph) == settled
