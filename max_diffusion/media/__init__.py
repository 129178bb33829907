"""Images as files, and pictures of runs."""
