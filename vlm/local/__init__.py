"""The local engine: the training API in this process, on stock transformers checkpoints with LoRA."""
