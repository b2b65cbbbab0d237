"""From raw rows to a prepared data set."""
