"""Every module here is one method; the folder is the registry."""
