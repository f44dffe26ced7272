"""The routes of the API: shape, and nothing else."""
