"""The real runtime: SGLang, opened up through its own extension points. Everything that touches SGLang is in here.

`plugin`, `platform`, `pool`, `cache`, `agent`, `reservations`, `sends`, `copier` and `load` run inside SGLang's
scheduler process; `frontend` and `runtime` in the engine's own.
"""
