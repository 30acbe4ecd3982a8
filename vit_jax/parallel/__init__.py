"""Meshes, sharding rules and multi-host runs."""
