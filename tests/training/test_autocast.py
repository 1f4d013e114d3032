"""Training steps under autocast: no norm leaves its fused kernel for gains of another dtype than its input's."""

from __future__ import annotations

import warnings

import torch

from tests.methods.bridge_parts import metaquery, requests, wemmu
from umm_zoo.blocks.metaquery_connector import FinalNorm, RMSNorm


def test_norms_of_trained_parts_keep_their_kernel() -> None:
    for method in (wemmu(["queries", "pathway", "connector", "detail", "decoder"]), metaquery()):
        with warnings.catch_warnings(), torch.autocast("cpu", torch.bfloat16):
            warnings.filterwarnings("error", message=".*fused.*")
            method.train().training_losses(requests(0, 1))["loss"].backward()


def test_norms_in_one_kernel_are_those_of_the_release() -> None:
    for norm, dtype in (
        (RMSNorm(6, 1e-6), torch.float32),
        (FinalNorm(6, 1e-5), torch.bfloat16),
        (FinalNorm(6, 1e-5), torch.float32),
    ):
        torch.nn.init.normal_(norm.weight)
        x = torch.randn(3, 4, 6).to(dtype)
        expected = norm.weight * norm.normalised(x)
        assert norm(x).dtype == torch.float32
        torch.testing.assert_close(norm(x), expected, rtol=1e-6, atol=1e-6)
