"""Studies, benchmarks and launch scripts: run from the repository, imported by nothing."""
