"""Style sheet of the HTML report: light and dark, narrow and wide, screen and paper."""

from __future__ import annotations

STYLE = """
:root {
  color-scheme: light dark;
  --page: #ffffff; --panel: #f6f7f9; --line: #dfe3e8; --text: #1b2129; --soft: #57606c;
  --blue: #3566a8; --track: #e4e8ee;
  --learned: #0c6b39; --learned-back: #d9f2e2;
  --error: #a8231b; --error-back: #fde9e7; --warning: #7d5300; --warning-back: #fdf1d6;
  --note: #2a5a94; --note-back: #e6eff9; --good: #0c6b39; --good-back: #dff3e6;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171b; --panel: #1c2026; --line: #313842; --text: #e4e8ed; --soft: #9da7b3;
    --blue: #79a7e3; --track: #2b323b;
    --learned: #7fdba4; --learned-back: #173624;
    --error: #ff9d94; --error-back: #45201d; --warning: #eebf66; --warning-back: #3b2e12;
    --note: #93bdf0; --note-back: #1e3048; --good: #7fdba4; --good-back: #173624;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 2.5rem 1.5rem 4rem; max-width: 66rem; background: var(--page);
  color: var(--text); font: 15px/1.55 system-ui, "Segoe UI", Roboto, "Noto Sans", sans-serif;
}
h1 { font-size: 1.55rem; line-height: 1.25; margin: 0; font-weight: 650; overflow-wrap: anywhere; }
h2 { font-size: 1.12rem; margin: 2.6rem 0 .8rem; font-weight: 650; }
h3 { font-size: .95rem; margin: 1.3rem 0 .4rem; font-weight: 600; }
h4 { font-size: .88rem; margin: .9rem 0 .3rem; font-weight: 600; color: var(--soft); }
p { margin: .4rem 0; }
code, .row, td.place {
  font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
  font-size: .86em;
}
.soft { color: var(--soft); }
.lead { font-size: 1.02rem; max-width: 46rem; }
.verdict {
  display: inline-block; margin: .8rem 0 .2rem; padding: .22rem .75rem; border-radius: 1rem;
  font-weight: 650;
}
.passed, .good { color: var(--good); background: var(--good-back); }
.warnings, .warning { color: var(--warning); background: var(--warning-back); }
.refused, .error { color: var(--error); background: var(--error-back); }
.note { color: var(--note); background: var(--note-back); }
.command {
  margin: .5rem 0 0; padding: .6rem .8rem; border: 1px solid var(--line); border-radius: .4rem;
  background: var(--panel); white-space: pre-wrap; overflow-wrap: anywhere; user-select: all;
}
dl.facts {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: 1rem 1.5rem;
  margin: 1.6rem 0 0; padding: 1rem 0; border-top: 1px solid var(--line);
  border-bottom: 1px solid var(--line);
}
dl.facts dt { font-size: .8rem; color: var(--soft); }
dl.facts dd { margin: 0; font-size: 1.12rem; font-weight: 600; font-variant-numeric: tabular-nums;
  overflow-wrap: anywhere; }
dl.facts dd small { display: block; font-size: .8rem; font-weight: 400; color: var(--soft); }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
.scroll { overflow-x: auto; }
th { text-align: left; font-weight: 600; color: var(--soft); font-size: .8rem; }
th, td { padding: .32rem .9rem .32rem 0; vertical-align: baseline;
  border-bottom: 1px solid var(--line); }
td { overflow-wrap: anywhere; min-width: 4rem; }
th.number, td.number { width: 1%; text-align: right; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
td.place { white-space: nowrap; }
.filter { display: flex; flex-wrap: wrap; gap: 1.1rem; margin-bottom: .6rem; font-size: .88rem; }
.filter label { cursor: pointer; }
body:has(#show-error:not(:checked)) .rule.is-error,
body:has(#show-warning:not(:checked)) .rule.is-warning,
body:has(#show-note:not(:checked)) .rule.is-note { display: none; }
.rule { border: 1px solid var(--line); border-radius: .45rem; margin: .45rem 0; }
.rule > summary {
  display: grid; grid-template-columns: 4.6rem 13rem 1fr auto; gap: .9rem; align-items: baseline;
  padding: .5rem .8rem; cursor: pointer; list-style: none;
}
.rule > summary::-webkit-details-marker { display: none; }
.rule > summary:hover, .rule[open] > summary { background: var(--panel); border-radius: .45rem; }
.chip {
  display: inline-block; padding: 0 .5rem; border-radius: .8rem; font-size: .78rem; font-weight: 600;
  text-align: center;
}
.rule .count { font-variant-numeric: tabular-nums; font-weight: 600; text-align: right; }
.rule .inside { padding: .2rem .8rem .9rem; }
.rule dl { display: grid; grid-template-columns: 6rem 1fr; gap: .15rem .8rem; margin: .5rem 0 .8rem; }
.rule dt { color: var(--soft); } .rule dd { margin: 0; }
.row {
  margin: .2rem 0 0; padding: .7rem .9rem; border: 1px solid var(--line); border-radius: .45rem;
  background: var(--panel); color: var(--soft); white-space: pre-wrap; overflow-wrap: anywhere;
  unicode-bidi: plaintext; max-height: 30rem; overflow-y: auto;
}
mark { background: var(--learned-back); color: var(--learned); border-radius: .15rem;
  text-decoration: underline 1px color-mix(in srgb, currentColor 45%, transparent);
  text-underline-offset: .22em; }
figure { margin: 0; }
.gap { font-style: italic; }
.caption { display: flex; gap: .8rem; margin: 1rem 0 0; font-size: .85rem; color: var(--soft); }
.splits { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr));
  gap: .5rem 2.2rem; }
svg.histogram { display: block; width: 100%; max-width: 44rem; height: auto; margin: .3rem 0; }
svg .bar { fill: var(--blue); } svg .track { fill: var(--track); }
svg .axis { stroke: var(--line); stroke-width: 1; }
svg .mark { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 2 3; }
svg text { font: 11px system-ui, sans-serif; fill: var(--soft); font-variant-numeric: tabular-nums; }
svg.share { width: 100%; min-width: 5rem; height: .5rem; }
td.drawn { width: 38%; vertical-align: middle; }
details.more > summary { cursor: pointer; color: var(--soft); font-size: .88rem; padding: .3rem 0; }
:focus-visible { outline: 2px solid var(--blue); outline-offset: 2px; }
footer { margin-top: 3rem; padding-top: .9rem; border-top: 1px solid var(--line); font-size: .85rem;
  color: var(--soft); }
@media (max-width: 40rem) {
  body { padding: 1.4rem 1rem 3rem; }
  .rule > summary { grid-template-columns: 4.6rem 1fr auto; }
  .rule > summary .about { grid-column: 1 / -1; grid-row: 2; }
  .rule dl { grid-template-columns: 1fr; gap: 0; } .rule dd { margin-bottom: .4rem; }
  dl.facts { grid-template-columns: 1fr 1fr; }
  td:not(.number, .place, .drawn) { min-width: 11rem; }
  svg text { font-size: 13px; }
}
@media print {
  body { max-width: none; padding: 0; font-size: 10pt; }
  .filter { display: none; }
  .row { max-height: none; overflow: visible; }
  .rule, .row, svg { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
}
"""
