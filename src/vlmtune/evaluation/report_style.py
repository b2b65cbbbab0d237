"""The report's style sheet: light and dark; for screen, phone and paper; loads nothing."""

STYLE = """
:root {
  color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --ink: #17202b; --muted: #5c6b7c; --rule: #dfe4ea;
  --before: #8a97a6; --after: #0f6fde; --soft: #eef2f6; --paper: #ffffff;
  --better: #0b7a4b; --better-soft: #e2f5ec; --worse: #b3261e; --worse-soft: #fdeceb;
  --none: #6b5a00; --none-soft: #fbf3d5;
  --extra: #ffd9d6; --extra-ink: #8c1d18; --missing: #d8ecff; --missing-ink: #0b4a8f;
  --c1: #0f6fde; --c2: #c2410c; --c3: #0b7a4b; --c4: #8b2fc9; --c5: #9a6b00; --c6: #0b7f93;
  --c7: #b8175c; --c8: #5c6b7c; --mix: #0f6fde; --wrong: #d9480f;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #0f141a; --card: #171e26; --ink: #e5eaf0; --muted: #96a5b5; --rule: #2a3440;
    --before: #7f8d9d; --after: #5aa9ff; --soft: #1f2832; --paper: #1f2832;
    --better: #5fd39d; --better-soft: #12382a; --worse: #ff9b93; --worse-soft: #43201e;
    --none: #e5cd6a; --none-soft: #38310f;
    --extra: #5a2623; --extra-ink: #ffc9c4; --missing: #173a5e; --missing-ink: #b9dcff;
    --c1: #5aa9ff; --c2: #ff9d5c; --c3: #5fd39d; --c4: #c79bff; --c5: #e5cd6a; --c6: #4fd1e6;
    --c7: #ff8fbf; --c8: #a9b6c4; --mix: #5aa9ff; --wrong: #ff9d5c;
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
.verdict .change { font-size: 17px; }
.verdict .change .range { font-size: 14px; color: var(--muted); }
.verdict p.sentence { margin: 0; max-width: 84ch; }
.verdict p.sentence + p.sentence { margin-top: 4px; }
.word.better, .badge.better { background: var(--better-soft); color: var(--better); }
.word.worse, .badge.worse { background: var(--worse-soft); color: var(--worse); }
.word.none, .badge.none, .word.untested { background: var(--none-soft); color: var(--none); }
.badge.plain { background: var(--soft); color: var(--muted); }
.badge { font-size: 12.5px; font-weight: 620; padding: 1px 9px; border-radius: 99px;
  white-space: nowrap; font-variant-numeric: tabular-nums; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(140px, 1fr)); gap: 12px;
  margin: 14px 0 0; padding: 0; }
.tiles.four { grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); }
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
table.metrics td small { display: block; color: var(--muted); font-size: 12.5px;
  white-space: nowrap; }
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
svg .limit { stroke: var(--worse); stroke-dasharray: 5 4; }
.s0 { --own: var(--after); } .s1 { --own: var(--c1); } .s2 { --own: var(--c2); }
.s3 { --own: var(--c3); } .s4 { --own: var(--c4); } .s5 { --own: var(--c5); }
.s6 { --own: var(--c6); } .s7 { --own: var(--c7); } .s8 { --own: var(--c8); }
svg .line { fill: none; stroke: var(--own); stroke-width: 2; stroke-linejoin: round; }
svg .line.faint { opacity: .28; stroke-width: 1; }
svg .dot { fill: var(--card); stroke: var(--own); stroke-width: 2; }
svg .s0 .dot { stroke: var(--ink); }
svg.whiskers { width: 200px; min-width: 110px; max-width: 100%; }
table.metrics tbody th { min-width: 130px; }
svg .span { stroke: var(--own); stroke-width: 3; stroke-linecap: round; opacity: .55; }
svg .span + circle { fill: var(--own); }
svg .before .span { stroke: var(--before); } svg .before circle { fill: var(--before); }
svg .after .span { stroke: var(--after); } svg .after circle { fill: var(--after); }
.key::before { content: ""; display: inline-block; width: 9px; height: 9px; border-radius: 50%;
  margin-right: 6px; background: var(--muted); }
.key.before::before { background: var(--before); }
.key.after::before { background: var(--after); }
.key.line::before { height: 3px; width: 16px; border-radius: 2px; vertical-align: 3px;
  background: var(--own); }
.key.dots::before { background: var(--card); border: 2px solid var(--own); }
.key.dots.s0::before { border-color: var(--ink); }
article.row { padding: 16px 18px; margin: 0 0 14px; break-inside: avoid; }
article.row header { display: flex; gap: 12px; align-items: center; margin-bottom: 10px; }
article.row h4 { margin: 0; font-size: 14px; font-weight: 620; }
article.row .badge { margin-left: auto; }
.picture { background: var(--paper); border: 1px solid var(--rule); border-radius: 8px;
  padding: 10px; margin-bottom: 10px; text-align: center; }
.picture img { max-width: 100%; max-height: 360px; vertical-align: middle; }
.picture svg { display: inline-block; width: auto; max-width: 100%; max-height: 560px;
  vertical-align: middle; }
.picture svg .label { font: 600 13px system-ui, "Noto Sans CJK SC", sans-serif; fill: #fff; }
.picture > * + * { margin: 0 0 0 10px; }
.boxes { display: flex; flex-wrap: wrap; gap: 2px 16px; font-size: 13px; color: var(--muted); }
.boxes span { display: inline-flex; align-items: center; gap: 6px; }
svg.swatch { width: 26px; }
.formula { background: #fff; border-radius: 6px; padding: 8px 10px; margin: 0 0 8px;
  overflow-x: auto; }
.formula img { display: block; max-width: none; }
p.formula { background: none; padding: 0; font-size: 12.5px; font-style: italic; }
.remarks { margin: 0 0 12px; padding-left: 20px; max-width: 92ch; }
.remarks li { margin: 2px 0; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table.matrix th, table.matrix td { padding: 6px 8px; text-align: center; font-size: 13.5px; }
table.matrix tbody th { text-align: left; font-weight: 560; max-width: 180px;
  overflow-wrap: anywhere; }
table.matrix thead th { vertical-align: bottom; max-width: 90px; overflow-wrap: anywhere; }
table.matrix td { --strength: calc(var(--share) * .6); }
table.matrix td.right { background: color-mix(in srgb, var(--mix) var(--strength), transparent);
  font-weight: 620; }
table.matrix td.wrong { background: color-mix(in srgb, var(--wrong) var(--strength), transparent); }
table.matrix td.none { color: var(--muted); }
.question { color: var(--muted); font-size: 13.5px; margin-bottom: 10px; white-space: pre-wrap; }
.columns { display: grid; grid-auto-flow: column; grid-auto-columns: minmax(0, 1fr); gap: 12px; }
.column { background: var(--soft); border-radius: 8px; padding: 8px 12px 10px; }
.column h5 { display: flex; margin: 0 0 4px; font-size: 12.5px; color: var(--muted);
  font-weight: 600; }
.column h5 .badge { margin-left: 8px; font-size: 11.5px; }
.column .score { margin-left: auto; color: var(--ink); font-variant-numeric: tabular-nums; }
.column.after { box-shadow: inset 0 2px 0 var(--after); }
.column.before { box-shadow: inset 0 2px 0 var(--before); }
.text { font-size: 13px; line-height: 1.6; white-space: pre-wrap; unicode-bidi: isolate;
  max-height: 21em; overflow-y: auto; }
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
@media (max-width: 1000px), print {
  table.metrics th, table.metrics td { padding: 8px; }
  table.metrics td small { white-space: normal; }
}
@media (max-width: 720px) {
  main, .top { padding: 0 16px; }
  .top { padding-top: 22px; }
  h1 { font-size: 24px; }
  .verdict { padding: 16px; }
  .verdict .big { font-size: 28px; }
  .verdict .name { flex-basis: 100%; }
  .curves, .two { grid-template-columns: minmax(0, 1fr); }
  .columns { grid-auto-flow: row; }
  .tiles, .tiles.four { grid-template-columns: 1fr 1fr; }
  svg text { font-size: 15px; }
  table.stacked thead { display: none; }
  table.stacked tr { display: block; padding: 12px 14px; border-top: 1px solid var(--rule); }
  table.stacked tr:first-child { border-top: 0; }
  table.stacked th, table.stacked td { display: flex; gap: 8px; padding: 3px 0; border: 0;
    align-items: baseline; }
  table.stacked th { display: block; }
  table.stacked td[data-label]::before { content: attr(data-label); color: var(--muted);
    flex: 0 0 84px; font-size: 13.5px; }
  table.stacked td.before::before { color: var(--before); font-weight: 620; }
  table.stacked td.after::before { color: var(--after); font-weight: 620; }
  td .range { display: inline; }
  svg.whiskers { width: 260px; }
  svg.whiskers text { font-size: 12px; }
}
@media print {
  @page { margin: 14mm; }
  :root { --page: #fff; --card: #fff; --ink: #000; --muted: #444; --rule: #bbb; --soft: #fff;
    --paper: #fff; --before: #777; --after: #0050b3; --better: #0b7a4b; --worse: #b3261e;
    --none: #6b5a00; --extra: #ffe3e1; --extra-ink: #8c1d18; --missing: #e0efff;
    --missing-ink: #0b4a8f; }
  body { font-size: 10.5pt; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  nav { display: none; }
  .tiles { margin-bottom: 24px; }
  main, .top { max-width: none; padding: 0; }
  .card, figure.curve, .tiles div, tr { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
  .picture img { max-height: 200px; }
  .text { max-height: none; }
}
"""
