"""The two students and how they learn: the nano DINOv2, and the nano Qwen3-VL (first its vision tower, then all of it).

Both are the stock modules of timm and transformers with fresh weights. The DINOv2 and the tower learn to describe
drawings and photographs as the teacher does (see `learning.distil`); neither is given a name. The whole Qwen3-VL then
learns to answer with the name of the drawing, in the words of `vlm.prompts`.
"""

import io
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from statistics import mean
from typing import Any, cast

import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from torchvision.transforms.v2 import Normalize
from transformers.models.qwen3_vl.modeling_qwen3_vl import apply_rotary_pos_emb_vision

from baselines.nano import CONFIG
from experiments.pretrain.checkpoints import Checkpoint
from experiments.pretrain.learning import (
    FULL,
    QUEUE,
    SMALL,
    Described,
    Plan,
    Report,
    description_head,
    distil,
    make_optimizers,
    precision,
    side_at,
    similarity_loss,
    steps,
)
from experiments.pretrain.views import Pictures
from vlm.prompts import Prompt

LATER_WEIGHT = 0.3  # weight of the tokens after a name's first
TOWER_RATE = 0.2  # the tower's learning rate, of the others'
EVERY = 0.6  # share of the steps in which every name is shown; then those are that many drawings have
COMMON = 16  # drawings, mirror images counted: so many of one name tell what it means on a new one
IGNORED = -100

# The nano DINOv2


def train_dinov2(drawings: Described, photographs: Described | None, plan: Plan, report: Report) -> Any:
    """A nano DINOv2 that learnt from these pictures and the teacher's descriptions of them."""
    vit = create_dinov2(plan.seed)
    # Pictures are of 0 to 1; a feature is the CLS token after the final norm.
    student = nn.Sequential(Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD), vit).to(plan.device)
    distil(student, vit.num_features, drawings, photographs, plan, report)
    return vit


def create_dinov2(seed: int) -> Any:
    """The architecture of config.json with fresh weights. Xavier's scale: timm's own (0.02) is for wide models."""
    import timm

    config = json.loads(CONFIG.read_text())
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        vit: Any = timm.create_model(
            config["architecture"], num_classes=0, dynamic_img_size=True, **config["model_args"]
        )
        for module in vit.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
            if hasattr(module, "fused_attn"):  # on a CPU its backward pass takes longer than all the rest
                module.fused_attn = False
        nn.init.xavier_uniform_(vit.patch_embed.proj.weight.data.flatten(1))
        positions = wave_positions(vit.patch_embed.grid_size[0], vit.embed_dim)
        vit.pos_embed.data[:, -len(positions) :] = positions
    return vit


def wave_positions(side: int, width: int) -> Tensor:
    """(side * side, width): sines and cosines of a patch's column and row, the start of the learnt positions."""
    line = torch.arange(side).float()
    row, column = torch.meshgrid(line, line, indexing="ij")
    frequency = 100.0 ** -(torch.arange(width // 4) / (width // 4))
    angles = [axis.flatten()[:, None] * frequency for axis in (column, row)]
    return 0.5 * torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], 1)


# The vision tower of the nano Qwen3-VL


class Tower(nn.Module):
    """Qwen3-VL's vision model; `visual` is the stock module, whose parameters these are."""

    def __init__(self, visual: Any) -> None:
        super().__init__()
        self.visual, config = visual, visual.config
        self.patch, self.merge, self.frames = config.patch_size, config.spatial_merge_size, config.temporal_patch_size
        visual.patch_embed.forward = partial(_patch_embed, visual.patch_embed)
        for block in visual.blocks:
            block.attn.forward = partial(_attention, block.attn)

    def forward(self, pictures: Tensor) -> Tensor:
        """(N, 3, side, side) of 0 to 1 → (N, D): the mean over an image's tokens, as the text model gets them."""
        return self.tokens(pictures)[0].mean(1)

    def tokens(self, pictures: Tensor) -> tuple[Tensor, list[Tensor]]:
        """(N, tokens, D): the image's tokens, and what is added to them in the first layers of the text model."""
        n, grid = len(pictures), pictures.shape[-1] // self.patch
        grids = torch.tensor([[1, grid, grid]] * n, device=pictures.device)
        out = self.visual(self.patches(pictures), grids)
        return out.pooler_output.view(n, -1, out.pooler_output.shape[-1]), list(out.deepstack_features)

    def patches(self, pictures: Tensor) -> Tensor:
        """(N, 3, side, side) of 0 to 1 → (N * patches, 3 * frames * patch * patch): as the stock processor orders them,
        blocks of `merge` x `merge` patches together, a picture being as many equal frames as the tower takes."""
        n, (p, m), grid = len(pictures), (self.patch, self.merge), pictures.shape[-1] // self.patch
        cut = (pictures * 2 - 1).view(n, 3, grid // m, m, p, grid // m, m, p)
        ordered = cut.permute(0, 2, 5, 3, 6, 1, 4, 7).reshape(n * grid * grid, 3, 1, p, p)
        return ordered.expand(-1, -1, self.frames, -1, -1).reshape(n * grid * grid, -1)


def _patch_embed(self: Any, patches: Tensor) -> Tensor:
    """(patches, channels x time x height x width) → (patches, hidden): a matrix product, as the Conv3d has a stride
    equal to its kernel; as a product it is many times faster (pytorch#174051)."""
    return functional.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


def _attention(
    self: Any, hidden_states: Tensor, cu_seqlens: Tensor, position_embeddings: tuple[Tensor, Tensor], **_: Any
) -> Tensor:
    """The stock attention for images of one size: all in one product, where the stock one takes image by image."""
    images, length = len(cu_seqlens) - 1, len(hidden_states)
    q, k, v = self.qkv(hidden_states).view(length, 3, self.num_heads, -1).unbind(1)
    q, k = apply_rotary_pos_emb_vision(q, k, *position_embeddings)
    q, k, v = (each.view(images, length // images, self.num_heads, -1).transpose(1, 2) for each in (q, k, v))
    weights = ((q * self.scaling) @ k.transpose(2, 3)).softmax(-1)
    return self.proj((weights.to(v.dtype) @ v).transpose(1, 2).reshape(length, -1))


# The whole nano Qwen3-VL


@dataclass(frozen=True)
class Questions:
    """What any batch is made of. question: (length,) token ids before the answer. is_image: (length,) bool, where the
    image is. answers: (N, longest) token ids by drawing, padded with -100."""

    question: Tensor
    is_image: Tensor
    answers: Tensor

    def batch(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """(rows, length) token ids of question and answer but the last token, and (rows, longest) what follows."""
        answer = self.answers[chosen]
        inputs = torch.where(answer == IGNORED, 0, answer)[:, :-1]
        return torch.cat([self.question.expand(len(chosen), -1), inputs], 1), answer


def questions(model: Any, prompt: Prompt, names: Sequence[str], side: int) -> Questions:
    """The prompt about pictures of that side, and each of these names, which are among its classes, as the answer."""
    before, _, after = cast(Any, prompt.question(_blank_image()).chunks)
    token, vision = model.config.image_token_id, model.config.vision_config
    image = [token] * (side // vision.patch_size // vision.spatial_merge_size) ** 2
    question = torch.tensor([*before.tokens, *image, *after.tokens])
    choices = dict(zip(prompt.classes, prompt.choices, strict=True))
    answers = pad_sequence([torch.tensor(choices[name]) for name in names], True, IGNORED)
    return Questions(question, question == token, answers)


def train_answers(
    model: Any, prompt: Prompt, drawings: Described, names: Sequence[str], plan: Plan, report: Report
) -> None:
    """Train the stock model in place; its tower should have been trained.

    Names that many drawings have are shown less often than they occur, at the end they alone. The first token of a
    name, which only the picture can tell, weighs most: else the loss is reduced by knowing the language. The hidden
    state where the answer begins must also give the drawing's description, as in `learning.distil`: else the model
    forgets all that no name needs, and cannot learn new names from a few examples.
    names: of each drawing, among the prompt's classes.
    """
    model.set_attn_implementation("eager")  # on a CPU the fused attention's backward pass takes several times longer
    model.train().to(plan.device)
    generator, tower = torch.Generator().manual_seed(plan.seed), Tower(model.model.visual)
    head = description_head(model.config.text_config.hidden_size, drawings.described, generator, plan.device)
    text_model = [*model.model.language_model.named_parameters(), ("head", head)]
    seeing = list(tower.named_parameters())
    optimizers = [*make_optimizers(text_model), *make_optimizers(seeing, TOWER_RATE)]
    prompts = {side: questions(model, prompt, names, side) for side in (SMALL, FULL)}
    pictures = {side: Pictures(plan.seed + side, side, plan.device) for side in (SMALL, FULL)}
    generators = [generator, *(view.generator for view in pictures.values())]
    kept = Checkpoint(plan.checkpoint, [p for _, p in (*text_model, *seeing)], optimizers, generators)
    every, common, losses = sampling_weights(names), sampling_weights(names, COMMON), list[float]()
    drawings = drawings.to(plan.device)
    masks, described = drawings.pictures, drawings.described
    for progress in steps(plan, kept, lambda text: report(f"{text}, loss {mean(losses[-100:]):.3f}")):
        weights = every if progress < EVERY else common
        side, chosen = side_at(progress), torch.multinomial(weights, plan.batch, True, generator=generator)
        others = torch.randint(len(masks), (QUEUE,), generator=generator)
        with precision(plan.device):
            shown = pictures[side](masks[chosen.to(plan.device)])
            hidden, targets = answer_states(model, tower, prompts[side], shown, chosen)
            loss = answer_loss(model.lm_head(hidden).float(), targets)
        queue = described[torch.cat([chosen, others]).to(plan.device)]
        (loss + similarity_loss(hidden[:, 0].float() @ head.T, queue)).backward()
        losses.append(float(loss.detach()))
    model.eval()


def answer_states(
    model: Any, tower: Tower, prompts: Questions, pictures: Tensor, chosen: Tensor
) -> tuple[Tensor, Tensor]:
    """(rows, longest, hidden) last hidden states where these drawings' answers are written, from the last token of the
    question on, and (rows, longest) the right tokens there."""
    ids, targets = (each.to(pictures.device) for each in prompts.batch(chosen))
    tokens, layers = tower.tokens(pictures)
    is_image = functional.pad(prompts.is_image, (0, ids.shape[1] - len(prompts.is_image))).to(ids.device)
    image_mask = is_image.expand(len(ids), -1)
    embedded = model.model.language_model.embed_tokens(ids)
    embedded = embedded.masked_scatter(image_mask[..., None], tokens.to(embedded.dtype))
    hidden = model.model.language_model(
        inputs_embeds=embedded,
        position_ids=_positions(model, ids, is_image, pictures.shape[-1] // tower.patch),
        visual_pos_masks=image_mask,
        deepstack_visual_embeds=layers,
        use_cache=False,
    ).last_hidden_state
    return hidden[:, len(prompts.question) - 1 :], targets


def answer_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy in nats, a mean over rows: the first token in full, the later ones by LATER_WEIGHT."""
    loss = functional.cross_entropy(logits.transpose(1, 2), targets, ignore_index=IGNORED, reduction="none")
    return (loss[:, 0] + LATER_WEIGHT * loss[:, 1:].sum(1)).mean()


def _positions(model: Any, ids: Tensor, is_image: Tensor, grid: int) -> Tensor:
    """(3, rows, length) M-RoPE positions, as the stock model counts them; the same in every row."""
    grids = torch.tensor([[1, grid, grid]], device=ids.device)
    positions, _ = model.model.get_rope_index(ids[:1], mm_token_type_ids=is_image[None].int(), image_grid_thw=grids)
    return positions.expand(-1, len(ids), -1)


def sampling_weights(names: Sequence[str], least: int = 1) -> Tensor:
    """(N,) how often each drawing is shown: a name that n drawings have as often as the root of n, and not at all where
    n is less than `least`."""
    count = Counter(names)
    return torch.tensor([count[name] ** -0.5 if count[name] >= least else 0.0 for name in names])


def _blank_image() -> bytes:
    """Any image, to get the tokens before and after one."""
    buffer = io.BytesIO()
    Image.new("RGB", (FULL, FULL)).save(buffer, "PNG")
    return buffer.getvalue()
