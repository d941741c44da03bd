#!/usr/bin/env python3
"""Makes the README's picture of a terminal that shows the dashboard.

    tmux new-session -d -s run -x 124 -y 36 'target/release/enamel train datasets/handbook/lora.toml'
    tmux capture-pane -e -p -t run | python3 scripts/dashboard_svg.py > docs/dashboard.svg

Every character stands where the terminal has it, in the colour the terminal gives it.
"""

import re
import sys
import unicodedata
from html import escape

WIDTH, HEIGHT = 7.8, 16.0  # of a cell, in pixels
INK, PAPER = "#d6d8dc", "#16181d"
PALETTE = [
    "#3b3f46", "#e06c75", "#98c379", "#e5c07b", "#61afef", "#c678dd", "#56b6c2", "#d6d8dc",
    "#6b7280", "#ff7b86", "#b5e08f", "#ffd58a", "#84c7ff", "#e39bf5", "#7fdbe6", "#ffffff",
]  # fmt: skip


def colour(number):
    """One of a terminal's 256 colours."""
    if number < 16:
        return PALETTE[number]
    if number >= 232:
        grey = 8 + 10 * (number - 232)
        return f"#{grey:02x}{grey:02x}{grey:02x}"
    steps = [0, 95, 135, 175, 215, 255]
    number -= 16
    return "#" + "".join(f"{steps[i]:02x}" for i in (number // 36, number // 6 % 6, number % 6))


def apply(codes, style):
    """The style after an SGR sequence (select graphic rendition, ECMA-48)."""
    codes = [int(code or 0) for code in codes.split(";")]
    while codes:
        code = codes.pop(0)
        if code == 0:
            style = {}
        elif code == 1:
            style = style | {"bold": True}
        elif code == 7:
            style = style | {"reverse": True}
        elif code in (22, 27):
            style = {k: v for k, v in style.items() if k != {22: "bold", 27: "reverse"}[code]}
        elif code in (38, 48):
            key = "ink" if code == 38 else "paper"
            if codes.pop(0) == 5:
                style = style | {key: colour(codes.pop(0))}
            else:
                style = style | {key: "#" + "".join(f"{codes.pop(0):02x}" for _ in range(3))}
        elif code in (39, 49):
            style = {k: v for k, v in style.items() if k != ("ink" if code == 39 else "paper")}
        elif 30 <= code <= 37 or 90 <= code <= 97:
            style = style | {"ink": PALETTE[code - 30 if code < 90 else code - 82]}
        elif 40 <= code <= 47 or 100 <= code <= 107:
            style = style | {"paper": PALETTE[code - 40 if code < 100 else code - 92]}
    return style


def cells(line, style):
    """Characters of a line with column and style, and the style that the next line begins with."""
    found, column = [], 0
    for part in re.split(r"(\x1b\[[0-9;]*m)", line):
        if part.startswith("\x1b["):
            style = apply(part[2:-1], style)
            continue
        for char in part:
            found.append((column, char, style))
            column += 2 if unicodedata.east_asian_width(char) in "WF" else 1
    return found, style


def main():
    lines = sys.stdin.read().rstrip("\n").split("\n")
    rows, style = [], {}
    for line in lines:
        row, style = cells(line, style)
        rows.append(row)
    columns = max(row[-1][0] for row in rows if row) + 1
    width, height = columns * WIDTH + 16, len(rows) * HEIGHT + 16
    print(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" '
        'font-family="DejaVu Sans Mono, Menlo, Consolas, monospace" font-size="13" xml:space="preserve">'
    )
    print(f'<rect width="100%" height="100%" rx="6" fill="{PAPER}"/>')
    for y, row in enumerate(rows):
        runs = []
        for column, char, style in row:
            ink, paper = style.get("ink", INK), style.get("paper")
            if style.get("reverse"):
                ink, paper = paper or PAPER, ink
            look = (ink, paper, style.get("bold", False))
            if runs and runs[-1][1] == look and runs[-1][0] + len(runs[-1][2]) == column:
                runs[-1][2] += char
            else:
                runs.append([column, look, char])
        for column, (ink, paper, bold), text in runs:
            x, top = 8 + column * WIDTH, 8 + y * HEIGHT
            length = len(text) * WIDTH
            if paper:
                print(f'<rect x="{x:.1f}" y="{top:.0f}" width="{length:.1f}" height="{HEIGHT:.0f}" fill="{paper}"/>')
            if not text.strip():
                continue
            weight = ' font-weight="bold"' if bold else ""
            # The length holds the columns together, whatever font there is.
            print(
                f'<text x="{x:.1f}" y="{top + 12:.0f}" textLength="{length:.1f}" '
                f'lengthAdjust="spacingAndGlyphs" fill="{ink}"{weight}>{escape(text)}</text>'
            )
    print("</svg>")


main()
