// Finished pictures: thumbnails, newest first, and the record of the one that is opened.
"use strict";

class Past {
  // `reuse(record)` and `startFrom(blob, record)` are called with the picture that is open.
  constructor(reuse, startFrom) {
    this.list = document.getElementById("thumbnails");
    this.dialog = document.getElementById("dialog");
    this.older = document.getElementById("older");
    this.oldest = null;
    this.open = null;
    this.known = new Set();
    this.older.addEventListener("click", () => this.load());
    document.getElementById("close").addEventListener("click", () => this.dialog.close());
    this.dialog.addEventListener("click", (event) => { if (event.target === this.dialog) this.dialog.close(); });
    document.getElementById("reuse").addEventListener("click", () => { this.dialog.close(); reuse(this.open.record); });
    document.getElementById("start-from").addEventListener("click", async () => {
      const answer = await fetch(address(this.open.name));
      this.dialog.close();
      if (answer.ok) startFrom(await answer.blob(), this.open.record);
    });
  }

  // Fetches a page of pictures older than those that are shown.
  async load() {
    const before = this.oldest ? `?before=${encodeURIComponent(this.oldest)}` : "";
    const answer = await fetch(`/api/studio/history${before}`);
    if (!answer.ok) return;
    const { pictures, more } = await answer.json();
    for (const each of pictures) this.add(each, false);
    this.older.hidden = !more;
  }

  // Fetches what has been made since, and puts it first.
  async refresh() {
    const answer = await fetch("/api/studio/history");
    if (!answer.ok) return;
    const fresh = (await answer.json()).pictures.filter((each) => !this.known.has(each.name));
    for (const each of fresh.reverse()) this.add(each, true);
  }

  add(each, first) {
    if (this.known.has(each.name)) return;
    this.known.add(each.name);
    if (!this.oldest || each.name < this.oldest) this.oldest = each.name;
    const item = document.createElement("li"), button = document.createElement("button"), image = document.createElement("img");
    button.type = "button";
    button.className = "cell";
    image.src = address(each.name);
    image.loading = "lazy";
    image.alt = describe(each.record);
    button.append(image);
    button.addEventListener("click", () => this.show(each));
    item.append(button);
    if (first) this.list.prepend(item);
    else this.list.append(item);
    document.getElementById("history").hidden = false;
  }

  // Opens a picture by name, wherever it is known from.
  async showNamed(name) {
    await this.refresh();
    const answer = await fetch(`/api/studio/history?before=${encodeURIComponent(name + "~")}`);
    if (!answer.ok) return;
    const found = (await answer.json()).pictures.find((each) => each.name === name);
    if (found) this.show(found);
  }

  show(each) {
    this.open = each;
    const picture = document.getElementById("dialog-picture");
    picture.src = address(each.name);
    picture.alt = describe(each.record);
    document.getElementById("dialog-title").textContent = describe(each.record);
    const link = document.getElementById("download");
    link.href = `${address(each.name)}?download`;
    link.download = `${each.name}.png`;
    const rows = document.getElementById("record");
    rows.replaceChildren();
    for (const [key, value] of Object.entries(each.record)) {
      const text = said(value);
      if (text === "") continue;
      const row = rows.insertRow(), head = document.createElement("th");
      head.scope = "row";
      head.textContent = key.replaceAll("_", " ");
      row.append(head);
      row.insertCell().textContent = text;
    }
    document.getElementById("reuse").disabled = !("seed" in each.record);
    this.dialog.showModal();
  }
}

function address(name) { return `/studio/picture/${name}.png`; }

function describe(record) {
  if (record.prompt === undefined) return "A picture without a record";
  return record.prompt === "" ? "A picture without a prompt" : record.prompt;
}

function said(value) {
  if (value === null || value === "") return "";
  if (Array.isArray(value)) return value.join(" × ");
  if (typeof value === "object") {
    const { name, ...rest } = value;
    const options = Object.entries(rest).map(([key, each]) => `${key}=${each}`).join(", ");
    return options ? `${name} (${options})` : String(name);
  }
  return String(value);
}
