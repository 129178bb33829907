"""The small graphs of their own that denoising caches need."""
