// The vote. One pair is shown; its names come with the answer to the vote, and so does the next pair, whose
// pictures load while the names are read. Both pictures appear together, once both have come.
"use strict";

const at = (id) => document.getElementById(id);
const KEYS = {
  ArrowLeft: "left", a: "left", ArrowRight: "right", d: "right",
  ArrowDown: "tie", s: "tie", ArrowUp: "both_bad", x: "both_bad",
};
const WORDS = {
  left: (left, right) => `You preferred ${left}, on the left, to ${right}.`,
  right: (left, right) => `You preferred ${right}, on the right, to ${left}.`,
  tie: (left, right) => `A tie between ${left}, on the left, and ${right}.`,
  both_bad: (left, right) => `Neither ${left}, on the left, nor ${right} was good.`,
};
const POLL = 1500;

// phase: "loading", "open" (waits for a vote), "sending", "shown" (names are there), "nothing"
const state = { phase: "loading", pair: null, coming: null };

async function ask(path, values) {
  const options = values === undefined ? {} : {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(values),
  };
  const answer = await fetch(path, options);
  const data = await answer.json().catch(() => ({}));
  if (!answer.ok) throw Object.assign(new Error(data.error || `the server answered ${answer.status}`), { status: answer.status });
  return data;
}

async function picture(address) {
  const answer = await fetch(address);
  if (!answer.ok) throw new Error("a picture did not come");
  return URL.createObjectURL(await answer.blob());
}

function load(pair) {
  if (!pair) return null;
  const images = Promise.all([picture(pair.left), picture(pair.right)]);
  images.catch(() => {}); // said where it is awaited
  return { pair, images };
}

function take(data) {
  state.coming = load(data.pair);
  const { voted, of, votes } = data.progress;
  at("bar").value = of ? voted / of : 0;
  at("progress").textContent = `${voted.toLocaleString()} of ${of.toLocaleString()} pairs are yours; ${votes.toLocaleString()} votes by all`;
  at("typed").hidden = !data.live;
  if (data.failed) at("typed-note").textContent = data.failed;
  else if (data.painting) at("typed-note").textContent = "Your prompt is being painted; it comes as soon as it is ready.";
  else if (at("typed-note").textContent.startsWith("Your prompt is being painted")) at("typed-note").textContent = "Your prompt is ready: it comes next.";
  return data;
}

async function show() {
  const coming = state.coming;
  if (!coming) return nothing();
  const [left, right] = await coming.images;
  for (const side of ["left", "right"]) {
    const image = at(`${side}-picture`);
    if (image.src) URL.revokeObjectURL(image.src);
    image.src = side === "left" ? left : right;
    image.parentElement.style.aspectRatio = `${coming.pair.width} / ${coming.pair.height}`;
    at(side).className = "";
    at(`${side}-name`).hidden = true;
    at(`${side}-name`).textContent = "";
  }
  await Promise.all(["left", "right"].map((side) => at(`${side}-picture`).decode()));
  at("prompt").textContent = coming.pair.prompt;
  at("nothing").hidden = true;
  at("round").hidden = false;
  at("after").hidden = true;
  for (const button of at("answers").children) { button.disabled = false; button.classList.remove("given"); }
  at("status").textContent = "";
  state.pair = coming.pair;
  state.phase = "open";
  at("prompt").focus({ preventScroll: true });
}

function nothing() {
  state.phase = "nothing";
  at("round").hidden = true;
  at("nothing").hidden = false;
  const waiting = at("typed-note").textContent.startsWith("Your prompt is being painted");
  at("nothing-title").textContent = waiting ? "Your prompt is being painted" : "You have seen every pair";
  at("nothing-text").textContent = waiting ? "Its two pictures appear here." : "Thank you. New pairs appear here when there are new pictures.";
  at("nothing-title").focus({ preventScroll: true });
  setTimeout(() => { if (state.phase === "nothing") start(); }, waiting ? POLL : 20 * POLL);
}

async function vote(outcome) {
  if (state.phase !== "open") return;
  state.phase = "sending";
  for (const button of at("answers").children) {
    button.disabled = true;
    button.classList.toggle("given", button.dataset.outcome === outcome);
  }
  let data;
  try {
    data = await ask("/api/arena/vote", { token: state.pair.token, outcome });
  } catch (error) {
    if (error.status === 409 || error.status === 410) return start(); // voted in another window
    return failed(error, () => { state.phase = "open"; vote(outcome); });
  }
  take(data);
  const { left, right } = data.shown;
  for (const [side, name] of [["left", left], ["right", right]]) {
    at(`${side}-name`).textContent = name;
    at(`${side}-name`).hidden = false;
    at(side).className = outcome === side ? "chosen" : ["left", "right"].includes(outcome) ? "other" : "";
  }
  at("status").textContent = WORDS[outcome](left, right);
  at("after").hidden = false;
  state.phase = "shown";
  at("next").focus({ preventScroll: true });
}

async function next() {
  if (state.phase !== "shown") return;
  state.phase = "loading";
  try {
    if (state.coming === null) take(await ask("/api/arena/next"));
    await show();
  } catch (error) {
    failed(error, start);
  }
}

async function start() {
  state.phase = "loading";
  try {
    take(await ask("/api/arena/next"));
    await show();
  } catch (error) {
    failed(error, start);
  }
}

function failed(error, again) {
  at("error").textContent = error instanceof TypeError ? "The server cannot be reached." : `This did not work: ${error.message}.`;
  at("again").hidden = false;
  at("again").onclick = () => {
    at("again").hidden = true;
    at("error").textContent = "";
    again();
  };
  at("again").focus();
}

for (const button of at("answers").children) button.addEventListener("click", () => vote(button.dataset.outcome));
at("next").addEventListener("click", next);

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.altKey || event.metaKey || event.repeat) return;
  if (event.target.closest("input, textarea, select")) return;
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  if (key in KEYS && state.phase === "open") {
    event.preventDefault();
    vote(KEYS[key]);
  } else if (key === "Enter" && state.phase === "shown" && !event.target.closest("a, button:not(#next)")) {
    event.preventDefault();
    next();
  }
});

at("typed").addEventListener("submit", async (event) => {
  event.preventDefault();
  const text = at("text").value.trim();
  if (!text) return;
  try {
    await ask("/api/arena/prompt", { text });
    at("text").value = "";
    at("typed-note").textContent = "Your prompt is being painted; it comes as soon as it is ready.";
    if (state.phase === "nothing") start();
  } catch (error) {
    at("typed-note").textContent = error.message;
  }
});

start();
