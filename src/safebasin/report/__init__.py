"""The report of a run, from its files alone. Nothing here imports torch: a report can be written on a laptop."""
