"""The built-in base model: its tokenizer, its data, and the script that trained it."""
