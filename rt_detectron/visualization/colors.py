"""Colours that colour-blind readers can tell apart (Okabe and Ito, "Color Universal Design", 2008)."""

PALETTE: tuple[tuple[int, int, int], ...] = (
    (0, 114, 178),  # blue
    (230, 159, 0),  # orange
    (0, 158, 115),  # bluish green
    (204, 121, 167),  # reddish purple
    (86, 180, 233),  # sky blue
    (213, 94, 0),  # vermilion
    (240, 228, 66),  # yellow
)

# The same hues for lines and dots, each with a contrast of at least 3:1 to a white and to a dark page.
PLOT_PALETTE: tuple[tuple[int, int, int], ...] = (
    (0, 114, 178),
    (176, 118, 0),
    (0, 158, 115),
    (204, 121, 167),
    (43, 140, 190),
    (213, 94, 0),
    (138, 128, 20),
)
# Of verdicts, as good on both pages: better, worse.
GAIN, LOSS = (0, 140, 100), (213, 94, 0)


def color_of(index: int) -> tuple[int, int, int]:
    """The RGB colour (0..255) of category or arm number ``index``; colours repeat after the palette's end."""
    return PALETTE[index % len(PALETTE)]


def css_color(color: tuple[int, int, int]) -> str:
    """``#rrggbb`` of an RGB colour (0..255)."""
    return "#{:02x}{:02x}{:02x}".format(*color)


def readable_on(color: tuple[int, int, int]) -> tuple[int, int, int]:
    """Black or white, whichever has the higher contrast on ``color`` (relative luminance of WCAG 2)."""
    return (0, 0, 0) if _luminance(color) > 0.179 else (255, 255, 255)


def contrast(color: tuple[int, int, int], other: tuple[int, int, int]) -> float:
    """The contrast of two colours as WCAG 2 defines it, from 1 to 21."""
    darker, lighter = sorted((_luminance(color), _luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


def _luminance(color: tuple[int, int, int]) -> float:
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in color)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
