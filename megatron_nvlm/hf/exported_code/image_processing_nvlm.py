"""Images to normalised tiles, as NVLM was trained on them. Needs Pillow and torch; every step is Pillow's own.

An image's aspect ratio decides its grid of tiles; behind the tiles of a larger grid comes the thumbnail, the whole image
squashed into one tile.
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor

Grid = tuple[int, int]
"""Columns and rows of tiles."""

MAX_PIXELS = 178_956_970
"""Where Pillow takes an image for a decompression bomb."""
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class NVLMImageProcessor(BaseImageProcessor):
    """Tiling and normalisation.

    Args:
        tile_size: pixels along an edge of a tile.
        max_tiles: most tiles of an image, its thumbnail not counted.
        image_mean, image_std: of each channel, for values from 0 to 1.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012

    def __init__(
        self,
        tile_size: int = 448,
        max_tiles: int = 6,
        image_mean: Sequence[float] = IMAGENET_MEAN,
        image_std: Sequence[float] = IMAGENET_STD,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if max_tiles < 1:
            raise ValueError(f"max_tiles is {max_tiles}; it must be at least 1")
        self.tile_size = tile_size
        self.max_tiles = max_tiles
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)

    def preprocess(self, images: Any, return_tensors: str | None = "pt", **kwargs: Any) -> BatchFeature:
        """One image or several to tiles.

        Args:
            images: Pillow images, uint8 arrays [height, width, 3], paths, or bytes of image files.
            return_tensors: only `pt`.

        Returns:
            `pixel_values` [t, 3, S, S] float32, all images' tiles in order, and `grids` [images, 2], columns and rows.

        Raises:
            ValueError: an image cannot be read, has no content or too much.
        """
        if return_tensors not in (None, "pt"):
            raise ValueError(f"return_tensors is {return_tensors!r}; NVLM's processors make torch tensors, 'pt'")
        max_tiles = kwargs.get("max_tiles") or self.max_tiles
        pictures = [open_image(image) for image in (images if isinstance(images, list | tuple) else [images])]
        grids = [choose_grid(*picture.size, max_tiles, self.tile_size) for picture in pictures]
        tiles = [
            to_tensor(tile)
            for picture, grid in zip(pictures, grids, strict=True)
            for tile in cut_tiles(picture, grid, self.tile_size)
        ]
        stacked = torch.stack(tiles) if tiles else torch.zeros(0, 3, self.tile_size, self.tile_size, dtype=torch.uint8)
        pixel_values = self.normalise(stacked)
        return BatchFeature({"pixel_values": pixel_values, "grids": torch.tensor(grids).reshape(-1, 2)})

    def normalise(self, tiles: Tensor) -> Tensor:
        """uint8 [t, 3, S, S] -> float32 of the same shape."""
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.image_mean, self.image_std))
        return (tiles.float() / 255 - mean) / std


def open_image(image: Any) -> Image.Image:
    """An upright RGB image from a Pillow image, an array, a path or bytes.

    16-bit grey is scaled to 8 bits, transparency is dropped, of an animation the first frame is taken.
    """
    try:
        if isinstance(image, np.ndarray | Tensor):
            image = Image.fromarray(np.asarray(image))
        elif isinstance(image, bytes):
            image = Image.open(io.BytesIO(image))
        elif isinstance(image, str | Path):
            image = Image.open(image)
        if not isinstance(image, Image.Image):
            raise TypeError(f"{type(image).__name__} is no image")
        check_size(*image.size)
        image.load()
    except (OSError, SyntaxError, TypeError, Image.DecompressionBombError) as error:
        raise ValueError(f"an image cannot be read ({error}); give Pillow images, arrays, paths or bytes") from error
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16") or image.mode == "I":
        image = Image.fromarray((np.asarray(image, dtype=np.uint32) >> 8).astype(np.uint8))
    return image.convert("RGB")


def check_size(width: int, height: int) -> None:
    """Refuse sizes that no image has or that would exhaust memory."""
    if width < 1 or height < 1 or width * height > MAX_PIXELS:
        raise ValueError(f"an image has {width}x{height} pixels; from 1 to {MAX_PIXELS} can be read")


def choose_grid(width: int, height: int, max_tiles: int, tile_size: int) -> Grid:
    """The grid of at most `max_tiles` tiles whose aspect ratio is closest to the image's.

    Among equals a larger grid replaces a smaller one only if the image has more than half of its pixels.
    """
    grids = [(cols, rows) for cols in range(1, max_tiles + 1) for rows in range(1, max_tiles // cols + 1)]
    best, least = (1, 1), float("inf")
    for cols, rows in sorted(grids, key=lambda grid: (grid[0] * grid[1], grid[0])):
        difference = abs(width / height - cols / rows)
        is_filled = width * height > 0.5 * tile_size * tile_size * cols * rows
        if difference < least or (difference == least and is_filled):
            best, least = (cols, rows), difference
    return best


def cut_tiles(image: Image.Image, grid: Grid, tile_size: int) -> list[Image.Image]:
    """Tiles row by row, then the thumbnail if there is more than one; bicubic, aspect ratio not kept."""
    cols, rows = grid
    canvas = image.resize((cols * tile_size, rows * tile_size), Image.Resampling.BICUBIC)
    corners = [(col * tile_size, row * tile_size) for row in range(rows) for col in range(cols)]
    tiles = [canvas.crop((left, top, left + tile_size, top + tile_size)) for left, top in corners]
    if len(tiles) > 1:
        tiles.append(image.resize((tile_size, tile_size), Image.Resampling.BICUBIC))
    return tiles


def to_tensor(tile: Image.Image) -> Tensor:
    """A square RGB tile -> uint8 [3, S, S]."""
    return torch.from_numpy(np.asarray(tile).transpose(2, 0, 1).copy())
