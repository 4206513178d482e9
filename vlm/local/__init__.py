"""The local engine: the training API answered in this process by stock transformers classes with PEFT LoRA."""
