"""The KV store: a KV endpoint that keeps the KV of prompts in memory and on disk, and computes nothing."""
