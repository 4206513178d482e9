"""Priors and the choice between them, against the published formulas written out; they are off by default."""

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from experiments.sweep.config import Settings
from kshot.errors import UnknownNameError
from vlm import calibration
from vlm.calibration import calibrated, choose, prior
from vlm.classifier import predict
from vlm.prompts import Prompt
from vlm.scoring import score_choices

logits = arrays(np.float32, (6, 4), elements=st.floats(-20, 20, width=32))


def test_it_is_off_by_default() -> None:
    assert Settings().calibration == calibration.NONE


@settings(deadline=None)
@given(logits, arrays(np.float32, 4, elements=st.floats(-9, 0, width=32)))
def test_the_prior_is_divided_out(scores: np.ndarray, log_prior: np.ndarray) -> None:
    """W = diag(prior)^-1 and no bias (Zhao et al. 2021, section 5), normalised."""
    weighted = np.exp(scores.astype(np.float64)) / np.exp(log_prior.astype(np.float64))
    expected = weighted / weighted.sum(1, keepdims=True)
    got = calibrated(scores - np.logaddexp.reduce(scores, 1, keepdims=True), log_prior)
    if np.ptp(log_prior):
        assert np.exp(got) == pytest.approx(expected, abs=1e-4)


def test_no_prior_changes_no_bit(sampler: Any, prompt: Prompt) -> None:
    scores = np.log(np.array([[0.2, 0.8], [0.5, 0.5]], np.float32))
    assert calibrated(scores, np.zeros(2, np.float32)) is scores
    assert not prior("none", sampler, prompt).any()


def test_contextual_is_the_mean_answer_to_images_without_content(
    sampler: Any, prompt: Prompt, make_image: Callable[..., bytes]
) -> None:
    blanks = []
    for grey in (0, 128, 255):
        buffer = io.BytesIO()
        Image.new("RGB", (224, 224), (grey, grey, grey)).save(buffer, "PNG")
        blanks.append(buffer.getvalue())
    expected = np.exp(predict(sampler, blanks, prompt).astype(np.float64)).mean(0)
    assert np.exp(prior("contextual", sampler, prompt)) == pytest.approx(expected, rel=1e-4)


def test_pmi_is_the_answer_to_the_question_alone(sampler: Any, prompt: Prompt) -> None:
    expected = score_choices(sampler, [prompt.without_image()], prompt.choices)[0]
    assert prior("pmi", sampler, prompt) == pytest.approx(expected, abs=1e-5)
    likelihood = score_choices(sampler, [prompt.without_image()], prompt.choices, "likelihood")[0].astype(np.float64)
    normal = likelihood - np.logaddexp.reduce(likelihood)
    assert prior("pmi", sampler, prompt, "likelihood") == pytest.approx(normal, abs=1e-4)


def test_what_fits_the_validation_images_best_is_chosen() -> None:
    scores = np.log(np.array([[0.7, 0.3], [0.6, 0.4], [0.9, 0.1]]))
    towards_first = np.log(np.array([0.9, 0.1]))
    priors = {"none": np.zeros(2), "other": towards_first}
    assert choose(scores, np.array([0, 0, 0]), priors) == "none"
    assert choose(scores, np.array([1, 1, 0]), priors) == "other"
    assert choose(scores, np.array([0, 1, 0]), {"none": np.zeros(2), "same": np.zeros(2)}) == "none"


def test_an_unknown_one_is_named(sampler: Any, prompt: Prompt) -> None:
    with pytest.raises(UnknownNameError, match="none, contextual, pmi"):
        prior("context", sampler, prompt)
