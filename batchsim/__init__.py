"""BatchSim predicts what a CPU/GPU batching pipeline will do, and proves it on the GPU."""

__version__ = "0.1.0"
