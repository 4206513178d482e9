"""Baselines: frozen encoders with heads, LoRA with a linear head.

Knows neither data sets nor the vision-language model. Importing the package costs nothing: import the module you need,
where you need it, since `features` and `lora` bring torch, and `linear` scikit-learn.
"""
