// What the suites share: servers and clients as processes, a hand-held IRC connection, terminals in tmux.
// Everything waits for events. Each wait gives up after WAIT_MS and says what it saw instead.
import { type ChildProcess, execFileSync, spawn } from "node:child_process";
import { EventEmitter, once } from "node:events";
import fs from "node:fs";
import net from "node:net";
import os from "node:os";
import path from "node:path";
import crypto from "node:crypto";
import { mock, type TestContext } from "node:test";
import tls from "node:tls";
import {
  type Clock,
  deriveKeys,
  formatVerifier,
  type Keys,
  makeIdentity,
  scramClient,
  serve,
  type ServeOptions,
  type Serving,
  verifierOf,
} from "../chat.ts";

export const ROOT = path.join(import.meta.dirname, "..");
export const BINARY = path.join(ROOT, "dist", process.platform === "win32" ? "chat.exe" : "chat");
export const WAIT_MS = 30_000;

/** Where a program of the system is; undefined if it is not there. */
export function which(program: string): string | undefined {
  const folders = (process.env["PATH"] ?? "").split(path.delimiter).concat("/usr/sbin", "/sbin");
  return folders.map((folder) => path.join(folder, program)).find((file) => fs.existsSync(file));
}

/** Options of a test that wants programs: skipped where one is missing, but never in CI, where all of them are. */
export function wants(...programs: readonly string[]): { skip: string | false } {
  const missing = programs.filter((program) => !which(program));
  if (missing.length && process.env["CI"]) throw new Error(`CI must have ${missing.join(", ")}`);
  return { skip: missing.length ? `${missing.join(", ")} not installed` : false };
}

/** The Deno that npx has fetched for the style checks. */
function deno(): string {
  const args = ["--yes", "-p", "deno@2.9.6", "-c", "command -v deno"];
  return execFileSync("npx", args, { encoding: "utf8", stdio: "pipe" }).trim().split("\n").at(-1) ?? "";
}

let denoPath: string | undefined;

/** The ways to run the program: each is a command and its first arguments. */
export const RUNTIMES: Readonly<Record<"binary" | "node" | "deno" | "node20", () => readonly string[]>> = {
  binary: () => [BINARY],
  node: () => [process.execPath, path.join(ROOT, "chat.ts")],
  deno: () => [denoPath ??= deno(), "run", "--allow-net", "--allow-env", "--no-prompt", path.join(ROOT, "chat.ts")],
  node20: () => [process.env["npm_node_execpath"] ?? "node", path.join(ROOT, "dist", "chat.mjs")],
};
export type Runtime = keyof typeof RUNTIMES;

/** Environment for a child: nothing of ours that would change what it does. */
export function environment(more: Readonly<Record<string, string>> = {}): Record<string, string> {
  const kept = Object.entries(process.env).filter(([name]) => !/^(CHAT_|NO_COLOR|FORCE_COLOR|NODE_)/.test(name));
  return { ...Object.fromEntries(kept) as Record<string, string>, ...more };
}

/** Lets the event loop turn until something holds, which no event tells. */
export async function until(holds: () => boolean, otherwise: () => string, ms = WAIT_MS): Promise<void> {
  for (const late = performance.now() + ms; !holds(); await new Promise(setImmediate)) {
    if (performance.now() > late) throw new Error(otherwise());
  }
}

/** Text that comes in pieces, and those who wait for something in it. */
export class Text extends EventEmitter {
  all = "";
  #taken = 0;

  constructor() {
    super();
    this.setMaxListeners(0);
  }

  add(piece: string | Buffer): void {
    this.all += piece;
    this.emit("more");
  }

  /** Drops what has been taken, so that a long conversation does not fill the memory. */
  forget(): void {
    this.all = this.all.slice(this.#taken);
    this.#taken = 0;
  }

  /** Waits until the pattern matches what was not taken yet, and takes everything up to its end. */
  async wait(pattern: RegExp, ms = WAIT_MS): Promise<RegExpExecArray> {
    const late = AbortSignal.timeout(ms);
    for (;;) {
      const found = pattern.exec(this.all.slice(this.#taken));
      if (found) {
        this.#taken += found.index + found[0].length;
        return found;
      }
      try {
        await once(this, "more", { signal: late });
      } catch {
        throw new Error(`no ${pattern} in:\n${this.all.slice(this.#taken).slice(-3000)}`);
      }
    }
  }
}

/** What owns connections and processes, and closes them at its end: a test, or a case of the benchmark. */
export interface Scope {
  after(close: () => unknown): void;
}

/** A child process, its output as it comes, and its end. One that is `detached` ends with all that it has started. */
export class Running {
  readonly out = new Text();
  readonly err = new Text();
  readonly child: ChildProcess;
  /** The exit status; a signal is told by its name. */
  readonly ended: Promise<number | string>;

  constructor(
    test: Scope,
    command: readonly string[],
    env: Readonly<Record<string, string>> = {},
    options: { readonly cwd?: string; readonly detached?: boolean } = {},
  ) {
    const [file = "", ...args] = command;
    this.child = spawn(file, args, { env: environment(env), stdio: ["pipe", "pipe", "pipe"], ...options });
    this.child.stdout?.setEncoding("utf8").on("data", (text: string) => this.out.add(text));
    this.child.stderr?.setEncoding("utf8").on("data", (text: string) => this.err.add(text));
    this.child.stdin?.on("error", () => {}); // the child may be gone
    this.ended = new Promise((resolve) => this.child.on("close", (code, signal) => resolve(code ?? signal ?? "?")));
    test.after(async () => {
      try {
        process.kill((options.detached ? -1 : 1) * (this.child.pid ?? NaN), "SIGKILL");
      } catch {
        // it has ended
      }
      await this.ended;
    });
  }

  write(text: string): void {
    this.child.stdin?.write(text);
  }

  end(text = ""): void {
    this.child.stdin?.end(text);
  }
}

export interface Served extends Running {
  readonly port: number;
  readonly pin: string;
}

/** Starts `chat serve` on a free port and waits until it says how to join. */
export async function serveProcess(
  test: TestContext,
  args: readonly string[] = [],
  { runtime = "binary" as Runtime, env = {}, address = "127.0.0.1:0" } = {},
): Promise<Served> {
  const running = new Running(test, [...RUNTIMES[runtime](), "serve", address, ...args], env);
  const [, port, pin] = await running.err.wait(/ join \S+:(\d+)\/(\S+)\n/);
  return Object.assign(running, { port: Number(port), pin: String(pin) });
}

/** Starts `chat join` with pipes. */
export function joinProcess(
  test: TestContext,
  address: string,
  args: readonly string[] = [],
  { runtime = "binary" as Runtime, env = {} as Readonly<Record<string, string>>, password = "secret" } = {},
): Running {
  const secrets = password ? { CHAT_PASSWORD: password } : {};
  return new Running(test, [...RUNTIMES[runtime](), "join", address, ...args], { ...secrets, ...env });
}

/** A port on which nothing listens, yet. */
export async function freePort(): Promise<number> {
  const server = net.createServer().listen(0, "127.0.0.1");
  await once(server, "listening");
  const { port } = server.address() as net.AddressInfo;
  server.close();
  await once(server, "close");
  return port;
}

/** A clock that stands still until a test moves it. */
export class FakeClock implements Clock {
  #now = 1_000_000;
  #wall = Date.now();
  #timers: { readonly at: number; readonly run: () => void }[] = [];
  wall(): number {
    return this.#wall;
  }
  now(): number {
    return this.#now;
  }
  after(ms: number, run: () => void): () => void {
    const timer = { at: this.#now + ms, run };
    this.#timers.push(timer);
    return () => this.#timers = this.#timers.filter((one) => one !== timer);
  }
  /** Moves the clock, and runs the timers that have expired, in order. */
  tick(ms: number): void {
    const until = this.#now + ms;
    for (;;) {
      const [next] = this.#timers.filter(({ at }) => at <= until).sort((one, other) => one.at - other.at);
      if (!next) break;
      this.#wall += Math.max(0, next.at - this.#now);
      this.#now = Math.max(this.#now, next.at);
      this.#timers = this.#timers.filter((one) => one !== next);
      next.run();
    }
    this.#wall += until - this.#now;
    this.#now = until;
  }
  /** Sets the time of day, as an operator or NTP does; durations do not change. */
  setWall(time: number): void {
    this.#wall = time;
  }
}

/**
 * Makes scrypt quick in this process, for suites in which it is not what is tested: another function of the password
 * and the salt stands in for it.
 * @param test the only test that it is quick in
 * @returns how often it has been called
 */
export function quickScrypt(test?: TestContext): () => number {
  type Callback = (error: Error | null, key: Buffer) => void;
  const quick = (password: string, salt: Buffer, _bytes: number, _options: unknown, done: Callback) => {
    setImmediate(done, null, crypto.createHash("sha256").update(salt).update(password).digest());
  };
  const { mock: mocked } = (test?.mock ?? mock).method(crypto, "scrypt", quick);
  return () => mocked.callCount();
}

/** A seeded generator of random numbers (mulberry32): each call returns an integer from 0 to `below` - 1. */
export function random(seed: number): (below: number) => number {
  return (below) => {
    seed = seed + 0x6d2b79f5 | 0;
    let mixed = Math.imul(seed ^ seed >>> 15, 1 | seed);
    mixed = mixed + Math.imul(mixed ^ mixed >>> 7, 61 | mixed) ^ mixed;
    return ((mixed ^ mixed >>> 14) >>> 0) % below;
  };
}

const identity = makeIdentity({});

/** A server in this process, with no limit on the rate and quiet unless told otherwise. */
export async function serveHere(test: TestContext, options: Partial<ServeOptions> = {}): Promise<Serving> {
  const serving = await serve({ host: "127.0.0.1", port: 0, identity, rate: 0, perAddress: 1000, ...options });
  test.after(() => serving.stop("The test is over"));
  return serving;
}

/** A connection that is held by hand: lines out, patterns in. */
export class Irc extends Text {
  readonly socket: tls.TLSSocket;
  readonly closed: Promise<unknown>;
  #tokens = 0;

  constructor(test: Scope, socket: tls.TLSSocket) {
    super();
    this.socket = socket;
    socket.setEncoding("utf8").on("data", (text: string) => this.add(text));
    socket.on("error", () => {});
    this.closed = once(socket, "close");
    test.after(() => socket.destroy());
  }

  send(...lines: readonly string[]): void {
    this.socket.write(lines.map((line) => `${line}\r\n`).join(""));
  }

  /** All that comes until the server has executed everything that was sent. */
  async sync(): Promise<string> {
    const token = `sync-${++this.#tokens}`;
    const from = this.all.length;
    this.send(`PING ${token}`);
    await this.wait(new RegExp(`PONG chat.server ${token}\r\n`));
    return this.all.slice(from);
  }
}

/** Connects to a server by TLS, whatever its certificate. */
export async function connect(port: number, options: tls.ConnectionOptions = {}): Promise<tls.TLSSocket> {
  const socket = tls.connect({ host: "127.0.0.1", port, rejectUnauthorized: false, ...options });
  await once(socket, "secureConnect");
  return socket;
}

/** The SHA-256 of a server's key, as irssi takes it. */
export async function keyHash(port: number): Promise<string> {
  const socket = await connect(port);
  const der = socket.getPeerX509Certificate()?.publicKey.export({ type: "spki", format: "der" }) ?? "";
  socket.destroy();
  return crypto.createHash("sha256").update(der).digest("hex").replace(/..(?=.)/g, "$&:").toUpperCase();
}

/** Connects to a server by TLS, for a test that sends its lines by hand. */
export async function dial(test: Scope, port: number, options: tls.ConnectionOptions = {}): Promise<Irc> {
  return new Irc(test, await connect(port, options));
}

/** Connects and logs in by PASS, with these capabilities, up to the end of the names of the first room. */
export async function enter(
  test: TestContext,
  port: number,
  nick: string,
  caps = "",
  password = "secret",
): Promise<Irc> {
  const irc = await dial(test, port);
  if (caps) irc.send(`CAP REQ :${caps}`);
  irc.send(`PASS :${password}`, `NICK ${nick}`, `USER ${nick} 0 * :${nick} X`);
  if (caps) irc.send("CAP END");
  await irc.wait(/ 366 \S+ #\S+ :End of \/NAMES list\r\n/);
  return irc;
}

const base64 = (text: string) => Buffer.from(text).toString("base64");
let keys: Promise<Keys> | undefined; // of all whom `register` registers

/** A connection that is held by hand, or by the benchmark. */
interface Hand {
  readonly socket: tls.TLSSocket;
  send(...lines: readonly string[]): void;
  wait(pattern: RegExp): Promise<RegExpExecArray>;
}

/** Registers a nick by a verifier, which costs the server no scrypt. */
export async function register(hand: Hand, nick: string): Promise<void> {
  keys ??= deriveKeys("secret");
  hand.send("CAP LS 302", `NICK ${nick}`, `REGISTER * * ${formatVerifier(verifierOf(await keys))}`);
  await hand.wait(/REGISTER SUCCESS/);
}

/** Logs in by SCRAM who is registered, and enters, up to the end of the names of the first room. */
export async function logIn(hand: Hand, nick: string, caps = ""): Promise<void> {
  const certificate = hand.socket.getPeerX509Certificate()?.raw ?? "";
  const scram = scramClient(
    nick,
    () => keys ??= deriveKeys("secret"),
    crypto.createHash("sha256").update(certificate).digest(),
  );
  hand.send(`CAP REQ :sasl ${caps}`, `NICK ${nick}`, `USER ${nick} 0 * :${nick}`, "AUTHENTICATE SCRAM-SCRYPT-PLUS");
  await hand.wait(/AUTHENTICATE \+\r\n/);
  for (let step = await scram.next(); !step.done;) {
    hand.send(`AUTHENTICATE ${base64(step.value)}`);
    const [, answer = ""] = await hand.wait(/AUTHENTICATE (\S+)\r\n/);
    step = await scram.next(Buffer.from(answer, "base64").toString());
  }
  hand.send("AUTHENTICATE +", "CAP END");
  await hand.wait(/ 366 \S+ #chat /);
}

/** A terminal in tmux, on a server of its own. */
export class Terminal {
  readonly #socket: string;

  constructor(test: TestContext, command: readonly string[], { columns = 80, rows = 24, env = {} } = {}) {
    this.#socket = path.join(fs.mkdtempSync(path.join(os.tmpdir(), "chat-tmux-")), "s");
    const size = ["-x", String(columns), "-y", String(rows)];
    const line = command.map((word) => `'${word.replaceAll("'", "'\\''")}'`).join(" ");
    const told = environment({ TERM: "xterm-256color", LANG: "C.UTF-8", ...env });
    const run = `${line}; echo "[exit $?]"; exec cat`;
    execFileSync("tmux", ["-u", "-f", "/dev/null", "-S", this.#socket, "new-session", "-d", ...size, run], {
      env: told,
    });
    test.after(() => {
      this.#tmux("kill-server");
      fs.rmSync(path.dirname(this.#socket), { recursive: true });
    });
  }

  #tmux(...args: readonly string[]): string {
    return execFileSync("tmux", ["-S", this.#socket, ...args], { encoding: "utf8", stdio: "pipe" });
  }

  /** Types a text, and Enter. */
  enter(text: string): void {
    this.type(text);
    this.keys("Enter");
  }

  type(text: string): void {
    this.#tmux("send-keys", "-l", "--", text);
  }

  keys(...names: readonly string[]): void {
    this.#tmux("send-keys", ...names);
  }

  /** Pastes a text, with marks around it if the program has asked for them. */
  paste(text: string): void {
    this.#tmux("set-buffer", "--", text);
    this.#tmux("paste-buffer", "-p");
  }

  resize(columns: number, rows: number): void {
    this.#tmux("resize-window", "-x", String(columns), "-y", String(rows));
  }

  /** What tmux knows about the pane, in its format language. */
  ask(format: string): string {
    return this.#tmux("display-message", "-p", format).trimEnd();
  }

  /** What is on the screen; with `history` also what has scrolled away; with `escapes` colours as escape sequences. */
  screen({ history = false, escapes = false } = {}): string {
    const args = [...history ? ["-S", "-5000"] : [], ...escapes ? ["-e"] : []];
    return this.#tmux("capture-pane", "-p", ...args).replace(/\s+$/, "");
  }

  /** Waits until the last prompt and all behind it are this, whatever the spaces and the line ends in it. */
  async untilTyped(expected: string): Promise<void> {
    const chars = [...expected].map((char) =>
      /[\p{L}\p{N}\p{M}\p{So}]/u.test(char) ? char : `\\x${char.charCodeAt(0).toString(16)}`
    );
    await this.wait(new RegExp(`${chars.join("\\s*")}$`));
  }

  /** Waits until the screen matches. tmux tells no event for that, so it is looked at again and again. */
  async wait(pattern: RegExp, options: { history?: boolean; escapes?: boolean } = {}): Promise<RegExpExecArray> {
    const until = Date.now() + WAIT_MS;
    for (;;) {
      const seen = this.screen(options);
      const found = pattern.exec(seen);
      if (found) return found;
      if (Date.now() > until) throw new Error(`no ${pattern} on the screen:\n${seen}`);
      await new Promise((resolve) => setTimeout(resolve, 25));
    }
  }
}
