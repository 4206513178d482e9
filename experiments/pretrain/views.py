"""Pictures of drawings, in batches and each different: colours, buttons, position, size, tilt, stroke, noise at random.

`data.embedded.icons` draws one icon as an interface shows it; this draws batches of tensors, of more variety: the
pictures of the data set `icons` are among those that are drawn here.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

MIN_CONTRAST = 4.5  # what WCAG 2.1 asks of text

# Shares of the pictures that get it.
DARK, BUTTON, GRADIENT = 0.4, 0.35, 0.2
THINNER, THICKER, OUTLINED, NOISY, BLURRED, HIDDEN = 0.1, 0.15, 0.15, 0.3, 0.15, 0.2


class Pictures:
    """Draws masks as pictures; one random generator, on the device of the pictures."""

    def __init__(self, seed: int, side: int = 64, device: str = "cpu") -> None:
        self.generator = torch.Generator(device).manual_seed(seed)
        self._device, self.side = torch.device(device), side
        self.variety = 1.0  # 0: black on white, upright, in the middle; 1: everything

    @torch.no_grad()
    def __call__(self, masks: Tensor) -> Tensor:
        """masks: (N, 64, 64) uint8, 255 = ink → (N, 3, side, side) float32 pictures, 0 to 1; or `photographs`."""
        if masks.ndim == 4:
            return self.photographs(masks)
        ink = self._stroke(masks.to(self._device).float().div(255)[:, None])
        button = self.chance(len(ink), BUTTON)
        glyph, plate = self.place(ink, button)
        ground, fill, colour = self.colours(button)
        picture = self._ground(ground) * (1 - plate) + fill * plate
        picture = picture * (1 - glyph) + colour * glyph
        return self.degrade(picture).clamp(0, 1)

    @torch.no_grad()
    def photographs(self, pictures: Tensor) -> Tensor:
        """pictures: (N, 3, any, any) uint8 → (N, 3, side, side) float32, 0 to 1: a part of each, of 0.6 to 1 of its
        side, mirrored or not, its light, contrast and colours a little different, and degraded."""
        n = len(pictures)
        extent = 1 - self.variety * self._uniform(n, 0, 0.4)
        centre = (1 - extent)[:, None] * self._uniform((n, 2), -1, 1)
        mirror = torch.where(self._uniform(n, 0, 1) < 0.5, -1.0, 1.0)
        matrix = torch.diag_embed(torch.stack([extent * mirror, extent], 1))
        theta = torch.cat([matrix, centre[..., None]], 2)
        grid = functional.affine_grid(theta, [n, 3, 2 * self.side, 2 * self.side], align_corners=False)
        whole = pictures.to(self._device).float() / 255
        seen = functional.avg_pool2d(functional.grid_sample(whole, grid, "bilinear", "reflection", False), 2)
        light, contrast, strong = (torch.exp(self.variety * self._uniform((n, 1, 1, 1), -0.3, 0.3)) for _ in range(3))
        grey = seen.mean(1, keepdim=True)
        seen = grey + (seen - grey) * strong
        middle = seen.mean((1, 2, 3), keepdim=True)
        return self.degrade((middle + (seen - middle) * contrast) * light).clamp(0, 1)

    def _stroke(self, ink: Tensor) -> Tensor:
        """Some drawings with thinner or thicker strokes, or as an outline of themselves."""
        n = len(ink)
        for share, change in ((THICKER, dilated), (THINNER, eroded), (OUTLINED, outlined)):
            chosen = self.chance(n, share)
            if chosen.any():
                ink = ink.index_put((chosen,), change(ink[chosen]))
        return ink

    def place(self, ink: Tensor, button: Tensor) -> tuple[Tensor, Tensor]:
        """(N, 1, 64, 64) each: the drawing, and the button that fits behind it, where the picture has them."""
        n = len(ink)
        angle = self.variety * self._uniform(n, -1, 1) * torch.where(self.chance(n, 0.15), 45.0, 12.0) * math.pi / 180
        stretch = torch.exp(self.variety * self._uniform(n, -0.2, 0.2))
        size = self._uniform(n, 0.4, 0.94) * self.variety + 0.8 * (1 - self.variety)  # of the drawing's longest side
        shear = self.variety * self._uniform(n, -0.15, 0.15)
        share = self._uniform(n, 0.55, 0.75)  # of the button that the drawing takes
        reach = size * torch.where(size / share < 0.95, 1 / share, torch.ones_like(share))
        centre = self.variety * self._uniform((n, 2), -1, 1) * (1 - reach).clamp(min=0)[:, None]
        cos, sin = torch.cos(angle), torch.sin(angle)
        rotation = torch.stack([cos, sin, -sin, cos], 1).view(n, 2, 2) / size.view(n, 1, 1)
        shear_matrix = torch.stack([stretch, stretch * shear, 0 * shear, 1 / stretch], 1).view(n, 2, 2)
        grid = sampling_grid(shear_matrix @ rotation, centre, 2 * self.side)
        glyph = functional.grid_sample(ink, grid, align_corners=False)
        corner = torch.randint(3, (n,), generator=self.generator, device=self._device)
        corner = torch.tensor([1.0, 0.5, 0.2], device=self._device)[corner] / share
        plate = torch.zeros_like(glyph)
        if (b := button).any():
            grid, scale = sampling_grid(rotation[b], centre[b], 2 * self.side), self.side * size[b]
            plate[b] = rounded_square(grid, 1 / share[b], corner[b], scale)[:, None]
        return functional.avg_pool2d(glyph, 2), functional.avg_pool2d(plate, 2)

    def colours(self, button: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(N, 3, 1, 1) each: ground, button and ink; the ink stands out from what is behind it."""
        n = len(button)
        dark = self.chance(n, DARK)
        light = torch.where(dark, self._uniform(n, 0.0, 0.3), 1 - self.variety * self._uniform(n, 0, 0.2))
        strong = self.variety * self._uniform(n, 0.0, 0.6)
        ground = self.random_hues(light, strong)
        fill = self.random_hues(self._uniform(n, 0.2, 0.8), self._uniform(n, 0, 0.9))
        behind = torch.where(button[:, None], fill, ground)
        best = torch.where((luminance(behind) > 0.18)[:, None], 0.0, 1.0).expand(n, 3)
        for _ in range(6):  # a colour that stands out is found in most tries; black or white where it is not
            tried = self.random_hues(self.variety * self._uniform(n, 0, 1), self._uniform(n, 0, 0.9))
            best = torch.where((contrast(tried, behind) >= MIN_CONTRAST)[:, None], tried, best)
        return ground[..., None, None], fill[..., None, None], best[..., None, None]

    def _ground(self, colour: Tensor) -> Tensor:
        """(N, 3, 64, 64): plain, or from lighter to darker in some direction."""
        n = len(colour)
        angle, strength = self._uniform(n, 0, 2 * math.pi), self._uniform(n, 0, 0.25) * self.chance(n, GRADIENT)
        line = torch.linspace(-1, 1, self.side, device=self._device)
        slope = torch.cos(angle).view(n, 1, 1) * line[None, :, None] + torch.sin(angle).view(n, 1, 1) * line
        return colour + (strength.view(n, 1, 1) * slope)[:, None]

    def degrade(self, picture: Tensor) -> Tensor:
        """Some blurred, some noisy, some with a patch hidden."""
        n = len(picture)
        soft = functional.avg_pool2d(functional.pad(picture, (1, 1, 1, 1), mode="replicate"), 3, 1)
        picture = torch.where(self.chance(n, BLURRED).view(n, 1, 1, 1), soft, picture)
        noise = torch.randn(picture.shape, generator=self.generator, device=self._device)
        strength = self._uniform(n, 0, 0.08) * self.chance(n, NOISY)
        picture = picture + noise * strength.view(n, 1, 1, 1)
        return self.hide_patch(picture)

    def hide_patch(self, picture: Tensor) -> Tensor:
        n = len(picture)
        line = torch.arange(self.side, device=self._device)
        extent = self._uniform((n, 2), 0.1, 0.35) * self.side
        start = self._uniform((n, 2), 0, 1) * (self.side - extent)
        inside = [(line >= start[:, i, None]) & (line < (start + extent)[:, i, None]) for i in (0, 1)]
        where = inside[0][:, :, None] & inside[1][:, None, :] & self.chance(n, HIDDEN).view(n, 1, 1)
        return torch.where(where[:, None], self._uniform((n, 3), 0, 1)[..., None, None], picture)

    def random_hues(self, light: Tensor, strong: Tensor) -> Tensor:
        """(N, 3): colours of any hue, of given lightness and saturation; half of them are greys."""
        n = len(light)
        hue, strong = self._uniform(n, 0, 12), strong * self.chance(n, 0.5)
        k = (torch.tensor([0.0, 8.0, 4.0], device=self._device) + hue[:, None]) % 12
        wave = torch.minimum(torch.minimum(k - 3, 9 - k), torch.ones_like(k)).clamp(min=-1)
        return light[:, None] - (strong * torch.minimum(light, 1 - light))[:, None] * wave

    def chance(self, n: int, share: float) -> Tensor:
        return torch.rand(n, generator=self.generator, device=self._device) < share * self.variety

    def _uniform(self, shape: int | tuple[int, ...], low: float, high: float) -> Tensor:
        return torch.rand(shape, generator=self.generator, device=self._device) * (high - low) + low


def dilated(ink: Tensor) -> Tensor:
    return functional.max_pool2d(ink, 3, 1, 1)


def eroded(ink: Tensor) -> Tensor:
    thin = -functional.max_pool2d(-ink, 3, 1, 1)
    # A drawing of hairlines would vanish.
    return torch.where((thin.sum((1, 2, 3)) > 0.4 * ink.sum((1, 2, 3))).view(-1, 1, 1, 1), thin, ink)


def outlined(ink: Tensor) -> Tensor:
    inner = -functional.max_pool2d(-functional.pad(ink, (2, 2, 2, 2)), 5, 1)
    return (ink - inner).clamp(min=0)


def sampling_grid(matrix: Tensor, centre: Tensor, side: int) -> Tensor:
    """(N, side, side, 2): where each point of the picture lies in the drawing, whose middle is at `centre`."""
    offset = -matrix @ centre[..., None]
    return functional.affine_grid(torch.cat([matrix, offset], 2), [len(centre), 1, side, side], align_corners=False)


def rounded_square(at: Tensor, half: Tensor, corner: Tensor, scale: Tensor) -> Tensor:
    """(N, side, side): coverage of a rounded square. half side, corner radius, pixels a unit: (N,)."""
    beyond = at.abs() - (half - corner).view(-1, 1, 1, 1)
    outside = beyond.clamp(min=0).norm(dim=-1) + beyond.amax(-1).clamp(max=0) - corner.view(-1, 1, 1)
    return (0.5 - outside * scale.view(-1, 1, 1)).clamp(0, 1)


def luminance(colour: Tensor) -> Tensor:
    linear = torch.where(colour <= 0.03928, colour / 12.92, ((colour.clamp(min=0.03928) + 0.055) / 1.055) ** 2.4)
    return linear @ torch.tensor([0.2126, 0.7152, 0.0722], device=colour.device)


def contrast(one: Tensor, other: Tensor) -> Tensor:
    a, b = luminance(one), luminance(other)
    return (torch.maximum(a, b) + 0.05) / (torch.minimum(a, b) + 0.05)
