"""Ledgers of every schema version, checked in: each must open, migrate, and show its jobs."""
