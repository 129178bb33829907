"""MAX graph builders: symbolic tensors in, symbolic tensors out.

Nothing here opens a session, reads a file or touches a device; ``max_diffusion`` does.
"""
