"""A run: configuration, folder, plan, one function a step, and the order in which they are called."""
