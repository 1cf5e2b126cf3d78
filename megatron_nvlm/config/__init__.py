"""One run: its YAML file, read, checked and composed of the sections that its parts define."""
