// The page's half of `widgets.Player`: one clock, that of the sound, for both streams.
//
// Sample n sounds at (shift + n) / rate of the AudioContext; frame i is shown while i / fps of the stream is in the ear.
// Pausing suspends that clock, and with it both streams. A chunk that comes too late moves the shift: both wait together.
// Nothing is asked for before it is nearly needed, so a page that is closed, paused or slow makes the kernel idle.
// That clock beats, too: a hidden tab repaints nothing, and drops pictures and asks for chunks all the same.

const LEAD = 0.1; // seconds from a chunk's arrival to its sound, when nothing is playing
const PREROLL = 0.25; // seconds that must be there before the sound starts: a first block is one frame
const MOST = 6; // seconds held at most; a page that gets more (another one asked) starts anew
const BEAT = 0.125; // seconds of the sound from one look at the clock to the next
const PATIENCE = 2; // seconds until a chunk is asked for again: a kernel that was shut down refuses to hear
const SILENCE = 10; // seconds without sound and without an answer after which the reader is told
const GONE = "this stream is gone with its kernel; run the cell again";
const WAITING = "no answer from the kernel: it is busy, or was restarted; then run the cell again";
const PAST = 2; // seconds of the strip behind now, and
const FUTURE = 1; // ahead of it

class Engine {
  constructor(model) {
    this.model = model;
    this.fps = model.get("fps");
    this.rate = model.get("sample_rate");
    this.chain = Promise.resolve();
    this.seen = { frames: 0, stalls: 0, trips: [0.4], skews: [], shown: [], first: null, answer: null };
    this.volume = 1;
    this.prompt = model.get("prompt");
    [this.wished, this.asked, this.tries] = [null, null, 0];
    this.forget();
    this.listen = (said, buffers) => (this.chain = this.chain.then(() => this.take(said, buffers)));
    this.obey = () => (model.get("playing") ? this.play() : this.pause());
    this.lose = () => ((this.lost = true), this.end());
    this.refused = () => model.get("notice") && (this.wished = null);
    model.on("msg:custom", this.listen);
    model.on("change:playing", this.obey);
    model.on("change:notice", this.refused);
    model.on("comm_live_update", this.lose); // the host says so when it restarts the kernel
  }

  forget() {
    for (const source of this.sources ?? []) source.stop();
    for (const picture of this.frames?.values() ?? []) if (picture !== this.picture) picture.close();
    this.sources = new Set();
    this.frames = new Map();
    this.pieces = []; // placed: {sample, sound, frame, frames, prompt}
    this.held = []; // arrived, not yet placed
    this.shift = this.frame = null;
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

  /** Seconds since a chunk was asked for that has not come. */
  get waited() {
    return this.asked ? (performance.now() - this.asked) / 1000 : 0;
  }

  /** What the reader must know. */
  get notice() {
    const silent = this.running && !this.ahead && this.waited > SILENCE;
    return this.lost ? GONE : this.model.get("notice") || (silent ? WAITING : "");
  }

  async play() {
    if (!this.context) {
      this.context = new AudioContext({ sampleRate: this.rate, latencyHint: "interactive" });
      this.out = new GainNode(this.context, { gain: this.volume });
      this.out.connect(this.context.destination);
      this.pressed = performance.now();
      this.beat();
    }
    await this.context.resume(); // pending until a click where the browser wants one
    this.ask();
  }

  /** Look at the clock of the sound once a beat; a source that ends tells so in a hidden tab, too. */
  beat() {
    const pulse = new ConstantSourceNode(this.context, { offset: 0 });
    pulse.onended = () => (this.advance(), this.beat());
    pulse.connect(this.out);
    pulse.start();
    pulse.stop(this.context.currentTime + BEAT);
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
    if (!this.running || this.ended || this.ahead > soon || this.waited < this.tries * PATIENCE) return;
    this.asked ??= performance.now();
    this.tries += 1;
    try {
      this.model.send({ kind: "more" });
    } catch {
      this.lose(); // a kernel that was shut down or replaced
    }
  }

  /** Play what is there, and ask for nothing more. */
  end() {
    this.ended = true;
    if (this.context) this.place();
  }

  async take(said, buffers) {
    if (this.asked) this.seen.trips = [...this.seen.trips, this.waited].slice(-4);
    if (said.kind === "end") this.end();
    else {
      if (this.ahead > MOST) this.forget();
      const [sound, ...pictures] = buffers;
      const decoded = pictures.map((bytes) => createImageBitmap(new Blob([bytes], { type: "image/jpeg" })));
      const frames = await Promise.all(decoded);
      frames.forEach((picture, i) => this.frames.set(said.frame + i, picture));
      this.held.push({ ...said, frames: frames.length, sound: floats(sound) });
      if (!this.picture) this.show(this.frames.get(said.frame));
      this.seen.made = said;
    }
    if (this.context && (this.shift !== null || this.ahead >= PREROLL)) this.place();
    [this.asked, this.tries] = [null, 0];
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
      source.onended = () => this.sources.delete(source);
      this.sources.add(source);
    }
  }

  show(picture) {
    if (picture !== this.picture) this.picture?.close();
    this.picture = picture;
    this.seen.first ??= performance.now() - this.pressed;
  }

  /** Do what is due by the clock of the sound; called at each of its beats and before each repaint. */
  advance() {
    if (!this.running) return;
    if (this.shift !== null) this.follow(this.now);
    if (this.ended && !this.ahead) this.toggle();
    this.ask();
  }

  /** Take the picture that belongs to the sound in the ear, and drop all before it. */
  follow(now) {
    const due = [...this.frames.keys()].filter((i) => i <= now * this.fps + 1e-6);
    for (const i of due) {
      this.show(this.frames.get(i));
      this.frames.delete(i);
      this.frame = i;
    }
    const piece = this.pieces.find((p) => p.frame <= this.frame && this.frame < p.frame + p.frames);
    if (due.length) this.hear(piece?.prompt ?? this.prompt);
    const old = (p) => (p.sample + p.sound.length) / this.rate < now - PAST - 1;
    while (this.pieces.length > 1 && old(this.pieces[0])) this.pieces.shift();
  }

  /** Note that the picture on show has been painted, in one view or in several. */
  painted() {
    const { seen, now, frame } = this;
    if (frame === null || frame === seen.last) return;
    seen.last = frame;
    seen.frames += 1;
    seen.skews = [...seen.skews, now - frame / this.fps].slice(-240);
    seen.shown = [...seen.shown, performance.now()].slice(-49);
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
    this.model.off("comm_live_update", this.lose);
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
      engine.painted();
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
    const coming = engine.wished ? `next: ${engine.wished.prompt}` : `now: ${engine.prompt}`;
    status.textContent = engine.notice || coming;
    status.classList.toggle("of-notice", Boolean(engine.notice));
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
