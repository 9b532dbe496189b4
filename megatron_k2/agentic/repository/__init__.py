"""The repository of tools: imported, evolved, validated, without near-duplicates; see README.md."""
