"""The chat page: a conversation about pictures in a browser, base beside tuned."""
