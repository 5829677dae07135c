"""Colours that keep their order for every reader: dark page or light, colour-blind or not."""

# Viridis at eleven even steps (matplotlib, CC0): lightness alone already tells the order.
_VIRIDIS = (
  "440154",
  "482475",
  "414487",
  "355f8d",
  "2a788e",
  "21918c",
  "22a884",
  "44bf70",
  "7ad151",
  "bddf26",
  "fde725",
)

LEVELS = 24  # shades that a page distinguishes


def shade(share: float) -> str:
  """Returns the colour of a value in [0, 1], dark violet to yellow, as "#rrggbb"."""
  place = min(max(share, 0.0), 1.0) * (len(_VIRIDIS) - 1)
  low = min(int(place), len(_VIRIDIS) - 2)
  mixed = (
    round(a + (b - a) * (place - low)) for a, b in zip(_rgb(_VIRIDIS[low]), _rgb(_VIRIDIS[low + 1]), strict=True)
  )
  return "#" + "".join(f"{channel:02x}" for channel in mixed)


def ink(colour: str) -> str:
  """Returns black or white, whichever is read better on `colour` (WCAG relative luminance)."""
  linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in _rgb(colour[1:]))]
  luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
  # Contrast with black is (l + 0.05) / 0.05, with white 1.05 / (l + 0.05).
  return "#000" if (luminance + 0.05) ** 2 > 1.05 * 0.05 else "#fff"


def level(share: float) -> int:
  """Returns which of the page's shades stands for a value in [0, 1]."""
  return round(min(max(share, 0.0), 1.0) * (LEVELS - 1))


def level_rules() -> str:
  """Returns the CSS classes v0, v1, ... (viridis) and t0, t1, ... (behind text).

  Behind text one hue grows out of the page's own ground, so that a paragraph
  stays readable and only what is high stands out. The text turns to the other
  end (--on-hot) where that reads better: later on a light page than on a dark one.
  """
  rules, dark = [], []
  for index in range(LEVELS):
    share = index / (LEVELS - 1)
    text = ";color:var(--on-hot)" if share >= 0.72 else ""
    mixed = f"color-mix(in srgb,var(--hot) {share:.0%},var(--panel))"
    rules.append(f".v{index}{{background:{shade(share)}}}.t{index}{{background:{mixed}{text}}}")
    if 0.5 <= share < 0.72:
      dark.append(f".t{index}{{color:var(--on-hot)}}")
  return "".join(rules) + "@media(prefers-color-scheme:dark){" + "".join(dark) + "}"


def _rgb(colour: str) -> tuple[int, int, int]:
  return int(colour[:2], 16), int(colour[2:4], 16), int(colour[4:], 16)
