"""What only a machine with a GPU can tell; ``scripts/gpu_check`` runs it."""
