"""Images into shards, shards into batches, in an order that is a pure function of (dataset, seed, position)."""
