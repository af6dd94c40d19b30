"""Attacks: each is first shown to succeed where its defence is missing, then to fail against a real server."""
