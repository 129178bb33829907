"""The engine behind HTTP, MAX's server and Ray Serve."""
