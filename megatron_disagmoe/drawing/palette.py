"""Colours of the drawings: the Okabe-Ito set, told apart by people with any common colour blindness.

M. Okabe and K. Ito, "Color universal design", 2008. Every hue is mixed with white by the position of the
stage inside its group, so that neighbouring virtual stages can be told apart, and text on top of it is black
or white, whichever has the higher contrast (WCAG 2.1 relative luminance).
"""

from __future__ import annotations

from typing import NamedTuple

RGB = tuple[float, float, float]


class Style(NamedTuple):
    """How one class of boxes looks."""

    label: str
    colour: str
    """``#rrggbb``."""


#: Order is the order in a legend.
STYLES: dict[str, Style] = {
    "F": Style("forward", "#0072b2"),
    "B": Style("backward", "#e69f00"),
    "I": Style("backward, inputs", "#d55e00"),
    "W": Style("backward, weights", "#009e73"),
    "M2N": Style("dispatch", "#56b4e9"),
    "dM2N": Style("dispatch gradient", "#2b6f9e"),
    "N2M": Style("combine", "#cc79a7"),
    "dN2M": Style("combine gradient", "#8a3f68"),
    "LANE": Style("lane", "#b3b3b3"),
    "dLANE": Style("lane gradient", "#757575"),
    "AGAIN": Style("dispatch again", "#f0e442"),
    "exposed": Style("waits for the network", "#000000"),
    "waits": Style("waits for another stage", "#c9c4bc"),
}

#: How far the last virtual stage of a group is mixed with white.
LIGHTEST = 0.62


def rgb(colour: str) -> RGB:
    """``#rrggbb`` as three numbers from 0 to 1."""
    return (int(colour[1:3], 16) / 255, int(colour[3:5], 16) / 255, int(colour[5:7], 16) / 255)


def shaded(style: str, shade: float) -> RGB:
    """The colour of ``style`` for a stage at ``shade``: 0 the first of its group (full), 1 the last (lightest)."""
    white = LIGHTEST * shade
    red, green, blue = rgb(STYLES[style].colour)
    return (red + (1 - red) * white, green + (1 - green) * white, blue + (1 - blue) * white)


def hexadecimal(colour: RGB) -> str:
    """Three numbers from 0 to 1 as ``#rrggbb``."""
    return "#" + "".join(f"{round(channel * 255):02x}" for channel in colour)


def luminance(colour: RGB) -> float:
    """Relative luminance, WCAG 2.1."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def text_on(colour: RGB) -> str:
    """Black or white, whichever is easier to read on ``colour``."""
    bright = luminance(colour)
    return "#000000" if (bright + 0.05) / 0.05 >= 1.05 / (bright + 0.05) else "#ffffff"
