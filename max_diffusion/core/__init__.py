"""What all else rests on: requests, reports, buffers, checks and files."""
