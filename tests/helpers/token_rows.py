"""What a `RowTokenizer` returns, as lists in the order of the texts."""

from legrad.tokens import RowTokenizer, as_token_ids


def token_ids(tokenizer, texts):
    rows = RowTokenizer(tokenizer)(texts)
    return as_token_ids([rows[text] for text in texts])


def truncated(tokenizer, texts):
    rows = RowTokenizer(tokenizer)(texts)
    return [rows[text].is_truncated for text in texts]
