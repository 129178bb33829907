"""Images and videos as files, and drawings of runs."""
