"""The orchestrator decides: recipes, plans, placement, status, gates, registry."""
