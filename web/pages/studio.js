// The studio's form and what comes of it. The server checks everything; the page says what it answered.
"use strict";

const $ = (id) => document.getElementById(id);
const SLIDERS = ["num_images", "num_steps", "guidance_scale", "image_guidance_scale", "strength", "brush-size"];

let offers = [];
let limits = { pictures: 16, steps: 250, text: 1000 };
let order = null;
let source = null;
let strengthTouched = false;

const start = new StartPicture(showStart);
const past = new Past(reuse, startFrom);

// --- the form

function shown(id) {
  const value = Number($(id).value);
  $(`${id}-value`).textContent = id === "brush-size" ? `${value} %` : id === "strength" ? value.toFixed(2) : String(value);
}

function set(id, value) {
  const input = $(id);
  if (value === null || value === undefined) return;
  if (input.type === "range" && Number(value) > Number(input.max)) input.max = value;
  if (input.type === "range" && Number(value) < Number(input.min)) input.min = value;
  if (input.tagName === "SELECT" && ![...input.options].some((each) => each.value === String(value))) {
    input.add(new Option(String(value), String(value)));
  }
  input.value = value;
  if (SLIDERS.includes(id)) shown(id);
}

function options(id, pairs, chosen) {
  $(id).replaceChildren(...pairs.map(([value, text, off]) => {
    const option = new Option(text, value);
    option.disabled = Boolean(off);
    return option;
  }));
  if (chosen !== undefined) $(id).value = chosen;
}

const chosen = () => offers.find((each) => each.id === $("checkpoint").value);

function named(offer) {
  const ends = { unread: " (being read)", damaged: " (damaged)" };
  return offer.name + (ends[offer.state] || "");
}

async function load() {
  const answer = await fetch("/api/studio/checkpoints").catch(() => null);
  if (!answer || !answer.ok) {
    $("form-error").textContent = await reason(answer);
    return;
  }
  const known = await answer.json();
  const before = $("checkpoint").value, beside = $("beside").value, was = chosen();
  offers = known.checkpoints;
  limits = known.limits;
  const first = before || (offers.find((each) => each.state !== "damaged") || offers[0] || {}).id;
  options("checkpoint", offers.map((each) => [each.id, named(each), each.state === "damaged"]), first);
  options("beside", [["", "none"], ...offers.map((each) => [each.id, named(each), each.state === "damaged"])], beside);
  $("beside-field").hidden = offers.length < 2;
  if (!$("sampler").options.length) {
    options("sampler", known.samplers.map((name) => [name, name.replaceAll("_", " ")]));
    options("grid", known.grids.map((name) => [name, name.replaceAll("_", " ")]));
  }
  const now = chosen();
  if (now && now.state === "ready" && (!was || was.state !== "ready")) takeDefaults();
  showCheckpoint();
  if (offers.some((each) => each.state === "unread")) setTimeout(load, 700);
}

function showCheckpoint() {
  const offer = chosen();
  const damaged = offers.filter((each) => each.state === "damaged").map((each) => `${each.name}: ${each.problem}`);
  $("checkpoint-note").textContent = [offer && offer.state === "unread" ? "The checkpoint is being read." : "", ...damaged].filter(Boolean).join(" ");
  const edits = Boolean(offer && offer.edits);
  $("image_guidance_scale-field").hidden = !edits;
  $("prompt-label").textContent = edits ? "Instruction" : "Prompt";
  $("prompt").placeholder = edits ? "make it a snowy night" : "a clear dawn over the sea, the sun on the left";
  start.masks = !edits;
  showStart();
}

// The sizes that are offered: around the one it was trained at, in steps its networks can make.
function takeDefaults() {
  const offer = chosen();
  if (!offer || offer.state !== "ready") return;
  for (const id of ["num_steps", "guidance_scale", "image_guidance_scale", "sampler", "grid"]) set(id, offer[id]);
  const side = (share) => Math.max(1, Math.round(offer.resolution * share / offer.multiple)) * offer.multiple;
  const sides = [...new Set([0.5, 0.75, 1, 1.25, 1.5, 2, 3, 4].map(side))];
  for (const id of ["width", "height"]) options(id, sides.map((each) => [each, `${each} px`]), side(1));
  start.fit(size());
}

const size = () => [Number($("width").value), Number($("height").value)];

function showStart() {
  const open = Boolean(start.image), edits = !start.masks;
  $("editor").hidden = !open;
  $("drop").hidden = open;
  for (const id of ["mask-tools", "brush-field", "strength-field"]) $(id).hidden = edits;
  if (!open) return;
  if (!strengthTouched) set("strength", start.drawn ? 1 : 0.6);
  start.fit(size());
  $("canvas-note").textContent = edits
    ? "Say above what is to change in it."
    : start.drawn ? "What is red is painted anew; all else stays as it is." : "Draw on it what is to be painted anew, or paint over all of it.";
}

async function startFrom(blob) {
  try {
    await start.open(blob);
    $("form-error").textContent = "";
    showStart();
    $("canvas").focus();
  } catch {
    $("form-error").textContent = "This file is no picture that can be shown; choose a PNG, JPEG or WebP.";
  }
}

function reuse(record) {
  const offer = offers.find((each) => each.sha256 === record.checkpoint_sha256) || offers.find((each) => each.name === record.checkpoint);
  if (offer) $("checkpoint").value = offer.id;
  takeDefaults();
  showCheckpoint();
  $("beside").value = "";
  for (const id of ["num_steps", "guidance_scale", "image_guidance_scale", "prompt", "negative_prompt", "seed"]) set(id, record[id]);
  if (record.strength < 1) { strengthTouched = true; set("strength", record.strength); }
  for (const id of ["sampler", "grid"]) if (record[id]) set(id, record[id].name);
  set("num_images", Math.max(record.index + 1, 1));
  set("width", record.size[0]);
  set("height", record.size[1]);
  $("form-error").textContent = record.image_sha256 && !start.image ? "It started from a picture: choose that one as well." : "";
  $("prompt").focus();
}

async function asked() {
  const offer = chosen();
  const values = {
    checkpoints: [offer.id, $("beside").value].filter((id, place) => id && (place === 0 || id !== offer.id)),
    prompt: $("prompt").value,
    num_images: Number($("num_images").value),
    seed: Number($("seed").value),
    num_steps: Number($("num_steps").value),
    guidance_scale: Number($("guidance_scale").value),
    size: size(),
    ...await start.posted(),
  };
  // What the checkpoint does by itself is left to it, with all the options it was trained with.
  for (const id of ["sampler", "grid"]) if ($(id).value !== offer[id]) values[id] = $(id).value;
  if ($("negative_prompt").value.trim()) values.negative_prompt = $("negative_prompt").value;
  if (offer.edits) values.image_guidance_scale = Number($("image_guidance_scale").value);
  else if (values.image && !(values.mask && Number($("strength").value) === 1)) values.strength = Number($("strength").value);
  return values;
}

// --- an order

async function post(address, values) {
  const body = JSON.stringify(values);
  return fetch(address, { method: "POST", headers: { "Content-Type": "application/json" }, body }).catch(() => null);
}

async function reason(answer) {
  if (!answer) return "The server does not answer; is it still running?";
  try { return (await answer.json()).error; } catch { return `The server answered ${answer.status}.`; }
}

async function paint() {
  if (order) return;
  const offer = chosen();
  for (const id of ["form-error", "error", "note"]) $(id).textContent = "";
  if (!offer || offer.state !== "ready") {
    $("form-error").textContent = offer ? "The checkpoint is still being read; a moment." : "There is no checkpoint.";
    return;
  }
  if (!$("seed").checkValidity()) {
    $("form-error").textContent = "The seed is a whole number from 0.";
    return;
  }
  working(true);
  const values = await asked();
  const answer = await post("/api/studio/paint", values);
  if (!answer || !answer.ok) {
    $("form-error").textContent = await reason(answer);
    working(false);
    return;
  }
  order = (await answer.json()).order;
  lay(values);
  source = new EventSource(`/api/studio/events/${order}`);
  source.addEventListener("message", (event) => told(JSON.parse(event.data)));
  source.addEventListener("error", () => { if (source && source.readyState === EventSource.CLOSED) end("The server does not know these pictures any more; paint again."); });
}

function working(on) {
  $("paint").disabled = on;
  $("cancel").hidden = !on;
  $("bar").hidden = !on;
  if (on) { $("bar").value = 0; $("status").textContent = "Asking"; }
}

// Empty frames, one for each picture of each checkpoint.
function lay(values) {
  const [width, height] = values.size, names = values.checkpoints.map((id) => offers.find((each) => each.id === id).name);
  $("empty").hidden = true;
  $("panels").className = names.length > 1 ? "two" : "";
  $("panels").replaceChildren(...names.map((name) => {
    const panel = document.createElement("section"), grid = document.createElement("div");
    panel.className = "panel";
    if (names.length > 1) {
      const title = document.createElement("h2");
      title.textContent = name;
      panel.append(title);
    }
    grid.className = `grid ${values.num_images === 1 ? "one" : values.num_images <= 4 ? "few" : ""}`;
    for (let k = 0; k < values.num_images; k++) {
      const cell = document.createElement("button"), image = document.createElement("img");
      cell.type = "button";
      cell.className = "cell";
      cell.disabled = true;
      cell.style.aspectRatio = `${width} / ${height}`;
      image.alt = "";
      image.hidden = true;
      cell.append(image);
      grid.append(cell);
    }
    panel.append(grid);
    return panel;
  }));
  if (innerWidth <= 800) $("pictures").scrollIntoView({ block: "start" });
}

function told(now) {
  const panels = [...$("panels").querySelectorAll(".grid")];
  now.pictures.forEach((names, place) => finish(panels[place], names));
  const cells = panels[now.panel] ? [...panels[now.panel].children] : [];
  now.previews.forEach((address, k) => {
    const image = cells[k].firstChild;
    image.src = address;
    image.hidden = false;
    image.alt = `Picture ${k + 1} after step ${now.step}`;
  });
  const whole = now.steps * panels.length;
  $("bar").value = whole ? (now.panel * now.steps + now.step) / whole : 0;
  if (now.note) $("note").textContent = now.note;
  const words = {
    waiting: now.ahead > 1 ? `${now.ahead - 1} before it` : "Next in line",
    loading: "Loading the checkpoint",
    painting: `Step ${now.step} of ${now.steps}`,
    done: "Done",
    failed: "",
    cancelled: "Cancelled",
  };
  $("status").textContent = words[now.state];
  if (["done", "failed", "cancelled"].includes(now.state)) end(now.state === "failed" ? now.error : "");
}

function finish(grid, names) {
  names.forEach((name, k) => {
    const cell = grid.children[k];
    if (cell.dataset.name) return;
    cell.dataset.name = name;
    const image = cell.firstChild;
    image.src = address(name);
    image.hidden = false;
    image.alt = `Picture ${k + 1}: ${$("prompt").value || "without a prompt"}`;
    cell.disabled = false;
    cell.addEventListener("click", () => past.showNamed(name));
  });
}

function end(problem) {
  if (source) source.close();
  source = null;
  order = null;
  if (problem) { $("error").textContent = problem; $("status").textContent = ""; }
  working(false);
  for (const cell of $("panels").querySelectorAll(".cell:disabled img")) cell.hidden = true;
  past.refresh();
}

// --- what can be done

$("form").addEventListener("submit", (event) => { event.preventDefault(); paint(); });
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); paint(); }
});
$("cancel").addEventListener("click", async () => { if (order) await post("/api/studio/cancel", { order }); });
$("dice").addEventListener("click", () => set("seed", Math.floor(Math.random() * 2 ** 31)));
$("checkpoint").addEventListener("change", () => { takeDefaults(); showCheckpoint(); });
$("defaults").addEventListener("click", takeDefaults);
for (const id of SLIDERS) { $(id).addEventListener("input", () => shown(id)); shown(id); }
$("strength").addEventListener("input", () => { strengthTouched = true; });
for (const id of ["width", "height"]) $(id).addEventListener("change", () => start.fit(size()));
$("file").addEventListener("change", () => { if ($("file").files[0]) startFrom($("file").files[0]); $("file").value = ""; });
$("remove").addEventListener("click", () => { strengthTouched = false; start.close(); $("file").focus(); });
$("clear").addEventListener("click", () => start.clear());
for (const [id, erases] of [["brush", false], ["eraser", true]]) {
  $(id).addEventListener("click", () => {
    start.erasing = erases;
    $("brush").setAttribute("aria-pressed", String(!erases));
    $("eraser").setAttribute("aria-pressed", String(erases));
  });
}
for (const name of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(name, (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", name === "dragover");
    const file = name === "drop" && event.dataTransfer.files[0];
    if (file) startFrom(file);
  });
}

load();
past.load();
