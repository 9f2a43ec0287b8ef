// The benchmark (Linux): each server runs on one core, and the clients that load it run in this process on another. All
// connections are TLS, all logins real. Everything is measured from outside: processor time and memory as /proc reports
// them, deliveries and latencies as the clients see them.
//
//   npm run bench -- [--only WORD]... [--server chat|node|deno|ngircd|bare]... [--seconds N] [--svg FILE]
//   npm run bench -- --soak MINUTES [--svg FILE]
import { execFileSync, fork, spawnSync } from "node:child_process";
import crypto from "node:crypto";
import { once } from "node:events";
import fs from "node:fs";
import net from "node:net";
import os from "node:os";
import path from "node:path";
import { pipeline } from "node:stream/promises";
import { setTimeout as sleep } from "node:timers/promises";
import type tls from "node:tls";
import { parseArgs } from "node:util";
import { selfSigned } from "../chat.ts";
import {
  BINARY,
  connect,
  environment,
  Irc,
  logIn,
  register,
  ROOT,
  Running,
  type Runtime,
  RUNTIMES,
  type Scope,
  which,
} from "./helpers.ts";

const { values: OPTIONS } = parseArgs({
  options: {
    only: { type: "string", multiple: true, default: [""] }, // the cases whose titles contain one of these
    server: { type: "string", multiple: true }, // instead of those that a case compares
    seconds: { type: "string", default: "10" }, // of each measurement
    svg: { type: "string" }, // a file for the results as a picture
    soak: { type: "string" },
    probe: { type: "string" }, // a port: this process is a LatencyProbe
  },
});
const SECONDS = Number(OPTIONS.seconds);
const [SERVER_CORE, LOAD_CORE] = os.cpus().length > 1 ? ["0", "1"] : ["0", "0"];

/** A scope that is closed by hand. */
class Cleanup implements Scope {
  readonly #tasks: (() => unknown)[] = [];

  after(task: () => unknown): void {
    this.#tasks.push(task);
  }

  async close(): Promise<void> {
    for (const task of this.#tasks.splice(0).reverse()) await task();
  }
}

// ---- Servers

type Command = readonly string[];
const pinned = (command: Command): Command => ["taskset", "-c", SERVER_CORE, ...command];

/** A running server, as the operating system sees it. */
interface Server {
  readonly name: string;
  readonly port: number;
  readonly hasAccounts: boolean;
  readonly running: Running;
  readonly noop: Command; // starts the same runtime, prints a line and ends
}

/** Processor time of all its threads, in microseconds. */
function cpuTime({ running: { child: { pid } } }: Server): number {
  const threads = fs.readdirSync(`/proc/${pid}/task`).map((thread) => {
    try {
      return Number(fs.readFileSync(`/proc/${pid}/task/${thread}/schedstat`, "utf8").split(" ")[0]) / 1000;
    } catch {
      return 0; // the thread has ended meanwhile
    }
  });
  return threads.reduce((sum, time) => sum + time, 0);
}

/** Resident memory in MiB. */
function memory({ running: { child: { pid } } }: Server): number {
  return Number(/VmRSS:\s*(\d+)/.exec(fs.readFileSync(`/proc/${pid}/status`, "utf8"))?.[1]) / 1024;
}

async function stop({ running }: Server): Promise<void> {
  running.child.kill("SIGTERM");
  await running.ended;
}

process.setMaxListeners(100);

/** Starts a server on its core. It ends with its scope, and with this process. */
function run(scope: Scope, command: Command, env: Readonly<Record<string, string>> = {}): Running {
  const running = new Running(scope, pinned(command), env);
  process.on("exit", () => running.child.kill("SIGKILL"));
  return running;
}

/** The port that a server prints as `chat serve` does: `join HOST:PORT/PIN`. */
async function printedPort({ err }: Running): Promise<number> {
  return Number((await err.wait(/join \S+:(\d+)\//))[1]);
}

async function startChat(scope: Scope, name: string, program: Command, rate = 0): Promise<Server> {
  const options = ["--rate", String(rate), "--max-clients", "10000", "--per-address", "10000"];
  const running = run(scope, [...program, "serve", "127.0.0.1:0", ...options]);
  return { name, port: await printedPort(running), hasAccounts: true, running, noop: [...program, "version"] };
}

const startChatOn = (runtime: Runtime) => (scope: Scope) => startChat(scope, `chat, ${runtime}`, RUNTIMES[runtime]());

function makeCertificate(): { readonly key: string; readonly cert: string } {
  const { privateKey } = crypto.generateKeyPairSync("ec", { namedCurve: "P-256" });
  return { key: privateKey.export({ type: "pkcs8", format: "pem" }).toString(), cert: selfSigned(privateKey) };
}

function temporaryFolder(): string {
  const folder = fs.mkdtempSync(path.join(os.tmpdir(), "chat-bench-"));
  process.on("exit", () => fs.rmSync(folder, { recursive: true, force: true }));
  return folder;
}

/** Makes an executable of a program, with the runtime and the settings of dist/chat. */
async function makeExecutable(program: string): Promise<string> {
  const folder = temporaryFolder();
  const [main = "", config = "", output = "", final = ""] = ["main.cjs", "sea.json", "raw", "bare"].map((name) =>
    path.join(folder, name)
  );
  const kept = fs.readFileSync(path.join(ROOT, "dist", "runtime", "chat.json"), "utf8");
  const settings: { readonly execArgv: readonly string[] } = JSON.parse(kept);
  fs.writeFileSync(main, program);
  fs.writeFileSync(config, JSON.stringify({ ...settings, main, output }));
  const engine = settings.execArgv.filter((option) => !/permission|allow|warning/.test(option));
  execFileSync(process.execPath, [...engine, "--build-sea", config], { stdio: "pipe" });
  // In chunks of 64 KiB, because build.mjs copies so: it decides how much of the file is resident.
  await pipeline(fs.createReadStream(output), fs.createWriteStream(final, { mode: 0o755 }));
  fs.rmSync(output);
  return final;
}

/** A TLS server that only keeps its connections. */
const BARE_SERVER = `
  const { KEY: key, CERT: cert } = process.env;
  const sockets = new Set();
  const server = require("node:tls").createServer({ key, cert, minVersion: "TLSv1.3" }, (socket) => {
    sockets.add(socket);
    socket.on("close", () => sockets.delete(socket)).on("error", () => {}).resume();
  });
  server.listen(0, "127.0.0.1", () => console.error("join bare:" + server.address().port + "/"));`;

const BARE_LINE = 'process.stdout.write("bare 1.0.0\\n");';

let bareExecutables: Promise<readonly string[]> | undefined;

async function startBare(scope: Scope): Promise<Server> {
  bareExecutables ??= Promise.all([makeExecutable(BARE_SERVER), makeExecutable(BARE_LINE)]);
  const [server = "", line = ""] = await bareExecutables;
  const { key: KEY, cert: CERT } = makeCertificate();
  const running = run(scope, [server], { KEY, CERT });
  return { name: "bare TLS", port: await printedPort(running), hasAccounts: false, running, noop: [line] };
}

async function startNgircd(scope: Scope): Promise<Server> {
  const folder = temporaryFolder();
  fs.chmodSync(folder, 0o755); // ngircd gives up its privileges
  const { key, cert } = makeCertificate();
  fs.writeFileSync(path.join(folder, "key.pem"), key);
  fs.writeFileSync(path.join(folder, "cert.pem"), cert);
  const port = 20_000 + crypto.randomInt(10_000);
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
    CertFile = ${folder}/cert.pem
    KeyFile = ${folder}/key.pem
    Ports = ${port}`;
  fs.writeFileSync(path.join(folder, "ngircd.conf"), config);
  const program = which("ngircd") ?? "ngircd";
  const running = run(scope, [program, "-n", "-f", path.join(folder, "ngircd.conf")]);
  for (let up = false; !up;) {
    await sleep(100);
    up = await connect(port).then((socket) => !!socket.destroy(), () => false);
  }
  return { name: "ngircd", port, hasAccounts: false, running, noop: [program, "--version"] };
}

type Start = (scope: Scope) => Promise<Server>;

const SERVERS: Readonly<Record<string, Start>> = {
  chat: (scope) => startChat(scope, "chat", [BINARY]),
  node: startChatOn("node"),
  deno: startChatOn("deno"),
  ngircd: startNgircd,
  bare: startBare,
  "chat, rate 10": (scope) => startChat(scope, "chat, rate 10", [BINARY], 10), // the default rate limit
};

// ---- Members

/** A connection that answers PING. */
class Member extends Irc {
  readonly nick: string;
  onText: ((text: string) => void) | undefined; // takes all text from now on

  constructor(scope: Scope, socket: tls.TLSSocket, nick: string) {
    super(scope, socket);
    this.nick = nick;
    this.closed.catch(() => {}); // where it matters, the next wait fails
    socket.setNoDelay(true);
  }

  override add(text: string): void {
    if (text.startsWith("PING ") || text.includes("\nPING ")) this.send("PONG :");
    if (this.onText) this.onText(text);
    else super.add(text);
  }
}

const dialAs = async (scope: Scope, port: number, nick: string) => new Member(scope, await connect(port), nick);

/** Makes an account and disconnects. */
async function registerAccount(scope: Scope, port: number, nick: string): Promise<void> {
  const member = await dialAs(scope, port, nick);
  await register(member, nick);
  member.socket.destroy();
}

/** Enters #chat, with a login by SCRAM if the server has accounts, up to the end of the list of names. */
async function enter(scope: Scope, server: Server, nick: string): Promise<Member> {
  const member = await dialAs(scope, server.port, nick);
  if (server.hasAccounts) await logIn(member, nick);
  else if (server.name === "ngircd") {
    member.send(`NICK ${nick}`, `USER ${nick} 0 * :${nick}`, "JOIN #chat");
    await member.wait(/ 366 \S+ #chat /);
  }
  member.forget();
  return member;
}

/** Runs so many jobs, at most 20 at once. */
async function runJobs<T>(count: number, job: (at: number) => Promise<T>): Promise<T[]> {
  const results: T[] = [];
  let next = 0;
  await Promise.all(Array.from({ length: Math.min(20, count) }, async () => {
    while (next < count) {
      const at = next++;
      results[at] = await job(at);
    }
  }));
  return results;
}

/** Registers accounts if the server has them, and logs in to them. */
async function enterAll(scope: Scope, server: Server, count: number, prefix = "m"): Promise<Member[]> {
  if (server.hasAccounts) await runJobs(count, (at) => registerAccount(scope, server.port, `${prefix}${at}`));
  return await runJobs(count, (at) => enter(scope, server, `${prefix}${at}`));
}

// ---- Load

/** A message that has not reached everybody yet. */
interface Pending {
  readonly sentAt: number;
  readonly done: () => void;
  missing: number; // deliveries
  sum: number; // of the positions of the members that miss it: 0 in the end if each got it once
}

/** Sends messages among members, and checks that each reaches every other member exactly once. */
class Traffic {
  readonly members: readonly Member[];
  readonly latencies: number[] = []; // in milliseconds
  deliveries = 0;
  duplicates = 0;
  readonly #pending = new Map<number, Pending>();
  #number = 0;

  constructor(members: readonly Member[]) {
    this.members = members;
    for (const [at, member] of members.entries()) {
      let rest = "";
      member.onText = (chunk) => {
        const text = rest + chunk;
        const end = text.lastIndexOf("\n") + 1;
        rest = text.slice(end);
        const now = performance.now();
        for (let from = text.indexOf(":~"); from >= 0 && from < end; from = text.indexOf(":~", from + 40)) {
          this.#deliver(at, readNumber(text, from + 2), now);
        }
      };
    }
  }

  get undelivered(): number {
    return this.#pending.size;
  }

  #deliver(at: number, number: number, now: number): void {
    this.deliveries++;
    const message = this.#pending.get(number);
    if (!message) return void this.duplicates++;
    if (this.latencies.length < 5_000_000) this.latencies.push(now - message.sentAt);
    message.sum -= at;
    if (--message.missing > 0) return;
    if (message.sum !== 0) this.duplicates++;
    this.#pending.delete(number);
    message.done();
  }

  /** Sends a message of one member. Resolves when all others have it. */
  send(from: number): Promise<void> {
    const number = ++this.#number;
    const count = this.members.length;
    const sum = count * (count - 1) / 2 - from;
    return new Promise((done) => {
      this.#pending.set(number, { sentAt: performance.now(), done, missing: count - 1, sum });
      this.members[from]?.send(`PRIVMSG #chat :~${number}~ and then some words, as many as people usually write`);
    });
  }

  /** So many messages a second, of one member after the other. */
  async paced(perSecond: number, isOver: () => boolean): Promise<void> {
    const sent: Promise<void>[] = [];
    const began = performance.now();
    while (!isOver()) {
      sent.push(this.send(sent.length % this.members.length));
      const wait = began + sent.length * 1000 / perSecond - performance.now();
      if (wait > 0) await sleep(wait);
    }
    await Promise.all(sent);
  }

  /** As many messages as possible, so many of them in flight at any time, of so many members in turn. */
  async inFlight(count: number, senders: number, isOver: () => boolean): Promise<void> {
    let next = 0;
    await Promise.all(Array.from({ length: count }, async () => {
      while (!isOver()) await this.send(next++ % senders);
    }));
  }
}

/** The decimal number at a position. */
function readNumber(text: string, at: number): number {
  let number = 0;
  for (let digit; (digit = text.charCodeAt(at) - 48) >= 0 && digit <= 9; at++) number = number * 10 + digit;
  return number;
}

function deadline(seconds: number): () => boolean {
  const end = performance.now() + seconds * 1000;
  return () => performance.now() >= end;
}

type Figures = Readonly<Record<string, number>>;

/** The value below which a share of the values lies. */
function percentile(values: readonly number[], share: number): number {
  const sorted = Float64Array.from(values).sort();
  return sorted[Math.min(sorted.length - 1, Math.floor(sorted.length * share))] ?? 0;
}

/** Measures a server under load, after a warm-up. */
async function measure(
  server: Server,
  traffic: Traffic,
  load: (isOver: () => boolean) => Promise<void>,
): Promise<Figures> {
  await load(deadline(Math.min(3, SECONDS)));
  const [before, at, cpu, ownCpu] = [traffic.deliveries, performance.now(), cpuTime(server), process.cpuUsage()];
  traffic.latencies.length = 0;
  await load(deadline(SECONDS));
  const [ms, serverCpu, { user, system }] = [
    performance.now() - at,
    cpuTime(server) - cpu,
    process.cpuUsage(ownCpu),
  ];
  const deliveries = traffic.deliveries - before;
  const { undelivered, duplicates, latencies } = traffic;
  if (undelivered || duplicates) throw new Error(`${server.name}: ${undelivered} lost, ${duplicates} duplicated`);
  return {
    "deliveries/s": deliveries / ms * 1000,
    "µs/delivery": serverCpu / deliveries,
    "p50 ms": percentile(latencies, 0.5),
    "p99 ms": percentile(latencies, 0.99),
    "max ms": percentile(latencies, 1),
    "server busy %": serverCpu / ms / 10,
    "load busy %": (user + system) / ms / 10, // at 100 the clients are what limits the figures
  };
}

// ---- Attacks

/** Measures private messages between pairs of members, in a process of its own that the load does not slow down. */
class LatencyProbe {
  readonly #child;

  constructor(scope: Scope, { port }: Server) {
    this.#child = fork(import.meta.filename, ["--probe", String(port)]);
    scope.after(() => this.#child.kill());
  }

  /** The latencies since the last call, in milliseconds. */
  async latencies(): Promise<readonly number[]> {
    this.#child.send("report");
    const [latencies] = await once(this.#child, "message");
    return latencies;
  }

  static async run(port: number): Promise<void> {
    let latencies: number[] = [];
    try {
      os.setPriority(-19); // the load shares this core; it must not count as latency of the server
    } catch {
      // only root may do that; then the figures include it
    }
    const scope = new Cleanup();
    const members = await runJobs(20, async (at) => {
      await registerAccount(scope, port, `probe${at}`);
      const member = await dialAs(scope, port, `probe${at}`);
      await logIn(member, member.nick);
      member.send("PART #chat"); // where the attacks happen
      await member.wait(/ PART #chat/);
      return member;
    });
    process.on("message", () => {
      process.send?.(latencies);
      latencies = [];
    });
    process.on("disconnect", () => process.exit());
    for (let at = 0;; at = (at + 1) % 10) {
      const [sender, receiver] = [members[at], members[at + 10]];
      const sentAt = performance.now();
      sender?.send(`PRIVMSG ${receiver?.nick} :${sentAt}`);
      await receiver?.wait(new RegExp(`:${sentAt}\\r\\n`));
      receiver?.forget();
      latencies.push(performance.now() - sentAt);
      await sleep(20);
    }
  }
}

/** Ten members that send as fast as TCP takes it. */
async function flood(scope: Scope, server: Server, prefix: string): Promise<Member[]> {
  const lines = Buffer.from(`PRIVMSG #chat :${"flood ".repeat(20)}\r\n`.repeat(1000));
  const members = await enterAll(scope, server, 10, prefix);
  for (const member of members) {
    const { socket } = member;
    const fill = () => {
      while (!socket.destroyed && socket.write(lines));
    };
    member.onText = () => {};
    socket.on("drain", fill);
    fill();
  }
  return members;
}

/** Attacks a server; a smaller share is the warm-up. */
type Attack = (scope: Scope, server: Server, share: number) => Promise<void>;

const ATTACKS: Readonly<Record<string, Attack>> = {
  "ten flooding members": async (scope, server, share) => {
    const members = await flood(scope, server, `flood${share * 10}_`);
    await sleep(20_000 * share);
    for (const { socket } of members) socket.destroy();
  },
  "10,000 connections closed at every stage": async (_scope, { port }, share) => {
    await runJobs(10_000 * share, async (at) => {
      const stage = at % 5;
      if (stage > 2) {
        const socket = await connect(port);
        if (stage === 4) socket.write("CAP LS 302\r\nNICK half");
        return void socket.on("error", () => {}).destroy();
      }
      const socket = net.connect(port, "127.0.0.1");
      await once(socket, "connect");
      if (stage === 1) socket.write("\x16\x03\x01\x02\x00\x01", "latin1"); // the beginning of a handshake
      if (stage < 2) return void socket.destroy();
      connect(port, { socket }).catch(() => {});
      setTimeout(() => socket.destroy(), 1); // in the middle of the handshake
    });
  },
  "100 unfinished handshakes, 100 of a byte a second": async (_scope, { port }, share) => {
    const hello = Buffer.from("1603010200010001fc0303".padEnd(1000, "0"), "hex");
    const raw = Array.from({ length: 100 }, () => net.connect(port, "127.0.0.1"));
    const secure = await runJobs(100, () => connect(port));
    const sockets = [...raw, ...secure];
    for (const socket of sockets) socket.on("error", () => {});
    for (let second = 0; second < 20 * share; second++) {
      for (const socket of sockets) if (!socket.destroyed) socket.write(hello.subarray(second, second + 1));
      await sleep(1000);
    }
    for (const socket of sockets) socket.destroy();
  },
  "a million JOINs of new rooms": async (scope, server, share) => {
    const [member] = await enterAll(scope, server, 1, `joiner${share * 10}_`);
    for (let at = 0; at < 1000 * share; at++) {
      const rooms = Array.from({ length: 1000 }, (_, more) => `#r${at}.${more}`);
      member?.send(...rooms.flatMap((room) => [`JOIN ${room}`, `PART ${room}`]), `PING :${at}.`);
      await member?.wait(new RegExp(`PONG \\S+ ${at}\\.`));
      member?.forget();
    }
    member?.socket.destroy();
  },
};

/** What other members notice of an attack, and what it costs in memory. */
async function attackCase(scope: Scope, server: Server, attack: Attack): Promise<Figures> {
  const probe = new LatencyProbe(scope, server);
  await sleep(2000);
  await attack(scope, server, 0.1);
  await sleep(2000);
  await probe.latencies();
  await sleep(SECONDS * 1000);
  const [calm, before, at] = [await probe.latencies(), memory(server), performance.now()];
  await attack(scope, server, 1);
  const seconds = (performance.now() - at) / 1000;
  const [attacked, after] = [await probe.latencies(), memory(server)];
  await sleep(120_000); // the runtime returns memory after a while without work
  return {
    seconds,
    "p50 ms before": percentile(calm, 0.5),
    "p50 ms": percentile(attacked, 0.5),
    "p90 ms before": percentile(calm, 0.9),
    "p90 ms": percentile(attacked, 0.9),
    "p99 ms before": percentile(calm, 0.99),
    "p99 ms": percentile(attacked, 0.99),
    "MiB before": before,
    "MiB after": after,
    "MiB two minutes later": memory(server),
  };
}

// ---- Cases

interface Case {
  readonly servers: readonly string[];
  run(scope: Scope, start: Start): Promise<Figures>;
}

type Load = (traffic: Traffic, isOver: () => boolean) => Promise<void>;

/** A case in which members talk. */
const talk = (count: number, load: Load): Case => ({
  servers: ["chat", "ngircd"],
  async run(scope, start) {
    const server = await start(scope);
    const traffic = new Traffic(await enterAll(scope, server, count));
    return await measure(server, traffic, (isOver) => load(traffic, isOver));
  },
});
const paced = (perSecond: number): Load => (traffic, isOver) => traffic.paced(perSecond, isOver);
const inFlight = (count: number, senders = 200): Load => (traffic, isOver) => traffic.inFlight(count, senders, isOver);

const LOGINS: Case = {
  servers: ["chat", "ngircd"],
  async run(scope, start) {
    const [server, count] = [await start(scope), 1000];
    const { port } = server;
    if (server.hasAccounts) await runJobs(count, (at) => registerAccount(scope, port, `m${at}`));
    const handshakes = async (number: number) => {
      await runJobs(number, async () => (await connect(port)).destroy());
    };
    await handshakes(200);
    const idle = cpuTime(server);
    await handshakes(count);
    const handshake = (cpuTime(server) - idle) / count;
    await sleep(1000);
    const [cpu, at] = [cpuTime(server), performance.now()];
    await runJobs(count, (member) => enter(scope, server, `m${member}`));
    const [seconds, login] = [(performance.now() - at) / 1000, (cpuTime(server) - cpu) / count];
    return {
      "logins/s": count / seconds,
      "µs/login": login,
      "µs/handshake": handshake,
      "µs/login without handshake": login - handshake,
    };
  },
};

const MEMORY: Case = {
  servers: ["chat", "bare", "ngircd"],
  async run(scope, start) {
    const server = await start(scope);
    const empty = memory(server);
    const [few, many] = [20, 1000];
    await enterAll(scope, server, few, "first");
    await sleep(1000);
    const withFew = memory(server); // the first connections load most of the code that all others share
    await enterAll(scope, server, many - few);
    await sleep(2000);
    const full = memory(server);
    return {
      "MiB empty": empty,
      "MiB with 20": withFew,
      "MiB with 1000": full,
      "KiB/connection from 20 on": (full - withFew) * 1024 / (many - few),
      "KiB/connection from 0 on": (full - empty) * 1024 / many,
    };
  },
};

const START_UP: Case = {
  servers: ["chat", "bare"],
  async run(scope, start) {
    const { noop: [file = "", ...args] } = await start(scope);
    const times = { run: [] as number[], listen: [] as number[] };
    for (let repeat = 0; repeat < 30; repeat++) {
      const began = performance.now();
      spawnSync("taskset", pinned([file, ...args]).slice(1), { env: environment() });
      const ended = performance.now();
      const server = await start(scope);
      times.run.push(ended - began);
      times.listen.push(performance.now() - ended);
      await stop(server);
    }
    return {
      "ms to run": percentile(times.run, 0.5), // `chat version`, a program that prints as much
      "ms to run, best": percentile(times.run, 0),
      "ms to listen": percentile(times.listen, 0.5),
      "ms to listen, best": percentile(times.listen, 0),
    };
  },
};

const RATE_LIMIT: Case = {
  servers: ["chat, rate 10"],
  async run(scope, start) {
    const server = await start(scope);
    const traffic = new Traffic(await enterAll(scope, server, 200));
    const load = (isOver: () => boolean) => traffic.paced(50, isOver);
    const { "p99 ms": calm = 0 } = await measure(server, traffic, load);
    await flood(scope, server, "flood");
    const { "p99 ms": flooded = 0 } = await measure(server, traffic, load);
    return { "p99 ms before": calm, "p99 ms": flooded, "ratio": flooded / calm };
  },
};

const CASES: Readonly<Record<string, Case>> = {
  "paced: 200 members, 50 lines a second": talk(200, paced(50)),
  "in flight: 200 members, 20 lines": talk(200, inFlight(20)),
  "in flight: 200 members, 200 lines": talk(200, inFlight(200)),
  "one sender: 200 members, 20 lines in flight": talk(200, inFlight(20, 1)),
  "logins: 1000 members": LOGINS,
  "memory: 1000 connections": MEMORY,
  "start-up": START_UP,
  "rate limit: 200 members, 50 lines a second, and ten flooding members": RATE_LIMIT,
  ...Object.fromEntries(
    Object.entries(ATTACKS).map(([title, attack]): [string, Case] => [`attack: ${title}`, {
      servers: [title.includes("flood") ? "chat, rate 10" : "chat"],
      run: async (scope, start) => await attackCase(scope, await start(scope), attack),
    }]),
  ),
  ...Object.fromEntries([100, 200, 500, 1000, 2000].map((count) => [
    `growth: ${count} members, 20 lines a second`,
    talk(count, paced(20)),
  ])),
};

/** Lines, logins, lost connections and readings of the history for minutes: memory must not grow, no line be lost. */
async function soak(scope: Scope, server: Server, minutes: number): Promise<string[]> {
  const [stable, changing] = [150, 50];
  const empty = memory(server);
  const all = await enterAll(scope, server, stable + changing);
  const traffic = new Traffic(all.slice(0, stable));
  const samples: { minute: number; mib: number }[] = [];
  const counts = { "lost connections": 0, "QUITs": 0, "readings of the history": 0 };
  const began = performance.now();
  const isOver = deadline(minutes * 60);
  const comeAndGo = async (member: Member | undefined) => {
    while (!isOver() && member) {
      await sleep(1000 + crypto.randomInt(8000));
      member.forget();
      member.send("CAP REQ :batch draft/chathistory", "CHATHISTORY LATEST #chat * 100");
      await member.wait(/BATCH -/);
      counts["readings of the history"]++;
      const loses = crypto.randomInt(2) === 0;
      if (loses) member.socket.destroy();
      else member.send("QUIT :bye");
      counts[loses ? "lost connections" : "QUITs"]++;
      member = await enter(scope, server, member.nick);
    }
  };
  const sample = async () => {
    while (!isOver()) {
      samples.push({ minute: (performance.now() - began) / 60_000, mib: memory(server) });
      await sleep(5000);
    }
  };
  await Promise.all([traffic.paced(20, isOver), sample(), ...all.slice(stable).map(comeAndGo)]);
  const { undelivered, duplicates, deliveries } = traffic;
  if (undelivered || duplicates) throw new Error(`${undelivered} messages lost, ${duplicates} duplicated`);
  if (OPTIONS.svg) fs.writeFileSync(OPTIONS.svg, curve(samples));
  const mean = (from: number, to: number) => {
    const some = samples.filter(({ minute }) => minute >= from && minute < to);
    return (some.reduce((sum, { mib }) => sum + mib, 0) / some.length).toFixed(1);
  };
  const [early, late] = [mean(minutes / 4, minutes / 2), mean(minutes * 3 / 4, minutes)];
  const events = Object.entries(counts).map(([what, count]) => `${count} ${what}`).join(", ");
  return [
    `soak: ${minutes} minutes, ${stable + changing} members, ${events}`,
    `  ${deliveries} deliveries, none lost, none duplicated`,
    `  MiB: ${empty.toFixed(1)} empty, ${early} in the second quarter, ${late} in the last quarter`,
  ];
}

// ---- Output

/** The lines of a case: a line for each server, and the ratios of the first to the others. */
function report(title: string, results: ReadonlyMap<string, Figures>): string[] {
  const row = (name: string, figures: Figures) => {
    const cells = Object.entries(figures).map(([what, value]) =>
      `${what} ${value < 100 ? value.toFixed(2) : Math.round(value)}`
    );
    return `  ${name.padEnd(16)}${cells.join("   ")}`;
  };
  const lines = [title, ...Array.from(results, ([name, figures]) => row(name, figures))];
  const [first, ...others] = results;
  for (const [name, other] of others) {
    const ratios = Object.entries(first?.[1] ?? {}).filter(([what]) => !what.endsWith("%"))
      .map(([what, value]) => [what, value / (other[what] ?? 0)]);
    lines.push(row(`${first?.[0]} / ${name}`, Object.fromEntries(ratios)));
  }
  return lines;
}

/** The results as a picture. */
function picture(lines: readonly string[]): string {
  const escape = (text: string) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;");
  const [width, height] = [8.5 * Math.max(...lines.map((line) => line.length)) + 40, 60 + lines.length * 20];
  const rows = lines.map((line, at) => {
    const weight = line.startsWith(" ") ? "normal" : "bold";
    return `<text x="20" y="${40 + at * 20}" xml:space="preserve" font-weight="${weight}">${escape(line)}</text>`;
  });
  return `<svg xmlns="http://www.w3.org/2000/svg" width="${width}" height="${height}"
  font-family="monospace" font-size="14">
<rect width="100%" height="100%" fill="white"/>
${rows.join("\n")}
</svg>
`;
}

/** Memory over time as a picture. */
function curve(samples: readonly { readonly minute: number; readonly mib: number }[]): string {
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

/** Runs something in a scope of its own. */
async function inScope<T>(work: (scope: Scope) => Promise<T>): Promise<T> {
  const scope = new Cleanup();
  try {
    return await work(scope);
  } finally {
    await scope.close();
  }
}

const serversOf = ({ servers }: Case) =>
  (servers.includes("bare") || servers.includes("ngircd") ? OPTIONS.server ?? servers : servers)
    .filter((name) => name !== "ngircd" || which("ngircd"));

async function main(): Promise<void> {
  for (const signal of ["SIGINT", "SIGTERM", "SIGHUP"]) process.on(signal, () => process.exit(1)); // with the servers
  execFileSync("taskset", ["-a", "-p", "-c", LOAD_CORE, String(process.pid)], { stdio: "pipe" });
  if (OPTIONS.soak) {
    const lines = await inScope(async (scope) =>
      await soak(scope, await startChat(scope, "chat", [BINARY]), Number(OPTIONS.soak))
    );
    return console.log(lines.join("\n"));
  }
  const lines: string[] = [];
  for (const [title, one] of Object.entries(CASES)) {
    if (!OPTIONS.only.some((word) => title.includes(word))) continue;
    const results = new Map<string, Figures>();
    for (const name of serversOf(one)) {
      const start = SERVERS[name];
      if (!start) throw new Error(`there is no server ${name}`);
      results.set(name, await inScope((scope) => one.run(scope, start)));
    }
    const reported = report(title, results);
    console.log(reported.join("\n"));
    lines.push(...reported);
  }
  if (OPTIONS.svg) fs.writeFileSync(OPTIONS.svg, picture(lines));
}

if (OPTIONS.probe) await LatencyProbe.run(Number(OPTIONS.probe));
else await main();
