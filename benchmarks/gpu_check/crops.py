"""Random resized crops on a device, of decoded images that stay there: what could feed a GPU that waits for loaders.

An antialiased bilinear resize is linear in the pixels and separable, so a crop is two matrix products: (S, h) by the
image's rows and (w, S) by its columns, with zeros outside of the crop.
"""

import torch
from torch import Tensor


class Resident:
    """Random images of one size, as uint8 on the device."""

    def __init__(self, count: int, height: int, width: int, device: torch.device) -> None:
        self.pixels = torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8).to(device)

    def batch(self, size: int) -> Tensor:
        """One crop of each image, of 8 to 100 % of its area and a ratio of 3:4 to 4:3, (B, 3, size, size)."""
        count, _, height, width = self.pixels.shape
        device = self.pixels.device
        area = height * width * torch.empty(count, device=device).uniform_(0.08, 1.0)
        ratio = torch.empty(count, device=device).uniform_(-0.2877, 0.2877).exp()
        h = (area / ratio).sqrt().round().clamp(1, height)
        w = (area * ratio).sqrt().round().clamp(1, width)
        top = (torch.rand(count, device=device) * (height - h + 1)).floor()
        left = (torch.rand(count, device=device) * (width - w + 1)).floor()
        return resized_crops(self.pixels, torch.stack([top, left, h, w], 1), size)


def resized_crops(pixels: Tensor, boxes: Tensor, size: int) -> Tensor:
    """(B, C, H, W) images and (B, 4) top, left, height, width -> (B, C, size, size): antialiased, bilinear."""
    rows = weights(boxes[:, 0], boxes[:, 2], pixels.shape[2], size)  # (B, size, H)
    columns = weights(boxes[:, 1], boxes[:, 3], pixels.shape[3], size)  # (B, size, W)
    half = rows[:, None] @ pixels.to(rows.dtype)  # (B, 1, size, H) @ (B, C, H, W) -> (B, C, size, W)
    return half @ columns[:, None].transpose(2, 3)


def weights(start: Tensor, length: Tensor, total: int, size: int) -> Tensor:
    """(B, size, total): how much of each pixel from `start` on, `length` of them, is in each of `size` new ones."""
    scale = (length / size)[:, None, None]
    inside = torch.arange(total, device=start.device) - start[:, None, None]  # (B, 1, total)
    centre = (torch.arange(size, device=start.device)[:, None] + 0.5) * scale  # (B, size, 1)
    triangle = (1 - (inside + 0.5 - centre).abs() / scale.clamp(min=1)).clamp(min=0)
    triangle = triangle * ((inside >= 0) & (inside < length[:, None, None]))
    return triangle / triangle.sum(2, keepdim=True)
