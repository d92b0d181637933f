"""Parquet in, parquet out: files, shards, rows, images, and the ledger of what is committed. Knows nothing of Ray."""
