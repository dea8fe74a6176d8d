"""teddy_ray: distil an image classification data set into a few images per class, on Ray."""

__version__ = "0.1.0"
