"""All regions of figures on the pages, by name; the data files have the values."""

from __future__ import annotations

import cost_layouts
import mask_layouts
from figure_values import read_figure
from layout_parts import Region

REGIONS: dict[str, Region] = {**mask_layouts.REGIONS, **cost_layouts.REGIONS}


def rendered(name: str) -> str:
    """Return the Markdown of a region.

    Raises:
        KeyError: there is no such region.
    """
    region = REGIONS[name]
    figure = read_figure(region.figure)
    return f"Not measured yet: `{region.command}`." if figure is None else region.render(figure)
