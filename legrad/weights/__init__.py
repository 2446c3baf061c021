"""Find, check and hash the files of models before a model is made."""
