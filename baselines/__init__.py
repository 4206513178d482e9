"""Baselines: frozen encoders with heads, LoRA with a linear head.

Import a module where you need it: `features` and `lora` import torch, which takes seconds.
"""
