"""The fine-tuning API in front of a run: files, jobs, verdicts, models; the provider's policy decides.

Nothing here imports torch: a job is a child process, and the server starts in about a second.
"""
