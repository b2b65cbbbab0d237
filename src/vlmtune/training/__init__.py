"""The training loop, its loss, schedule, checkpoints and ledger."""
