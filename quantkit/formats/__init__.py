"""Writers that turn solved blocks into artifacts, and readers that look into artifacts."""
