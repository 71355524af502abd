"""The registry service: who is in the mesh, and the settings that all of it shares."""
