// Recordings of event cameras from files: .npz and .npy with t, x, y, p; .bin of N-MNIST; AEDAT 2.0 of a DVS128. Each
// reader gives {t, x, y, p}, as spikezoo/data/events/readers.py does, and `framesOf` counts them into frames.
"use strict";

const TYPES = { b1: "Uint8", i1: "Int8", u1: "Uint8", i2: "Int16", u2: "Uint16", i4: "Int32", u4: "Uint32", i8: "BigInt64", u8: "BigUint64" };
const ALIASES = { t: ["t", "ts", "timestamp"], x: ["x"], y: ["y"], p: ["p", "pol", "polarity", "on"] };

// Bytes as numpy stored them: columns by name, or one nameless column.
function readNpy(content) {
  const view = new DataView(content.buffer, content.byteOffset, content.byteLength);
  if (String.fromCharCode(...content.subarray(1, 6)) !== "NUMPY") throw new Error("it is no file of numpy");
  const long = content[6] > 1, start = (long ? 12 : 10) + (long ? view.getUint32(8, true) : view.getUint16(8, true));
  const header = String.fromCharCode(...content.subarray(long ? 12 : 10, start));
  const shape = /'shape': \((\d+),\)/.exec(header);
  if (!shape) throw new Error("its arrays are no lists");
  const fields = [...header.matchAll(/\('(\w*)', '([<>|=])(\w)(\d+)'\)/g)].map((found) => found.slice(1));
  if (!fields.length) fields.push(["", ...(/'descr': '([<>|=])(\w)(\d+)'/.exec(header) || []).slice(1)]);
  const stride = fields.reduce((sum, field) => sum + Number(field[3]), 0), columns = {};
  let place = start;
  for (const [name, order, kind, bytes] of fields) {
    const type = TYPES[kind + bytes], first = place;
    place += Number(bytes);
    if (type) columns[name] = Float64Array.from({ length: Number(shape[1]) }, (_, i) => Number(view[`get${type}`](first + i * stride, order !== ">")));
  }
  return columns;
}

// The parts of a zip file by name.
async function unzip(content) {
  const view = new DataView(content.buffer, content.byteOffset, content.byteLength), parts = {};
  let end = content.length - 22;
  while (end >= 0 && view.getUint32(end, true) !== 0x06054b50) end--;
  if (end < 0) throw new Error("it is truncated, or no .npz file");
  let place = view.getUint32(end + 16, true);
  for (let left = view.getUint16(end + 10, true); left > 0; left--) {
    const [method, size, name, extra, comment, local] = [[10, 16], [20, 32], [28, 16], [30, 16], [32, 16], [42, 32]]
      .map(([offset, bits]) => view[`getUint${bits}`](place + offset, true));
    const start = local + 30 + view.getUint16(local + 26, true) + view.getUint16(local + 28, true);
    const stored = content.slice(start, start + size);
    const key = String.fromCharCode(...content.subarray(place + 46, place + 46 + name));
    parts[key.replace(/\.npy$/, "")] = method ? await inflate(stored, "deflate-raw") : stored;
    place += 46 + name + extra + comment;
  }
  return parts;
}

const READERS = {
  npz: async (content) => {
    const parts = await unzip(content);
    return Object.fromEntries(Object.entries(parts).map(([name, part]) => [name, readNpy(part)[""]]));
  },
  npy: readNpy,
  bin: (content) => { // five bytes an event; row 240 stands for a clock that ran over
    if (content.length % 5) throw new Error("it is truncated: an event has 5 bytes");
    const columns = { t: [], x: [], y: [], p: [] };
    let over = 0;
    for (let i = 0; i < content.length; i += 5) {
      const [x, y, high, middle, low] = content.subarray(i, i + 5);
      if (y === 240) { over += 1; continue; }
      columns.t.push(((high & 127) << 16 | middle << 8 | low) + over * 8192), columns.x.push(x), columns.y.push(y), columns.p.push(high >> 7);
    }
    return columns;
  },
  aedat: (content) => { // text, then eight bytes an event, address and time
    let start = 0;
    const header = [];
    while (content[start] === 35) {
      const stop = content.indexOf(10, start);
      const line = stop < 0 ? "\0" : String.fromCharCode(...content.subarray(start, stop));
      if (/[\0-\x08\x0b\x0c\x0e-\x1f]/.test(line)) break; // an event that begins with the byte of '#'
      header.push(line), start = stop + 1;
    }
    if (!/AER-DAT2/.test(header[0])) throw new Error("it is no AEDAT 2.0");
    if (header.some((line) => /AEChip|Source \d/.test(line) && !/DVS128/i.test(line))) throw new Error("its camera is no DVS128");
    for (const blank of [2, 1]) if (content[start + blank - 1] === 10 && (content.length - start) % 8 === blank) start += blank;
    if ((content.length - start) % 8) throw new Error("it is truncated: an event has 8 bytes");
    const view = new DataView(content.buffer, content.byteOffset), columns = { t: [], x: [], y: [], p: [] };
    for (let i = start; i < content.length; i += 8) {
      const address = view.getUint32(i);
      if (address & 0x80008000) continue; // no event of a pixel
      columns.t.push(view.getUint32(i + 4)), columns.x.push(127 - (address >> 8 & 127));
      columns.y.push(127 - (address >> 1 & 127)), columns.p.push(1 - (address & 1));
    }
    return columns;
  },
};

// Events [T, 2, H, W] of a recording, equally many in every frame, and the size that it was scaled from, if it was.
async function framesOf(name, content, T, height, width) {
  const kind = name.toLowerCase().split(".").pop().replace("aedat2", "aedat");
  if (!READERS[kind]) throw new Error(`it is a .${kind}, read are ${Object.keys(READERS).map((each) => "." + each).join(" ")}`);
  const columns = await READERS[kind](content);
  const [t, x, y, p] = Object.values(ALIASES).map((names) => columns[names.find((each) => columns[each])]);
  if (!t || !x || !y || !p) throw new Error("it lacks t, x, y or p as whole numbers");
  if (!t.length) throw new Error("it is empty");
  if (t.some((value, i) => i && value < t[i - 1])) throw new Error("its time runs backwards: sort the events by t");
  const most = (list) => list.reduce((a, b) => Math.max(a, b), 0) + 1;
  let sensor = kind === "aedat" ? [128, 128] : [most(y), most(x)];
  if (sensor[0] <= height && sensor[1] <= width) sensor = null; // it fits, and stays where it is
  const [down, across] = sensor ? [height / sensor[0], width / sensor[1]] : [1, 1];
  const frames = new Float32Array(T * 2 * height * width), each = Math.floor(t.length / T);
  for (let i = 0; i < t.length; i++) {
    const frame = each ? Math.min(T - 1, Math.floor(i / each)) : T - 1, channel = p[i] > 0 ? 1 : 0;
    frames[((frame * 2 + channel) * height + Math.floor(y[i] * down)) * width + Math.floor(x[i] * across)] += 1;
  }
  return { frames, events: t.length, sensor };
}
