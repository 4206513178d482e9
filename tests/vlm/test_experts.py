"""The experts' block against the stock one and PEFT's layers on it: output, gradients, what it allocates."""

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration
from transformers.models.qwen3_vl_moe.configuration_qwen3_vl_moe import Qwen3VLMoeTextConfig
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextSparseMoeBlock

from vlm.local.model import experts
from vlm.local.model.experts import Pair, by_expert, sparse_mlp

EXPERTS, HIDDEN, MOE, TOP, RANK, SCALE = 8, 16, 12, 3, 4, 0.7
SIZES: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "moe_intermediate_size": MOE,
    "num_experts": EXPERTS,
    "num_experts_per_tok": TOP,
}
NAMES = "base_model.model.model.language_model.layers.0.mlp.experts."


def _fill(tensors: Iterable[Tensor], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for tensor in tensors:
        tensor.data = torch.randn(tensor.shape, generator=generator).to(tensor) / tensor.shape[-1] ** 0.5


def _random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _block(**sizes: int) -> Any:
    block = Qwen3VLMoeTextSparseMoeBlock(Qwen3VLMoeTextConfig(**{**SIZES, **sizes})).requires_grad_(False)
    _fill(block.parameters(), 0)
    return block


def _of(gate: nn.Module, experts: nn.Module) -> Any:
    block: Any = nn.Module()
    block.gate, block.experts = gate, experts
    return block


def _pairs(block: Any, rank: int = RANK) -> tuple[Pair, Pair]:
    """Random A and B of both projections, as PEFT stores them."""
    number, gate_up, hidden = block.experts.gate_up_proj.shape
    low, narrow = rank * number, gate_up // 2
    tensors = [torch.empty(s) for s in [(low, hidden), (gate_up, low), (low, narrow), (hidden, low)]]
    _fill(tensors, 2)
    a, b, c, d = (tensor.requires_grad_() for tensor in tensors)
    return (a, b), (c, d)


def _outputs(block: Any, x: Tensor, pairs: Sequence[Pair | None]) -> list[Tensor]:
    """The block's output, and the gradients of x and of the pairs."""
    gate_up, down = pairs
    output = sparse_mlp(x, block, gate_up, down, SCALE)
    return [output, *_grads(output, x, *(gate_up or ()), *(down or ()))]


def _grads(output: Tensor, *wrt: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad((output * _random(*output.shape, seed=3).to(output)).sum(), wrt))


def _assert_close(here: Iterable[Tensor], there: Iterable[Tensor], tolerance: float = 1e-5) -> None:
    for a, b in zip(here, there, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= tolerance * b.abs().max()


@pytest.fixture
def peft_block() -> Any:
    """The block of a small model with PEFT's layers on its experts, heads and attention, and PEFT's tensors by name."""
    tiny = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": HIDDEN}
    vision = {**tiny, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    text = {**SIZES, **heads, "vocab_size": 32, "intermediate_size": 16, "num_hidden_layers": 1}
    config = LoraConfig(
        r=RANK,
        lora_alpha=SCALE * RANK,  # type: ignore[arg-type]
        target_modules=r".*self_attn\.(q|k|v|o)_proj|.*lm_head",
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        stock = Qwen3VLMoeForConditionalGeneration(Qwen3VLMoeConfig(text_config=text, vision_config=vision))
        model: Any = get_peft_model(stock, config)
    _fill(model.parameters(), 4)
    return model.base_model.model.model.language_model.layers[0].mlp, dict(model.named_parameters())


def test_without_lora_it_is_the_stock_block() -> None:
    block, x = _block(), _random(50, HIDDEN).requires_grad_()
    there = block(x[None])[0]
    _assert_close(_outputs(block, x, (None, None)), [there, *_grads(there, x)])


def test_output_and_gradients_are_those_of_peft(peft_block: Any) -> None:
    block, named = peft_block
    # The outer wrapper is the down projection's: what PEFT meets last on the module.
    assert [block.experts.parameter_name, block.experts.base_layer.parameter_name] == ["down_proj", "gate_up_proj"]
    gate_up, down = (
        tuple(named[f"{NAMES}{place}lora_{side}.default.weight"] for side in "AB") for place in ("base_layer.", "")
    )
    x = _random(40, HIDDEN).requires_grad_()
    there = block(x[None])[0]
    there_grads = _grads(there, x, *gate_up, *down)

    bare = _of(block.gate, block.experts.get_base_layer())
    _assert_close(_outputs(bare, x, (gate_up, down)), [there, *there_grads])


@pytest.mark.parametrize("only", [0, 1])
def test_one_projection_alone_may_have_lora(only: int) -> None:
    block, x = _block(), _random(20, HIDDEN).requires_grad_()
    pairs = _pairs(block)
    here = _outputs(block, x, [pair if place == only else None for place, pair in enumerate(pairs)])
    gate_up, down = (pair if place == only else (pair[0], 0 * pair[1]) for place, pair in enumerate(pairs))
    there = sparse_mlp(x, block, gate_up, down, SCALE)
    _assert_close(here, [there, *_grads(there, x, *pairs[only])])


def test_gradients_are_those_of_finite_differences() -> None:
    block = _block(hidden_size=4, moe_intermediate_size=3, num_experts=4, num_experts_per_tok=2).double()
    chosen = torch.tensor([[0, 2], [2, 0], [3, 2]])

    class Router(nn.Module):
        """Double precision throughout (the stock one's softmax is single) and a choice that no difference changes."""

        def forward(self, x: Tensor) -> tuple[None, Tensor, Tensor]:
            scores = (x @ block.gate.weight.T).gather(1, chosen).softmax(-1)
            return None, scores, chosen

    fixed = _of(Router(), block.experts)
    tensors = [t.detach().double().requires_grad_() for pair in _pairs(block, rank=2) for t in pair]
    x = _random(3, 4).double().requires_grad_()

    def run(x: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
        return sparse_mlp(x, fixed, (a, b), (c, d), SCALE)

    assert torch.autograd.gradcheck(run, (x, *tensors))


def test_experts_without_rows_get_zero_gradients() -> None:
    block, x = _block(), _random(1, HIDDEN)
    pairs = _pairs(block)
    idle = sorted({*range(EXPERTS)} - {*block.gate(x)[2].flatten().tolist()})
    assert len(idle) == EXPERTS - TOP
    for pair in pairs:
        grad_a, grad_b = _grads(sparse_mlp(x, block, *pairs, SCALE), *pair)
        for grad in (grad_a.view(EXPERTS, RANK, -1), grad_b.view(-1, RANK, EXPERTS).permute(2, 1, 0)):
            assert not grad[idle].any()
            assert grad.flatten(1).any(1).sum() == TOP


def test_a_batch_is_its_parts() -> None:
    block, x = _block(), _random(30, HIDDEN)
    pairs = _pairs(block)
    parts = [sparse_mlp(part, block, *pairs, SCALE) for part in x.split([0, 1, 20, 9])]
    assert parts[0].shape == (0, HIDDEN)
    _assert_close([sparse_mlp(x, block, *pairs, SCALE)], [torch.cat(parts)])


def test_the_same_input_gives_the_same_bits() -> None:
    block, x = _block(), _random(300, HIDDEN).requires_grad_()
    once, again = (_outputs(block, x, _pairs(block)) for _ in range(2))
    _assert_close(once, again, tolerance=0)


def test_pairs_by_expert_give_the_same() -> None:
    block, x = _block(), _random(20, HIDDEN)
    pairs = _pairs(block)
    flat = [t for pair in pairs for t in pair]
    here = sparse_mlp(x, block, by_expert(pairs[0], EXPERTS), by_expert(pairs[1], EXPERTS), SCALE)
    there = sparse_mlp(x, block, *pairs, SCALE)
    assert torch.equal(here, there)
    _assert_close(_grads(here, *flat), _grads(there, *flat), tolerance=0)


@pytest.mark.skipif(not hasattr(functional, "grouped_mm"), reason="this torch has no grouped product")
def test_torchs_grouped_product_gives_what_the_loop_does(monkeypatch: pytest.MonkeyPatch) -> None:
    block, x = _block(), _random(3, HIDDEN).requires_grad_()
    loop = _outputs(block, x, _pairs(block))
    monkeypatch.setattr(experts, "_groupable", lambda left, right: True)
    _assert_close(_outputs(block, x, _pairs(block)), loop)


class _Fixed(nn.Module):
    """A router whose answer is known."""

    def __init__(self, scores: Tensor, chosen: Tensor) -> None:
        super().__init__()
        self.answer = (None, scores, chosen)

    def forward(self, _: Tensor) -> tuple[None, Tensor, Tensor]:
        return self.answer


def _at(dtype: torch.dtype, device: str) -> list[Tensor]:
    """Output and gradients at a precision, all inputs being numbers that bfloat16 has, the routing fixed."""
    block = _block(hidden_size=64, moe_intermediate_size=32)
    x = _random(40, 64).bfloat16()
    router = _Fixed(torch.full((40, TOP), 0.25).to(device, dtype), block.gate(x.float())[2].to(device))
    fixed = _of(router, block.bfloat16().to(device, dtype).experts)
    a, b, c, d = (t.detach().bfloat16().to(device, dtype).requires_grad_() for pair in _pairs(block, 8) for t in pair)
    return [t.float().cpu() for t in _outputs(fixed, x.to(device, dtype).requires_grad_(), ((a, b), (c, d)))]


def test_bfloat16_is_near_float32() -> None:
    _assert_close(_at(torch.bfloat16, "cpu"), _at(torch.float32, "cpu"), tolerance=2e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float32, 1e-4)])
def test_a_gpu_gives_what_a_cpu_does(dtype: torch.dtype, tolerance: float) -> None:
    _assert_close(_at(dtype, "cuda"), _at(torch.float32, "cpu"), tolerance)


class _Largest(TorchDispatchMode):
    """Records the largest storage, in elements, that operations give beside those known."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.elements, self.known = 0, {tensor.untyped_storage().data_ptr() for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


def _largest(run: Callable[[], Tensor], known: Iterable[Tensor], *wrt: Tensor) -> int:
    with _Largest(known) as largest:
        _grads(run(), *wrt)
    return largest.elements


def test_no_tensor_of_the_experts_size_is_made() -> None:
    block, x = _block(num_experts=64, hidden_size=32, moe_intermediate_size=16), _random(4, 32)
    pairs = _pairs(block, rank=2)
    flat = [t for pair in pairs for t in pair]
    size = block.experts.down_proj.numel()

    def naive() -> Tensor:
        a, b = by_expert(pairs[1], 64)
        return block.experts.down_proj + b @ a

    known = [x, *flat, *block.parameters()]
    assert _largest(naive, known, *pairs[1]) >= size
    # The thin tensors themselves, copied by expert, and their gradients.
    assert (
        _largest(lambda: sparse_mlp(x, block, *pairs, SCALE), known, *flat) <= max(t.numel() for t in flat) < size / 4
    )
