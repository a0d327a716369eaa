"""The page without its numbers; page.py fills what stands between @@."""

# ruff: noqa: E501, RUF001

TEMPLATE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Attention</title>
<style>
:root { color-scheme: light dark; --ink: #222; --faint: #6b6b6b; --line: #ddd; --paper: #fff; --mark: #3b76af }
@media (prefers-color-scheme: dark) { :root { --ink: #ddd; --faint: #999; --line: #3a3a3a; --paper: #161616; --mark: #7fb2e0 } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 1120px; padding: 36px 24px 64px; background: var(--paper); color: var(--ink);
  font: 15px/1.5 Charter, "Bitstream Charter", Georgia, "DejaVu Serif", serif }
h1 { font-size: 26px; font-weight: 600; margin: 0 } h2 { font-size: 17px; font-weight: 600; margin: 44px 0 10px }
.small, figcaption { font-size: 13px; color: var(--faint); margin: 8px 0 0; max-width: 92ch }
.thumbs { display: flex; gap: 8px; flex-wrap: wrap; margin: 22px 0 16px }
.thumbs button { padding: 0; border: 2px solid transparent; background: none; cursor: pointer; line-height: 0 }
.thumbs img { width: 72px; height: 72px; object-fit: cover } .thumbs [aria-pressed=true] { border-color: var(--mark) }
.viewer { display: grid; grid-template-columns: minmax(0, 480px) minmax(0, 1fr); gap: 28px }
@media (max-width: 820px) { .viewer { grid-template-columns: 1fr } }
canvas { width: 100%; display: block } #large { cursor: crosshair; touch-action: none }
.controls { display: flex; gap: 8px 18px; flex-wrap: wrap; align-items: center; font-size: 13px; margin-bottom: 12px }
.controls label { white-space: nowrap } select, input { font: inherit; vertical-align: middle; accent-color: var(--mark) }
.heads { display: grid; gap: 5px } .heads figure { margin: 0; cursor: pointer; outline: 2px solid transparent; position: relative }
.heads figure[aria-current=true] { outline-color: var(--mark) }
.heads span { position: absolute; left: 4px; top: 0; color: #fff; font-size: 11px; text-shadow: 0 0 2px #000 }
.bar { height: 7px; width: 150px; display: inline-block; vertical-align: middle } figure { margin: 0 }
.two { display: grid; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); gap: 36px; align-items: start }
.two img { max-width: 100%; image-rendering: pixelated } svg { width: 100%; height: auto } svg text { font-family: inherit !important }
</style>
<h1>What the model attends to</h1>
<p class=small>@@DESCRIPTION@@</p>
<div class=thumbs id=thumbs></div>
<div class=viewer>
 <figure><canvas id=large width=480 height=480></canvas>
  <figcaption><span id=words></span><br>
  <canvas class=bar id=bar width=256 height=1></canvas> 0 to <span id=most></span></figcaption></figure>
 <div>
  <div class=controls>
   <label>Show <select id=what><option value=asking>one layer, @@ASKING@@</option><option value=rollout>rollout, all layers</option>
    <option value=gradient>gradient rollout</option><option value=none>image alone</option></select></label>
   <label>Layer <input type=range id=layer min=0 value=0 step=1> <output id=layername></output></label>
   <label>Head <select id=head></select></label>
   <label><input type=checkbox id=hover checked> patch under the pointer</label>
  </div>
  <div class=heads id=heads></div>
  <p class=small>Every head of the chosen layer: attention of the @@ASKING@@ to the patches, each scaled to its own largest
  patch; click to enlarge. With the pointer on the image: what @@SQUARES@@ under it attends to, mean over heads of the chosen layer.</p>
 </div>
</div>
<h2>Over depth</h2>
<figure>@@DEPTH@@<figcaption>Means over the @@IMAGES@@ images of this page. Left: mean attention distance of each head (dots) and
their mean (line), weights over patches renormalised, distances between patch centres (Dosovitskiy et al. 2021, fig. 7). Middle: entropy of the
patches' rows, mean of each head. Right: norm of the tokens behind each block, logarithmic (Darcet et al. 2024). Tokens with more than
three times the median norm of the patches of their image, all images together, by layer: @@OUTLIERS@@.</figcaption></figure>
<h2>Parameters</h2>
<div class=two><figure>@@POSITIONS@@<figcaption>Cosine similarity of the position embedding of each patch, at its place, with those of all patches;
from −1 (dark) to 1 (bright) (Dosovitskiy et al. 2021, fig. 7, centre).</figcaption></figure>
<figure>@@FILTERS@@<figcaption>Principal components of the patch projection, largest first, each scaled to its own largest entry, gray is 0:
@@SHARES@@ (Dosovitskiy et al. 2021, fig. 7, left).</figcaption></figure></div>
<p class=small style="margin-top:40px">Rollout: Abnar &amp; Zuidema 2020. Gradient rollout, for the most probable class: Chefer et al. 2021 (ICCV).
Attention is shown with 8 bits per patch. It says where information is read, not by itself why a class was chosen.</p>
<script>
const D = @@DATA@@, $ = id => document.getElementById(id)
const bytes = s => Uint8Array.from(atob(s), c => c.charCodeAt(0))
const unpack = r => ({ largest: new Float32Array(bytes(r.largest).buffer), numbers: bytes(r.numbers) })
const lut = bytes(D.colours), SIDE = 480
let at = { image: 0, layer: D.layers.length - 1, head: -1, patch: -1 }
for (const i of D.images) { i.a = unpack(i.asking); i.t = unpack(i.through); i.m = unpack(i.maps) }
// a row of numbers: {n: values, rows, columns}
const row = (p, k, rows, columns) => { const S = rows * columns, n = new Float32Array(S)
  for (let s = 0; s < S; s++) n[s] = p.numbers[k * S + s] / 255 * p.largest[k]
  return { n, rows, columns } }
const headRow = (i, l, h) => row(i.a, l * D.heads + h, i.rows, i.columns)
const meanRow = (i, l) => { const r = headRow(i, l, 0)
  for (let h = 1; h < D.heads; h++) headRow(i, l, h).n.forEach((x, s) => r.n[s] += x)
  r.n = r.n.map(x => x / D.heads); return r }
const grayOf = (i, side) => { i.grays ??= {}
  if (!i.grays[side]) { const c = document.createElement('canvas'); c.width = c.height = side; const g = c.getContext('2d')
    g.drawImage(i.element, 0, 0, side, side); i.grays[side] = g.getImageData(0, 0, side, side).data }
  return i.grays[side] }
function paint(canvas, i, r) {
  const side = canvas.width, g = canvas.getContext('2d', { willReadFrequently: true })
  if (!r) { g.drawImage(i.element, 0, 0, side, side); return 0 }
  const most = r.n.reduce((a, b) => Math.max(a, b), 1e-30), small = document.createElement('canvas')
  small.width = r.columns; small.height = r.rows
  const p = new ImageData(r.columns, r.rows)
  r.n.forEach((x, s) => { p.data.fill(Math.round(255 * x / most), 4 * s, 4 * s + 3); p.data[4 * s + 3] = 255 })
  small.getContext('2d').putImageData(p, 0, 0)
  g.imageSmoothingQuality = 'high'; g.drawImage(small, 0, 0, side, side)
  const o = g.getImageData(0, 0, side, side), d = o.data, y = grayOf(i, side)
  for (let k = 0; k < d.length; k += 4) { const v = 3 * d[k], b = .38 * (.299 * y[k] + .587 * y[k + 1] + .114 * y[k + 2])
    for (let c = 0; c < 3; c++) d[k + c] = .62 * lut[v + c] + b }
  g.putImageData(o, 0, 0); return most }
function chosen(i) {
  const what = $('what').value, maps = i.m.largest.length
  if (what === 'none') return [null, i.name]
  if (at.patch >= 0) { const R = i.rows / i.pool, C = i.columns / i.pool, l = Math.min(at.layer, maps / (R * C) - 1)
    return [row(i.m, l * R * C + at.patch, R, C), `patch in row ${Math.floor(at.patch / C) + 1}, column ${at.patch % C + 1}; layer ${D.layers[l]}, mean over heads`] }
  if (what === 'rollout') return [row(i.t, 0, i.rows, i.columns), 'rollout through all layers']
  if (what === 'gradient') return [row(i.t, 1, i.rows, i.columns), 'gradient rollout for the most probable class']
  return at.head < 0 ? [meanRow(i, at.layer), `${D.asking}, layer ${D.layers[at.layer]}, mean over heads`]
    : [headRow(i, at.layer, at.head), `${D.asking}, layer ${D.layers[at.layer]}, head ${at.head + 1}`] }
function large() { const i = D.images[at.image], [r, words] = chosen(i), most = paint($('large'), i, r)
  const heads = i.distance[at.layer], of = $('what').value === 'asking' && at.patch < 0 && at.head >= 0 && heads
  $('words').textContent = `${i.caption}. ${words[0].toUpperCase() + words.slice(1)}` + (of ? `; all patches of this head: distance ${heads[at.head]} px, entropy ${i.entropy[at.layer][at.head]} nats.` : '.')
  $('most').textContent = r && $('what').value === 'gradient' && at.patch < 0 ? 'the largest patch; relevance has no unit' : r ? `${(100 * most).toPrecision(3)} % (largest patch; uniform ${(100 / i.tokens).toPrecision(2)} %)` : '–'
  if (r && at.patch >= 0) { const g = $('large').getContext('2d'), w = SIDE / r.columns, h = SIDE / r.rows
    g.strokeStyle = '#fff'; g.lineWidth = 1.5; g.strokeRect(at.patch % r.columns * w + 1, Math.floor(at.patch / r.columns) * h + 1, w - 2, h - 2) } }
function all() { const i = D.images[at.image]
  $('layername').textContent = D.layers[at.layer]; $('layer').value = at.layer; $('head').value = at.head
  document.querySelectorAll('.thumbs button').forEach((b, n) => b.setAttribute('aria-pressed', n === at.image))
  document.querySelectorAll('.heads figure').forEach((f, h) => { f.setAttribute('aria-current', h === at.head); paint(f.firstChild, i, headRow(i, at.layer, h)) })
  large() }
D.images.forEach((i, n) => { i.element = new Image(); i.element.src = i.picture
  const b = document.createElement('button'); b.title = i.name; b.append(i.element.cloneNode()); b.firstChild.alt = i.name
  b.onclick = () => { at.image = n; all() }; $('thumbs').append(b) })
$('head').append(new Option('mean', -1))
$('heads').style.gridTemplateColumns = `repeat(${Math.max(3, Math.ceil(Math.sqrt(D.heads)))}, 1fr)`
for (let h = 0; h < D.heads; h++) { $('head').append(new Option(h + 1, h))
  const f = document.createElement('figure'), c = document.createElement('canvas'), s = document.createElement('span')
  c.width = c.height = 128; s.textContent = h + 1; f.append(c, s); $('heads').append(f)
  f.onclick = () => { at.head = at.head === h ? -1 : h; $('what').value = 'asking'; all() } }
$('layer').max = D.layers.length - 1
$('layer').oninput = e => { at.layer = +e.target.value; all() }
$('head').onchange = e => { at.head = +e.target.value; $('what').value = 'asking'; all() }
$('what').onchange = large
$('large').onpointermove = e => { if (!$('hover').checked) return
  const i = D.images[at.image], b = e.target.getBoundingClientRect(), R = i.rows / i.pool, C = i.columns / i.pool
  const y = Math.min(R - 1, Math.floor((e.clientY - b.top) / b.height * R)), x = Math.min(C - 1, Math.floor((e.clientX - b.left) / b.width * C))
  const p = Math.max(0, y) * C + Math.max(0, x); if (p !== at.patch) { at.patch = p; large() } }
$('large').onpointerleave = () => { at.patch = -1; large() }
const g = $('bar').getContext('2d'), p = new ImageData(256, 1)
for (let v = 0; v < 256; v++) { for (let c = 0; c < 3; c++) p.data[4 * v + c] = lut[3 * v + c]; p.data[4 * v + 3] = 255 }
g.putImageData(p, 0, 0)
Promise.all(D.images.map(i => i.element.decode())).then(all)
</script></html>
"""
