"""Tools around the package: data, reports, the demo."""
