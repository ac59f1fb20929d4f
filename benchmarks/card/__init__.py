"""The stages of `benchmarks/on_gpu.py`: each a function of a device that yields rows."""
