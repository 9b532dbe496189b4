"""Static pages: parts that escape, charts as inline SVG, one file that loads nothing."""
