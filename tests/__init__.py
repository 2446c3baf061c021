"""Tests, in folders that mirror the source; their helpers are in `tests.helpers`."""
