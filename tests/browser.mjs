// A browser for `player.js` whose time is ours: repaints, sound and answers come when the scenario says.
//
// Sounds are [start, end] and paintings [when, frame] by the clock of the sound, which is `latency_s` later in the ear.
//
//   node browser.mjs player.mjs '{"seconds": 60, "hidden": [2, 50], "made_s": 0.3, "restarted": 55}'
//
// Prints what a reader would have seen and heard. As in a real one, a hidden tab repaints nothing, the clock of the
// sound goes on, a source without a way to the output never ends, and a comm whose kernel is gone refuses to send.

const [path, told] = process.argv.slice(2);
const { seconds = 30, hidden = [], made_s = 0.3, ...ends } = JSON.parse(told);
const { restarted = Infinity, shut_down = Infinity, silent = Infinity } = ends; // seconds at which the kernel is gone
const end = Math.min(restarted, shut_down, silent);
const [FPS, RATE, TICK] = [24, 1600, 0.01]; // few samples: a page looks at all of them at each repaint
let time = 0;
const found = { open: 0, most_open: 0, asked: 0, latency_s: 0.08, sounds: [], painted: [], painted_closed: 0 };
const [elements, playing, due, answers] = [[], new Set(), [], []];

class Element {
  classList = { toggle() {} };
  clientWidth = 300;
  clientHeight = 72;
  append() {}
  setAttribute() {}
  addEventListener() {}
  getContext() {
    const drawImage = (picture) => (found.painted.push([found.context.currentTime, picture.number]), (found.painted_closed += picture.closed));
    return new Proxy({}, { get: (_, name) => (name === "drawImage" ? drawImage : () => {}), set: () => true });
  }
}

class Source {
  constructor(context, { buffer } = {}) {
    Object.assign(this, { context, buffer });
  }
  connect(to) {
    this.heard = Boolean(to);
  }
  start(at = this.context.currentTime) {
    if (this.buffer) found.sounds.push([at, at + this.buffer.length / RATE]);
    this.end ??= this.buffer ? at + this.buffer.length / RATE : Infinity;
    playing.add(this);
  }
  stop(at = this.context.currentTime) {
    this.end = at;
  }
}

class AudioContext {
  state = "suspended";
  currentTime = 0;
  outputLatency = found.latency_s;
  destination = {};
  constructor() {
    found.context = this;
  }
  async resume() {
    this.state = "running";
  }
  async suspend() {
    this.state = "suspended";
  }
}

class AudioBuffer {
  constructor({ length }) {
    this.length = length;
  }
  copyToChannel() {}
}

let pictures = 0;
async function createImageBitmap() {
  found.most_open = Math.max(found.most_open, ++found.open);
  const close = (picture) => ((found.open -= !picture.closed), (picture.closed = true));
  return { number: pictures++, width: 8, height: 8, closed: false, close() { close(this); } };
}

const [state, handlers] = [{ fps: FPS, sample_rate: RATE, prompt: "a red ball, bell", playing: false, notice: "" }, {}];
const emit = (name, ...rest) => (handlers[name] ?? []).forEach((handler) => handler(...rest));
let [block, frame, sample] = [0, 0, 0];
const model = {
  get: (name) => state[name],
  set: (name, value) => (state[name] = value),
  save_changes() {},
  on: (name, handler) => (handlers[name] ??= []).push(handler),
  off() {},
  send() {
    if (time >= Math.min(restarted, shut_down)) throw new Error("Cannot send");
    found.asked += 1;
    if (!answers.length) answers.push(time + made_s); // who asks twice shares one chunk
  },
};

function answer() {
  const [frames, samples] = block++ ? [FPS, RATE] : [1, RATE / 100];
  const said = { kind: "chunk", frame, sample, prompt: state.prompt, length_s: frames / FPS, made_s };
  [frame, sample] = [frame + frames, sample + samples];
  const bytes = new DataView(new ArrayBuffer(2 * samples));
  emit("msg:custom", said, [bytes, ...Array(frames).fill(bytes)]);
}

Object.assign(globalThis, { AudioContext, AudioBuffer, createImageBitmap, window: {} });
Object.assign(globalThis, { AudioBufferSourceNode: Source, ConstantSourceNode: Source });
globalThis.GainNode = class extends Source {};
globalThis.requestAnimationFrame = (paint) => due.push(paint);
globalThis.getComputedStyle = () => ({ getPropertyValue: () => "" });
globalThis.document = { createElement: () => (elements.push(new Element()), elements.at(-1)) };
Object.defineProperty(globalThis, "performance", { value: { now: () => 1000 * (time + 1) } });

const settled = () => new Promise(setImmediate);
const widget = (await import(path)).default();
widget.initialize({ model });
widget.render({ el: new Element() });
const part = (name) => elements.find((element) => element.className === name);
part("of-play").onclick();
for (let tick = 0; time < seconds; tick++) {
  await settled();
  time = tick * TICK;
  if (found.context?.state === "running") found.context.currentTime += TICK;
  for (const source of playing) {
    if (!source.heard || source.end > source.context.currentTime) continue;
    playing.delete(source);
    source.onended?.();
  }
  if (Math.abs(time - restarted) < TICK / 2) emit("comm_live_update");
  while (answers[0] <= time) if (answers.shift() < end) answer();
  const away = hidden[0] <= time && time < hidden[1];
  if (!away && tick % 2 === 0) for (const paint of due.splice(0)) paint();
}
const { context, ...seen } = found;
const [engine, status] = [part("of-player").engine, part("of-status").textContent];
console.log(JSON.stringify({ ...seen, now: engine.now, state: context.state, stalls: engine.seen.stalls, status }));
