"""Which texts are explained for a sample.

class_list (a file), mentions (classes that a text names) -> sample_prompts -> batch_texts (embedded, chosen)
"""
