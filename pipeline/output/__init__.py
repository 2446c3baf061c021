"""The output folder: its files, their schemas, what is done in it, and how readers join it with shards."""
