// The picture that is started from, and the mask that is drawn on it. Knows nothing of the server:
// `const start = new StartPicture(changed)`, `await start.open(blob)`, `await start.posted()`.
"use strict";

// Larger pictures are made smaller before they are sent; the networks see them at the size that is made.
const LONGEST = 1024;
const TINT = "rgb(214 64 38)";

class StartPicture {
  constructor(changed) {
    this.canvas = document.getElementById("canvas");
    this.changed = changed;
    this.image = null;
    this.mask = document.createElement("canvas");
    this.erasing = false;
    this.last = null;
    this.cursor = null;
    this.target = null;
    this.canvas.addEventListener("pointerdown", (event) => this.down(event));
    this.canvas.addEventListener("pointermove", (event) => this.move(event));
    for (const name of ["pointerup", "pointercancel"]) this.canvas.addEventListener(name, () => this.up());
    this.canvas.addEventListener("keydown", (event) => this.key(event));
    this.canvas.addEventListener("blur", () => { this.cursor = null; this.draw(); });
  }

  // Takes a picture's file; throws where the browser cannot show it.
  async open(blob) {
    const bitmap = await createImageBitmap(blob);
    const scale = Math.min(1, LONGEST / Math.max(bitmap.width, bitmap.height));
    this.image = document.createElement("canvas");
    this.image.width = Math.max(8, Math.round(bitmap.width * scale));
    this.image.height = Math.max(8, Math.round(bitmap.height * scale));
    const context = this.image.getContext("2d");
    context.imageSmoothingQuality = "high";
    context.drawImage(bitmap, 0, 0, this.image.width, this.image.height);
    // A file of the right size goes as it is, to the byte; another one as the browser made it smaller.
    this.blob = scale === 1 ? blob : await new Promise((done) => this.image.toBlob(done, "image/png"));
    for (const canvas of [this.mask, this.canvas]) {
      canvas.width = this.image.width;
      canvas.height = this.image.height;
    }
    // Fine lines of the brush need pixels of their own where the picture is small.
    this.zoom = Math.max(1, Math.floor(512 / Math.max(this.image.width, this.image.height)));
    this.canvas.width = this.image.width * this.zoom;
    this.canvas.height = this.image.height * this.zoom;
    this.clear();
  }

  close() { this.image = null; this.blob = null; this.changed(); }

  clear() {
    this.mask.getContext("2d").clearRect(0, 0, this.mask.width, this.mask.height);
    this.drawn = false;
    this.draw();
    this.changed();
  }

  // Share of the picture's longer side that the brush is wide.
  get radius() {
    const percent = Number(document.getElementById("brush-size").value);
    return Math.max(1, percent / 200 * Math.max(this.mask.width, this.mask.height));
  }

  place(event) {
    const box = this.canvas.getBoundingClientRect();
    return [(event.clientX - box.left) / box.width * this.mask.width, (event.clientY - box.top) / box.height * this.mask.height];
  }

  down(event) {
    if (!this.masks || event.button > 0) return;
    event.preventDefault();
    this.canvas.focus();
    this.canvas.setPointerCapture(event.pointerId);
    this.last = this.place(event);
    this.stroke(this.last, this.last);
  }

  move(event) {
    if (!this.last) return;
    const events = event.getCoalescedEvents && event.getCoalescedEvents().length ? event.getCoalescedEvents() : [event];
    for (const each of events) {
      const next = this.place(each);
      this.stroke(this.last, next);
      this.last = next;
    }
  }

  up() { this.last = null; }

  key(event) {
    const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    if (!this.masks || !this.image || !(event.key in steps || event.key === " ")) return;
    event.preventDefault();
    this.cursor = this.cursor || [this.mask.width / 2, this.mask.height / 2];
    if (event.key === " ") this.stroke(this.cursor, this.cursor);
    else {
      const [x, y] = steps[event.key], far = this.radius;
      this.cursor = [
        Math.min(this.mask.width, Math.max(0, this.cursor[0] + x * far)),
        Math.min(this.mask.height, Math.max(0, this.cursor[1] + y * far)),
      ];
    }
    this.draw();
  }

  stroke(from, to) {
    const context = this.mask.getContext("2d");
    context.globalCompositeOperation = this.erasing ? "destination-out" : "source-over";
    context.strokeStyle = "white";
    context.lineCap = "round";
    context.lineWidth = 2 * this.radius;
    context.beginPath();
    context.moveTo(...from);
    context.lineTo(to[0] + 0.01, to[1]);
    context.stroke();
    const before = this.drawn;
    if (!this.erasing) this.drawn = true;
    this.draw();
    if (!before && this.drawn) this.changed();
  }

  // `target`: [width, height] that is made; what its central cut leaves away is shaded.
  fit(target) { this.target = target; this.draw(); }

  draw() {
    if (!this.image) return;
    const context = this.canvas.getContext("2d"), { width, height } = this.canvas;
    context.imageSmoothingEnabled = false;
    context.globalAlpha = 1;
    context.clearRect(0, 0, width, height);
    context.drawImage(this.image, 0, 0, width, height);
    const tint = document.createElement("canvas");
    tint.width = this.mask.width;
    tint.height = this.mask.height;
    const colour = tint.getContext("2d");
    colour.drawImage(this.mask, 0, 0);
    colour.globalCompositeOperation = "source-in";
    colour.fillStyle = TINT;
    colour.fillRect(0, 0, tint.width, tint.height);
    context.globalAlpha = 0.55;
    context.drawImage(tint, 0, 0, width, height);
    if (this.target) this.shade(context, width, height);
    if (this.cursor) {
      context.globalAlpha = 1;
      context.strokeStyle = "white";
      context.lineWidth = 3;
      context.beginPath();
      context.arc(this.cursor[0] * this.zoom, this.cursor[1] * this.zoom, this.radius * this.zoom, 0, 7);
      context.stroke();
    }
  }

  shade(context, width, height) {
    const ratio = this.target[0] / this.target[1];
    const w = Math.min(width, height * ratio), h = Math.min(height, width / ratio);
    const x = (width - w) / 2, y = (height - h) / 2;
    context.globalAlpha = 0.6;
    context.fillStyle = "black";
    for (const box of [[0, 0, width, y], [0, y + h, width, y], [0, y, x, h], [x + w, y, x, h]]) context.fillRect(...box);
  }

  // What is sent: the picture, and the mask (white: painted anew) where one was drawn; both in base64.
  async posted() {
    if (!this.image) return {};
    const posted = { image: await base64(this.blob) };
    if (this.masks && this.drawn) {
      const flat = document.createElement("canvas");
      flat.width = this.mask.width;
      flat.height = this.mask.height;
      const context = flat.getContext("2d");
      context.fillStyle = "black";
      context.fillRect(0, 0, flat.width, flat.height);
      context.drawImage(this.mask, 0, 0);
      posted.mask = await base64(await new Promise((done) => flat.toBlob(done, "image/png")));
    }
    return posted;
  }
}

function base64(blob) {
  return new Promise((done, failed) => {
    const reader = new FileReader();
    reader.onload = () => done(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = () => failed(reader.error);
    reader.readAsDataURL(blob);
  });
}
