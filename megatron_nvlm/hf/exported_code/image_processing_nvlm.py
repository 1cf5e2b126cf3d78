"""Images to normalised tiles, as NVLM was trained on them. Needs Pillow and torch; every step is Pillow's own.

An image's aspect ratio decides its grid of tiles; after the tiles of a larger grid comes the thumbnail, the whole image
squashed into one tile.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor

from megatron_nvlm.image.pixels import (
    IMAGENET,
    check_background,
    decode_image,
    picture_faults,
    to_array,
    upright_rgb,
)
from megatron_nvlm.image.tiling import choose_grid, cut_tiles


class NVLMImageProcessor(BaseImageProcessor):
    """Tiling and normalisation.

    Args:
        tile_size: pixels along an edge of a tile.
        max_tiles: most tiles of an image, its thumbnail not counted.
        background: colour behind transparent pixels, as Pillow names colours; None drops transparency.
        image_mean, image_std: of each channel, for values from 0 to 1.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012

    def __init__(
        self,
        tile_size: int = 448,
        max_tiles: int = 6,
        image_mean: Sequence[float] = IMAGENET.mean,
        image_std: Sequence[float] = IMAGENET.std,
        background: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if max_tiles < 1:
            raise ValueError(f"max_tiles is {max_tiles}; it must be at least 1")
        check_background(background)
        self.tile_size = tile_size
        self.background = background
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
        background = self.background
        pictures = [
            open_image(image, background) for image in (images if isinstance(images, list | tuple) else [images])
        ]
        grids = [choose_grid(*picture.size, max_tiles, self.tile_size) for picture in pictures]
        tiles = [
            torch.from_numpy(to_array(tile))
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


def open_image(image: Any, background: str | None = None) -> Image.Image:
    """An upright RGB image from a Pillow image, an array, a path or bytes, as training reads it."""
    with picture_faults("an image cannot be read", "give Pillow images, arrays, paths or bytes"):
        if isinstance(image, np.ndarray | Tensor):
            image = Image.fromarray(np.asarray(image))
        elif isinstance(image, str) and "://" in image:
            raise TypeError(f"{image[:80]!r} is an address; download it and name the file")
        elif isinstance(image, str | Path):
            image = Path(image).read_bytes()
    if isinstance(image, bytes):
        return decode_image(image, background)
    if not isinstance(image, Image.Image):
        raise ValueError(f"{type(image).__name__} is no image; give Pillow images, arrays, paths or bytes")
    return upright_rgb(image, background=background)
