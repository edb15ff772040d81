"""The command line: each command parses, calls the API and hands back what to print."""
