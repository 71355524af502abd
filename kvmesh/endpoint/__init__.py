"""What every KV endpoint is made of, engine and store alike."""
