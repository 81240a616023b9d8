// The leaderboard, drawn from /api/arena/board every few seconds. Names are set as text, never as markup.
"use strict";

const at = (id) => document.getElementById(id);
const REFRESH = 5000;
let board = null;

function make(tag, text, className) {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  if (className) node.className = className;
  return node;
}

const whole = (number) => Math.round(number).toLocaleString();
const percent = (share) => `${Math.round(100 * share)} %`;
const ranks = (row) => (row.rank === row.worst_rank ? `${row.rank}` : `${row.rank}–${row.worst_rank}`);

function verdict() {
  const rated = board.rows.filter((row) => row.rating !== null);
  if (!rated.length) return "No votes yet";
  const first = rated.filter((row) => row.rank === 1);
  if (first.length === 1) return `${first[0].entrant} leads`;
  if (first.length <= 3) return `${first.map((row) => row.entrant).join(" and ")} cannot be told apart yet`;
  return `${rated[0].entrant} is ahead, but ${first.length} entrants could be first`;
}

// The scale: from the least to the greatest end of an interval, in whole fifties.
function scale(rows) {
  const ends = rows.filter((row) => row.rating !== null).flatMap((row) => [row.rating, row.interval.low ?? row.rating - 60, row.interval.high ?? row.rating + 60]);
  const low = Math.floor((Math.min(950, ...ends) - 5) / 50) * 50;
  const high = Math.ceil((Math.max(1050, ...ends) + 5) / 50) * 50;
  const step = [50, 100, 200, 500, 1000, 2000].find((size) => (high - low) / size <= 6) || 5000;
  const ticks = [];
  for (let tick = Math.ceil(low / step) * step; tick <= high; tick += step) ticks.push(tick);
  return { place: (value) => 100 * (value - low) / (high - low), ticks };
}

function track(row, { place, ticks }) {
  const line = make("span", undefined, "track");
  line.setAttribute("aria-hidden", "true");
  for (const tick of ticks) {
    const mark = make("span", undefined, "tick");
    mark.style.left = `${place(tick)}%`;
    line.append(mark);
  }
  if (row.rating === null) return line;
  const low = row.interval.low === null ? 0 : place(row.interval.low);
  const high = row.interval.high === null ? 100 : place(row.interval.high);
  const whisker = make("span", undefined, `whisker${row.interval.low === null ? " open-low" : ""}${row.interval.high === null ? " open-high" : ""}`);
  whisker.style.left = `${low}%`;
  whisker.style.width = `${high - low}%`;
  const dot = make("span", undefined, "dot");
  dot.style.left = `${place(row.rating)}%`;
  line.append(whisker, dot);
  return line;
}

function drawRatings() {
  const chosen = board.categories[at("category").value];
  const rows = chosen ? chosen.rows : board.rows;
  const drawn = scale(rows);
  at("axis").replaceChildren(...drawn.ticks.map((tick) => {
    const label = make("span", String(tick));
    label.style.left = `${drawn.place(tick)}%`;
    return label;
  }));
  at("ratings").tBodies[0].replaceChildren(...rows.map((row) => {
    const line = make("tr", undefined, [row.rank === 1 && row.rating !== null ? "first" : "", row.preliminary ? "preliminary" : ""].join(" ").trim());
    const name = make("td", row.entrant, "entrant");
    if (row.preliminary) name.append(make("span", row.rating === null ? "no votes yet" : "preliminary"));
    const wide = make("td", undefined, "wide");
    wide.append(track(row, drawn));
    const { low, high } = row.interval;
    const interval = row.rating === null ? "–" : `${low === null ? "open" : whole(low)} – ${high === null ? "open" : whole(high)}`;
    line.append(
      make("td", row.rating === null ? "–" : ranks(row)), name, wide,
      make("td", row.rating === null ? "–" : whole(row.rating), "number"),
      make("td", interval, "number interval"), make("td", row.tally.votes.toLocaleString(), "number votes"),
    );
    return line;
  }));
}

function drawMatrix() {
  const { entrants, wins, votes, needed } = board.matrix;
  const head = make("tr");
  head.append(make("td"), ...entrants.map((name) => {
    const cell = make("th", name);
    cell.scope = "col";
    return cell;
  }));
  at("matrix").tHead.replaceChildren(head);
  at("matrix").tBodies[0].replaceChildren(...entrants.map((name, i) => {
    const line = make("tr");
    const title = make("th", name);
    title.scope = "row";
    line.append(title, ...entrants.map((_, j) => {
      if (i === j) return make("td", "·", "none");
      if (!votes[i][j]) return make("td", "–", "none");
      const share = wins[i][j] / votes[i][j];
      const cell = make("td");
      const colour = share >= 0.5 ? "var(--good)" : "var(--bad)";
      cell.style.background = `color-mix(in srgb, ${colour} ${Math.round(70 * Math.abs(share - 0.5))}%, transparent)`;
      cell.append(make("b", percent(share)), make("small", `of ${votes[i][j].toLocaleString()}`));
      if (needed[i][j]) cell.append(" ", make("span", `+${needed[i][j].toLocaleString()}`, "need"));
      return cell;
    }));
    return line;
  }));
}

// Each statement: heading, text, and whether it asks for care (true), is in order (false) or unknown (null).
function statements() {
  const found = board.diagnostics;
  const { position, goodness_of_fit: fit, cycles, robustness } = found;
  const said = [];
  if (position.share === null) said.push(["Sides", "No vote has been decided yet.", null]);
  else {
    const biased = position.p_value < 0.01;
    said.push(["Sides", `The left picture won ${percent(position.share)} of the decided votes (${percent(position.low)} to ${percent(position.high)}): ${biased ? "voters prefer one side. Sides are drawn by lot, so this costs votes but favours nobody." : "no preferred side can be seen."}`, biased]);
  }
  if (fit.p_value === null) said.push(["One scale", "Too few pairs have met to say whether one rating each is enough.", null]);
  else said.push(["One scale", fit.p_value < 0.01 ? `Some pairs come out otherwise than their ratings say (p = ${fit.p_value.toPrecision(1)}): look at each against each.` : "What pairs did agrees with one rating for each entrant.", fit.p_value < 0.01]);
  if (!cycles.triads) said.push(["Circles", "No three entrants have decided pairs yet.", null]);
  else said.push(["Circles", `${cycles.cyclic} of ${cycles.triads} triples go round in a circle (chance makes ${cycles.expected.toFixed(1)}).`, cycles.p_value < 0.01]);
  const { dropped, flipped } = robustness;
  if (flipped) said.push(["What would overturn it", `${flipped.votes.toLocaleString()} ${flipped.votes === 1 ? "vote" : "votes"} reversed${dropped ? `, or ${dropped.votes.toLocaleString()} left out,` : ""} would put ${flipped.rival} first.`, flipped.votes <= Math.max(2, 0.01 * board.votes)]);
  else said.push(["What would overturn it", "There is no leader to overturn, or no votes that could.", null]);
  const most = robustness.influences[0];
  if (!most || board.voters < 2) said.push(["Single voters", `${board.voters} ${board.voters === 1 ? "voter" : "voters"} so far.`, null]);
  else {
    const deciding = robustness.voters_who_decide;
    said.push(["Single voters", `Without voter ${most.voter} (${most.votes.toLocaleString()} votes), ${most.entrant} would move by ${whole(Math.abs(most.change))} points. ${deciding ? `${deciding} of ${board.voters} voters decide alone who is first.` : "No single voter decides who is first."}`, deciding > 0]);
  }
  said.push(["Intervals", board.by_voter ? `They take voters as independent${found.design_effect === null ? "" : ` (variance ${found.design_effect.toFixed(1)} times that of independent votes)`}.` : "They take votes as independent: with fewer than 10 voters, tastes of single people are not in them.", board.by_voter ? false : null]);
  if (found.both_bad !== null) said.push(["Both bad", `${percent(found.both_bad)} of the votes liked neither picture.`, found.both_bad > 0.4]);
  return said;
}

function draw() {
  at("verdict").textContent = verdict();
  at("counts").textContent = `${board.votes.toLocaleString()} blind ${board.votes === 1 ? "vote" : "votes"} by ${board.voters.toLocaleString()} ${board.voters === 1 ? "voter" : "voters"} on ${board.rows.length} entrants`;
  const select = at("category");
  const names = Object.keys(board.categories).sort();
  const known = [...select.options].slice(1).map((option) => option.value);
  if (names.join("\n") !== known.join("\n")) {
    const chosen = select.value;
    select.replaceChildren(new Option("all", ""), ...names.map((name) => new Option(name, name)));
    select.value = names.includes(chosen) ? chosen : "";
  }
  select.parentElement.hidden = names.length < 2;
  drawRatings();
  drawMatrix();
  at("trust").replaceChildren(...statements().map(([title, text, care]) => {
    const box = make("div", undefined, care === null ? "unknown" : care ? "care" : "fine");
    box.append(make("dt", title), make("dd", text));
    return box;
  }));
}

async function refresh() {
  if (document.hidden) return;
  try {
    const answer = await fetch("/api/arena/board");
    if (!answer.ok) throw new Error((await answer.json()).error);
    board = await answer.json();
    at("error").textContent = "";
    draw();
  } catch (error) {
    at("error").textContent = error instanceof TypeError ? "The server cannot be reached." : `This did not work: ${error.message}`;
  }
}

at("category").addEventListener("change", drawRatings);
document.addEventListener("visibilitychange", refresh);
setInterval(refresh, REFRESH);
refresh();
