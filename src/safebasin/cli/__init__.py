"""The command line: a verb parses, calls and prints."""
