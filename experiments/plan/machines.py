"""Machines that a plan can be made for without being on them: what data sheets say, and how long passes take there.

A pass takes what its matrix products need at the rate that such a GPU reaches, plus the time in which its elementwise
operations move their bytes; or, where that is longer, the time in which the host starts its kernels. The three factors
are those of training steps measured on an H200 (results/bench/train-h200-profile.json); that other GPUs reach the same
shares is an assumption, so every time of these is an estimate.
"""

import re
from dataclasses import dataclass, replace
from typing import Any

from experiments.plan.memory import VitSize, VlmSize
from kshot.errors import UnknownNameError

# Measured on an H200, see above; a test holds them to the file.
MATRIX_SHARE = 0.79  # of the peak in the data sheet that large matrix products reach
MOVED = 1370.0  # bytes that a training step's elementwise operations move, a layer, position and unit of width
HOST_TRAINING = 6.0e-3  # seconds of the host for a training step, a layer
# Not measured: a pass without a gradient is taken to be a third of a training step beside its matrix products.
FORWARD = 1 / 3
TRAINING_PRODUCTS = 4  # operations of a step, a weight and position: forward and backward, where weights are frozen
CPU_CORE = 97e9  # operations a second of a large matrix product in float32, on one core of results/bench/train.json
CPU_SHARE = 0.39  # of it that a whole training step reaches there
CPU_BANDWIDTH = 10e9


@dataclass(frozen=True)
class Machine:
    """A GPU as its data sheet has it, or a CPU's core. peak: operations a second of dense matrix products in bfloat16
    (CPU: float32). peak32: in float32. bandwidth: bytes a second. memory: bytes; 0 where this machine's own counts.
    share: of the peak that matrix products reach. gpu: whether elementwise operations and the host are counted apart.
    """

    title: str
    peak: float
    peak32: float
    bandwidth: float
    memory: int
    share: float = MATRIX_SHARE
    gpu: bool = True

    @property
    def basis(self) -> str:
        """Where its rates come from, as a plan says it."""
        if not self.gpu:
            return "from what one core reaches in results/bench/train.json"
        shares = "shares of a training step on one H200 (results/bench)"
        return f"from its data sheet and {shares}, which scoring, answers and other GPUs are assumed to reach too"

    @property
    def rate(self) -> float:
        return self.peak * self.share

    @property
    def in_float32(self) -> "Machine":
        """The same, for models that compute in float32: numbers have twice the bytes on a GPU."""
        return replace(self, peak=self.peak32, bandwidth=self.bandwidth / (2 if self.gpu else 1))

    def training_pass(self, weights: float, layers: int, width: int, positions: float) -> float:
        """Seconds of a forward and a backward pass over so many positions. weights: that each goes through."""
        products = TRAINING_PRODUCTS * weights * positions / self.rate
        return max(products + self._moving(layers, width, positions), self.gpu * HOST_TRAINING * layers)

    def forward_pass(self, weights: float, layers: int, width: int, positions: float) -> float:
        """Seconds of a pass without a gradient."""
        products = 2 * weights * positions / self.rate
        moving = FORWARD * self._moving(layers, width, positions)
        return max(products + moving, self.gpu * FORWARD * HOST_TRAINING * layers)

    def decoding_pass(self, weight_bytes: float, layers: int) -> float:
        """Seconds of the next token of several sequences together: all weights are read once."""
        return max(weight_bytes / self.bandwidth, self.gpu * FORWARD * HOST_TRAINING * layers)

    def _moving(self, layers: int, width: int, positions: float) -> float:
        return self.gpu * MOVED * layers * width * positions / self.bandwidth


# NVIDIA's data sheets: H100 SXM, H200 SXM, A100 80GB SXM, L4, GeForce RTX 4090; without sparsity.
GPUS = {
    "h100": Machine("an H100 (80 GB)", 989e12, 67e12, 3.35e12, 80 * 10**9),
    "h200": Machine("an H200 (141 GB)", 989e12, 67e12, 4.8e12, 141 * 10**9),
    "a100": Machine("an A100 (80 GB)", 312e12, 19.5e12, 2.04e12, 80 * 10**9),
    "l4": Machine("an L4 (24 GB)", 121e12, 30.3e12, 0.3e12, 24 * 10**9),
    "4090": Machine("an RTX 4090 (24 GB)", 165e12, 82.6e12, 1.01e12, 24 * 10**9),
}
CPU = Machine("this CPU, a worker a core", CPU_CORE, CPU_CORE, CPU_BANDWIDTH, 0, CPU_SHARE, gpu=False)
OTHERS = {"laptop", "pcie", "nvl"}  # in a name: slower ones than those of the data sheets above
USABLE = 0.94  # of a GPU's memory, beside what its driver and libraries take
FEATURE_SHARE = 16  # a GPU's memory over what the engine keeps of image features there


def gpu(name: str) -> Machine:
    """A GPU of the table. Raises UnknownNameError."""
    if name.lower() not in GPUS:
        raise UnknownNameError("GPU", name, GPUS)
    return GPUS[name.lower()]


def this_machine(device: str) -> Machine:
    """The one that a device of this machine is. Raises UnknownNameError for a GPU that is not in the table."""
    if device.startswith("cpu"):
        return CPU
    import torch

    if not torch.cuda.is_available():
        raise UnknownNameError("GPU", device, GPUS, "torch sees none here; give --gpu")
    number = int(device.partition(":")[2] or 0)
    title, memory = torch.cuda.get_device_name(number), torch.cuda.get_device_properties(number).total_memory
    words = set(re.split(r"[\W_]+", title.lower()))
    found = [machine for name, machine in GPUS.items() if name in words and not words & OTHERS]
    if not found:
        raise UnknownNameError("GPU", title, GPUS, "leave --quick out: --plan measures it")
    return replace(found[0], title=title, memory=memory)  # there is an A100 of 40 GB too


@dataclass(frozen=True)
class TextShape:
    """Of a language model: weights that a position goes through, without embeddings and head; layers; width; bytes of
    all weights that decoding reads."""

    weights: float
    layers: int
    width: int
    read: float


def text_shape(size: VlmSize, config: dict[str, Any]) -> TextShape:
    """config: config.json of the model, for its vision tower."""
    t = size.text
    embeddings = t.vocab_size * t.hidden_size * (1 if config.get("tie_word_embeddings", False) else 2)
    experts = int(getattr(t, "num_experts", 0) or 0)
    idle = 0
    if experts:
        expert = 3 * t.hidden_size * t.moe_intermediate_size
        idle = t.num_hidden_layers * (experts - t.num_experts_per_tok) * expert
    through = size.weights - tower_weights(config) - embeddings - idle
    return TextShape(through, t.num_hidden_layers, t.hidden_size, size.weight_bytes)


def tower_weights(config: dict[str, Any]) -> float:
    """Weights of a Qwen vision tower that a patch goes through, about: its blocks."""
    v = config["vision_config"]
    width = v["hidden_size"]
    return float(v["depth"] * (4 * width * width + 2 * width * v["intermediate_size"]))


def tower_pass(machine: Machine, config: dict[str, Any], tokens: float, together: int) -> float:
    """Seconds of an image of so many tokens through the tower, of several that share a pass."""
    v = config["vision_config"]
    patches = tokens * v.get("spatial_merge_size", 2) ** 2
    width, depth = v["hidden_size"], v["depth"]
    attention = 2 * patches * depth * width  # operations of scores and values beside those of weights, halved
    return machine.forward_pass(tower_weights(config) + attention, depth, width, patches * together) / together


def vit_training(machine: Machine, size: VitSize, tokens: float, images: int) -> float:
    """Seconds of a step of so many images. DINOv2 computes in float32."""
    return machine.in_float32.training_pass(size.weights, size.depth, size.width, tokens * images)


def vit_forward(machine: Machine, size: VitSize, tokens: float, together: int) -> float:
    """Seconds of an image, of several that share a pass."""
    return machine.in_float32.forward_pass(size.weights, size.depth, size.width, tokens * together) / together
