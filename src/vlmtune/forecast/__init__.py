"""What a run will need, known before it starts: parameters, tokens, FLOPs, memory, time."""
