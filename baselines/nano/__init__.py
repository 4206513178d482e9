"""The nano DINOv2: a 0.8 M parameter ViT of DINOv2's architecture, to run the whole comparison on a CPU in minutes.

This folder is the model in timm's hub layout: config.json, the one source of the architecture, the weights and the
model card README.md. `experiments.pretrain` made the weights. `init_values`, DINOv2's layer scale, starts at 1 and
not at 1e-5, which is for networks far deeper.
"""

from pathlib import Path

NAME = "kshot/nano-dinov2"
NOTE = (
    f"{NAME} has 0.8 million weights and learnt from drawings of icons without names and a few photographs; none is by "
    "a designer of the data set icons. It says nothing about DINOv2."
)
REVISION = "00f06736422a"  # the first 12 digits of the SHA-256 of the weights
HERE = Path(__file__).parent  # the folder with config.json and model.safetensors
CONFIG = HERE / "config.json"
