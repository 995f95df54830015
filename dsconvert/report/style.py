"""The style sheet of the HTML report, in a light and a dark scheme."""

from __future__ import annotations

STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #5d6776; --line: #dfe3ea; --back: #fff;
  --curve: #2563b0; --strong: #c2410c; --good: #15803d; --bad: #b91c1c; --mark: #fde68a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ee; --soft: #98a2b3; --line: #333c4a;
  --back: #14181f; --curve: #7db4ff; --strong: #fb923c; --good: #22a352; --bad: #dc3d3d; --mark: #7c5e10; } }
body { margin: 0; background: var(--back); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 860px; margin: 0 auto; padding: 24px 20px 60px; }
h1 { font-size: 22px; margin: 8px 0; overflow-wrap: anywhere; }
h2 { font-size: 17px; margin: 34px 0 8px; border-bottom: 1px solid var(--line); padding-bottom: 4px; }
p { color: var(--soft); margin: 6px 0; }
.pass, .fail { color: #fff; border-radius: 4px; padding: 2px 10px; font-size: 16px; margin-right: 6px; }
.pass { background: var(--good); } .fail { background: var(--bad); }
.why { color: var(--bad); padding-left: 20px; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; font-variant-numeric: tabular-nums; }
th { text-align: left; color: var(--soft); font-weight: 600; }
th, td { padding: 3px 12px 3px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.text { font-family: ui-monospace, monospace; font-size: 12.5px; white-space: pre-wrap;
  overflow-wrap: anywhere; min-width: 70px; }
.checks td:nth-child(-n+2) { white-space: nowrap; }
mark { background: var(--mark); color: inherit; border-radius: 2px; }
svg { width: 100%; height: auto; display: block; margin: 6px 0; }
svg text { font-size: 11px; fill: var(--soft); paint-order: stroke; stroke: var(--back); stroke-width: 3px; }
svg text.inside { fill: #fff; stroke: none; }
.chart { overflow-x: auto; } .chart svg { min-width: 600px; }
.wide { overflow-x: auto; }
.grid { stroke: var(--line); } .limit { stroke: var(--bad); stroke-dasharray: 4 3; }
.curve { fill: none; stroke: var(--curve); stroke-width: 2; } .dot, .bar { fill: var(--curve); }
.dot.failed { fill: var(--bad); } .leader { stroke: var(--soft); stroke-width: 0.7; }
.front { fill: none; stroke: var(--curve); stroke-width: 1; stroke-dasharray: 2 4; opacity: 0.7; }
svg text.name { fill: var(--ink); } svg text.value { fill: #111; stroke: none; font-size: 10px; }
svg text.pale { fill: #fff; }
.cell { stroke: var(--line); stroke-width: 0.5; } .equal { fill: none; stroke: var(--line); }
.broken { fill: var(--bad); stroke: var(--ink); stroke-width: 2; }
.part0 { fill: #2563b0; } .part1 { fill: #b45309; } .part2 { fill: #15803d; } .part3 { fill: #7e22ce; }
.part4 { fill: #0e7490; } .part5 { fill: #9f1239; }
"""
