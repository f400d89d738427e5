"""What became of every prompt: the ledger (SQLite) and the rollout store (Parquet), in formats anyone can query."""
