"""Choosing: the batch size and delay of a service, the micro-batch and checkpointing of a training run."""
