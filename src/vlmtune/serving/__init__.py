"""Asking a model: one engine, and what stands before it (the API, the terminal, the chat page)."""
