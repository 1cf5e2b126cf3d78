"""Images to tiles: sizes, tags and pixels. Pillow and numpy only."""
