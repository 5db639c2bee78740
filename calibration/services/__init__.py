"""A real server with dynamic batching: an encoder and a convnet, their calibration, and their validation."""
