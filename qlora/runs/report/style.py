"""The style sheet of a report: one column, light and dark scheme, for screens, phones and print.

The colors of runs are those of Okabe and Ito (2008), which people with any common kind of color vision can tell apart;
the dark scheme has lighter versions of them.
"""

STYLE = """
:root {
  --paper: #fff; --ink: #1d2126; --quiet: #626a73; --hair: #e3e6e9; --base: #9aa1a8; --mark: #b84d00;
  --c0: #0072b2; --c1: #d55e00; --c2: #00886a; --c3: #a8558b; --c4: #b07d00; --c5: #3b8fc4;
}
@media (prefers-color-scheme: dark) { :root {
  --paper: #15181b; --ink: #e2e5e8; --quiet: #98a1aa; --hair: #2b3036; --base: #626a73; --mark: #f0a35e;
  --c0: #6db9ec; --c1: #f0a35e; --c2: #45c4a0; --c3: #dc9cc4; --c4: #e3c457; --c5: #a5c8f0;
} }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, "Segoe UI", Roboto,
  "Helvetica Neue",
  "Liberation Sans", Arial, sans-serif; font-variant-numeric: tabular-nums lining-nums; }
main { max-width: 66rem; margin: 0 auto; padding: 2.5rem 1.5rem 3rem; }
h1 { margin: 0; font-size: 1.7rem; font-weight: 600; line-height: 1.2; letter-spacing: -.01em;
  overflow-wrap: anywhere; }
h2 { margin: 0 0 .5rem; font-size: 1.05rem; font-weight: 600; }
h3 { margin: 0; font-size: .95rem; font-weight: 600; }
h4 { margin: 0 0 .15rem; font-size: .8rem; font-weight: 400; color: var(--quiet); }
.what { margin: .35rem 0 0; color: var(--quiet); overflow-wrap: anywhere; }
section { margin-top: 2.75rem; }

.head { display: flex; flex-wrap: wrap; gap: 1rem 2.5rem; margin: 1.75rem 0 0; }
.head div { display: flex; flex-direction: column-reverse; }
.head dt { font-size: .8rem; color: var(--quiet); }
.head dd { margin: 0; font-size: 1.3rem; line-height: 1.3; white-space: nowrap; }
.head small { font-size: 1rem; color: var(--quiet); }

figure { margin: 2.5rem 0 0; min-width: 0; break-inside: avoid; }
figcaption { display: flex; flex-wrap: wrap; align-items: baseline; gap: .1rem 1.25rem; }
.row { display: grid; grid-template-columns: repeat(auto-fit, minmax(17rem, 1fr)); column-gap: 2.25rem; }
.legend { display: flex; flex-wrap: wrap; gap: .1rem 1.1rem; margin: 0; font-size: .8rem; color: var(--quiet); }
header .legend { margin-top: .6rem; font-size: .95rem; color: var(--ink); }
.key { width: 18px; height: 12px; overflow: visible; }
.entry { overflow-wrap: anywhere; }
.note { margin: .25rem 0 0; font-size: .8rem; color: var(--quiet); }

.figure { display: block; width: 100%; overflow: visible; font-size: 12px; }
.plot { height: 220px; padding: 34px 10px 42px 46px; }
.wide .plot { height: 360px; }
.bars { box-sizing: content-box; width: calc(100% - 220px); padding: 6px 76px 44px 144px; }
.marked { padding-top: 26px; }
.figure text { fill: var(--quiet); }
.figure .name, .figure .value { fill: var(--ink); }
.end { text-anchor: end; } .middle { text-anchor: middle; } .start { text-anchor: start; }
.foot { overflow: visible; }
.ruler { stroke: var(--hair); } .base { stroke: var(--base); }
.figure line { shape-rendering: crispEdges; }
.figure line.mark { stroke: var(--mark); stroke-width: 1.5; } .figure text.mark { fill: var(--mark); }
path { fill: none; stroke: currentColor; vector-effect: non-scaling-stroke; stroke-linejoin: round; }
.raw { opacity: .45; stroke-width: 1; } .thin { stroke-width: 1.3; } .smooth { stroke-width: 2; }
.several .raw { opacity: .25; }
.held-out { stroke-width: 1; opacity: .75; }
.dot { fill: currentColor; stroke: var(--paper); stroke-width: 1; opacity: 1; }
.dashed { stroke-dasharray: 5 3; }
.bar { fill: currentColor; opacity: .8; }
.c0 { color: var(--c0); } .c1 { color: var(--c1); } .c2 { color: var(--c2); }
.c3 { color: var(--c3); } .c4 { color: var(--c4); } .c5 { color: var(--c5); }
.single .held-out { color: var(--c1); }
.legend.plain .key { color: var(--quiet); } .legend.plain .key * { color: inherit; }

.samples article { padding: .8rem 0 1rem; border-top: 1px solid var(--hair); break-inside: avoid; }
.samples p { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; }
.prompt { padding-bottom: .6rem !important; font-weight: 600; }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); gap: .75rem 2.25rem; }
.same h4 span { color: var(--c2); }

.tables { display: grid; grid-template-columns: repeat(auto-fit, minmax(24rem, 1fr)); column-gap: 3.5rem; }
.several .tables { grid-template-columns: minmax(0, 1fr); }
.scroll { overflow-x: auto; }
table { width: 100%; border-collapse: separate; border-spacing: 0; font-size: .88rem; }
th, td { border-top: 1px solid var(--hair); padding: .3rem 0; font-weight: 400; text-align: left;
  vertical-align: baseline; }
td, thead th { padding-left: 1.25rem; text-align: right; overflow-wrap: anywhere; }
.single td { min-width: 9.5rem; }
.several td, .several thead th { min-width: 7.5rem; }
.several tbody th { min-width: 9rem; overflow-wrap: anywhere; }
tbody th { color: var(--quiet); }
thead th { font-weight: 600; }
thead th, thead td { border-top: 0; }
.spectrum { display: block; font-size: 12px; }
.spectrum text { fill: var(--ink); pointer-events: none; }
.spectrum .quiet { fill: var(--quiet); } .spectrum .cell { fill: var(--c0); }
.state { color: var(--mark); }
pre { margin: 0 0 1rem; padding: .9rem 0; border: solid var(--hair); border-width: 1px 0; overflow-x: auto;
  font: .8rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
footer { margin-top: 3rem; font-size: .8rem; color: var(--quiet); }

@media (min-width: 34rem) { .single tbody th { white-space: nowrap; } }
@media (max-width: 34rem) {
  main { padding: 1.5rem 1rem 2rem; }
  .head { display: grid; grid-template-columns: 1fr 1fr; gap: .9rem 1rem; }
  .head dd { font-size: 1.1rem; } .head small { font-size: .9rem; }
  .wide .plot { height: 260px; }
  .row, .tables { grid-template-columns: minmax(0, 1fr); }
  .several tbody th { position: sticky; left: 0; min-width: 6.5rem; background: var(--paper); }
}
@media print {
  :root { --paper: #fff; --ink: #000; --quiet: #555; --hair: #ddd; --base: #888; --mark: #b84d00;
    --c0: #0072b2; --c1: #d55e00; --c2: #00886a; --c3: #a8558b; --c4: #b07d00; --c5: #3b8fc4; }
  body { font-size: 10.5pt; } main { max-width: none; padding: 0; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  pre { white-space: pre-wrap; } h2, h3 { break-after: avoid; } section.facts, tr { break-inside: avoid; }
}
"""
