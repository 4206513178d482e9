"""Corrections of a model's liking for some class names whatever the image: scores minus a prior. Off by default.

A prior is what the model answers where nothing speaks for any class: about images without content (contextual
calibration, Zhao et al., ICML 2021) or about no image at all (domain conditional PMI, Holtzman et al., EMNLP 2021). A
choice between them is made on labelled validation images, never on test images.
"""

import io
from collections.abc import Callable, Mapping

import numpy as np
import tinker

from kshot.errors import UnknownNameError
from vlm.prompts import Prompt
from vlm.scoring import score_choices
from vlm.service import SamplingClient

NONE = "none"
BLANKS = (0, 128, 255)  # black, grey and white images have no content
SIDE = 224  # pixels
PRIORS: Mapping[str, Callable[[Prompt], list[tinker.ModelInput]]] = {  # the questions whose mean answer a prior is
    "contextual": lambda prompt: [prompt.question(_blank(value)) for value in BLANKS],
    "pmi": lambda prompt: [prompt.without_image()],
}


def prior(name: str, sampler: SamplingClient, prompt: Prompt, method: str = "constrained") -> np.ndarray:
    """(classes,) the log prior of this name; zeros for "none". Raises UnknownNameError."""
    if name == NONE:
        return np.zeros(len(prompt.classes), np.float32)
    if name not in PRIORS:
        raise UnknownNameError("calibration", name, [NONE, *PRIORS])
    rows = _normalised(score_choices(sampler, PRIORS[name](prompt), prompt.choices, method))
    mean: np.ndarray = np.logaddexp.reduce(rows, 0) - np.log(len(rows))
    return mean.astype(np.float32)


def calibrated(scores: np.ndarray, log_prior: np.ndarray) -> np.ndarray:
    """(images, classes) log-probabilities: scores minus the prior, each row normalised; scores as they are where the
    prior is the same for all classes and they are normalised."""
    if not np.ptp(log_prior):
        return scores
    return _normalised(scores - log_prior)


def choose(scores: np.ndarray, labels: np.ndarray, priors: Mapping[str, np.ndarray]) -> str:
    """The name of the prior with the lowest mean NLL of these (validation) images' labels; the first one of equals."""

    def nll(name: str) -> float:
        return float(-_normalised(scores - priors[name])[np.arange(len(labels)), labels].mean())

    return min(priors, key=nll)


def _normalised(scores: np.ndarray) -> np.ndarray:
    normal: np.ndarray = scores - np.logaddexp.reduce(scores.astype(np.float64), 1, keepdims=True)
    return normal.astype(np.float32)


def _blank(value: int) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (SIDE, SIDE), (value, value, value)).save(buffer, "PNG")
    return buffer.getvalue()
