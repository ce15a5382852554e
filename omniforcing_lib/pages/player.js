// The page's half of `widgets.Player`: one clock, that of the sound, for both streams.
//
// Sample n sounds at (shift + n) / rate of the AudioContext; frame i is shown while i / fps of the stream is in the ear.
// Pausing suspends that clock, and with it both streams. A chunk that comes too late moves the shift: both wait together.
// Nothing is asked for before it is nearly needed, so a page that is closed, paused or slow makes the kernel idle.

const LEAD = 0.1; // seconds from a chunk's arrival to its sound, when nothing is playing
const PREROLL = 0.25; // seconds that must be there before the sound starts: a first block is one frame
const MOST = 6; // seconds held at most; a page that gets more (another one asked) starts anew
const PAST = 2; // seconds of the strip behind now, and
const FUTURE = 1; // ahead of it

class Engine {
  constructor(model) {
    this.model = model;
    this.fps = model.get("fps");
    this.rate = model.get("sample_rate");
    this.chain = Promise.resolve();
    this.seen = { frames: 0, dropped: 0, stalls: 0, trips: [0.4], skews: [], shown: [], first: null, answer: null };
    this.volume = 1;
    this.prompt = model.get("prompt");
    this.wished = null;
    this.forget();
    this.listen = (said, buffers) => (this.chain = this.chain.then(() => this.take(said, buffers)));
    this.obey = () => (model.get("playing") ? this.play() : this.pause());
    this.refused = () => model.get("notice") && (this.wished = null);
    model.on("msg:custom", this.listen);
    model.on("change:playing", this.obey);
    model.on("change:notice", this.refused);
  }

  forget() {
    for (const source of this.sources ?? []) source.stop();
    for (const picture of this.frames?.values() ?? []) this.drop(picture);
    this.sources = new Set();
    this.frames = new Map();
    this.pieces = []; // placed: {sample, sound, frame, frames, prompt}
    this.held = []; // arrived, not yet placed
    this.shift = null;
  }

  get running() {
    return this.context?.state === "running";
  }

  /** Seconds of the stream that are in the ear now. */
  get now() {
    if (this.shift === null) return 0;
    return this.context.currentTime - (this.context.outputLatency || 0) - this.shift / this.rate;
  }

  /** Seconds of sound that are there and not heard yet. */
  get ahead() {
    const waiting = this.held.reduce((sum, piece) => sum + piece.sound.length, 0) / this.rate;
    const last = this.pieces.at(-1);
    return waiting + (last ? Math.max(0, (last.sample + last.sound.length) / this.rate - this.now) : 0);
  }

  async play() {
    if (!this.context) {
      this.context = new AudioContext({ sampleRate: this.rate, latencyHint: "interactive" });
      this.out = new GainNode(this.context, { gain: this.volume });
      this.out.connect(this.context.destination);
      this.pressed = performance.now();
    }
    await this.context.resume(); // pending until a click where the browser wants one
    this.ask();
  }

  async pause() {
    await this.context?.suspend();
  }

  toggle() {
    this.model.set("playing", !this.running);
    this.model.save_changes();
    this.obey();
  }

  wish(prompt) {
    this.wished = { prompt, at: performance.now() };
    this.model.set("prompt", prompt);
    this.model.save_changes();
  }

  louder(volume) {
    this.volume = volume;
    if (this.out) this.out.gain.setTargetAtTime(volume, this.context.currentTime, 0.02);
  }

  ask() {
    const soon = 1.5 * Math.max(...this.seen.trips) + PREROLL;
    if (!this.running || this.asked || this.ended || this.ahead > soon) return;
    this.asked = performance.now();
    this.model.send({ kind: "more" });
  }

  async take(said, buffers) {
    if (this.asked) this.seen.trips = [...this.seen.trips, (performance.now() - this.asked) / 1000].slice(-4);
    this.ended = said.kind === "end";
    if (said.kind === "chunk") {
      if (this.ahead > MOST) this.forget();
      const [sound, ...pictures] = buffers;
      const decoded = pictures.map((bytes) => createImageBitmap(new Blob([bytes], { type: "image/jpeg" })));
      const frames = await Promise.all(decoded);
      frames.forEach((picture, i) => this.frames.set(said.frame + i, picture));
      this.held.push({ ...said, frames: frames.length, sound: floats(sound) });
      if (!this.picture) this.show(this.frames.get(said.frame));
      this.seen.made = said;
    }
    if (this.context && (this.ended || this.shift !== null || this.ahead >= PREROLL)) this.place();
    this.asked = null;
    this.ask();
  }

  place() {
    for (const piece of this.held.splice(0)) {
      const soonest = Math.ceil((this.context.currentTime + LEAD / 5) * this.rate);
      if (this.shift === null || this.shift + piece.sample < soonest) {
        this.seen.stalls += this.shift !== null;
        this.shift = Math.ceil((this.context.currentTime + LEAD) * this.rate) - piece.sample;
      }
      this.pieces.push(piece);
      if (!piece.sound.length) continue;
      const buffer = new AudioBuffer({ length: piece.sound.length, sampleRate: this.rate });
      buffer.copyToChannel(piece.sound, 0);
      const source = new AudioBufferSourceNode(this.context, { buffer });
      source.connect(this.out);
      source.start((this.shift + piece.sample) / this.rate);
      source.onended = () => (this.sources.delete(source), this.ask());
      this.sources.add(source);
    }
  }

  drop(picture) {
    if (picture !== this.picture) picture.close();
  }

  show(picture) {
    if (picture !== this.picture) this.picture?.close();
    this.picture = picture;
    this.seen.first ??= performance.now() - this.pressed;
  }

  /** Take the picture that belongs to the sound in the ear; called before each repaint. */
  advance() {
    if (!this.running || this.shift === null) return;
    const { now, seen } = this;
    const due = [...this.frames.keys()].filter((i) => i <= now * this.fps + 1e-6);
    const last = due.pop();
    for (const i of due) {
      this.drop(this.frames.get(i));
      this.frames.delete(i);
    }
    if (last !== undefined) {
      this.show(this.frames.get(last));
      this.frames.delete(last);
      seen.frames += 1;
      seen.dropped += due.length;
      seen.skews = [...seen.skews, now - last / this.fps].slice(-240);
      seen.shown = [...seen.shown, performance.now()].slice(-49);
      const piece = this.pieces.find((p) => p.frame <= last && last < p.frame + p.frames);
      this.hear(piece?.prompt ?? this.prompt);
    }
    const old = (p) => (p.sample + p.sound.length) / this.rate < now - PAST - 1;
    while (this.pieces.length > 1 && old(this.pieces[0])) this.pieces.shift();
    if (this.ended && !this.ahead) this.toggle();
    this.ask();
  }

  hear(prompt) {
    if (this.wished && prompt === this.wished.prompt) {
      this.seen.answer = (performance.now() - this.wished.at) / 1000;
      this.wished = null;
    }
    this.prompt = prompt;
  }

  close() {
    this.model.off("msg:custom", this.listen);
    this.model.off("change:playing", this.obey);
    this.model.off("change:notice", this.refused);
    this.forget();
    this.context?.close();
  }
}

function floats(bytes) {
  const whole = new Int16Array(bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.byteLength));
  return Float32Array.from(whole, (value) => value / 32767);
}

const FACTS = [
  ["time", "s", "of the stream, as heard"],
  ["frames a second", "", "shown in the last two seconds"],
  ["first picture", "ms", "after the first press of play"],
  ["speed", "× real time", "length of the last block over the time to make it"],
  ["ahead", "s", "of sound made and not heard yet"],
  ["picture after sound", "ms", "median over the last frames; the next repaint is at most 17 ms away"],
  ["new prompt after", "s", "from typing it to seeing it"],
  ["pauses for lack of data", "", ""],
];

function readings({ seen, now, ahead, fps }) {
  const span = (seen.shown.at(-1) - seen.shown[0]) / 1000;
  const made = seen.made;
  const skews = [...seen.skews].sort((a, b) => a - b);
  return [
    now > 0 ? now.toFixed(1) : "0.0",
    span ? ((seen.shown.length - 1) / span).toFixed(1) : "–",
    seen.first === null ? "–" : seen.first.toFixed(0),
    made?.made_s ? (made.length_s / made.made_s).toFixed(1) : "–",
    ahead.toFixed(1),
    skews.length ? (1000 * skews[skews.length >> 1]).toFixed(0) : "–",
    seen.answer === null ? "–" : seen.answer.toFixed(1),
    String(seen.stalls),
  ];
}

function strip(canvas, engine, colours) {
  const ratio = window.devicePixelRatio || 1;
  const [width, height] = [canvas.clientWidth, canvas.clientHeight];
  if (canvas.width !== Math.round(width * ratio)) {
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
  }
  const pen = canvas.getContext("2d");
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  pen.clearRect(0, 0, width, height);
  const { now, rate, fps } = engine;
  const x = (seconds) => ((seconds - now + PAST) / (PAST + FUTURE)) * width;
  const middle = (height - 20) / 2 + 2;
  pen.font = "10px system-ui, sans-serif";
  pen.textAlign = "center";
  for (let s = Math.max(0, Math.ceil(now - PAST)); s < now + FUTURE; s++) {
    pen.fillStyle = colours.pale;
    pen.fillRect(x(s), 2, 1, height - 20);
    pen.fillStyle = colours.grey;
    if (x(s) > 8 && x(s) < width - 8) pen.fillText(`${s} s`, x(s), height - 4);
  }
  for (const piece of engine.pieces) {
    const left = Math.max(0, x(piece.frame / fps));
    const right = x((piece.frame + piece.frames) / fps);
    pen.fillStyle = colours.video;
    pen.globalAlpha = 0.85;
    pen.fillRect(left, height - 18, Math.max(0, right - left - 1), 3);
    for (let column = Math.max(0, Math.ceil(x(piece.sample / rate))); column < width; column++) {
      const at = (c) => Math.floor(((c / width) * (PAST + FUTURE) - PAST + now) * rate) - piece.sample;
      const [from, to] = [Math.max(0, at(column)), Math.min(piece.sound.length, at(column + 1))];
      if (from >= piece.sound.length) break;
      let peak = 0;
      for (let n = from; n < to; n++) peak = Math.max(peak, Math.abs(piece.sound[n]));
      pen.fillStyle = colours.audio;
      pen.globalAlpha = column > x(now) ? 0.4 : 1;
      const half = Math.max(0.5, Math.min(1, peak * 1.6) * (middle - 4));
      pen.fillRect(column, middle - half, 1, 2 * half);
    }
    pen.globalAlpha = 1;
  }
  pen.fillStyle = colours.ink;
  pen.fillRect(x(now), 0, 1, height - 15);
}

function element(parent, tag, name, text = "") {
  const made = document.createElement(tag);
  made.className = name;
  made.textContent = text;
  parent.append(made);
  return made;
}

function render(engine, el) {
  const { model } = engine;
  const root = element(el, "div", "of-player");
  root.engine = engine;
  const stage = element(root, "div", "of-stage");
  const picture = element(stage, "canvas", "of-picture");
  const wave = element(stage, "canvas", "of-strip");
  const side = element(root, "div", "of-side");
  const bar = element(side, "form", "of-bar");
  const button = element(bar, "button", "of-play", "Play");
  const volume = element(bar, "input", "of-volume");
  Object.assign(volume, { type: "range", min: 0, max: 1, step: 0.01, value: engine.volume, title: "volume" });
  const label = element(side, "label", "of-label", "prompt");
  const prompt = element(label, "input", "of-prompt");
  Object.assign(prompt, { type: "text", value: model.get("prompt"), spellcheck: false });
  const status = element(side, "div", "of-status");
  status.setAttribute("role", "status");
  const table = element(side, "div", "of-facts");
  const values = FACTS.map(([name, unit, why]) => {
    const row = element(table, "div", "of-fact");
    row.title = why;
    element(row, "span", "of-name", name);
    const number = element(row, "span", "of-number", "–");
    element(row, "span", "of-unit", unit);
    return number;
  });
  button.type = "button";
  button.onclick = () => engine.toggle();
  volume.oninput = () => engine.louder(Number(volume.value));
  const wish = () => prompt.value !== model.get("prompt") && engine.wish(prompt.value);
  prompt.onchange = wish;
  bar.onsubmit = (event) => event.preventDefault();
  // A notebook takes single keys as commands; what is typed here is text.
  for (const kind of ["keydown", "keypress", "keyup"]) prompt.addEventListener(kind, (e) => e.stopPropagation());
  prompt.addEventListener("keydown", (event) => event.key === "Enter" && wish());
  const told = () => (prompt.value = model.get("prompt"));
  model.on("change:prompt", told);

  const colours = {};
  let [drawn, written, frame] = [null, 0, 0];
  const paint = () => {
    frame = requestAnimationFrame(paint);
    engine.advance();
    if (engine.picture && engine.picture !== drawn) {
      drawn = engine.picture;
      Object.assign(picture, { width: drawn.width, height: drawn.height });
      picture.getContext("2d").drawImage(drawn, 0, 0);
    }
    if (performance.now() - written > 200) {
      written = performance.now();
      tell();
    }
    strip(wave, engine, colours);
  };
  const tell = () => {
    const style = getComputedStyle(root); // empty until the notebook has put us on the page
    for (const name of ["ink", "grey", "pale", "video", "audio"]) colours[name] = style.getPropertyValue(`--of-${name}`);
    button.textContent = engine.running ? "Pause" : "Play";
    button.setAttribute("aria-pressed", String(engine.running));
    readings(engine).forEach((text, i) => (values[i].textContent = text));
    const notice = model.get("notice");
    const coming = engine.wished ? `next: ${engine.wished.prompt}` : `now: ${engine.prompt}`;
    status.textContent = notice || coming;
    status.classList.toggle("of-notice", Boolean(notice));
  };
  paint();
  return () => {
    cancelAnimationFrame(frame);
    model.off("change:prompt", told);
  };
}

export default () => {
  let engine;
  return {
    initialize({ model }) {
      engine = new Engine(model);
      return () => engine.close();
    },
    render: ({ el }) => render(engine, el),
  };
};
