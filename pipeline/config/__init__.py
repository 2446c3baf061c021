"""The configuration of a job: its keys, how it is loaded, and which keys change the rows."""
