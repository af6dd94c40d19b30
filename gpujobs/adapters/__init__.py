"""Everything that touches the world outside: NVML, the Engine, the file systems, the store."""
