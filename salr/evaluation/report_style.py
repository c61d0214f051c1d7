"""The style sheet of the page: light, dark and printed."""

from __future__ import annotations

_LIGHT = """
--page:#fbfbfa; --card:#ffffff; --line:#e6e5e1; --soft:#f3f2ee; --text:#1b1c1e; --dim:#6a6c70; --faint:#a3a5a8;
--accent:#2f56c9; --warm:#d9730d;
--values:#2f56c9; --bitmap:#7d9df0; --row-offsets:#b9caf8; --scales:#3aa6a0; --residual:#f0962e; --trained:#c93a75;
--kept:#b4b6ba; --overhead:#7c7f85; --dense:#55585e;
--h0:#f4f3ef; --h1:#fbe6c9; --h2:#f8d3a4; --h3:#f3bb80; --h4:#ec9f62; --h5:#e08150; --h6:#cf6348; --h7:#b74947;
--h8:#973449; --h9:#742548; --h10:#511a42; --h11:#33123a;"""

_DARK = """
--page:#131416; --card:#1b1d20; --line:#2e3135; --soft:#24272b; --text:#ececea; --dim:#a2a5aa; --faint:#6e7177;
--accent:#8fabff; --warm:#ffab57;
--values:#5f83ee; --bitmap:#93aef5; --row-offsets:#c3d1fb; --scales:#4fbdb6; --residual:#f6a548; --trained:#e0608f;
--kept:#a0a3a9; --overhead:#777a80; --dense:#5f636a;
--h0:#202226; --h1:#2b1a35; --h2:#43204a; --h3:#622953; --h4:#823355; --h5:#a14053; --h6:#bd514e; --h7:#d3674b;
--h8:#e4824f; --h9:#f0a05f; --h10:#f7be7e; --h11:#fde0ac;"""

_RULES = """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;color-scheme:light dark}
body{margin:0;background:var(--page);color:var(--text);font:16px/1.5 "Inter","SF Pro Text",-apple-system,
"Segoe UI",Roboto,"Helvetica Neue","Noto Sans",Arial,sans-serif;font-variant-numeric:tabular-nums;
-webkit-print-color-adjust:exact;print-color-adjust:exact}
main{max-width:1160px;margin:0 auto;padding:56px 32px 72px}
header{margin-bottom:32px}
h1{font-size:40px;line-height:1.15;letter-spacing:-.02em;font-weight:680;margin:0 0 10px;overflow-wrap:anywhere}
h2{font-size:22px;letter-spacing:-.012em;font-weight:640;margin:0 0 4px}
h3{font-size:14px;font-weight:620;margin:0 0 8px}
p{margin:0}
.eyebrow{font-size:13px;font-weight:600;letter-spacing:.08em;text-transform:uppercase;color:var(--accent);
margin-bottom:8px}
.lead{color:var(--dim);font-size:17px;overflow-wrap:anywhere}
.note{color:var(--dim);font-size:14.5px;max-width:92ch;margin-bottom:20px;text-wrap:pretty}
section{background:var(--card);border:1px solid var(--line);border-radius:14px;padding:26px 28px 28px;margin-top:20px;
break-inside:avoid}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(210px,1fr));gap:16px;margin:0}
.tile{background:var(--card);border:1px solid var(--line);border-radius:14px;padding:20px 22px;break-inside:avoid}
.tile dt{font-size:13.5px;color:var(--dim);font-weight:560;margin-bottom:6px}
.tile dd{margin:0}
.tile .big{font-size:34px;line-height:1.1;font-weight:680;letter-spacing:-.025em;white-space:nowrap}
.tile .unit{font-size:17px;font-weight:560;letter-spacing:0;color:var(--dim);margin-left:6px}
.tile .from{color:var(--faint);font-weight:560}
.tile small{display:block;color:var(--dim);font-size:13.5px;line-height:1.42;margin-top:8px;text-wrap:pretty}
.plot{overflow-x:auto}.plot+.plot{margin-top:26px}
svg{display:block;width:100%;min-width:680px;height:auto;overflow:visible}
svg text{font-size:13px;fill:var(--dim);font-family:inherit}
svg .strong{fill:var(--text);font-weight:600}
svg .inside{fill:#fff;font-weight:600}
svg .inside.dark{fill:#20242c}
svg .axis{stroke:var(--line);stroke-width:1}
svg .median{fill:none;stroke:var(--residual);stroke-width:2.2;stroke-linejoin:round;stroke-linecap:round}
svg .band{fill:var(--residual);opacity:.22}
svg .column{fill:var(--values)} svg .whisker{stroke:var(--text);stroke-width:1.2}
.legend{display:grid;grid-template-columns:repeat(auto-fill,minmax(300px,1fr));gap:7px 40px;margin:18px 0 0;padding:0;
list-style:none;font-size:14.5px}
.legend li{display:flex;align-items:center;gap:9px}
.legend i{flex:none;width:12px;height:12px;border-radius:3px}
.legend span{flex:1} .legend b{font-weight:600}
.legend em{font-style:normal;color:var(--dim);width:4.4em;text-align:right}
table{border-collapse:collapse;width:100%;font-size:14.5px}
.scroll{overflow-x:auto}
th{text-align:left;color:var(--dim);font-weight:560;font-size:13px}
th,td{padding:9px 18px 9px 0;border-bottom:1px solid var(--line);vertical-align:baseline;overflow-wrap:anywhere}
tr:last-child td{border-bottom:0}
th.n,td.n{text-align:right;white-space:nowrap} th:last-child,td:last-child{padding-right:0}
td.n+td:not(.n),th.n+th:not(.n){padding-left:14px}
tr.this td{font-weight:640}
table.pairs td:first-child{width:26%;min-width:110px;color:var(--dim);white-space:nowrap}
td .tag{font-weight:560;font-size:12px;color:var(--accent);margin-left:8px;white-space:nowrap}
td.meter{width:22%;min-width:110px;padding-left:6px}
.meter div{height:9px;border-radius:5px;background:var(--kept)} tr.this .meter div{background:var(--values)}
.columns{display:grid;grid-template-columns:repeat(auto-fit,minmax(320px,1fr));gap:28px 44px}
.columns>div{min-width:0}
code{font:12.5px/1.5 ui-monospace,"SF Mono","Cascadia Mono",Menlo,Consolas,"DejaVu Sans Mono",monospace;
overflow-wrap:anywhere}
footer{color:var(--faint);font-size:13px;margin-top:28px;text-align:center}
@media (max-width:640px){main{padding:28px 16px 40px}h1{font-size:30px}section{padding:20px 18px}}
@page{size:A4;margin:12mm}
@media print{body{font-size:13px;background:#fff}main{max-width:none;padding:0}section,.tile{border-color:#ddd}
.tiles{grid-template-columns:repeat(4,1fr);gap:10px}.tile{padding:12px 14px}.tile .big{font-size:24px}
svg{min-width:0}.plot,.scroll{overflow:visible}}
"""

_PARTS = ("values", "bitmap", "row-offsets", "scales", "residual", "trained", "kept", "overhead", "dense")


def style_sheet() -> str:
    """Return the CSS; parts of a file and steps of a heat map are classes whose colours follow the light."""
    parts = "".join(f".p-{p}{{fill:var(--{p});background:var(--{p})}}" for p in _PARTS)
    steps = "".join(f".h{i}{{fill:var(--h{i})}}" for i in range(12))
    dark = f"@media screen and (prefers-color-scheme:dark){{:root{{{_DARK}}}}}"
    return f":root{{{_LIGHT}}}{dark}{_RULES}{parts}{steps}"
