"""The methods that a sweep compares: a function each, from a Task to an Outcome, and a table of them, METHODS. None of
them sees a test label."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from data.dataset import Example, Images
from experiments.sweep.config import DATA_SETTINGS, Settings
from kshot.errors import TooFewImagesError
from kshot.files import cache_folder
from vlm.places import first_device

if TYPE_CHECKING:
    from tinker import types

    from baselines.features import Encoder
    from baselines.heads import Head
    from baselines.heads.inputs import FittedHead
    from baselines.lora import LoraHeadClient
    from vlm.prompts import Prompt
    from vlm.service import SamplingClient, ServiceClient, TrainingClient
    from vlm.thinking import Thought


@dataclass(frozen=True)
class Task:
    """The input of a method. train: k labelled examples a class. service, device: what computes. validation:
    labelled images to choose settings on, where any are chosen; none of them is in train or test."""

    classes: tuple[str, ...]
    train: Sequence[Example]
    test: Sequence[bytes]
    seed: int
    settings: Settings
    service: str = "local"
    device: str = "cpu"
    validation: Sequence[Example] = ()

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return self.settings.steps(len(self.classes))


@dataclass(frozen=True)
class Outcome:
    """The output of a method. scores: (images, classes), higher is better; log-probabilities where `probabilities`.
    seconds: "fit" (learning), "predict" (scoring), "answer" (writing free answers); what an earlier cell of the process
    has encoded or loaded costs nothing again. answers: the free-text answer to each image and the label it reads as
    (-1: none), for methods that write. chosen: what was chosen on labelled images that are no test images, by setting.
    thoughts: of a method that thinks before it answers."""

    scores: np.ndarray
    probabilities: bool
    seconds: Mapping[str, float]
    answers: Sequence[tuple[str, int]] | None = None
    chosen: Mapping[str, Any] = field(default_factory=dict)
    thoughts: "Thoughts | None" = None


@dataclass(frozen=True)
class Thoughts:
    """What was thought about each image, (images,) each. tokens: of a thought on average. closed: the share of the
    thoughts that the model itself ended. without: the class that is likeliest without a thought."""

    tokens: np.ndarray
    closed: np.ndarray
    without: np.ndarray


@dataclass(frozen=True)
class Method:
    """The function, the settings its numbers depend on, whether it learns, and its relative cost in time. zero_shot:
    the method that evaluates the model before this one tunes it. leaves_out: whether it chooses its own settings by
    leave-one-out on the training images. local: whether it needs features, which the Tinker API does not give."""

    run: Callable[[Task], Outcome]
    settings: tuple[str, ...]
    learns: bool = True
    cost: float = 1.0
    zero_shot: str | None = None
    leaves_out: bool = False
    local: bool = False

    @property
    def uses_vlm(self) -> bool:
        """Whether images are shown to the VLM."""
        return "model" in self.settings

    @property
    def uses_backbone(self) -> bool:
        """Whether images are shown to DINOv2."""
        return "backbone" in self.settings

    @property
    def generates(self) -> bool:
        """Whether a model is prompted twice for each test image: to score the classes, and to generate an answer."""
        return "answer_tokens" in self.settings

    @property
    def trains(self) -> bool:
        """Whether a model takes optimizer steps."""
        return "views_per_class" in self.settings


def vlm_zero_shot(task: Task) -> Outcome:
    """The base model without training: the k = 0 point."""
    sampler = base_sampler(task.service, task.device, task.settings.model)
    return _evaluate(sampler, task, fit_seconds=0.0)


def vlm_lora(task: Task) -> Outcome:
    """LoRA-tune the vision-language model to answer with the class name, then evaluate it."""
    start = time.perf_counter()
    return _evaluate(_tuned(task, fit_lora), task, fit_seconds=time.perf_counter() - start)


def fit_lora(client: "TrainingClient", task: Task) -> Iterator[float]:
    """Train a new run on the task's shots; yields the loss of each step, a training image on average."""
    from vlm.classifier import fit

    s, views, prompt = task.settings, _batches(task), prompt_of(client, task)
    thoughts = _thoughts_of_training(client, task, prompt) if s.thinking else None
    first = islice(views, s.start_steps(task.steps))
    for batches, loss, power in ((first, "text", 0.0), (views, s.loss, s.loss_power)):
        for answer, _ in fit(client, batches, prompt, _adam(s), loss, power, thoughts, s.train_on):
            yield answer.metrics["loss:sum"] / s.batch_size


def vlm_tuned_linear(task: Task) -> Outcome:
    """Logistic regression on the last hidden state of the VLM that `vlm_lora` tunes, instead of its answer in text
    (Zhang et al. 2024, arXiv:2405.18415)."""
    from baselines.heads import HEADS
    from vlm.embedding import embed_images

    start, sampler = time.perf_counter(), _tuned(task, fit_lora)
    tuning, prompt = time.perf_counter() - start, prompt_of(sampler, task)
    outcome = _frozen(task, lambda images: embed_images(sampler, images, prompt, "hidden"), HEADS["logreg"])
    return replace(outcome, seconds={**outcome.seconds, "fit": tuning + outcome.seconds["fit"]})


def vlm_rl(task: Task) -> Outcome:
    """LoRA-tune the vision-language model by reward for answers of its own, then evaluate it."""
    start = time.perf_counter()
    return _evaluate(_tuned(task, fit_rl), task, fit_seconds=time.perf_counter() - start)


def fit_rl(client: "TrainingClient", task: Task) -> Iterator[float]:
    """Train a new run on the task's shots, after the start with the loss text by reward; yields the mean loss of a
    training image, then the mean reward of an answer."""
    from vlm.classifier import fit
    from vlm.reward import Policy, reinforce

    s, views, prompt = task.settings, _batches(task), prompt_of(client, task)
    for answer, _ in fit(client, islice(views, s.start_steps(task.steps)), prompt, _adam(s)):
        yield answer.metrics["loss:sum"] / s.batch_size
    policy = Policy(s.group_size, s.temperature, s.answer_tokens, s.policy_loss, s.kl)
    base = base_sampler(task.service, task.device, s.model) if s.kl else None
    yield from reinforce(client, views, prompt, _adam(s), policy, seed=task.seed, base=base)


def _tuned(task: Task, fit: Callable[["TrainingClient", Task], Iterator[float]]) -> Any:
    """A sampling client of a new run after it was trained."""
    s, service = task.settings, connected(task.service, task.device)
    client = service.create_lora_training_client(s.model, rank=s.rank, seed=task.seed).result()
    for _ in fit(client, task):
        pass
    return client.save_weights_and_get_sampling_client().result()


def _thoughts_of_training(client: Any, task: Task, prompt: "Prompt") -> "dict[bytes | str, Thought]":
    """What the model thinks, before it is tuned, about each training image, mirrored ones too."""
    from vlm.thoughts import Thinking, consider

    s = task.settings
    images = dict.fromkeys(image for each in task.train for image in (each.image, each.mirrored) if image)
    sampler = client.save_weights_and_get_sampling_client().result()
    thinking = Thinking(s.thinking, 1, s.thinking_temperature, s.thinking_seed)
    windows = consider(sampler, [*images], prompt, thinking)
    thoughts = [own[0] for window in windows for own in window.thoughts]
    return dict(zip(images, thoughts, strict=True))


def vlm_vision_linear(task: Task) -> Outcome:
    """Logistic regression on features of the base vision-language model."""
    from baselines.heads import HEADS
    from vlm.embedding import embed_images

    sampler = base_sampler(task.service, task.device, task.settings.model)
    prompt, which = prompt_of(sampler, task), task.settings.vlm_features
    return _frozen(task, lambda images: embed_images(sampler, images, prompt, which), HEADS["logreg"])


def dinov2_frozen(head: str, task: Task) -> Outcome:
    """Frozen DINOv2 features with a head of `baselines.heads`."""
    from baselines.heads import HEADS

    return _frozen(task, _dinov2_features(task), HEADS[head])


def fit_dinov2_head(head: str, task: Task) -> "FittedHead":
    """The head that `dinov2_frozen` tests."""
    from baselines.heads import HEADS

    return _fitted(task, _dinov2_features(task), HEADS[head])


def pixel_knn(task: Task) -> Outcome:
    """Nearest neighbour on raw pixels: the floor."""
    from baselines.heads import Head
    from baselines.heads.knn import fit_nearest_neighbour, pixels

    return _frozen(task, pixels, Head(fit_nearest_neighbour, probabilities=False, chooses=False))


def dinov2_lora(task: Task) -> Outcome:
    """LoRA and a linear head on DINOv2, by the same requests and on the very batches that `vlm_lora` makes."""
    start, client = time.perf_counter(), lora_head_client(task)
    for _ in fit_lora_head(client, task):
        pass
    fitted = time.perf_counter()
    scores = client.class_log_probs(task.test)
    return Outcome(scores, True, {"fit": fitted - start, "predict": time.perf_counter() - fitted})


def lora_head_client(task: Task) -> "LoraHeadClient":
    """A client of the task's backbone, untrained."""
    from baselines.lora import LoraHeadClient

    s = task.settings
    return LoraHeadClient(
        s.backbone,
        len(task.classes),
        seed=task.seed,
        rank=s.rank,
        readout=s.readout,
        size=s.image_size,
        device=first_device(task.device),
    )


def fit_lora_head(client: Any, task: Task) -> Iterator[float]:
    """Train it on the task's shots; yields the loss of each step, a training image on average."""
    from baselines.lora import datum
    from vlm.classifier import steps

    data = ([datum(image, label) for image, label in batch] for batch in _batches(task))
    for answer, _ in steps(client, data, "cross_entropy", _adam(task.settings)):
        yield answer.metrics["loss:sum"] / task.settings.batch_size


_TRAINED = ("views_per_class", "hflip", "batch_size", "rank", "learning_rate", "beta1", "beta2", "eps")
_LOSS = ("loss", "loss_power", "start")
_POLICY = ("start", "group_size", "temperature", "policy_loss", "kl")
_FROZEN = (*DATA_SETTINGS, "backbone", "readout", "image_size")
_THINKING = ("thinking", "thoughts", "thinking_temperature", "thinking_seed")
_ANSWERED = (*DATA_SETTINGS, "model", "prompt", "answer_tokens", "calibration")
_PROMPTED = (*_ANSWERED, *_THINKING)
_TUNED_HEAD = (*DATA_SETTINGS, "model", "prompt")
_EMBEDDED = (*DATA_SETTINGS, "model", "prompt", "vlm_features")
METHODS = {
    "vlm-zero-shot": Method(vlm_zero_shot, _PROMPTED, learns=False),
    "vlm-lora": Method(vlm_lora, (*_PROMPTED, *_TRAINED, *_LOSS, "train_on"), cost=10.0, zero_shot="vlm-zero-shot"),
    "vlm-rl": Method(vlm_rl, (*_ANSWERED, *_TRAINED, *_POLICY), cost=100.0, zero_shot="vlm-zero-shot"),
    "vlm-tuned-linear": Method(vlm_tuned_linear, (*_TUNED_HEAD, *_TRAINED, *_LOSS), cost=9.0, local=True),
    "vlm-vision-linear": Method(vlm_vision_linear, _EMBEDDED, cost=2.0, local=True),
    "dinov2-logreg": Method(partial(dinov2_frozen, "logreg"), _FROZEN),
    "dinov2-ridge": Method(partial(dinov2_frozen, "ridge"), _FROZEN, leaves_out=True),
    "dinov2-knn": Method(partial(dinov2_frozen, "knn"), _FROZEN, leaves_out=True),
    "dinov2-mean": Method(partial(dinov2_frozen, "mean"), _FROZEN, leaves_out=True),
    "dinov2-lora": Method(dinov2_lora, (*_FROZEN, *_TRAINED), cost=5.0),
    "pixel-knn": Method(pixel_knn, DATA_SETTINGS),
}


def encode(images: Sequence[bytes], settings: Settings, device: str) -> None:
    """Put the local VLM's vision features of these images into the cache that all workers share."""
    from vlm.embedding import encode
    from vlm.inputs import ImageRule

    encode(base_sampler("local", device, settings.model), images, ImageRule.from_pretrained(settings.model))


def tower_forwards(settings: Settings, device: str) -> int:
    """How many images the local VLM's vision tower has encoded in this process."""
    forwards: int = base_sampler("local", device, settings.model).tower_forwards
    return forwards


def base_sampler(service: str, device: str, model: str) -> Any:
    """A sampling client of the model without an adapter."""
    return connected(service, device).create_sampling_client(base_model=model).result()


@lru_cache(maxsize=1)
def connected(service: str, device: str) -> "ServiceClient":
    """One service a process, so that cells share the base model; image features are shared by processes too."""
    from vlm.service import connect

    if service != "local":
        return connect(service)
    return connect(service, device=device, features=cache_folder() / "vision")


@lru_cache(maxsize=4)
def _encoder(backbone: str, readout: str, size: int | None, device: str) -> "Encoder":
    """One encoder a setting and process; its features are cached for the other processes and for later sweeps."""
    from baselines.features import Encoder

    return Encoder(backbone, readout=readout, size=size, device=device, folder=cache_folder() / "features")


def _adam(settings: Settings) -> "types.AdamParams":
    from tinker import types

    s = settings
    return types.AdamParams(learning_rate=s.learning_rate, beta1=s.beta1, beta2=s.beta2, eps=s.eps)


def _batches(task: Task) -> Iterator[list[tuple[bytes, int]]]:
    """The batches of (image, label) that every method that trains sees: fixed by the seed."""
    from vlm.classifier import batches

    rng, s = np.random.default_rng(task.seed), task.settings
    return batches(task.train, s.batch_size, task.steps, rng, hflip=s.hflip or 0.0)


def prompt_of(client: Any, task: Task) -> "Prompt":
    """The task's prompt in the tokens of its model."""
    from vlm import service
    from vlm.inputs import ImageRule
    from vlm.prompts import Prompt, template

    model = task.settings.model
    # The SDK's client would load it from the hub by the model's name, where our models and folders are not.
    tokenizer = client.get_tokenizer() if task.service == "local" else service.tokenizer(model)
    return Prompt(tokenizer, ImageRule.from_pretrained(model), task.classes, template(task.settings.prompt))


def _evaluate(sampler: "SamplingClient", task: Task, fit_seconds: float) -> Outcome:
    from vlm.calibration import calibrated
    from vlm.classifier import generate, predict

    start, prompt = time.perf_counter(), prompt_of(sampler, task)
    if task.settings.thinking:
        return _evaluate_thinking(sampler, task, prompt, fit_seconds)
    prior, chosen = _prior(sampler, task, prompt)
    scores = calibrated(predict(sampler, task.test, prompt), prior)
    scored = time.perf_counter()
    answers = [(text, prompt.parse(text)) for text in generate(sampler, task.test, prompt, task.settings.answer_tokens)]
    seconds = {"fit": fit_seconds, "predict": scored - start, "answer": time.perf_counter() - scored}
    return Outcome(scores, True, seconds, answers, chosen)


def _evaluate_thinking(sampler: "SamplingClient", task: Task, prompt: "Prompt", fit_seconds: float) -> Outcome:
    """Scores after thoughts, and without them; the free answer is that after an image's first thought."""
    from vlm.classifier import answers, predict
    from vlm.thoughts import Thinking, consider, posteriors

    s, seconds, start = task.settings, {"fit": fit_seconds, "answer": 0.0}, time.perf_counter()
    scores, thoughts, written = list[np.ndarray](), list[list[Any]](), list[str]()
    thinking = Thinking(s.thinking, s.thoughts, s.thinking_temperature, s.thinking_seed)
    for window in consider(sampler, task.test, prompt, thinking):
        scores.append(posteriors(sampler, window, prompt))
        thoughts += window.thoughts
        before = time.perf_counter()
        written += answers(sampler, [own[0] for own in window.asked], prompt, s.answer_tokens)
        seconds["answer"] += time.perf_counter() - before
    without = predict(sampler, task.test, prompt).argmax(1)
    seconds["predict"] = time.perf_counter() - start - seconds["answer"]
    tokens, closed = (
        np.array([np.mean([getattr(each, name) for each in own]) for own in thoughts], np.float32)
        for name in ("length", "closed")
    )
    read = [(text, prompt.parse(text)) for text in written]
    return Outcome(np.concatenate(scores), True, seconds, read, thoughts=Thoughts(tokens, closed, without))


def _prior(sampler: "SamplingClient", task: Task, prompt: "Prompt") -> tuple[np.ndarray, dict[str, str]]:
    """The log prior that the scores are corrected by, and what was chosen. Without labelled images, at zero-shot,
    nothing can be chosen and the scores stay as they are."""
    from vlm.calibration import NONE, PRIORS, choose, prior
    from vlm.classifier import predict

    name: str = task.settings.calibration
    if name != "validated" or not task.validation:
        return prior(NONE if name == "validated" else name, sampler, prompt), {}
    priors = {each: prior(each, sampler, prompt) for each in (NONE, *PRIORS)}
    labels = np.array([example.label for example in task.validation])
    name = choose(predict(sampler, Images(task.validation), prompt), labels, priors)
    return priors[name], {"calibration": name}


def _frozen(task: Task, features: Callable[[Sequence[bytes]], np.ndarray], head: "Head") -> Outcome:
    """A head fitted on the training images alone, then applied; both with the encoding of their images."""
    start = time.perf_counter()
    fitted = _fitted(task, features, head)
    learnt = time.perf_counter()
    scores = fitted.scores(features(task.test))
    seconds = {"fit": learnt - start, "predict": time.perf_counter() - learnt}
    return Outcome(scores, head.probabilities, seconds, chosen=fitted.chosen)


def _fitted(task: Task, features: Callable[[Sequence[bytes]], np.ndarray], head: "Head") -> "FittedHead":
    if head.chooses:
        check_left_out(task.classes, task.train)
    labels = np.array([example.label for example in task.train])
    return head.fit(features(Images(task.train)), labels, len(task.classes))


def _dinov2_features(task: Task) -> Callable[[Sequence[bytes]], np.ndarray]:
    s = task.settings
    return _encoder(s.backbone, s.readout, s.image_size, first_device(task.device)).features


def check_left_out(classes: Sequence[str], train: Sequence[Example]) -> None:
    """Raises TooFewImagesError, which names the class, where one has one image and others have more."""
    counts = np.bincount([example.label for example in train], minlength=len(classes))
    if counts.max() > 1 and (counts == 1).any():
        name = classes[int(np.argmax(counts == 1))]
        raise TooFewImagesError(
            f"class {name!r} has one training image and others have {counts.max()}: ridge, kNN and nearest mean choose "
            "their settings by leaving one out, and then it has none; add an image, ask for 1 shot, or leave them out"
        )
