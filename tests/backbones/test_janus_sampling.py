"""Sampling of image tokens against the same tokens given to the model as they are."""

import pytest
from torch.testing import assert_close

from tests.backbones.janus_parts import TEXTS, janus


@pytest.fixture(scope="module")
def model():
    return janus()


@pytest.mark.parametrize("scale, tolerance", [(1.0, 1e-5), (5.0, 1e-4), (0.0, 1e-5)])
def test_log_probabilities_of_sampling_are_those_of_teacher_forcing(model, scale, tolerance):
    inputs = model.image_prompt(TEXTS)
    drawn = model.sample_image(inputs, [1, 2, 3, 4], scale)
    assert drawn.ids.shape == (4, 16) and not drawn.log_probs.requires_grad
    assert_close(model.image_log_probs(inputs, drawn.ids, scale), drawn.log_probs, atol=tolerance, rtol=0)
