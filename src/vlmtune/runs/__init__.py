"""The run folder, and the resolver of every MODEL argument."""
