"""From image-text pairs to a fine-tuned vision-language model you can trust."""

__version__ = "0.1.0"
