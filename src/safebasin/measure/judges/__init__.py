"""Every module here is one judge; the folder is the registry."""
