"""Qwen-VL and Qwen-VL-Chat (2023; Bai et al., arXiv 2308.12966), natively: no code from a hub."""
