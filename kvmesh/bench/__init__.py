"""Load on a mesh or any OpenAI-compatible server, and what came of it."""
