"""A job's configuration: its keys, how they are read and overridden, and which of them change rows."""
