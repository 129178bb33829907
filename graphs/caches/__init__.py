"""The small graphs of the denoising caches."""
