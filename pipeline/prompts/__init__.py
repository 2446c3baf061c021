"""Choose the texts that are explained for a sample: its captions, or the classes that apply to it."""
