"""Training for real: a Llama-shaped model in torch, its loop, and what is measured of it."""
