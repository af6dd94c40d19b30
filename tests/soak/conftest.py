"""The long random runs use the same real parts as the end-to-end tests."""

from tests.e2e.conftest import lab, nvml_state, people, place

__all__ = ["lab", "nvml_state", "people", "place"]
