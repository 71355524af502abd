"""How KV moves between pools: layouts, slots, and one module a transport."""
