"""Where it runs: meshes, sharding rules, several hosts."""
