"""The method: towers, one forward pass as values, and relevance in closed form."""
