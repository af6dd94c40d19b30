"""gpujobs: one YAML file, one command, the right GPUs, in a container, on a server that many people share."""

__version__ = "0.1.0"
