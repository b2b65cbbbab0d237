"""Which parts train, adapters, and merging."""
