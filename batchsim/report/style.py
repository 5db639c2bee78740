"""How the page looks, and the few lines that draw its figures."""

STYLE = """
:root { color-scheme: light dark; --fg: #1c2330; --dim: #667085; --bg: #f6f7f9; --card: #ffffff; --line: #e3e7ed;
  --gain: #00714f; --gain-bg: #dcf3ea; --loss: #b42318; --loss-bg: #fdE4e1; --accent: #0072b2; --warn: #fff6e0; }
@media (prefers-color-scheme: dark) { :root { --fg: #e6e9ef; --dim: #98a2b3; --bg: #12151b; --card: #1a1f28;
  --line: #2c3440; --gain: #5fd6a6; --gain-bg: #123a2c; --loss: #ff9a8f; --loss-bg: #46201c; --accent: #4aa8e0;
  --warn: #3a2f14; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--bg); color: var(--fg);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 28px; margin: 0 0 6px; letter-spacing: -0.01em; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 0 0 2px; }
h3 { font-size: 15px; margin: 12px 0 4px; }
.kicker { margin: 0; color: var(--dim); font-size: 13px; }
.headline { font-size: 19px; margin: 0 0 10px; }
.causes { margin: 0 0 18px; padding-left: 20px; max-width: 118ch; }
.warnings { list-style: none; margin: 0 0 18px; padding: 10px 14px; background: var(--warn); border-radius: 8px; }
.warnings li::before { content: "\\26A0\\00A0 "; }
.alerts { list-style: none; margin: 0 0 18px; padding: 10px 14px; border-radius: 8px; font-weight: 600;
  color: var(--loss); background: var(--loss-bg); }
.alerts li::before { content: "\\26A0\\00A0 "; }
.note { color: var(--dim); margin: 0 0 8px; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(290px, 1fr)); gap: 16px; margin-bottom: 16px; }
.card, section { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 18px 20px; }
section { margin-top: 16px; }
.card h3 { margin: 0; font-size: 16px; display: flex; justify-content: space-between; align-items: center; }
.chip { font-size: 13px; font-weight: 600; padding: 2px 10px; border-radius: 99px; background: var(--line); }
.chip.gain { color: var(--gain); background: var(--gain-bg); }
.chip.loss { color: var(--loss); background: var(--loss-bg); }
.big { font-size: 32px; font-weight: 650; margin: 4px 0 0; letter-spacing: -0.02em;
  font-variant-numeric: tabular-nums; }
small, .measured { font-size: 13px; font-weight: 400; color: var(--dim); letter-spacing: 0; }
.measured { margin: 0; }
.meter { height: 8px; border-radius: 4px; background: var(--line); overflow: hidden; margin: 10px 0; }
.meter i { display: block; height: 100%; background: var(--accent); }
dl { display: grid; grid-template-columns: auto auto; gap: 2px 16px; margin: 0; }
dt { color: var(--dim); }
dd { margin: 0; text-align: right; font-variant-numeric: tabular-nums; }
.definitions { grid-template-columns: max-content 1fr; }
.definitions dd { text-align: left; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(440px, 100%), 1fr)); gap: 12px; }
.pair > * { min-width: 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 3px 12px; text-align: right; white-space: nowrap; }
th { font-weight: 500; }
th[colspan] { text-align: center; }
tr > th:first-child:not([colspan]), tr[class] > th { text-align: left; padding-left: 0; }
tr[class="group"] th { padding-top: 14px; color: var(--dim); font-size: 13px; border-bottom: 1px solid var(--line); }
pre, code { font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre { margin: 0; overflow-x: auto; }
summary { cursor: pointer; color: var(--accent); padding: 6px 0; }
tr.chosen td, tr.chosen th { font-weight: 650; }
@media (max-width: 600px) { main { padding: 20px 10px 40px; } .card, section { padding: 14px 12px; }
  .definitions { grid-template-columns: 1fr; } .definitions dd { margin-bottom: 6px; } }
.plot [class*="tick"] text, .plot .legendtext, .plot [class*="title"], .plot .annotation-text,
.plot .bartext-outside { fill: var(--fg) !important; }
"""

# `data-rendered` and `data-error` tell a test, or a person who asks, what became of the figures.
SCRIPT = """
const root = document.documentElement;
addEventListener("error", event => { root.dataset.error = event.message; });
addEventListener("unhandledrejection", event => { root.dataset.error = String(event.reason); });
const plots = JSON.parse(document.getElementById("plots").textContent);
const config = { responsive: true, displayModeBar: false };
const draw = shown => Promise.all(shown.map(id => {
  const { data, layout } = plots[id];
  delete plots[id];
  return Plotly.newPlot(id, data, layout, config);
}));
// Figures in a closed `details` are drawn when it is opened.
const open = within => Object.keys(plots).filter(id => {
  const place = document.getElementById(id);
  return within.contains(place) && !place.closest("details:not([open])");
});
document.addEventListener("toggle", event => draw(open(event.target)), true);
draw(open(document)).then(drawn => { root.dataset.rendered = drawn.length; });
"""
