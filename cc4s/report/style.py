"""The style sheet of `report.html`."""

STYLE = """\
:root {
  --paper: #fbfbfc; --sheet: #ffffff; --ink: #1c2024; --soft: #666d76; --line: #e3e6ea; --bar: #3b82c42b;
  --mark: #2f6fae;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171a; --sheet: #1c2024; --ink: #e6e8eb; --soft: #9aa2ab; --line: #30363d; --bar: #5aa0e63d;
    --mark: #7db8f0;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
  -webkit-text-size-adjust: 100%;
}
main { max-width: 75rem; margin: 0 auto; padding: 2rem clamp(1rem, 4vw, 2.5rem) 4rem; }
h1 { margin: 0; font-size: 1.75rem; line-height: 1.2; overflow-wrap: anywhere; }
h2 { margin: 3rem 0 .5rem; font-size: 1.25rem; }
h3 { margin: 1.5rem 0 .5rem; font-size: 1rem; overflow-wrap: anywhere; }
p { margin: 0 0 .9rem; max-width: 46rem; color: var(--soft); }
.facts { margin-top: .4rem; }
.facts b { font-weight: 600; color: var(--ink); overflow-wrap: anywhere; }
.cards {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr)); gap: .75rem;
  margin-top: 1.5rem;
}
.card {
  background: var(--sheet); border: 1px solid var(--line); border-radius: .6rem; padding: .75rem .9rem;
}
.card span { display: block; font-size: .8rem; color: var(--soft); }
.card strong {
  display: block; font-size: 1.5rem; line-height: 1.35; white-space: nowrap;
  font-variant-numeric: tabular-nums;
}
.card small { font-size: .6em; font-weight: 500; color: var(--soft); }
.card:first-child strong { color: var(--mark); }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: .6rem; background: var(--sheet); }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .75rem; text-align: right; white-space: nowrap; border-top: 1px solid var(--line); }
thead th {
  border-top: 0; white-space: normal; vertical-align: bottom; line-height: 1.25; font-weight: 500;
  font-size: .8rem; color: var(--soft);
}
th:first-child { position: sticky; left: 0; background: var(--sheet); text-align: left; }
tbody th { font-weight: 500; max-width: 14rem; overflow: hidden; text-overflow: ellipsis; }
.meter { background: linear-gradient(var(--bar), var(--bar)) no-repeat left center / var(--share) 1.5em; }
tr.total th, tr.total td { border-top: 2px solid var(--line); font-weight: 600; }
tr.other th, tr.other td { font-style: italic; }
tr.aside th, tr.aside td { color: var(--soft); }
.pair {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); gap: 0 1.5rem;
}
.pair > div { min-width: 0; }
i {
  display: inline-block; width: .8em; height: .8em; margin-right: .5em; border-radius: .2em;
  border: 1px solid #8a8f98;
}
.key { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; max-width: none; font-size: .875rem; }
.key i { margin-right: .4em; vertical-align: -.05em; }
.curves {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); gap: .75rem;
}
figure { margin: 0; min-width: 0; }
.curve { background: var(--sheet); border: 1px solid var(--line); border-radius: .6rem; padding: .5rem; }
.curve svg { display: block; width: 100%; height: auto; }
.curve svg * { stroke-linejoin: round; stroke-linecap: butt; }
.curve text { fill: var(--ink); }
.views { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(46%, 13rem), 1fr)); gap: .75rem; }
.views.small { grid-template-columns: repeat(auto-fill, minmax(min(22%, 9rem), 1fr)); margin-top: .75rem; }
.views img { display: block; width: 100%; height: auto; border-radius: .35rem; }
figcaption { margin-top: .2rem; font-size: .8rem; color: var(--soft); }
article + article { margin-top: 2rem; padding-top: .5rem; border-top: 1px solid var(--line); }
details { margin-top: 3rem; }
summary { font-size: 1.25rem; font-weight: 700; cursor: pointer; }
pre {
  overflow-x: auto; padding: .9rem 1rem; border: 1px solid var(--line); border-radius: .6rem;
  background: var(--sheet); font: .8rem/1.6 ui-monospace, "SF Mono", Menlo, Consolas, monospace;
}
pre span { color: var(--soft); }
@media print { .scroll { overflow: visible; } article, .curve { break-inside: avoid; } }
"""
