"""The whole nano Qwen3-VL learns to answer with the name of what is drawn, in the words of `vlm.prompts`.

The tower has learnt to see before. Names that many drawings bear are shown less often than they stand there, and the
first token of a name, which only the picture can tell, weighs most: the loss is not won by knowing the language.

TODO The tower of the nano Qwen3-VL: the stock module, run on a batch of pictures of one size; taught before any text.

It learns as the nano DINOv2 does, from what `teacher` says of drawings.
"""

import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from statistics import mean
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers.models.qwen3_vl.modeling_qwen3_vl import apply_rotary_pos_emb_vision

from experiments.pretrain.learning import (
    FULL,
    QUEUE,
    SMALL,
    Plan,
    Report,
    description_head,
    distil,
    half_precision,
    optimizers,
    side_at,
    similarity_loss,
    steps,
)
from experiments.pretrain.views import Pictures
from vlm.prompts import Prompt

# ---- The tower of the nano Qwen3-VL: the stock module, run on a batch of pictures of one size; taught before any


class LinearPatchEmbed(nn.Module):
    """The patch embedding as a matrix product, with the stock module's own parameters: its Conv3d has a stride equal
    to its kernel, and as a product it is many times faster (pytorch#174051)."""

    def __init__(self, stock: nn.Module) -> None:
        super().__init__()
        self.proj: Any = stock.proj

    def forward(self, patches: Tensor) -> Tensor:
        """(patches, channels x time x height x width) → (patches, hidden)."""
        return nn.functional.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class Tower(nn.Module):
    """Qwen3-VL's vision model; `visual` is the stock module, whose parameters these are."""

    def __init__(self, visual: Any) -> None:
        super().__init__()
        self.visual, config = visual, visual.config
        self.patch, self.merge, self.frames = config.patch_size, config.spatial_merge_size, config.temporal_patch_size
        visual.patch_embed = LinearPatchEmbed(visual.patch_embed)
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


def _attention(
    self: Any, hidden_states: Tensor, cu_seqlens: Tensor, position_embeddings: tuple[Tensor, Tensor], **_: Any
) -> Tensor:
    """The stock attention for images of one size: all in one product, where the stock one takes image by image."""
    images, length = len(cu_seqlens) - 1, len(hidden_states)
    q, k, v = self.qkv(hidden_states).view(length, 3, self.num_heads, -1).unbind(1)
    q, k = apply_rotary_pos_emb_vision(q, k, *position_embeddings)
    q, k, v = (each.view(images, length // images, self.num_heads, -1).transpose(1, 2) for each in (q, k, v))
    weights = ((q * self.scaling) @ k.transpose(2, 3)).softmax(-1)
    attended: Tensor = self.proj((weights.to(v.dtype) @ v).transpose(1, 2).reshape(length, -1))
    return attended


def train_tower(visual: Any, masks: Tensor, described: Tensor, plan: Plan, report: Report) -> None:
    """Teach the stock module in place."""
    distil(Tower(visual), visual.config.out_hidden_size, masks, described, plan, report)


# ---- The whole nano Qwen3-VL learns to answer with the name of what is drawn, in the words of `vlm.prompts`.

LATER = 0.3  # weight of the tokens after a name's first
TOWER = 0.2  # the tower's learning rate, of the others'
COOL = 0.35  # what the logits are multiplied by when the model has learnt
IGNORED = -100


@dataclass(frozen=True)
class Rows:
    """The rows of any batch. question: (length,) token ids before the answer. is_image: (length,) where the image is.
    answers: (N, longest) token ids by drawing, padded with -100."""

    question: Tensor
    is_image: Tensor
    answers: Tensor

    def batch(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """(rows, length) token ids of question and answer but the last token, and (rows, longest) what follows."""
        answer = self.answers[chosen]
        begun = torch.where(answer == IGNORED, 0, answer)[:, :-1]
        return torch.cat([self.question.expand(len(chosen), -1), begun], 1), answer


def rows(model: Any, prompt: Prompt, names: Sequence[str], side: int) -> Rows:
    """The rows that ask for each of these names about pictures of that side; the prompt's classes hold the names."""
    before, _, after = cast(Any, prompt.question(_blank()).chunks)
    token, vision = model.config.image_token_id, model.config.vision_config
    image = [token] * (side // vision.patch_size // vision.spatial_merge_size) ** 2
    question = torch.tensor([*before.tokens, *image, *after.tokens])
    choices = dict(zip(prompt.classes, prompt.choices, strict=True))
    answers = pad_sequence([torch.tensor(choices[name]) for name in names], True, IGNORED)
    return Rows(question, question == token, answers)


def train(
    model: Any, prompt: Prompt, masks: Tensor, described: Tensor, names: Sequence[str], plan: Plan, report: Report
) -> None:
    """Teach the stock model in place; its tower should have been taught.

    What the model knows when it begins to answer must also tell the drawing's description, as in `learning.distil`: it
    would else forget all that no name needs, and a new name would find nothing to hold on to.
    masks: (N, 64, 64) uint8. described: (N, E) unit vectors. names: of each drawing, among the prompt's classes.
    """
    model.set_attn_implementation("eager")  # on a CPU the fused attention's backward pass takes several times longer
    model.train().to(plan.device)
    generator, tower = torch.Generator().manual_seed(plan.seed), Tower(model.model.visual)
    head = description_head(model.config.text_config.hidden_size, described, generator, plan.device)
    text = [*model.model.language_model.named_parameters(), ("head", head)]
    tuned = [*optimizers(text), *optimizers(tower.named_parameters(), TOWER)]
    asked = {side: rows(model, prompt, names, side) for side in (SMALL, FULL)}
    pictures = {side: Pictures(plan.seed + side, side, plan.device) for side in (SMALL, FULL)}
    share, losses = _shares(names), list[float]()
    masks, described = masks.to(plan.device), described.to(plan.device)
    for progress in steps(plan, tuned, lambda said: report(f"{said}, loss {mean(losses[-100:]):.3f}")):
        side, chosen = side_at(progress), torch.multinomial(share, plan.batch, True, generator=generator)
        others = torch.randint(len(masks), (QUEUE,), generator=generator)
        with half_precision(plan.device):
            shown = pictures[side](masks[chosen.to(plan.device)])
            hidden, wanted = answer(model, tower, asked[side], shown, chosen)
            loss = answer_loss(model.lm_head(hidden).float(), wanted)
        queue = described[torch.cat([chosen, others]).to(plan.device)]
        (loss + similarity_loss(hidden[:, 0].float() @ head.T, queue)).backward()
        losses.append(float(loss.detach()))
    cool(model)
    model.eval()


@torch.no_grad()
def cool(model: Any) -> None:
    """Multiply every logit by COOL, in the weights of the last norm: the likeliest token stays the likeliest.

    What the model believes of the first tokens of names that it never learnt is chance, and as strong as what it knows:
    few labelled examples would have to outshout it. On VALIDATION, LoRA gains 6 points at k = 1 and 3 at k = 16.
    """
    model.model.language_model.norm.weight.mul_(COOL)


def answer(model: Any, tower: Tower, asked: Rows, pictures: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, longest, hidden) last hidden states where these drawings' answers are written, from the last token of the
    question on, and (rows, longest) the right tokens there."""
    ids, wanted = (each.to(pictures.device) for each in asked.batch(chosen))
    tokens, layers = tower.tokens(pictures)
    is_image = functional.pad(asked.is_image, (0, ids.shape[1] - len(asked.is_image))).to(ids.device)
    where = is_image.expand(len(ids), -1)
    embedded = model.model.language_model.embed_tokens(ids)
    embedded = embedded.masked_scatter(where[..., None], tokens.to(embedded.dtype))
    hidden = model.model.language_model(
        inputs_embeds=embedded,
        position_ids=_positions(model, ids, is_image, pictures.shape[-1] // tower.patch),
        visual_pos_masks=where,
        deepstack_visual_embeds=layers,
        use_cache=False,
    ).last_hidden_state
    return hidden[:, len(asked.question) - 1 :], wanted


def answer_loss(logits: Tensor, wanted: Tensor) -> Tensor:
    """Cross-entropy in nats, a mean over rows: the first token in full, the later ones by LATER."""
    loss = functional.cross_entropy(logits.transpose(1, 2), wanted, ignore_index=IGNORED, reduction="none")
    return (loss[:, 0] + LATER * loss[:, 1:].sum(1)).mean()


def _positions(model: Any, ids: Tensor, is_image: Tensor, grid: int) -> Tensor:
    """(3, rows, length) M-RoPE positions, as the stock model counts them; the same in every row."""
    grids = torch.tensor([[1, grid, grid]], device=ids.device)
    positions, _ = model.model.get_rope_index(ids[:1], mm_token_type_ids=is_image[None].int(), image_grid_thw=grids)
    return positions.expand(-1, len(ids), -1)


def _shares(names: Sequence[str]) -> Tensor:
    """(N,) how often each drawing is shown: a name that n drawings bear as often as the root of n."""
    count = Counter(names)
    return torch.tensor([count[name] ** -0.5 for name in names])


def _blank() -> bytes:
    """Any picture, to see what stands around one."""
    buffer = io.BytesIO()
    Image.new("RGB", (FULL, FULL)).save(buffer, "PNG")
    return buffer.getvalue()
