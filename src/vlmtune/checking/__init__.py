"""Preflight checks of a data set against a model."""
