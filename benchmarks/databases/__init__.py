"""What others wrote, as entries of a sweep: operations, modules, optimizers, architectures."""
