// The benchmark: a server as its own process on one core, driven from this process on another, over TLS, with real
// logins. Measured from outside: /proc tells processor time and memory (Linux), the clients count every delivery.
//
//   npm run bench -- [--svg FILE] [--only WORD] [--seconds N] [--server ours|node|deno|ngircd|bare]
//   npm run bench -- --soak MINUTES [--svg FILE]
import { type ChildProcess, spawn } from "node:child_process";
import crypto from "node:crypto";
import { once } from "node:events";
import fs from "node:fs";
import net from "node:net";
import os from "node:os";
import path from "node:path";
import { parseArgs } from "node:util";
import tls from "node:tls";
import { selfSigned } from "../chat.ts";
import { logIn, register } from "./helpers.ts";

const { values: OPTIONS } = parseArgs({
  options: {
    svg: { type: "string" },
    only: { type: "string", default: "" },
    seconds: { type: "string", default: "10" },
    server: { type: "string", multiple: true },
    soak: { type: "string" },
    driver: { type: "boolean", default: false },
    witness: { type: "string" },
  },
});
const ROOT = path.join(import.meta.dirname, "..");
const SECONDS = Number(OPTIONS.seconds);
const [SERVER_CORE, DRIVER_CORE] = os.cpus().length > 1 ? ["0", "1"] : ["0", "0"];

// ---- Servers under test

/** A running server, and what the operating system says about it. */
class Subject {
  readonly name: string;
  readonly port: number;
  readonly child: ChildProcess;

  constructor(name: string, port: number, child: ChildProcess) {
    this.name = name;
    this.port = port;
    this.child = child;
  }

  /** Processor time of all its threads, in microseconds. */
  cpu(): number {
    let nanoseconds = 0;
    for (const task of fs.readdirSync(`/proc/${this.child.pid}/task`)) {
      try {
        nanoseconds += Number(fs.readFileSync(`/proc/${this.child.pid}/task/${task}/schedstat`, "utf8").split(" ")[0]);
      } catch {
        // the thread has ended
      }
    }
    return nanoseconds / 1000;
  }

  get hasAccounts(): boolean {
    return /^(chat|fair)/.test(this.name);
  }

  /** Resident memory in KiB. */
  memory(): number {
    return Number(/VmRSS:\s*(\d+)/.exec(fs.readFileSync(`/proc/${this.child.pid}/status`, "utf8"))?.[1]);
  }

  async stop(): Promise<void> {
    this.child.kill("SIGTERM");
    if (this.child.exitCode === null && this.child.signalCode === null) await once(this.child, "close");
  }
}

const pinned = (command: readonly string[]) => ["taskset", "-c", SERVER_CORE, ...command] as const;

process.setMaxListeners(100);

function start([file = "", ...args]: readonly string[], env: Readonly<Record<string, string>> = {}): ChildProcess {
  const child = spawn(file, args, { stdio: ["ignore", "ignore", "pipe"], env: { ...process.env, ...env } });
  process.on("exit", () => child.kill("SIGKILL"));
  return child;
}

/** A server that tells its port as `serve` does. */
async function telling(name: string, child: ChildProcess): Promise<Subject> {
  let told = "";
  child.stderr?.setEncoding("utf8").on("data", (text: string) => told += told.length < 10_000 ? text : "");
  while (!/join \S+:(\d+)\//.test(told)) await once(child.stderr ?? child, "data");
  return new Subject(name, Number(/join \S+:(\d+)\//.exec(told)?.[1]), child);
}

function startOurs(name: string, command: readonly string[], rate = 0): Promise<Subject> {
  const options = ["--rate", String(rate), "--max-clients", "10000", "--per-address", "10000"];
  return telling(name, start(pinned([...command, "serve", "127.0.0.1:0", ...options])));
}

function makeCertificate(): { key: string; cert: string } {
  const { privateKey } = crypto.generateKeyPairSync("ec", { namedCurve: "P-256" });
  return { key: privateKey.export({ type: "pkcs8", format: "pem" }).toString(), cert: selfSigned(privateKey) };
}

/** What a TLS server on this runtime costs that does nothing at all. */
function startBare(): Promise<Subject> {
  const program = `const { KEY: key, CERT: cert } = process.env;
    const server = require("node:tls").createServer({ key, cert, minVersion: "TLSv1.3" }, (socket) =>
      socket.on("data", (bytes) => socket.write(bytes)).on("error", () => {}));
    server.listen(0, "127.0.0.1", () => console.error("join x:" + server.address().port + "/"))`;
  const { key: KEY, cert: CERT } = makeCertificate();
  const flags = ["--max-semi-space-size=1", "--no-maglev"];
  return telling("bare TLS", start(pinned([process.execPath, ...flags, "-e", program]), { KEY, CERT }));
}

async function startNgircd(): Promise<Subject> {
  const home = fs.mkdtempSync(path.join(os.tmpdir(), "chat-bench-"));
  process.on("exit", () => fs.rmSync(home, { recursive: true, force: true }));
  fs.chmodSync(home, 0o755);
  const { key, cert } = makeCertificate();
  fs.writeFileSync(path.join(home, "key.pem"), key);
  fs.writeFileSync(path.join(home, "cert.pem"), cert);
  const port = 20_000 + crypto.randomInt(20_000);
  const config = `[Global]
    Name = irc.example.net
    Info = Benchmark
    Listen = 127.0.0.1
    Ports =
    [Limits]
    MaxConnections = 0
    MaxConnectionsIP = 0
    MaxPenaltyTime = 0
    PingTimeout = 600
    MaxJoins = 0
    [Options]
    DNS = no
    Ident = no
    PAM = no
    [SSL]
    CertFile = ${home}/cert.pem
    KeyFile = ${home}/key.pem
    Ports = ${port}`;
  fs.writeFileSync(path.join(home, "ngircd.conf"), config);
  const child = start(pinned(["/usr/sbin/ngircd", "-n", "-f", path.join(home, "ngircd.conf")]));
  for (let up = false; !up;) {
    await new Promise((later) => setTimeout(later, 100));
    up = await new Promise((resolve) => {
      const socket = tls.connect({ host: "127.0.0.1", port, rejectUnauthorized: false }, () => resolve(true));
      socket.on("error", () => resolve(false)).on("secureConnect", () => socket.destroy());
    });
  }
  return new Subject("ngircd", port, child);
}

const SUBJECTS: Readonly<Record<string, () => Promise<Subject>>> = {
  ours: () => startOurs("chat", [path.join(ROOT, "dist", "chat")]),
  node: () => startOurs("chat on Node", [process.execPath, path.join(ROOT, "dist", "chat.mjs")]),
  deno: () =>
    startOurs("chat on Deno", [
      "npx",
      "--yes",
      "deno@2.9.6",
      "run",
      "--allow-net",
      "--allow-env",
      path.join(ROOT, "chat.ts"),
    ]),
  ngircd: startNgircd,
  bare: startBare,
  /** With the limit on the rate that people have: its cases are the ones about floods. */
  fair: () => startOurs("fair", [path.join(ROOT, "dist", "chat")], 10),
};

// ---- Members

class Member {
  readonly nick: string;
  readonly socket: tls.TLSSocket;
  #pending = "";
  #wake: () => void = () => {};
  onText: (text: string) => void = (text) => {
    this.#pending += text;
    this.#wake();
  };

  constructor(nick: string, socket: tls.TLSSocket) {
    this.nick = nick;
    this.socket = socket;
    socket.setNoDelay(true);
    socket.on("data", (chunk: Buffer) => {
      const text = chunk.toString("latin1");
      if (text.startsWith("PING ")) socket.write(text.replace("PING", "PONG")); // who only listens is asked
      this.onText(text);
    });
    socket.on("error", () => {}).on("close", () => this.#wake());
  }

  send(...lines: readonly string[]): void {
    this.socket.write(lines.map((line) => `${line}\r\n`).join(""));
  }

  async wait(pattern: RegExp): Promise<RegExpExecArray> {
    for (;;) {
      const found = pattern.exec(this.#pending);
      if (found) {
        this.#pending = this.#pending.slice(found.index + found[0].length);
        return found;
      }
      if (this.socket.destroyed) throw new Error(`${this.nick} was closed: ${this.#pending.slice(-300)}`);
      await new Promise<void>((wake) => this.#wake = wake);
    }
  }
}

async function dial(subject: { readonly port: number }, nick: string): Promise<Member> {
  const socket = tls.connect({ host: "127.0.0.1", port: subject.port, rejectUnauthorized: false });
  await once(socket, "secureConnect");
  return new Member(nick, socket);
}

/** Makes an account, without entering. */
async function enlist(subject: { readonly port: number }, nick: string): Promise<void> {
  const member = await dial(subject, nick);
  await register(member, nick);
  member.socket.destroy();
}

/** Logs in by SCRAM, or just enters where there are no accounts, up to the end of the names of the room. */
async function enter(subject: Subject, nick: string): Promise<Member> {
  const member = await dial(subject, nick);
  if (subject.name === "ngircd") {
    member.send(`NICK ${nick}`, `USER ${nick} 0 * :${nick}`, "JOIN #chat");
    await member.wait(/ 366 \S+ #chat /);
  } else if (subject.name === "bare TLS") {
    member.send("a line of some length, as it is in a login");
    await member.wait(/\n/);
  } else await logIn(member, nick);
  return member;
}

/** Runs jobs, a few at a time. */
async function each<T>(count: number, job: (at: number) => Promise<T>, atOnce = 20): Promise<T[]> {
  const results: T[] = [];
  let next = 0;
  await Promise.all(Array.from({ length: Math.min(atOnce, count) }, async () => {
    while (next < count) {
      const at = next++;
      results[at] = await job(at);
    }
  }));
  return results;
}

const nickOf = (at: number) => `m${at}`;

async function crowd(subject: Subject, count: number): Promise<Member[]> {
  if (subject.hasAccounts) await each(count, (at) => enlist(subject, nickOf(at)));
  return await each(count, (at) => enter(subject, nickOf(at)));
}

// ---- Talking

/** What the members hear: each delivery is counted, and checked to be there once. */
class Ears {
  readonly members: readonly Member[];
  readonly latencies: number[] = [];
  deliveries = 0;
  /** Deliveries of each message so far, and who is told when it has reached everybody. */
  readonly #heard = new Map<number, { count: number; sum: number; done: () => void }>();
  readonly #expectedSum: number;
  #number = 0;
  faults = 0;

  constructor(members: readonly Member[]) {
    this.members = members;
    this.#expectedSum = members.length * (members.length - 1) / 2;
    for (const [at, member] of members.entries()) {
      let rest = "";
      member.onText = (text) => {
        const all = rest + text;
        const end = all.lastIndexOf("\n") + 1;
        rest = all.slice(end);
        for (let from = all.indexOf(":~"); from >= 0 && from < end; from = all.indexOf(":~", from + 2)) {
          const stop = all.indexOf("~", from + 2);
          const middle = all.indexOf(",", from);
          this.#hear(at, Number(all.slice(from + 2, middle)), Number(all.slice(middle + 1, stop)));
        }
      };
    }
  }

  #hear(at: number, number: number, sent: number): void {
    this.deliveries++;
    if (this.latencies.length < 5_000_000) this.latencies.push(performance.now() - sent);
    const heard = this.#heard.get(number);
    if (!heard) return void this.faults++;
    heard.count++;
    heard.sum += at;
    if (heard.count < this.members.length - 1) return;
    if (heard.sum !== 0) this.faults++;
    this.#heard.delete(number);
    heard.done();
  }

  /** Sends a message from a member; resolves when all others have it. */
  say(from: number): Promise<void> {
    const number = ++this.#number;
    return new Promise((done) => {
      this.#heard.set(number, { count: 0, sum: from - this.#expectedSum, done });
      this.members[from]?.send(
        `PRIVMSG #chat :~${number},${performance.now().toFixed(3)}~ and some words that people say`,
      );
    });
  }

  get missing(): number {
    return this.#heard.size;
  }
}

interface Figures {
  readonly [name: string]: number;
}

const percentile = (sorted: readonly number[], share: number) =>
  sorted[Math.min(sorted.length - 1, Math.floor(sorted.length * share))] ?? 0;

/** Runs `talk` for a while, after a warm-up, and measures the server meanwhile. */
async function measure(
  subject: Subject,
  ears: Ears,
  talk: (running: () => boolean) => Promise<unknown>,
): Promise<Figures> {
  await talk(until(Math.min(3, SECONDS)));
  const [cpu, at, deliveries] = [subject.cpu(), performance.now(), ears.deliveries];
  ears.latencies.length = 0;
  await talk(until(SECONDS));
  const seconds = (performance.now() - at) / 1000;
  const delivered = ears.deliveries - deliveries;
  if (ears.faults || ears.missing) {
    throw new Error(`${subject.name}: ${ears.missing} messages lost, ${ears.faults} doubled`);
  }
  const sorted = Float64Array.from(ears.latencies).sort() as unknown as number[];
  return {
    "deliveries/s": delivered / seconds,
    "µs/delivery": (subject.cpu() - cpu) / delivered,
    "p50 ms": percentile(sorted, 0.5),
    "p99 ms": percentile(sorted, 0.99),
    "max ms": percentile(sorted, 1),
  };
}

function until(seconds: number): () => boolean {
  const end = performance.now() + seconds * 1000;
  return () => performance.now() < end;
}

/** So many messages a second, from one member after the other. */
const paced = (ears: Ears, rate: number) => async (running: () => boolean) => {
  const all: Promise<void>[] = [];
  const began = performance.now();
  for (let sent = 0; running(); sent++) {
    all.push(ears.say(sent % ears.members.length));
    const wait = began + (sent + 1) * 1000 / rate - performance.now();
    if (wait > 0) await new Promise((later) => setTimeout(later, wait));
  }
  await Promise.all(all);
};

/** As fast as it goes, with so many messages under way, from so many members. */
const flying = (ears: Ears, inFlight: number, senders = ears.members.length) => async (running: () => boolean) => {
  let next = 0;
  await Promise.all(Array.from({ length: inFlight }, async () => {
    while (running()) await ears.say(next++ % senders);
  }));
};

// ---- Cases

async function talkCase(
  subject: Subject,
  members: number,
  how: (ears: Ears) => (running: () => boolean) => Promise<unknown>,
): Promise<Figures> {
  const all = await crowd(subject, members);
  const ears = new Ears(all);
  const figures = await measure(subject, ears, how(ears));
  for (const member of all) member.socket.destroy();
  return figures;
}

/** Pairs of members in a process of their own, whatever the driver is busy with: how long is it from one to the other? */
class Witness {
  readonly #child: ChildProcess;

  constructor(subject: Subject) {
    const command = ["-c", DRIVER_CORE, process.execPath, import.meta.filename, "--witness", String(subject.port)];
    this.#child = spawn("taskset", command, { stdio: ["ignore", "inherit", "inherit", "ipc"] });
  }

  /** The latencies since it was asked last, in milliseconds. */
  async latencies(): Promise<number[]> {
    this.#child.send("tell");
    const [latencies] = await once(this.#child, "message");
    return latencies.sort((one: number, other: number) => one - other);
  }

  stop(): void {
    this.#child.disconnect();
  }

  static async run(port: number): Promise<void> {
    let latencies: number[] = [];
    try {
      os.setPriority(-19); // what keeps the driver busy on this core is not the server's fault
    } catch {
      // only root may: then it is in the figures
    }
    const members = await each(20, async (at) => {
      await enlist({ port }, `witness${at}`);
      const member = await dial({ port }, `witness${at}`);
      await logIn(member, member.nick);
      member.send("PART #chat"); // what is said there would keep this process busy
      await member.wait(/ PART #chat/);
      return member;
    });
    process.on("message", () => {
      process.send?.(latencies);
      latencies = [];
    });
    process.on("disconnect", () => process.exit());
    for (let at = 0;; at = (at + 1) % 10) { // each says five lines a second
      const sent = performance.now();
      members[at]?.send(`PRIVMSG witness${at + 10} :${sent}`);
      await members[at + 10]?.wait(new RegExp(`:${sent}\\r\\n`));
      latencies.push(performance.now() - sent);
      await new Promise((later) => setTimeout(later, 20));
    }
  }
}

/** Ten who send as fast as TCP lets them. */
async function flooding(subject: Subject, share: number): Promise<Member[]> {
  const flood = Buffer.from(`PRIVMSG #chat :${"flood ".repeat(20)}\r\n`.repeat(1000));
  const nick = (at: number) => `flooder${share * 10}_${at}`;
  await each(10, (at) => enlist(subject, nick(at)));
  const flooders = await each(10, (at) => enter(subject, nick(at)));
  for (const { socket } of flooders) {
    const pour = () => {
      while (!socket.destroyed && socket.write(flood));
    };
    pour();
    socket.on("drain", pour);
  }
  return flooders;
}

/** What somebody can do to a server; `share` of it for a warm-up. */
type Harm = (subject: Subject, share: number) => Promise<unknown>;

const HARMS: Readonly<Record<string, Harm>> = {
  "ten flood": async (subject, share) => {
    const flooders = await flooding(subject, share);
    await new Promise((later) => setTimeout(later, 20_000 * share));
    for (const { socket } of flooders) socket.destroy();
  },
  "10,000 connections dropped at every stage": (subject, share) =>
    each(10_000 * share, async (at) => {
      const stage = at % 5;
      const socket = net.connect(subject.port, "127.0.0.1");
      await once(socket, "connect");
      if (stage === 1) socket.write("\x16\x03\x01\x02\x00\x01", "latin1"); // the beginning of a handshake
      if (stage < 2) return socket.destroy();
      const secure = tls.connect({ socket, rejectUnauthorized: false });
      secure.on("error", () => {});
      if (stage === 2) return setTimeout(() => socket.destroy(), 1); // in the middle of the handshake
      await once(secure, "secureConnect");
      if (stage === 4) secure.write("CAP LS 302\r\nNICK half");
      return secure.destroy();
    }),
  "100 slow handshakes, 100 at a byte a second": async (subject, share) => {
    const hello = Buffer.from("1603010200010001fc0303".padEnd(1000, "0"), "hex");
    const sockets = Array.from(
      { length: 200 },
      (_, at) =>
        at % 2
          ? net.connect(subject.port, "127.0.0.1")
          : tls.connect({ host: "127.0.0.1", port: subject.port, rejectUnauthorized: false }),
    );
    for (const socket of sockets) socket.on("error", () => {});
    for (let second = 0; second < 20 * share; second++) {
      for (const socket of sockets) if (!socket.destroyed) socket.write(hello.subarray(second, second + 1));
      await new Promise((later) => setTimeout(later, 1000));
    }
    for (const socket of sockets) socket.destroy();
  },
  "a million JOINs of new rooms": async (subject, share) => {
    const nick = `joiner${share * 10}`;
    await enlist(subject, nick);
    const member = await enter(subject, nick);
    for (let at = 0; at < 1000 * share; at++) {
      const rooms = Array.from({ length: 1000 }, (_, more) => `#r${at}.${more}`);
      member.send(...rooms.flatMap((room) => [`JOIN ${room}`, `PART ${room}`]), `PING :${at}.`);
      await member.wait(new RegExp(`PONG \\S+ ${at}\\.`));
    }
    member.socket.destroy();
  },
};

async function harmCase(subject: Subject, harm: Harm): Promise<Figures> {
  const rest = (ms: number) => new Promise((later) => setTimeout(later, ms));
  const witness = new Witness(subject);
  await rest(2000);
  await harm(subject, 0.1);
  await rest(2000);
  await witness.latencies();
  await rest(SECONDS * 1000);
  const [calm, before, at] = [await witness.latencies(), subject.memory(), performance.now()];
  await harm(subject, 1);
  const seconds = (performance.now() - at) / 1000;
  const [harmed, after] = [await witness.latencies(), subject.memory()];
  witness.stop();
  await rest(120_000); // the runtime gives back what it does not use when it has had nothing to do for a while
  return {
    "seconds": seconds,
    "p50 ms calm": percentile(calm, 0.5),
    "p50 ms": percentile(harmed, 0.5),
    "p90 ms calm": percentile(calm, 0.9),
    "p90 ms": percentile(harmed, 0.9),
    "p99 ms calm": percentile(calm, 0.99),
    "p99 ms": percentile(harmed, 0.99),
    "MiB before": before / 1024,
    "MiB after": after / 1024,
    "MiB two minutes later": subject.memory() / 1024,
  };
}

const CASES: Readonly<Record<string, (subject: Subject) => Promise<Figures>>> = {
  "talk: 200 members, 50/s": (subject) => talkCase(subject, 200, (ears) => paced(ears, 50)),
  "fast: 200 members, 20 in flight": (subject) => talkCase(subject, 200, (ears) => flying(ears, 20)),
  "fast: 200 members, 200 in flight": (subject) => talkCase(subject, 200, (ears) => flying(ears, 200)),
  "fast: 200 members, 20 in flight from one": (subject) => talkCase(subject, 200, (ears) => flying(ears, 20, 1)),
  "talk: 1000 members, 20/s": (subject) => talkCase(subject, 1000, (ears) => paced(ears, 20)),
  "join: 1000 members": async (subject) => {
    if (subject.hasAccounts) await each(1000, (at) => enlist(subject, nickOf(at)));
    await each(200, async () => (await dial(subject, "x")).socket.destroy());
    const before = subject.cpu();
    await each(1000, async () => (await dial(subject, "x")).socket.destroy());
    const handshakes = subject.cpu() - before;
    await new Promise((later) => setTimeout(later, 1000));
    const [cpu, at] = [subject.cpu(), performance.now()];
    const members = await each(1000, (member) => enter(subject, nickOf(member)));
    const seconds = (performance.now() - at) / 1000;
    const spent = subject.cpu() - cpu;
    for (const member of members) member.socket.destroy();
    return {
      "joins/s": 1000 / seconds,
      "µs/handshake": handshakes / 1000,
      "µs/join": spent / 1000,
      "µs/join beside the handshake": (spent - handshakes) / 1000,
    };
  },
  "memory: 1000 members": async (subject) => {
    const empty = subject.memory();
    const members = await crowd(subject, 1000);
    await new Promise((later) => setTimeout(later, 2000));
    const full = subject.memory();
    for (const member of members) member.socket.destroy();
    return { "MiB empty": empty / 1024, "MiB": full / 1024, "KiB/member": (full - empty) / 1000 };
  },
  "fair: 200 members, 50/s, ten flood": async (subject) => {
    const members = await crowd(subject, 200);
    const ears = new Ears(members);
    const calm = await measure(subject, ears, paced(ears, 50));
    const flooders = await flooding(subject, 1);
    const flooded = await measure(subject, ears, paced(ears, 50));
    for (const member of [...members, ...flooders]) member.socket.destroy();
    const [before = 0, p99 = 0] = [calm["p99 ms"], flooded["p99 ms"]];
    return { "p99 ms calm": before, "p99 ms flooded": p99, "ratio": p99 / before };
  },
  ...Object.fromEntries(
    Object.entries(HARMS).map(([name, harm]) => [
      `harm: ${name}`,
      (subject: Subject) => harmCase(subject, harm),
    ]),
  ),
  ...Object.fromEntries([100, 200, 500, 1000, 2000].map((count) => [
    `grow: ${count} members, 20/s`,
    (subject: Subject) => talkCase(subject, count, (ears) => paced(ears, 20)),
  ])),
};

/** Talk, joins, leaves, breaks and readings of history for some minutes: memory must not drift, nor a line be lost. */
async function soak(subject: Subject, minutes: number): Promise<string[]> {
  const [stable, restless] = [150, 50];
  const empty = subject.memory();
  const all = await crowd(subject, stable + restless);
  const ears = new Ears(all.slice(0, stable));
  const samples: { minute: number; mib: number }[] = [];
  const counts = { breaks: 0, leaves: 0, histories: 0 };
  const began = performance.now();
  const running = until(minutes * 60);
  const wait = (ms: number) => new Promise((later) => setTimeout(later, ms));
  const come = async (at: number) => {
    let member = all[at];
    while (running() && member) {
      await wait(1000 + crypto.randomInt(8000));
      member.send("CAP REQ :batch draft/chathistory", "CHATHISTORY LATEST #chat * 100");
      await member.wait(/BATCH -/);
      counts.histories++;
      if (crypto.randomInt(2)) member.socket.destroy();
      else member.send("QUIT :bye");
      counts[member.socket.destroyed ? "breaks" : "leaves"]++;
      member = await enter(subject, nickOf(at));
    }
    member?.socket.destroy();
  };
  const sample = async () => {
    while (running()) {
      samples.push({ minute: (performance.now() - began) / 60_000, mib: subject.memory() / 1024 });
      await wait(5000);
    }
  };
  const comers = Array.from({ length: restless }, (_, at) => come(stable + at));
  await Promise.all([paced(ears, 20)(running), sample(), ...comers]);
  const mean = (from: number, to: number) => {
    const some = samples.filter(({ minute }) => minute >= from && minute < to);
    return some.reduce((sum, { mib }) => sum + mib, 0) / some.length;
  };
  if (ears.faults || ears.missing) throw new Error(`${ears.missing} messages lost, ${ears.faults} doubled`);
  if (OPTIONS.svg) fs.writeFileSync(OPTIONS.svg, curve(samples));
  const [early, late] = [mean(minutes / 4, minutes / 2), mean(minutes * 3 / 4, minutes)];
  return [
    `soak: ${minutes} minutes, ${stable + restless} members, ${
      Object.entries(counts).map(([what, n]) => `${n} ${what}`).join(", ")
    }`,
    `  ${ears.deliveries} deliveries counted, none lost, none doubled`,
    `  memory: ${(empty / 1024).toFixed(1)} MiB empty, ${early.toFixed(1)} in the second quarter, ${
      late.toFixed(1)
    } in the last`,
  ];
}

// ---- Telling

type Results = Map<string, Map<string, Figures>>;

function table(results: Results): string[] {
  const lines: string[] = [];
  for (const [name, by] of results) {
    lines.push(name);
    for (const [subject, figures] of by) {
      lines.push(
        `  ${subject.padEnd(14)}${
          Object.entries(figures).map(([what, value]) =>
            `${what} ${value < 100 ? value.toFixed(2) : Math.round(value)}`
          ).join("   ")
        }`,
      );
    }
    const [one, other] = [by.get("chat"), by.get("ngircd")];
    if (!one || !other) continue;
    const ratios = Object.keys(one).map((what) => `${what} ${((one[what] ?? 0) / (other[what] ?? 0)).toFixed(2)}`);
    lines.push(`  ${"chat / ngircd".padEnd(14)}${ratios.join("   ")}`);
  }
  return lines;
}

/** The table as a picture. */
function picture(lines: readonly string[]): string {
  const escape = (text: string) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;");
  const width = 8.5 * Math.max(...lines.map((line) => line.length)) + 40;
  const rows = lines.map((line, at) =>
    `<text x="20" y="${40 + at * 20}" xml:space="preserve"${line.startsWith(" ") ? "" : ' font-weight="bold"'}>${
      escape(line)
    }</text>`
  );
  return `<svg xmlns="http://www.w3.org/2000/svg" width="${width}" height="${
    60 + lines.length * 20
  }" font-family="monospace" font-size="14">
<rect width="100%" height="100%" fill="white"/>
${rows.join("\n")}
</svg>
`;
}

/** Memory over time, as a picture. */
function curve(samples: readonly { minute: number; mib: number }[]): string {
  const [end, top] = [samples.at(-1)?.minute ?? 1, Math.max(...samples.map(({ mib }) => mib)) * 1.1];
  const points = samples.map(({ minute, mib }) => `${60 + minute / end * 700},${340 - mib / top * 300}`).join(" ");
  return `<svg xmlns="http://www.w3.org/2000/svg" width="800" height="400" font-family="monospace" font-size="14">
<rect width="100%" height="100%" fill="white"/>
<path d="M60 40 V340 H760" fill="none" stroke="black"/>
<text x="10" y="30">resident MiB, up to ${top.toFixed(0)}</text>
<text x="560" y="370">${end.toFixed(1)} minutes</text>
<polyline points="${points}" fill="none" stroke="steelblue" stroke-width="2"/>
</svg>
`;
}

async function main(): Promise<void> {
  if (OPTIONS.soak) {
    const subject = await startOurs("chat", [path.join(ROOT, "dist", "chat")]);
    console.log((await soak(subject, Number(OPTIONS.soak))).join("\n"));
    return await subject.stop();
  }
  const subjects = OPTIONS.server ?? (fs.existsSync("/usr/sbin/ngircd") ? ["ours", "ngircd"] : ["ours"]);
  const results: Results = new Map();
  for (const [name, run] of Object.entries(CASES)) {
    if (!name.includes(OPTIONS.only)) continue;
    const by = new Map<string, Figures>();
    const own = /^fair|flood/.test(name) ? ["fair"] : name.startsWith("harm") ? ["ours"] : subjects;
    for (const which of own) {
      const subject = await SUBJECTS[which]?.();
      if (!subject) throw new Error(`there is no ${which}`);
      by.set(subject.name, await run(subject));
      await subject.stop();
    }
    results.set(name, by);
    console.log(table(new Map([[name, by]])).join("\n"));
  }
  if (OPTIONS.svg) fs.writeFileSync(OPTIONS.svg, picture(table(results)));
}

if (OPTIONS.witness) await Witness.run(Number(OPTIONS.witness));
else if (OPTIONS.driver) await main();
else { // on a core of its own
  const child = spawn("taskset", ["-c", DRIVER_CORE, process.execPath, ...process.argv.slice(1), "--driver"], {
    stdio: "inherit",
  });
  child.on("exit", (status) => process.exit(status ?? 1));
}
