"""Jobs whose calls to the system fail one by one, or end them: what was finished is not lost."""
