"""The process around the program: what libraries expect of it, signals, and its exit code."""
