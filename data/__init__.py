"""Training data: the small world and own pictures, batches of them, stored latents and states."""
