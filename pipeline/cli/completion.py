"""Complete the keys of a configuration on the command line."""

from __future__ import annotations


def complete_override(incomplete: str) -> list[str]:
    """Return the keys that begin with a text, each with the sign that its value follows.

    Args:
        incomplete: what was typed of KEY=VALUE so far.
    """
    if "=" in incomplete:
        return []
    # imported here: only this needs the configuration's sections
    from pipeline.config.load import known_keys

    return [f"{key}=" for key in known_keys() if "." in key and key.startswith(incomplete)]
