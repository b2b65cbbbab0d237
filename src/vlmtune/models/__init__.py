"""Families, the contract, the encoder, loading and generation."""
