"""`kshot bench baseline`: the heads of a whole comparison from cached features, and how fast features are made.

The grid is run as a sweep runs it, by worker processes with one thread each, on Gaussian classes with the spectrum of
natural features and the sizes of the real sets: how long heads take depends on sizes and on how hard the classes are to
part. Its accuracies say nothing but that something was learnt.

Each head is compared with scikit-learn's on the same features, in turn, on the threads of this process. Ours includes
what it chooses on its shots; scikit-learn's neighbours and means are given that choice, its ridge chooses among the
same penalties by leave-one-out.

An encoder, from the bytes of photographs to features, is compared with the bare forward pass of its backbone on pixels
that are ready, one image at a time or in batches, whichever is faster. On a CPU both have one thread, as each of the
workers of a sweep has.
"""

import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import timm
import torch
from sklearn.linear_model import LogisticRegression, RidgeClassifierCV
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler, normalize

from baselines.backbone import Backbone, load
from baselines.features import Encoder, resized
from baselines.heads import HEADS
from baselines.heads.knn import TEMPERATURE
from baselines.heads.linear import C
from baselines.heads.ridge import PENALTIES
from experiments.bench import harness
from experiments.bench.case import Plan, photographs
from experiments.bench.grid import DIM, QUICK, SIZES, Cell, cells, predict, problem, run, write
from experiments.bench.harness import Rows, check_agreement, in_turn, median_ratio, row, synchronize, timed
from experiments.sweep import workers

SEEDS = 5
PACKAGES = ("numpy", "pillow", "scikit-learn", "scipy", "timm", "torch")


def measure(root: Path | None, quick: bool, device: str = "cpu", model: str = "") -> dict[str, Any]:
    """The record of `experiments.bench.harness`. root: a folder of class folders; None: photographs made from a seed.
    model: the backbone; "" is DINOv2-small's shape (quick) or DINOv2-base's with random weights.

    Raises InputError for a device that cannot be; ModelError for the model; DatasetError; KshotError where a head's
    predictions differ from scikit-learn's.
    """
    harness.quiet()
    with tempfile.TemporaryDirectory() as name:
        folder, sizes = Path(name), QUICK if quick else SIZES
        encoder_rows, share = _encoder(root, quick, device, model, folder)
        write(folder, sizes)
        head_rows, ratios = heads(folder, quick)
        grid_rows, seconds = _grid(cells(folder, sizes, 1 if quick else SEEDS))
    ratios = {"grid_seconds": seconds, "feature_rate_share": share, **ratios}
    return harness.record([*grid_rows, *head_rows, *encoder_rows], ratios, PACKAGES)


# The grid


def _grid(jobs: Sequence[Cell]) -> tuple[Rows, float]:
    """Rows of the grid and its seconds."""
    done = timed(lambda: list(workers.results(workers.local(run, jobs))))
    most = {split: max(getattr(SIZES[job.dataset], split) for job in jobs) for split in ("train", "test")}
    rows = [row("grid of heads", [done.seconds], "s", cells=len(jobs), dim=DIM, **most)]
    for head in HEADS:
        seconds, accuracies = zip(*(outcome for cell, outcome in done.value if cell.head == head), strict=True)
        facts = {"sum": sum(seconds), "longest": max(seconds), "mean_accuracy": mean(accuracies)}
        rows.append(row(f"{head}, a cell on one thread", [median(seconds)], "s", cells=len(seconds), **facts))
    return rows, done.seconds


# The heads against scikit-learn's

COMPARED_ON = {False: ("cars", 4), True: ("pets", 2)}  # quick → data set and shots
DISAGREE = 0.01  # of predictions, at most
TOLERANCE = 1e-6  # of scikit-learn's logistic regression: at its default, 1e-4, it stops long before the optimum

Peer = Callable[[np.ndarray, np.ndarray, np.ndarray, Any], Any]  # train, labels, test, our choice → predictions


def _linear(model: Any, train: np.ndarray, labels: np.ndarray, test: np.ndarray, chosen: Any) -> Any:
    pipeline = make_pipeline(StandardScaler(), model)
    return pipeline.fit(train.astype(np.float64), labels).predict(test.astype(np.float64))


def _knn(train: np.ndarray, labels: np.ndarray, test: np.ndarray, chosen: Any) -> Any:
    weights = lambda distances: np.exp((1 - distances) / TEMPERATURE)  # noqa: E731
    return KNeighborsClassifier(chosen["neighbours"], metric="cosine", weights=weights).fit(train, labels).predict(test)


def _mean(train: np.ndarray, labels: np.ndarray, test: np.ndarray, chosen: Any) -> Any:
    """In a cosine space: the mean of unit vectors, then the nearest by angle, as scikit-learn has no centroid of it."""
    if chosen["space"] == "euclidean":
        return NearestCentroid().fit(train, labels).predict(test)
    centre = train.mean(axis=0) if chosen["space"] == "centred cosine" else 0.0
    centroids = NearestCentroid().fit(normalize(train - centre), labels).centroids_
    return (normalize(test - centre) @ normalize(centroids).T).argmax(axis=1)


PEERS: dict[str, Peer] = {
    "logreg": partial(_linear, LogisticRegression(C=C, tol=TOLERANCE, max_iter=10_000)),
    "ridge": partial(_linear, RidgeClassifierCV(np.array(PENALTIES) * DIM, scoring="accuracy")),
    "knn": _knn,
    "mean": _mean,
}


def heads(folder: Path, quick: bool) -> tuple[Rows, dict[str, float]]:
    """Rows of seconds and of agreement, and scikit-learn's seconds over ours for each head. Raises KshotError where
    predictions differ: speed bought with errors."""
    dataset, shots = COMPARED_ON[quick]
    made, n_classes = problem(folder, dataset), SIZES[dataset].classes
    train, labels = made.shots(shots, seed=0)
    rows, ratios = Rows(), {}
    for name, head in HEADS.items():
        chosen = head.fit(train, labels, n_classes).chosen
        ours, peer = f"{name}, kshot", f"{name}, scikit-learn"
        tasks: dict[str, Callable[[], Any]] = {
            ours: partial(predict, head, train, labels, made.test, n_classes),
            peer: partial(PEERS[name], train, labels, made.test, chosen),
        }
        seconds, predictions = in_turn(tasks, 1 if quick else 3)
        agree = float((predictions[ours] == predictions[peer]).mean())
        check_agreement(f"{name}: predictions of kshot and scikit-learn are", 1 - agree, DISAGREE)
        facts = {"dataset": dataset, "shots": shots, "chosen": dict(chosen), "agree": agree}
        rows += [row(ours, seconds[ours], "s", **facts), row(peer, seconds[peer], "s")]
        ratios[f"{name}_vs_sklearn"] = median_ratio(seconds[peer], seconds[ours])
    return rows, ratios


# The encoder

ARCHITECTURES = {True: "vit_small_patch14_dinov2", False: "vit_base_patch14_dinov2"}  # quick → timm's name
PIXELS = 224  # DINOv2's own 518 takes six times as long, and overheads weigh less there
BATCHES = (1, 8, 64)
COUNT = {("cpu", True): 8, ("cpu", False): 16, ("cuda", True): 512, ("cuda", False): 2048}  # photographs


def _encoder(root: Path | None, quick: bool, device: str, model: str, folder: Path) -> tuple[Rows, float]:
    """Rows of images a second, and the encoder's over the fastest bare one's. Raises as `baselines.backbone.load`
    does, and DatasetError."""
    rounds, architecture, ours = 3 if quick else 5, ARCHITECTURES[quick], "photographs to features"
    name, model = Path(model).name or f"{architecture} (random)", model or _random_backbone(architecture, folder)
    with workers.one_thread_on_a_cpu(device):
        backbone = load(model, device)
        images = _images(root, COUNT[device.split(":")[0], quick])
        ready = [backbone.normalised([resized(image, backbone.patch, PIXELS)]) for image in images]
        encoders = [Encoder(model, size=PIXELS, device=device) for _ in range(rounds + 1)]  # nothing cached
        tasks: dict[str, Callable[[], Any]] = {ours: lambda: encoders.pop().features(images)}
        batches = {n: [torch.cat(ready[m : m + n]) for m in range(0, len(ready), n)] for n in BATCHES}
        tasks |= {f"forward, {n} at a time": partial(_forward, backbone, batches[n]) for n in BATCHES}
        seconds, _ = in_turn(tasks, rounds)
    threads = 1 if device == "cpu" else torch.get_num_threads()
    facts = {"images": len(images), "size": PIXELS, "backbone": name, "device": device, "threads": threads}
    rows = [row(what, [len(images) / s for s in each], "images/s", **facts) for what, each in seconds.items()]
    fastest = [min(times) for times in zip(*(seconds[name] for name in seconds if name != ours), strict=True)]
    return rows, median_ratio(fastest, seconds[ours])


def _random_backbone(architecture: str, folder: Path) -> str:
    """A folder in timm's hub layout with random weights, drawn from a seed."""
    place = str(folder / "backbone")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        module = timm.create_model(architecture, num_classes=0)
    timm.models.save_for_hf(module, place, safe_serialization=True)
    return place


def _images(root: Path | None, count: int) -> list[bytes]:
    _, chosen = photographs(root, Plan(classes=8, shots=min(count // 8, 8)), np.random.default_rng(0))
    # More are the same with another tail: other bytes, so another key, and the same work.
    return [chosen[n % len(chosen)][0] + b"\0" * (n // len(chosen)) for n in range(count)]


@torch.inference_mode()
def _forward(backbone: Backbone, batches: Sequence[torch.Tensor]) -> None:
    for batch in batches:
        backbone.features(backbone.module, batch)
    synchronize(backbone.mean.device.type)
