"""Length buckets: inputs of many lengths in groups of similar ones, so that little of what is computed is padding."""

import math
from collections.abc import Sequence


MOST_PADDING = 0.05  # share of a group


def length_buckets(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Places of `lengths` in groups, longest first; those of equal length stay in their order.

    A group, padded to its longest, is of `most` in all or less (unless one alone is longer), of which `MOST_PADDING`
    or less is padding.
    """
    groups: list[list[int]] = []
    filled = 0
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        padded = (len(groups[-1]) + 1) * lengths[groups[-1][0]] if groups else math.inf
        filled += lengths[place]
        if padded <= most and filled >= (1 - MOST_PADDING) * padded:
            groups[-1].append(place)
        else:
            groups.append([place])
            filled = lengths[place]
    return groups
