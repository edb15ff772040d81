"""One worker script per runtime, each run as a process of its own by its file path."""
