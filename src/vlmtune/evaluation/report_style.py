"""The report's style sheet: light and dark; for screen, phone and paper; loads nothing."""

STYLE = """
:root {
  color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --ink: #17202b; --muted: #5c6b7c; --rule: #dfe4ea;
  --before: #8a97a6; --after: #0f6fde; --soft: #eef2f6; --paper: #ffffff;
  --better: #0b7a4b; --better-soft: #e2f5ec; --worse: #b3261e; --worse-soft: #fdeceb;
  --none: #6b5a00; --none-soft: #fbf3d5;
  --extra: #ffd9d6; --extra-ink: #8c1d18; --missing: #d8ecff; --missing-ink: #0b4a8f;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #0f141a; --card: #171e26; --ink: #e5eaf0; --muted: #96a5b5; --rule: #2a3440;
    --before: #7f8d9d; --after: #5aa9ff; --soft: #1f2832; --paper: #f4f5f6;
    --better: #5fd39d; --better-soft: #12382a; --worse: #ff9b93; --worse-soft: #43201e;
    --none: #e5cd6a; --none-soft: #38310f;
    --extra: #5a2623; --extra-ink: #ffc9c4; --missing: #173a5e; --missing-ink: #b9dcff;
  }
}
* { box-sizing: border-box; }
html { scroll-behavior: smooth; -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", Helvetica, Arial,
    "PingFang SC", "Noto Sans CJK SC", "Microsoft YaHei", sans-serif;
}
main, .top { max-width: 1120px; margin: 0 auto; padding: 0 24px; }
.top { padding-top: 36px; }
.brand { color: var(--muted); font-size: 13px; letter-spacing: .04em; margin: 0; }
h1 { font-size: 30px; line-height: 1.2; margin: 4px 0 18px; letter-spacing: -.015em; }
h1, h4, .text, .question, td, pre { overflow-wrap: anywhere; }
h2 { font-size: 20px; margin: 0 0 4px; letter-spacing: -.01em; }
h3 { font-size: 15px; margin: 26px 0 10px; }
p { margin: 0 0 10px; }
a { color: var(--after); text-decoration: none; }
a:hover { text-decoration: underline; }
nav { display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 18px 0 26px; font-size: 14px; }
section { margin: 0 0 44px; }
.muted, .lead { color: var(--muted); }
.lead { max-width: 76ch; margin-bottom: 16px; }
.card, article.row, figure.curve, .verdict {
  background: var(--card); border: 1px solid var(--rule); border-radius: 12px;
}
code, pre, .text, .hash { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.verdict { padding: 22px 24px; border-left: 6px solid var(--muted); }
.verdict.better { border-left-color: var(--better); }
.verdict.worse { border-left-color: var(--worse); }
.verdict.none, .verdict.untested { border-left-color: var(--none); }
.verdict .word { font-size: 13px; font-weight: 650; display: inline-block; padding: 2px 10px;
  border-radius: 99px; margin-bottom: 10px; }
.verdict .numbers { display: flex; flex-wrap: wrap; align-items: baseline; gap: 4px 14px;
  font-variant-numeric: tabular-nums; margin: 0 0 8px; }
.verdict .big { font-size: 36px; font-weight: 680; letter-spacing: -.02em; line-height: 1.1; }
.verdict .from { color: var(--muted); font-weight: 500; }
.verdict p.sentence { margin: 0; max-width: 84ch; }
.word.better, .badge.better { background: var(--better-soft); color: var(--better); }
.word.worse, .badge.worse { background: var(--worse-soft); color: var(--worse); }
.word.none, .badge.none, .word.untested { background: var(--none-soft); color: var(--none); }
.badge { font-size: 12.5px; font-weight: 620; padding: 1px 9px; border-radius: 99px;
  white-space: nowrap; font-variant-numeric: tabular-nums; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(140px, 1fr)); gap: 12px;
  margin: 14px 0 0; padding: 0; }
.tiles div { background: var(--card); border: 1px solid var(--rule); border-radius: 12px;
  padding: 12px 14px; }
.tiles dt { color: var(--muted); font-size: 12.5px; }
.tiles dd { margin: 2px 0 0; font-size: 17px; font-weight: 620; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 10px 14px; border-top: 1px solid var(--rule);
  vertical-align: middle; }
thead th { border-top: 0; color: var(--muted); font-weight: 560; font-size: 13px; }
tbody th { font-weight: 620; }
tbody th small { display: block; color: var(--muted); font-weight: 400; font-size: 12.5px;
  line-height: 1.4; max-width: 36ch; }
td .value { font-weight: 620; }
td .range { color: var(--muted); white-space: nowrap; font-size: 13.5px; display: block; }
table.facts th, table.facts td { padding: 6px 14px; vertical-align: top; font-size: 14px; }
table.facts th { color: var(--muted); font-weight: 500; width: 34%; overflow-wrap: anywhere; }
table.facts tr:first-child > * { border-top: 0; }
table.sums td:last-child, table.sums th:last-child { text-align: right; }
table.sums tr.sum > * { font-weight: 680; border-top: 2px solid var(--rule); }
.holds { color: var(--better); font-weight: 560; margin: 10px 0 0; }
.fails { color: var(--worse); font-weight: 620; margin: 10px 0 0; }
.curves { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 16px; }
figure.curve { margin: 0; padding: 14px 16px 8px; }
figcaption { display: flex; flex-wrap: wrap; gap: 2px 10px; font-size: 13.5px; margin-bottom: 4px; }
figcaption .last { margin-left: auto; color: var(--muted); font-variant-numeric: tabular-nums; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { fill: var(--muted); font-size: 12px; font-variant-numeric: tabular-nums; }
svg .grid { stroke: var(--rule); }
svg .axis { stroke: var(--muted); }
svg .line { fill: none; stroke: var(--after); stroke-width: 2; stroke-linejoin: round; }
svg .line.faint { opacity: .28; stroke-width: 1; }
svg .dot { fill: var(--card); stroke: var(--ink); stroke-width: 2; }
svg.whiskers { width: 200px; max-width: 100%; }
svg .span { stroke-width: 3; stroke-linecap: round; opacity: .55; }
svg .before .span { stroke: var(--before); } svg .before circle { fill: var(--before); }
svg .after .span { stroke: var(--after); } svg .after circle { fill: var(--after); }
.key::before { content: ""; display: inline-block; width: 9px; height: 9px; border-radius: 50%;
  margin-right: 6px; background: var(--muted); }
.key.before::before { background: var(--before); }
.key.after::before { background: var(--after); }
.key.dots::before { background: var(--card); border: 2px solid var(--ink); }
article.row { padding: 16px 18px; margin: 0 0 14px; break-inside: avoid; }
article.row header { display: flex; gap: 12px; align-items: center; margin-bottom: 10px; }
article.row h4 { margin: 0; font-size: 14px; font-weight: 620; }
article.row .badge { margin-left: auto; }
.picture { background: var(--paper); border: 1px solid var(--rule); border-radius: 8px;
  padding: 10px; margin-bottom: 10px; text-align: center; }
.picture img { max-width: 100%; max-height: 360px; vertical-align: middle; }
.question { color: var(--muted); font-size: 13.5px; margin-bottom: 10px; white-space: pre-wrap; }
.columns { display: grid; grid-auto-flow: column; grid-auto-columns: minmax(0, 1fr); gap: 12px; }
.column { background: var(--soft); border-radius: 8px; padding: 8px 12px 10px; }
.column h5 { display: flex; margin: 0 0 4px; font-size: 12.5px; color: var(--muted);
  font-weight: 600; }
.column .score { margin-left: auto; color: var(--ink); font-variant-numeric: tabular-nums; }
.column.after { box-shadow: inset 0 2px 0 var(--after); }
.column.before { box-shadow: inset 0 2px 0 var(--before); }
.text { font-size: 13px; line-height: 1.6; white-space: pre-wrap; unicode-bidi: isolate; }
ins, del { border-radius: 3px; padding: 0 1px; }
ins { background: var(--extra); color: var(--extra-ink); text-decoration: underline; }
del { background: var(--missing); color: var(--missing-ink); text-decoration: line-through; }
.legend { font-size: 13.5px; color: var(--muted); }
.also { font-size: 13px; color: var(--muted); margin: 10px 0 0; }
.hidden-character { border: 1px solid var(--worse); color: var(--worse); border-radius: 3px;
  font-size: .85em; padding: 0 2px; }
pre { margin: 0; padding: 14px 16px; font-size: 13px; line-height: 1.5; overflow-x: auto;
  white-space: pre-wrap; }
.two { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 16px;
  align-items: start; }
.two h3 { margin-top: 0; }
footer { color: var(--muted); font-size: 13px; padding-bottom: 40px; }
@media (max-width: 720px) {
  main, .top { padding: 0 16px; }
  .top { padding-top: 22px; }
  h1 { font-size: 24px; }
  .verdict { padding: 16px; }
  .verdict .big { font-size: 28px; }
  .curves, .two { grid-template-columns: minmax(0, 1fr); }
  .columns { grid-auto-flow: row; }
  .tiles { grid-template-columns: 1fr 1fr; }
  svg text { font-size: 15px; }
  table.metrics thead { display: none; }
  table.metrics tr { display: block; padding: 12px 14px; border-top: 1px solid var(--rule); }
  table.metrics tr:first-child { border-top: 0; }
  table.metrics th, table.metrics td { display: flex; gap: 8px; padding: 3px 0; border: 0; }
  table.metrics th { display: block; }
  table.metrics td[data-label]::before { content: attr(data-label); color: var(--muted);
    flex: 0 0 84px; font-size: 13.5px; }
  td .range { display: inline; }
  svg.whiskers { width: 260px; }
  svg.whiskers text { font-size: 12px; }
}
@media print {
  :root { --page: #fff; --card: #fff; --ink: #000; --muted: #444; --rule: #bbb; --soft: #fff;
    --paper: #fff; --before: #777; --after: #0050b3; --better: #0b7a4b; --worse: #b3261e;
    --none: #6b5a00; --extra: #ffe3e1; --extra-ink: #8c1d18; --missing: #e0efff;
    --missing-ink: #0b4a8f; }
  body { font-size: 10.5pt; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  nav { display: none; }
  main, .top { max-width: none; padding: 0; }
  .card, figure.curve, .tiles div, tr { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
  .picture img { max-height: 200px; }
}
"""
