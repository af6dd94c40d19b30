"""Pure values and decisions: no I/O, no clock, no threads. Everything here is a function of its arguments."""
