"""A zoo of unified multimodal models: each paper a LightningModule composed from shared, swappable blocks."""

__version__ = "0.1.0"
