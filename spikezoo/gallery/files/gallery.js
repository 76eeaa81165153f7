// The net of a page at work: one time step after another in onnxruntime-web, its spikes drawn as they come.
// NET is what spikezoo/gallery/pages.py wrote of the net; RUNTIME is onnxruntime-web, its script and its machine code.
// Both are packed with gzip.
"use strict";

const byId = (id) => document.getElementById(id);
const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
const inflate = async (packed, kind) =>
  new Uint8Array(await new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream(kind))).arrayBuffer());
const unpack = (text) => inflate(bytes(text), "gzip");
const size = (shape) => shape.reduce((a, b) => a * b, 1);

// T, C, H, W; an image is its own frame at every step.
const [channels, height, width] = NET.input.slice(-3);
const canvas = byId("input");
const draws = !NET.events && channels === 1;
const ground = 112; // pixels of a side on which digits are drawn
let ort = null, session = null, inputs = null, values = null, turn = 0, shown = null, drawing = null;

async function load() {
  const script = URL.createObjectURL(new Blob([await unpack(RUNTIME[0])], { type: "text/javascript" }));
  ort = await import(script);
  ort.env.wasm.numThreads = 1;
  ort.env.wasm.wasmBinary = (await unpack(RUNTIME[1])).buffer;
  session = await ort.InferenceSession.create(await unpack(NET.program), { executionProviders: ["wasm"] });
  inputs = new Float32Array((await unpack(NET.values)).buffer);
}

// What the net sees at a step: a frame of events, the image, or the pixels whose first spike is due (bright ones early).
function frame(step, T) {
  const count = size([channels, height, width]);
  if (NET.events) return values.subarray(step * count, (step + 1) * count);
  return NET.encoding === "direct" ? values : values.map((v) => even((T - 1) * (1 - v)) === step ? 1 : 0);
}

function even(value) { // rounds halves to even numbers, as torch does
  const low = Math.floor(value), rest = Math.fround(value) - low;
  return rest > .5 || (rest === .5 && low % 2) ? low + 1 : low;
}

// Run T steps; told(step, result) is called after each. Answers are means of logits over the steps.
async function simulate(T, told) {
  const own = ++turn;
  let state = NET.shapes.map((shape, i) => new ort.Tensor("float32", new Float32Array(size(shape)).fill(NET.rest[i]), [1, ...shape]));
  const sum = new Float64Array(NET.classes.length), operations = new Float64Array(NET.layers.length);
  let logits = [];
  for (let step = 0; step < T; step++) {
    const feeds = { x: new ort.Tensor("float32", Float32Array.from(frame(step, T)), [1, channels, height, width]) };
    state.forEach((tensor, i) => { feeds[`v${i}`] = tensor; });
    const out = await session.run(feeds);
    if (own !== turn) return null; // another input came meanwhile
    out.logits.data.forEach((value, i) => { sum[i] += value; });
    out.operations.data.forEach((value, i) => { operations[i] += Number(value); });
    state = NET.neurons.map((_, i) => out[`w${i}`]);
    logits = Array.from(sum, (value) => value / (step + 1));
    told(step, { logits, operations, spikes: NET.neurons.map((_, i) => out[`s${i}`]) });
  }
  return { logits, operations: Array.from(operations) };
}

// Energy in microjoules: pixels are multiplied, or added where weights are binary, once in the first layer; spikes are
// added.
function energy(operations) {
  const events = operations.reduce((a, b, i) => a + (NET.encoding !== "direct" || NET.events || i > 0 ? b : 0), 0);
  return 1e-6 * (NET.analog_macs * NET.mac_pj + (NET.analog_sops + events) * NET.sop_pj);
}

function showAnswer(result, step) {
  const most = Math.max(...result.logits);
  const raised = result.logits.map((value) => Math.exp(value - most));
  const total = raised.reduce((a, b) => a + b);
  const shares = raised.map((value) => value / total);
  const best = shares.indexOf(Math.max(...shares));
  const order = shares.map((share, i) => [share, i]).sort((a, b) => b[0] - a[0]).slice(0, 10);
  if (NET.classes.length <= 10) order.sort((a, b) => a[1] - b[1]);
  byId("answer").innerHTML = order.map(([share, i]) =>
    `<tr class="${i === best ? "best" : ""}"><th scope="row">${NET.classes[i]}</th><td><span class="bar" ` +
    `style="--share:${share.toFixed(4)}"></span><span>${(100 * share).toFixed(1)} %</span></td></tr>`).join("");
  const cost = energy(Array.from(result.operations));
  byId("cost").textContent = `After ${step + 1} time step${step ? "s" : ""}: ${cost.toPrecision(3)} \u00b5J, ` +
    `${(100 * cost / (1000 * NET.ann_mj)).toPrecision(3)} % of the ReLU twin's.` +
    NET.over.filter((row) => row.T === step + 1).map((row) => ` Of ${NET.images} test images ${row.top1.toFixed(1)} % are right.`).join("");
  [...document.querySelectorAll("#over tr")].forEach((row, i) => row.classList.toggle("best", NET.over[i].T === step + 1));
  return NET.classes[best];
}

// Spikes of a layer at a step: channels of a map side by side, vectors in a square.
function drawSpikes(target, tensor) {
  const shape = tensor.dims.slice(1), data = tensor.data;
  const side = Math.ceil(Math.sqrt(shape[0]));
  const [maps, rows, columns] = shape.length === 3 ? shape : [1, Math.ceil(shape[0] / side), side];
  const across = Math.ceil(Math.sqrt(maps)), gap = maps > 1 ? 1 : 0;
  target.width = across * (columns + gap);
  target.height = Math.ceil(maps / across) * (rows + gap);
  const context = target.getContext("2d"), image = context.createImageData(target.width, target.height);
  data.forEach((value, i) => {
    const map = Math.floor(i / (rows * columns)), place = i % (rows * columns);
    const x = (map % across) * (columns + gap) + place % columns;
    const y = Math.floor(map / across) * (rows + gap) + Math.floor(place / columns);
    image.data.set(value ? [255, 150, 80, 255] : [28, 32, 40, 255], 4 * (y * target.width + x));
  });
  context.putImageData(image, 0, 0);
}

function showSpikes(step, spikes, T) {
  const place = byId("spikes");
  if (step === 0) {
    place.innerHTML = NET.neurons.map((name) => `<figure><figcaption>${name}</figcaption><div class="frames"></div></figure>`).join("");
  }
  spikes.forEach((tensor, i) => {
    const figure = place.children[i], fired = tensor.data.reduce((a, b) => a + (b ? 1 : 0), 0);
    const target = document.createElement("canvas");
    target.setAttribute("role", "img");
    target.setAttribute("aria-label", `${NET.neurons[i]}, step ${step + 1}: ${fired} of ${tensor.data.length} neurons fire`);
    if (step < 16) figure.lastChild.append(target), drawSpikes(target, tensor);
    figure.dataset.fired = (step ? Number(figure.dataset.fired) : 0) + fired;
    const rate = figure.dataset.fired / (tensor.data.length * (step + 1));
    figure.firstChild.textContent = `${NET.neurons[i]}: ${tensor.data.length} neurons, ${rate.toFixed(3)} spikes a step`;
  });
}

// A drawing as the net knows digits: MNIST's longer side is 20 of 28 pixels and the centre of mass in the middle;
// scikit-learn's fill the height and stand in the middle. The ink's box is found and scaled by means of areas.
function fit(ink) {
  const rows = [], columns = [], at = (row, column) => ink[row * ground + column];
  for (let row = 0; row < ground; row++) for (let column = 0; column < ground; column++) {
    if (at(row, column) > .2) rows.push(row), columns.push(column);
  }
  const result = new Float32Array(height * width);
  if (!rows.length) return result;
  const box = [rows, columns].map((list) => [list.reduce((a, b) => Math.min(a, b)), list.reduce((a, b) => Math.max(a, b)) + 1]);
  const scale = (height > 8 ? 20 / 28 * height : height) / Math.max(box[0][1] - box[0][0], box[1][1] - box[1][0]);
  const mean = (list) => list.reduce((a, b) => a + b) / list.length + .5;
  const middle = height > 8 ? [mean(rows), mean(columns)] : box.map(([low, high]) => (low + high) / 2);
  const parts = Math.max(1, Math.ceil(1 / scale));
  for (let row = 0; row < height; row++) for (let column = 0; column < width; column++) {
    let sum = 0;
    for (let i = 0; i < parts; i++) for (let j = 0; j < parts; j++) {
      const y = Math.floor((row + (i + .5) / parts - height / 2) / scale + middle[0]);
      const x = Math.floor((column + (j + .5) / parts - width / 2) / scale + middle[1]);
      if (y >= 0 && x >= 0 && y < ground && x < ground) sum += at(y, x);
    }
    result[row * width + column] = sum / parts ** 2;
  }
  return result;
}

async function go() {
  if (!session || !values) return;
  if (drawing) values = fit(drawing);
  const T = Number(byId("steps").value);
  byId("shown").textContent = T;
  let said = "";
  const result = await simulate(T, (step, now) => {
    said = showAnswer(now, step);
    showSpikes(step, now.spikes, T);
  });
  if (result) byId("state").textContent = `It says: ${said}.`;
}

function paint(step = 0) {
  const [rows, columns] = drawing ? [ground, ground] : [height, width];
  canvas.width = columns;
  canvas.height = rows;
  const context = canvas.getContext("2d"), image = context.createImageData(columns, rows), plane = rows * columns;
  const now = NET.events ? frame(step) : drawing || values;
  for (let i = 0; i < plane; i++) {
    const pixel = NET.events ? [24 + 220 * Math.min(1, now[i]), 26, 32 + 220 * Math.min(1, now[plane + i])]
      : channels === 1 ? [now[i], now[i], now[i]].map((v) => 255 * v)
      : [now[i], now[plane + i], now[2 * plane + i]].map((v) => 255 * v);
    image.data.set([...pixel, 255], 4 * i);
  }
  context.putImageData(image, 0, 0);
}

function choose(index) {
  values = inputs.slice(index * size(NET.input), (index + 1) * size(NET.input));
  drawing = null;
  shown = index;
  [...byId("samples").children].forEach((button, i) => button.setAttribute("aria-pressed", String(i === index)));
  paint();
  if (NET.events) play();
  return go();
}

let playing = 0;
function play() { // the frames of a recording, again and again
  clearInterval(playing);
  let step = 0;
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  if (!still) playing = setInterval(() => paint(step = (step + 1) % NET.input[0]), 180);
}

function clear() {
  values = new Float32Array(size(NET.input));
  drawing = draws ? new Float32Array(ground * ground) : null;
  shown = null;
  [...byId("samples").children].forEach((button) => button.setAttribute("aria-pressed", "false"));
  paint();
  byId("answer").innerHTML = byId("cost").textContent = byId("spikes").innerHTML = "";
  byId("state").textContent = draws ? "Draw a digit." : "";
}

// A stroke of the pen: a soft disc, a line of discs from where it was.
function pen(x, y) {
  const reach = .045 * ground;
  const [top, bottom] = [Math.max(0, Math.floor(y - reach - 1)), Math.min(ground, Math.ceil(y + reach + 1))];
  for (let row = top; row < bottom; row++) for (let column = 0; column < ground; column++) {
    const far = Math.hypot(column + .5 - x, row + .5 - y), i = row * ground + column;
    drawing[i] = Math.max(drawing[i], Math.min(1, Math.max(0, reach + .5 - far)));
  }
}

function line(from, to) {
  const steps = Math.max(1, Math.ceil(Math.hypot(to[0] - from[0], to[1] - from[1])));
  for (let i = 0; i <= steps; i++) pen(from[0] + (to[0] - from[0]) * i / steps, from[1] + (to[1] - from[1]) * i / steps);
  paint();
}

function takeImage(blob) {
  createImageBitmap(blob).then((picture) => {
    const side = Math.min(picture.width, picture.height), small = document.createElement("canvas");
    small.width = width;
    small.height = height;
    const context = small.getContext("2d");
    context.imageSmoothingQuality = "high";
    context.drawImage(picture, (picture.width - side) / 2, (picture.height - side) / 2, side, side, 0, 0, width, height);
    const data = context.getImageData(0, 0, width, height).data, plane = height * width;
    values = new Float32Array(channels * plane);
    for (let i = 0; i < plane; i++) {
      const [r, g, b] = [data[4 * i], data[4 * i + 1], data[4 * i + 2]];
      if (channels === 1) values[i] = (.299 * r + .587 * g + .114 * b) / 255;
      else [r, g, b].forEach((v, c) => { values[c * plane + i] = v / 255; });
    }
    shown = drawing = null;
    paint();
    go();
  }).catch(() => { byId("state").textContent = "This file is no image that the browser reads."; });
}

// A recording of the reader's own.
async function takeRecording(file) {
  try {
    const found = await framesOf(file.name, new Uint8Array(await file.arrayBuffer()), NET.input[0], height, width);
    values = found.frames;
    shown = null;
    [...byId("samples").children].forEach((button) => button.setAttribute("aria-pressed", "false"));
    paint();
    play();
    await go();
    const scaled = found.sensor ? `, scaled from ${found.sensor.join(" x ")} pixels` : "";
    byId("state").textContent += ` ${found.events} events${scaled}.`;
  } catch (error) {
    byId("state").textContent = `${file.name} is not read: ${error.message}.`;
  }
}

function listen() {
  const take = NET.events ? takeRecording : takeImage;
  byId("samples").append(...NET.samples.map((sample, i) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = sample.name;
    button.addEventListener("click", () => choose(i));
    return button;
  }));
  const steps = byId("steps");
  steps.min = NET.encoding === "ttfs" ? 2 : 1;
  steps.max = NET.events ? NET.input[0] : Math.max(8, 2 * NET.T);
  steps.value = byId("shown").textContent = NET.T;
  steps.addEventListener("input", go);
  byId("clear").addEventListener("click", clear);
  byId("file").addEventListener("change", (event) => event.target.files[0] && take(event.target.files[0]));
  byId("clear").hidden = NET.events;
  if (draws) {
    let last = null;
    canvas.classList.add("draw");
    const at = (event) => {
      const box = canvas.getBoundingClientRect();
      return [(event.clientX - box.left) / box.width * ground, (event.clientY - box.top) / box.height * ground];
    };
    canvas.addEventListener("pointerdown", (event) => {
      if (!drawing) clear();
      canvas.setPointerCapture(event.pointerId);
      line(last = at(event), last);
    });
    canvas.addEventListener("pointermove", (event) => last && line(last, last = at(event)));
    canvas.addEventListener("pointerup", () => { last = null; go(); });
    // By keyboard: arrows draw, with shift they move the pen only.
    let place = [ground / 2, ground / 2];
    canvas.addEventListener("keydown", (event) => {
      const way = { ArrowLeft: [-4, 0], ArrowRight: [4, 0], ArrowUp: [0, -4], ArrowDown: [0, 4], " ": [0, 0] }[event.key];
      if (!way) return;
      event.preventDefault();
      if (!drawing) clear();
      const next = place.map((value, i) => Math.min(ground - 4, Math.max(4, value + way[i])));
      if (event.key === " " || !event.shiftKey) line(place, next), go();
      place = next;
    });
  }
  document.addEventListener("dragover", (event) => event.preventDefault());
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    if (event.dataTransfer.files[0]) take(event.dataTransfer.files[0]);
  });
}

// For tests and the curious: what PyTorch said of the samples, and what is computed here.
window.gallery = {
  values: () => Array.from(values),
  ready: (async () => {
    listen();
    try {
      await load();
    } catch (error) {
      byId("state").textContent = `The net cannot run in this browser: ${error.message}`;
      throw error;
    }
    await choose(0);
    byId("stage").setAttribute("aria-busy", "false");
  })(),
  logitsOf: async (index) => {
    await choose(index);
    return (await simulate(NET.T, () => {})).logits;
  },
};
