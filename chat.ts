/**
 * chat: an encrypted group chat in one file. `chat serve` opens a room, `chat join` enters it. The wire between them is
 * IRC over TLS 1.3, so that any IRC client can sit in the room as well.
 *
 * The chapters build on each other, from top to bottom: Basics, Protocol, Identity, Passwords, Accounts; then the
 * server: Rooms, Delivery, Session, Server, Registration, Commands, Console, Listener; then the client: Terminal,
 * Interfaces, Full terminal, Link, Login, Connection, Transcript, Conversations, Client, Slash commands; and what is
 * typed in a shell: Options, Operator, Command line.
 *
 *   bytes → Listener → Inbox (lines, rate limit) → Session → handler in Commands ─→ Reply → Outbox → Listener → bytes
 *                                                                └→ log (Event) → Delivery → each reader's Outbox ┘
 *
 * There are three imports. The program cannot open a file or start another program: accounts, keys and history live in
 * memory and end with the process, unless a shell keeps the accounts.
 */
import crypto from "node:crypto";
import readline from "node:readline";
import tls from "node:tls";

/* =====================================================================================================================
 * Basics
 * The limits are in one table, so that an operator can see what a peer may cost. Time comes from one clock, which tests
 * replace. Three small mechanisms enforce most of the limits: a rate limit, a counter per network, and a semaphore.
 * ================================================================================================================== */

export const VERSION = "1.0.0";

export const LIMITS = Object.freeze({
  // Lines
  bodyBytes: 512, // of a line without its tags, CR LF included (RFC 1459, section 2.3)
  clientTagBytes: 4_096, // of the tags that a client sends, "@" and the space included
  serverTagBytes: 8_191, // of the tags that a server sends, likewise
  targets: 4, // of one message
  nick: 20, // characters of a nick
  room: 50, // bytes of a room's name
  topic: 300, // bytes of a topic
  text: 200, // bytes of a real name, an away message or a reason
  // Connections
  handshakeMs: 60_000, // for the TLS handshake: a person may be reading the certificate
  silenceMs: 60_000, // without a byte before login
  loginMs: 300_000, // from connecting to being logged in
  unauthenticated: 500, // connections before login, or half of --max-clients if that is more
  handshakes: 0.5, // per network (IPv6: /48) and second, for each connection that --per-address allows
  handshakeBurst: 10, // of them at once; further ones wait
  pingMs: 60_000, // of silence before a PING is sent, and then until the connection times out
  sleepMs: 10_000, // a longer gap between two sweeps means that the machine was asleep: then nobody times out
  graceMs: 15_000, // for which a member whose last connection was lost stays present
  stopMs: 1_500, // to write out the queues when the server stops
  // Rates. A unit is a line, or its equivalent in bytes.
  burstSeconds: 5, // whose units may be used at once
  loginRate: 10, // units a second before login, whatever --rate says
  chunkUnits: 0.1, // charged for every chunk received
  unitBytes: 512, // charged as one unit when received
  replyBytes: 2_048, // charged as one unit when replied
  debtUnits: 1_000, // over the rate limit, while reading is paused; a member beyond it is disconnected
  silentBytes: 512, // a second on the socket that bring no text: KeyUpdates, empty records
  silentBurst: 24_576, // of them at once: the beginning of a large record is among them
  silentStart: 2_048, // of them at once before login, while the server is busy
  silentMs: 10, // between two checks of them
  lateMs: 2, // by which a check is late when the server is busy
  // Memory
  inputBytes: 256 * 1024, // received on a connection and not yet executed
  pauseBytes: 256 * 1024, // in a connection's outgoing queue, before its own lines have to wait
  writeBytes: 64 * 1024, // written to a connection at once; TLS keeps a copy until the network has taken them
  queueBytes: 1024 * 1024, // in a connection's outgoing queue, before it is closed
  allQueuesBytes: 64 * 1024 * 1024, // in all of them, before the connection with the longest one is closed
  historyBytes: 64 * 1024 * 1024, // of all logs together
  chathistory: 100, // messages read by one CHATHISTORY
  missed: 1_000, // private messages replayed to a member who returns
  rooms: 1_000,
  roomsPerMember: 20,
  roomIdleMs: 600_000, // for which an empty room with a log is kept
  accounts: 10_000,
  instances: 8, // client instances per account whose idempotency keys are remembered
  knownNetworks: 8, // per account, from which it has logged in
  rateKeys: 100_000, // in one keyed rate limit
  unreadBytes: 256 * 1024, // written to a terminal or a pipe that nobody reads; what is more is not shown
  unreadRows: 1_000, // that wait to be drawn on such a terminal; older ones are not shown
  failuresPerMinute: 60, // lines in the log about failed logins and handshakes, per network
  // Guessing and hoarding
  newAccountsPerHour: 20, // per network (IPv6: /48), loopback excepted
  wrongPasswords: 3, // per connection
  triesPerAccount: 10, // at once per account and network, then one every 30 s
  triesPerNetwork: 100, // at once, besides --per-address, then one a second; an IPv6 network is a /48 here
  triesOfUnknown: 100, // at once per account, from networks where it never logged in, then one every 10 s
  shownOfKind: 3, // lines of one kind that --explain shows, before it counts them
  scrypts: 2, // password hashings at once
  admitMs: 3_600_000, // for which /admit lets a nick register
  // The operator
  againMs: 10_000, // within which stopping a room that is not empty is confirmed
  // The client
  joinMs: 10_000, // for a login
  outbox: 500, // lines typed that wait for the connection
  window: 50, // lines sent and not yet acknowledged
  held: 2_000, // messages of rooms whose history is being loaded
  codeTries: 3, // to type the check code
  slowMs: 1_000, // after which a message that was not acknowledged is shown as waiting
  leaveMs: 2_000, // within which a second Ctrl-C leaves
  steadyMs: 10_000, // for which a connection must have lasted to reset the back-off
  timeoutMs: 30_000, // without progress after the end of the input, before the rest is given up
  hushMs: 30_000, // of a server's silence before a PING, and then until the connection counts as lost
});

/** An error in words for a person; `status` is the exit status that it leads to. */
export class Fault extends Error {
  readonly hint: string; // what to try; empty if there is nothing
  readonly status: number;
  constructor(message: string, hint = "", status = 1) {
    super(message);
    this.hint = hint;
    this.status = status;
  }
}

// tls keeps a small buffer for each connection. Cut out of a shared pool, each would keep the whole pool alive.
Buffer.poolSize = 0;

/** Where the time comes from. */
export interface Clock {
  wall(): number; // the time of day in ms since 1970, for people and for events; it may jump
  now(): number; // a monotonic time in ms, for every duration
  after(ms: number, run: () => void): () => void; // calls `run` after some ms; returns a function that cancels it
}

export const systemClock: Clock = {
  wall: () => Date.now(),
  now: () => performance.now(),
  after(ms, run) {
    const timer = setTimeout(run, ms);
    return () => clearTimeout(timer);
  },
};

/** A rate limit (GCRA, the generic cell rate algorithm). A rate of 0 means no limit. */
class RateLimit {
  readonly #clock: Clock;
  readonly #msPerUnit: number;
  readonly #burstMs: number;
  #paidAt = -Infinity; // when everything charged so far will have been paid off
  /** @param burst units that may be charged at once, besides those that become free over time */
  constructor(clock: Clock, perSecond: number, burst: number) {
    this.#clock = clock;
    this.#msPerUnit = perSecond > 0 ? 1000 / perSecond : 0;
    this.#burstMs = burst * this.#msPerUnit;
  }
  charge(units: number): void {
    this.#paidAt = Math.max(this.#paidAt, this.#clock.now()) + units * this.#msPerUnit;
  }
  /** Takes a charge back. The limit never becomes fuller than full. */
  refund(units: number): void {
    this.#paidAt -= units * this.#msPerUnit;
  }
  /** For how many ms nothing may be done until the limit is kept again; 0 if it is kept. */
  get throttleMs(): number {
    return Math.max(0, this.#paidAt - this.#clock.now() - this.#burstMs);
  }
  /** How many units beyond the limit have been charged. */
  get excess(): number {
    return this.#msPerUnit && this.throttleMs / this.#msPerUnit;
  }
  get isFull(): boolean {
    return this.#paidAt <= this.#clock.now();
  }
}

/**
 * Charges one unit to each of some limits if all of them allow it.
 * @returns for how many ms they do not; 0 if it is charged
 */
function tryCharge(...limits: readonly RateLimit[]): number {
  for (const limit of limits) limit.charge(1);
  const waitMs = Math.max(...limits.map(({ throttleMs }) => throttleMs));
  if (waitMs) { for (const limit of limits) limit.refund(1); }
  return waitMs;
}

/** A rate limit per key. Keys that are full again are forgotten one by one. */
class KeyedRateLimit {
  readonly #limits = new Map<string, RateLimit>(); // the key used longest ago first
  readonly #make: () => RateLimit;
  constructor(clock: Clock, perSecond: number, burst: number) {
    this.#make = () => new RateLimit(clock, perSecond, burst);
  }
  of(key: string): RateLimit {
    const limit = this.#limits.get(key) ?? this.#make();
    this.#limits.delete(key);
    this.#limits.set(key, limit);
    for (const [oldest, { isFull }] of this.#limits) {
      if (oldest === key || (!isFull && this.#limits.size <= LIMITS.rateKeys)) break;
      this.#limits.delete(oldest);
    }
    return limit;
  }
}

/** A connection, as one that takes a place. It does so from its accept on, until it is closed. */
interface Occupant {
  readonly address: string;
  evict(): void; // closes it, because another one needs the place
}

/**
 * The places that connections take: per network, and in all for those that have not logged in. When one is missing,
 * the oldest of these makes way: of the same network, or of the site that has most of them.
 */
class Occupancy {
  readonly #perNetwork = new Map<string, Set<Occupant>>();
  readonly #guests = new Map<string, Set<Occupant>>(); // those that have not logged in, by site; the oldest first
  readonly #networkLimit: number;
  readonly #guestLimit: number;
  guests = 0; // connections before login, of all sites
  constructor(networkLimit: number, guestLimit: number) {
    this.#networkLimit = networkLimit;
    this.#guestLimit = guestLimit;
  }
  /** Whether a network has more connections than it may: members, who do not make way. */
  isCrowded(address: string): boolean {
    return (this.#perNetwork.get(networkOf(address))?.size ?? 0) > this.#networkLimit;
  }
  enter(occupant: Occupant): void {
    const { address } = occupant;
    const neighbours = this.#perNetwork.get(networkOf(address)) ?? new Set();
    if (neighbours.size >= this.#networkLimit) this.#evictFrom(neighbours);
    if (this.guests >= this.#guestLimit) {
      const [busiest] = [...this.#guests.values()].sort((one, other) => other.size - one.size);
      this.#evictFrom(busiest ?? []);
    }
    const guests = this.#guests.get(siteOf(address)) ?? new Set();
    this.#perNetwork.set(networkOf(address), neighbours.add(occupant));
    this.#guests.set(siteOf(address), guests.add(occupant));
    this.guests++;
  }
  /** A connection has logged in. */
  settle(occupant: Occupant): void {
    const site = siteOf(occupant.address);
    const guests = this.#guests.get(site);
    if (!guests?.delete(occupant)) return;
    this.guests--;
    if (!guests.size) this.#guests.delete(site);
  }
  leave(occupant: Occupant): void {
    this.settle(occupant);
    const network = networkOf(occupant.address);
    const neighbours = this.#perNetwork.get(network);
    neighbours?.delete(occupant);
    if (!neighbours?.size) this.#perNetwork.delete(network);
  }
  #evictFrom(occupants: Iterable<Occupant>): void {
    for (const one of occupants) {
      if (!this.#guests.get(siteOf(one.address))?.has(one)) continue;
      this.leave(one);
      return one.evict();
    }
  }
}

/** Runs a few jobs at once. The keys of those that wait take turns, so that nobody's many jobs delay another's one. */
class Semaphore {
  readonly #waiting = new Map<string, (() => void)[]>(); // the key whose turn is next first
  #free: number;
  constructor(permits: number) {
    this.#free = permits;
  }
  async run<T>(key: string, job: () => Promise<T>): Promise<T> {
    if (this.#free > 0) this.#free--;
    else await new Promise<void>((start) => this.#waiting.set(key, [...this.#waiting.get(key) ?? [], start]));
    try {
      return await job();
    } finally {
      this.#pass();
    }
  }
  #pass(): void {
    for (const [key, [start, ...more]] of this.#waiting) {
      this.#waiting.delete(key);
      if (more.length) this.#waiting.set(key, more);
      return start?.();
    }
    this.#free++;
  }
}

const sha256 = (data: Buffer | string) => crypto.createHash("sha256").update(data).digest();
/** scrypt (RFC 7914), in the thread pool. */
const scrypt = (password: Buffer | string, salt: Buffer | string, bytes: number, options: crypto.ScryptOptions) =>
  new Promise<Buffer>((resolve, reject) => {
    crypto.scrypt(password, salt, bytes, options, (error, key) => error ? reject(error) : resolve(key));
  });
const base64 = (data: Buffer) => data.toString("base64");
const fromBase64 = (text = "") => Buffer.from(text, "base64");
const sumOf = <T>(items: readonly T[], sizeOf: (item: T) => number) => items.reduce((sum, one) => sum + sizeOf(one), 0);
const plural = (count: number, one: string, many: string) => `${count} ${count === 1 ? one : many}`;

/** Looks up a row of a table, but none of what every object inherits. */
const rowOf = <T>(table: Readonly<Partial<Record<string, T>>>, name: string) =>
  Object.hasOwn(table, name) ? table[name] : undefined;

/** The network that an address is counted under: an IPv4 address, or the /64 of an IPv6 address. */
export function networkOf(address: string, prefix = 64): string {
  if (!address.includes(":")) return address;
  const plain = address.replace(/^::ffff:(?=\d+\.)/i, "").replace(/%.*/, "");
  if (plain.includes(".")) return plain;
  const [left = [], right = []] = plain.split("::").map((part) => part.split(":").filter(Boolean));
  const zeros = Array<string>(Math.max(0, 8 - left.length - right.length)).fill("0");
  return `${[...left, ...zeros, ...right].slice(0, prefix / 16).join(":")}::/${prefix}`;
}

/** The most that one subscriber usually has: an IPv4 address, or an IPv6 /48. */
const siteOf = (address: string) => networkOf(address, 48);

const isLoopback = (address: string): boolean => /^(::ffff:)?127\.|^::1$/i.test(address);

/** How the program was invoked: every command that is printed for copying begins like that. */
const CHAT = invocation();

function invocation(): string {
  const [, file = "chat"] = process.argv; // the executable as it was typed, or the whole path of a script
  if ("Deno" in globalThis) return "deno run --allow-net --allow-env chat.ts";
  const isScript = /\.m?[jt]s$/.test(file);
  const short = isScript && file.startsWith(`${process.cwd()}/`) ? file.slice(process.cwd().length + 1) : file;
  const word = /[^\w./\\:@+-]/.test(short) ? `'${short}'` : short;
  return isScript ? `node ${word}` : word;
}

/* =====================================================================================================================
 * Protocol
 * A line is `@tags :source COMMAND param param :last param` and ends with CR LF. Bytes become lines in a LineSplitter,
 * and text from the wire reaches a terminal only through `clean`.
 * Sources: modern.ircdocs.horse ("Modern IRC"), IRCv3 message-tags, RFC 1459.
 * ================================================================================================================== */

export type Tag = readonly [name: string, value: string];

export interface Line {
  readonly tags: ReadonlyMap<string, string>;
  readonly source: string; // `nick!user@host` or a server's name; empty if the line names none
  readonly command: string; // in upper case
  readonly params: readonly string[];
}

const LINE = /^(?:@([^ ]*) *)?(?::([^ ]*) *)?([^ ]*) *(.*)$/s;
const NO_TAGS: Line["tags"] = new Map();
/** What stands behind a backslash in the value of a tag, by the character that it means. */
const ESCAPES = new Map([[";", ":"], [" ", "s"], ["\r", "r"], ["\n", "n"], ["\\", "\\"]]);
const UNESCAPED = new Map(Array.from(ESCAPES, ([plain, code]) => [code, plain]));

/**
 * Parses a line (Modern IRC, "Message Format"). What is missing is empty.
 * @param text the line without its CR LF
 * @example parse(":bo!bo@chat PRIVMSG #chat :good morning").params // ["#chat", "good morning"]
 */
export function parse(text: string): Line {
  const [, tags, source = "", command = "", rest = ""] = LINE.exec(text) ?? [];
  const [middle = "", last] = ` ${rest}`.split(/ :(.*)/s);
  const params = middle.split(" ").filter(Boolean);
  if (last !== undefined) params.push(last);
  return { tags: tags ? parseTags(tags) : NO_TAGS, source, command: command.toUpperCase(), params };
}

function parseTags(text: string): Line["tags"] {
  const pairs = text.split(";").map((pair) => pair.split(/=(.*)/s)).filter(([name]) => name);
  const unescape = (value: string) => value.replace(/\\(.?)/gs, (_, code: string) => UNESCAPED.get(code) ?? code);
  return new Map(pairs.map(([name = "", value = ""]) => [name, unescape(value)]));
}

/** The last parameter of these is text, and stands behind a colon even if it is one word: some clients rely on that. */
const TEXTUAL = /^(PRIVMSG|NOTICE|QUIT|PART|TOPIC|AWAY|ERROR|301|319|332|353)$/;

/**
 * Formats a line without its CR LF. Only the last parameter may be empty, begin with a colon or contain spaces.
 * @example format("PRIVMSG", ["#chat", "good morning"]) // "PRIVMSG #chat :good morning"
 */
export function format(command: string, params: readonly string[], source = "", tags: readonly Tag[] = []): string {
  let text = formatTags(tags) + (source ? `:${source} ${command}` : command);
  for (const [index, param] of params.entries()) {
    const isLast = index === params.length - 1;
    const needsColon = param === "" || param[0] === ":" || param.includes(" ");
    const isText = TEXTUAL.test(command) && (index > 0 || !/^[PT]/.test(command)); // PART #room has no text
    text += isLast && (needsColon || isText) ? ` :${param}` : ` ${param}`;
  }
  return text;
}

/** Formats tags, with the space that follows them. */
function formatTags(tags: readonly Tag[]): string {
  const escape = (value: string) => value.replace(/[; \r\n\\]/g, (char) => `\\${ESCAPES.get(char)}`);
  return tags.length ? `@${tags.map(([name, value]) => value ? `${name}=${escape(value)}` : name).join(";")} ` : "";
}

/** Folds a name for comparison: CASEMAPPING=ascii. */
export const fold = (name: string): string => name.replace(/[A-Z]+/g, (upper) => upper.toLowerCase());

const JOINING_SCRIPTS = "Arab Syrc Mong Deva Beng Guru Gujr Orya Taml Telu Knda Mlym Sinh".split(" ");
const KEPT = [
  "[\\uFE0E\\uFE0F]", // text or emoji presentation
  "[\\u0600-\\u0605\\u06DD\\u070F\\u0890\\u0891\\u08E2\\u{110BD}\\u{110CD}]", // signs around numbers, which are visible
  "\\p{ExtPict}[\\u{1F3FB}-\\u{1F3FF}]?\\uFE0F?\\u200D(?=\\p{ExtPict})", // a joiner between two emoji
  "\\u{1F3F4}[\\u{E0030}-\\u{E007A}]{1,6}\\u{E007F}", // the flags of Scotland and the like
  `[${JOINING_SCRIPTS.map((script) => `\\p{sc=${script}}`).join("")}][\\u200C\\u200D](?=\\p{L})`, // shapes letters
].join("|");
/** Control characters, bidirectional embeddings and blank letters: what could deceive. */
const HARMFUL =
  "[\\p{Cc}\\p{Cs}\\p{Co}\\p{Zl}\\p{Zp}\\u202A-\\u202E\\u2066-\\u2069\\u115F\\u1160\\u3164\\uFFA0\\uFFF9-\\uFFFB]";
/** What is invisible and harmless, such as word gaps in Khmer and soft hyphens. */
const IGNORABLE = "[\\p{Cf}\\p{DI}]";
const UNSHOWN = new RegExp(`(${KEPT})|(${HARMFUL})|${IGNORABLE}`, "gu");
/** IRC's colours, with their numbers, and its other formatting. */
const FORMATTING = new RegExp(
  `${"\x03"}(\\d{1,2}(,\\d{1,2})?)?|${"\x04"}([\\dA-F]{6})?|[${"\x02\x0f\x11\x16\x1d\x1e\x1f"}]`,
  "gi",
);

/** Text that is safe to show on a terminal: nothing else reaches one. */
export type Clean = string & { readonly clean: unique symbol };

/**
 * Makes a text safe to show: removes IRC's formatting and what is invisible, and puts U+FFFD in place of what could do
 * harm.
 */
export function clean(text: string): Clean {
  if (/^[ -~]*$/.test(text)) return text as Clean;
  const plain = text.replace(FORMATTING, "").replaceAll("\t", " ")
    .replace(UNSHOWN, (_, kept?: string, harmful?: string) => kept ?? (harmful ? "\uFFFD" : ""));
  return plain.replace(/(\p{M}{4})\p{M}+/gu, "$1") as Clean; // longer stacks of marks reach into other rows
}

/**
 * Whether a name is a valid nick. Nicks are ASCII, so that no two look alike; "…serv" is reserved, because clients
 * send passwords to services of such names unasked.
 */
export const isNick = (name: string): boolean =>
  name.length <= LIMITS.nick && /^[A-Za-z[\]\\`_^{|}][-\w[\]\\`^{|}]*$/.test(name) && !/serv$/i.test(name);

/** Whether a name is a valid name of a room: `#` and then no space, no comma and no invisible character. */
export const isRoom = (name: string): boolean =>
  /^#[^\s,]+$/.test(name) && Buffer.byteLength(name) <= LIMITS.room && clean(name) === name;

/** Cuts a text to a number of bytes of UTF-8, but never inside a character. */
export function cut(text: string, bytes: number): string {
  if (text.length * 3 <= bytes) return text;
  const raw = Buffer.from(text);
  let end = bytes;
  while (((raw[end] ?? 0) & 0xc0) === 0x80) end--;
  return raw.toString("utf8", 0, end);
}

/** Fills rows of up to `width` bytes with words. A word that is longer than a row gets its own. */
function fill(words: readonly string[], width: number): string[] {
  const rows: string[] = [];
  for (const word of words) {
    const longer = `${rows.at(-1)} ${word}`;
    if (rows.length && Buffer.byteLength(longer) <= width) rows[rows.length - 1] = longer;
    else rows.push(word);
  }
  return rows;
}

const EMPTY: Buffer = Buffer.alloc(0);
const UTF8 = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });
const [LF, CR, AT, SPACE] = [10, 13, 64, 32];

/** What a LineSplitter found: a line, or a fault and what can be read of the line. */
export interface Split {
  readonly text: string;
  readonly fault?: "too long" | "not UTF-8" | "NUL";
}

/** Splits a stream of bytes into lines that end with CR, LF or both. An endless line is reported once and skipped. */
export class LineSplitter {
  readonly #tagBytes: number;
  #bytes = EMPTY; // with no line end at the beginning, unless a line is being skipped
  #isSkipping = false; // the rest of a line that is too long
  /** @param tagBytes how long the tags of a line may be, "@" and the space included */
  constructor(tagBytes: number = LIMITS.clientTagBytes) {
    this.#tagBytes = tagBytes;
  }
  /** How many bytes were pushed and not yet returned as lines. */
  get buffered(): number {
    return this.#bytes.length;
  }
  push(chunk: Buffer): void {
    this.#bytes = this.#bytes.length ? Buffer.concat([this.#bytes, chunk]) : chunk;
    if (!this.#isSkipping) this.#take(0);
  }
  /** @returns the next line that is not empty; undefined until there is one */
  next(): Split | undefined {
    const most = LIMITS.bodyBytes + (this.#bytes[0] === AT ? this.#tagBytes : 0);
    const end = this.#endOfLine(this.#isSkipping ? Infinity : most + 1);
    if (end < 0 && !this.#isSkipping && this.#bytes.length > most) {
      this.#isSkipping = true;
      return this.#tooLong(this.#bytes);
    }
    if (end < 0) { // a copy does not keep the large chunk alive that it was a part of
      this.#bytes = this.#isSkipping ? EMPTY : Buffer.from(this.#bytes);
      return undefined;
    }
    const line = this.#take(end);
    if (!this.#isSkipping) return this.#decode(line);
    this.#isSkipping = false;
    return this.next();
  }
  /** Where the line ends within the first `most` bytes; -1 if it does not. */
  #endOfLine(most: number): number {
    const searched = this.#bytes.subarray(0, most);
    const lf = searched.indexOf(LF);
    const cr = (lf < 0 ? searched : searched.subarray(0, lf)).indexOf(CR);
    return cr < 0 ? lf : cr;
  }
  /** Takes a line, and drops the line ends that follow it. */
  #take(length: number): Buffer {
    const line = this.#bytes.subarray(0, length);
    let next = length;
    while (this.#bytes[next] === LF || this.#bytes[next] === CR) next++;
    this.#bytes = this.#bytes.subarray(next);
    return line;
  }
  #decode(line: Buffer): Split {
    const tags = line[0] === AT ? line.indexOf(SPACE) + 1 || line.length : 0;
    if (tags > this.#tagBytes || line.length - tags > LIMITS.bodyBytes - 2) return this.#tooLong(line);
    if (line.includes(0)) return { fault: "NUL", text: "" };
    try {
      return { text: UTF8.decode(line) };
    } catch {
      return { fault: "not UTF-8", text: line.toString() };
    }
  }
  /** A line that is too long keeps its tags, unless they are too long themselves. */
  #tooLong(line: Buffer): Split {
    const end = line[0] === AT ? line.indexOf(SPACE) + 1 : 0;
    return { fault: "too long", text: line.toString("utf8", 0, end <= this.#tagBytes ? end : 0) };
  }
}

/* =====================================================================================================================
 * Identity
 * A server is known by its public key. The key is generated at the start, or derived from a secret that the operator
 * keeps, or it is the operator's own, with a certificate chain. A pin is a short name of the key: it is part of the
 * command that joins.
 * ================================================================================================================== */

export interface Identity {
  readonly key: string; // PEM text of the private key
  readonly cert: string; // PEM text of the certificate, with the operator's chain behind it
  readonly publicKey: crypto.KeyObject;
  readonly pin: string;
  readonly binding: Buffer; // SHA-256 over the certificate, for channel binding (RFC 5929, tls-server-end-point)
}

/** Encodes a DER element (X.690) of less than 64 KiB: more than a certificate needs. */
function der(tag: number, ...parts: readonly (Uint8Array | readonly number[])[]): Buffer {
  const body = Buffer.concat(parts.map((part) => Buffer.from(part)));
  const size = body.length;
  const length = size < 0x80 ? [size] : size < 0x100 ? [0x81, size] : [0x82, size >> 8, size & 0xff];
  return Buffer.concat([Buffer.from([tag, ...length]), body]);
}
const derText = (tag: number, text: string) => der(tag, Buffer.from(text));

/** Encodes a time; from 2050 on it has four digits for the year (RFC 5280, section 4.1.2.5). */
function derTime(date: Date): Buffer {
  const digits = date.toISOString().replace(/[-:T]|\.\d+/g, "");
  return date.getUTCFullYear() < 2050 ? derText(0x17, digits.slice(2)) : derText(0x18, digits);
}

/**
 * Makes a self-signed certificate (RFC 5280) for a P-256 key, valid for ten years, for the names of this machine.
 * @returns its PEM text
 */
export function selfSigned(privateKey: crypto.KeyObject): string {
  const algorithm = der(0x30, der(0x06, [0x2a, 0x86, 0x48, 0xce, 0x3d, 4, 3, 2])); // ecdsa-with-SHA256
  const name = der(0x30, der(0x31, der(0x30, der(0x06, [0x55, 4, 3]), derText(0x0c, "chat")))); // a common name
  const [from, until] = [new Date(Date.now() - 86_400_000), new Date()]; // clients' clocks may be behind
  until.setUTCFullYear(until.getUTCFullYear() + 10);
  const addresses = [der(0x87, [127, 0, 0, 1]), der(0x87, Buffer.alloc(16).fill(1, 15))];
  const names = der(0x30, derText(0x82, "localhost"), ...addresses);
  const tbs = der(
    0x30,
    der(0xa0, der(0x02, [2])), // version 3
    der(0x02, [0x40], crypto.randomBytes(15)), // serial number, positive
    algorithm,
    name, // of the issuer
    der(0x30, derTime(from), derTime(until)),
    name, // of the subject
    spki(crypto.createPublicKey(privateKey)),
    der(0xa3, der(0x30, der(0x30, der(0x06, [0x55, 0x1d, 0x11]), der(0x04, names)))), // subjectAltName
  );
  const whole = base64(der(0x30, tbs, algorithm, der(0x03, [0], crypto.sign("sha256", tbs, privateKey))));
  return `-----BEGIN CERTIFICATE-----\n${whole.replace(/.{1,64}/g, "$&\n")}-----END CERTIFICATE-----\n`;
}

/** Makes a P-256 key. That of a secret is the same on every machine and runtime. */
function newKey(secret?: string): crypto.KeyObject {
  if (!secret) return crypto.generateKeyPairSync("ec", { namedCurve: "P-256" }).privateKey;
  const order = 0xffffffff00000000ffffffffffffffffbce6faada7179e84f3b9cac2fc632551n;
  const cost = { N: 2 ** 17, r: 8, p: 1, maxmem: 2 ** 28 };
  const wide = crypto.scryptSync(secret, "chat identity v1", 48, cost).toString("hex");
  const scalar = Buffer.from((BigInt(`0x${wide}`) % (order - 1n) + 1n).toString(16).padStart(64, "0"), "hex");
  const curve = crypto.createECDH("prime256v1");
  curve.setPrivateKey(scalar);
  const [d, point] = [scalar.toString("base64url"), curve.getPublicKey()]; // 0x04, x, y
  const [x, y] = [point.toString("base64url", 1, 33), point.toString("base64url", 33)];
  return crypto.createPrivateKey({ format: "jwk", key: { kty: "EC", crv: "P-256", d, x, y } });
}

/** The SubjectPublicKeyInfo of a public key, in DER (RFC 5280, section 4.1.2.7). */
export const spki = (key: crypto.KeyObject): Buffer => key.export({ type: "spki", format: "der" });

/** The pin of a public key: 120 bits of SHA-256 over its SubjectPublicKeyInfo, in base32, in groups of four. */
export function pinOf(key: crypto.KeyObject): string {
  return base32(sha256(spki(key)).subarray(0, 15));
}

/**
 * The check code of a public key, for people who compare: 40 bits of scrypt over its fingerprint. To find another key
 * with the same code one has to try 2^40 keys, each at a tenth of a second and 64 MiB.
 */
export async function checkCodeOf(key: crypto.KeyObject): Promise<string> {
  return base32(await scrypt(sha256(spki(key)), "chat check v1", 5, { N: 2 ** 16, r: 8, p: 1, maxmem: 2 ** 27 }));
}

/** Whether a pin or a check code may decide about a key. With RSA, keys that look alike are too cheap to make. */
const isPinnable = ({ asymmetricKeyType, asymmetricKeyDetails }: crypto.KeyObject): boolean =>
  asymmetricKeyType === "ed25519" || asymmetricKeyDetails?.namedCurve === "prime256v1";

/** Encodes whole groups of five bytes in base32 (RFC 4648, in lower case), in groups of four. */
function base32(bytes: Buffer): string {
  const bits = Array.from(bytes, (byte) => byte.toString(2).padStart(8, "0")).join("");
  return grouped(bits.replace(/.{5}/g, (five) => "abcdefghijklmnopqrstuvwxyz234567"[parseInt(five, 2)] ?? ""));
}

/** Reads a pin as people write it, in any case and with or without hyphens. @returns undefined if it is not a pin */
export const readPin = (text: string): string | undefined => readBase32(text, 24);

/** Reads base32 in groups of four. @returns undefined if it does not have so many digits */
function readBase32(text: string, length: number): string | undefined {
  const digits = text.toLowerCase().replace(/[\s-]/g, "");
  return /^[a-z2-7]*$/.test(digits) && digits.length === length ? grouped(digits) : undefined;
}

const grouped = (digits: string) => digits.replace(/.{4}(?=.)/g, "$&-");

/**
 * Makes the server's identity from the operator's PEM texts, from a secret of 24 characters or more, or a new one.
 * @throws {Fault} if the texts cannot be read, do not belong together, or the certificate is not valid now
 */
export function makeIdentity({ secret, key, cert }: { secret?: string; key?: string; cert?: string }): Identity {
  if (secret !== undefined && secret.length < 24) {
    throw new Fault("CHAT_SECRET is too short to be safe", "export CHAT_SECRET=$(openssl rand -base64 24)");
  }
  const isOwn = key || cert; // the operator's
  const privateKey = isOwn ? readPem("CHAT_KEY", key, "private key", crypto.createPrivateKey) : newKey(secret);
  const chain = isOwn ? cert : selfSigned(privateKey);
  const leaf = readPem("CHAT_CERT", chain, "certificate", (text) => new crypto.X509Certificate(text));
  if (!spki(crypto.createPublicKey(privateKey)).equals(spki(leaf.publicKey))) {
    const hint = "the server's own certificate comes first in CHAT_CERT, those of its issuers follow";
    throw new Fault("CHAT_KEY and CHAT_CERT do not fit: the certificate is for another key", hint);
  }
  const problem = outsideValidity(leaf);
  if (problem) throw new Fault(`the certificate in CHAT_CERT ${problem}`, "nobody could trust it: get a new one");
  const pem = privateKey.export({ type: "pkcs8", format: "pem" }).toString();
  const { publicKey, raw } = leaf;
  return { key: pem, cert: chain ?? "", publicKey, pin: pinOf(publicKey), binding: sha256(raw) };
}

/**
 * Reads a PEM text from an environment variable.
 * @param what what the text should be, for the message
 * @throws {Fault} whose words tell the common mistakes apart
 */
export function readPem<T>(name: string, text: string | undefined, what: string, read: (text: string) => T): T {
  if (!text) throw new Fault(`${name} is not set`, "CHAT_KEY and CHAT_CERT go together");
  if (!text.includes("-----BEGIN ")) {
    const path = /^[\w./~-]{1,200}$/.exec(text)?.[0];
    const hint = `export ${name}="$(cat ${path ?? "FILE"})"`;
    throw new Fault(`${name} must hold the PEM text of a ${what}${path ? ", not its path" : ""}`, hint);
  }
  try {
    return read(text);
  } catch {
    if (text.includes("ENCRYPTED")) {
      throw new Fault(`the key in ${name} is encrypted`, "openssl pkey -in FILE opens it");
    }
    throw new Fault(`the PEM text in ${name} is not that of a ${what}`, `it begins with ${text.trim().split("\n")[0]}`);
  }
}

/** Says how a certificate is outside its validity period; undefined if it is valid now. */
function outsideValidity({ validFrom, validTo }: crypto.X509Certificate): string | undefined {
  const day = (date: string) => new Date(date).toISOString().slice(0, 10);
  if (Date.now() > Date.parse(validTo)) return `expired on ${day(validTo)}`;
  return Date.now() < Date.parse(validFrom) ? `is not valid before ${day(validFrom)}` : undefined;
}

const RECORD_OVERHEAD = 22; // bytes of a TLS 1.3 record besides its text: a header of 5, a type, a tag of 16

/** Says how long a text is, in clear and as TLS records, which hold up to 16 KiB each. */
function recorded(bytes: number): string {
  const records = Math.max(1, Math.ceil(bytes / 16384));
  if (records > 1) return `(${bytes} bytes) → ${records} TLS records of ${bytes + records * RECORD_OVERHEAD} bytes`;
  return `(${bytes} bytes) → ${bytes + RECORD_OVERHEAD}-byte TLS record: 5 header + ${bytes} + 1 type + 16 tag`;
}

/** Passes on what happens, but of many of one kind only the first few, and how many more there were. */
class Folded {
  readonly #tell: (text: string) => void;
  readonly #counts = new Map<string, number>(); // of a few kinds that take turns
  #folded = 0;
  constructor(tell: (text: string) => void) {
    this.#tell = tell;
  }
  tell(kind: string, text: string): void {
    const count = this.#counts.get(kind) ?? 0;
    if (!count && this.#folded) this.#tell(`… ${this.#folded} more of the kind`);
    if (!count && (this.#folded || this.#counts.size > LIMITS.shownOfKind)) {
      this.#folded = 0;
      this.#counts.clear();
    }
    this.#counts.set(kind, count + 1);
    if (count < LIMITS.shownOfKind) this.#tell(text);
    else this.#folded++;
  }
}

/** The names of a certificate's subject or issuer, in a row: `CN=server, O=…`. */
const namesInRow = (names: string) => clean(names.replaceAll("\n", ", ").replaceAll("\\,", ","));

/** A fact about a connection, with the step in which it came about. */
interface Fact {
  readonly step: 1 | 2 | 3;
  readonly label: string;
  readonly text: string;
}

/** Describes a connection. What the runtime does not say is left out. */
function describe(socket: tls.TLSSocket, certificate: crypto.X509Certificate | undefined): Fact[] {
  const facts: [step: Fact["step"], label: string, text: string | false | undefined | null][] = [
    [1, "TCP", `${socket.localAddress}:${socket.localPort} to ${socket.remoteAddress}:${socket.remotePort}`],
    [2, "protocol", `${socket.getProtocol()}`],
    [2, "cipher", `${socket.getCipher()?.name}, which also tells if a byte was changed`],
    [2, "key exchange", (socket.getEphemeralKeyInfo() as { name?: string } | null)?.name],
    [2, "ALPN", socket.alpnProtocol],
  ];
  if (certificate) {
    const { subject, issuer, validFrom, validTo, publicKey } = certificate;
    const { asymmetricKeyType, asymmetricKeyDetails: details } = publicKey;
    facts.push(
      [3, "certificate", namesInRow(subject)],
      [3, "issued by", issuer === subject ? "itself" : namesInRow(issuer)],
      [3, "valid", `${validFrom} to ${validTo}`],
      [3, "public key", `${asymmetricKeyType} ${details?.namedCurve ?? details?.modulusLength ?? ""}`.trim()],
      [3, "SHA-256", base64(sha256(spki(publicKey)))], // of its SubjectPublicKeyInfo
      [3, "pin", pinOf(publicKey)],
    );
  }
  return facts.flatMap(([step, label, text]) => text ? [{ step, label, text }] : []);
}

const layOut = ({ label, text }: Fact) => `${label.padEnd(14)}${text}`;

/** The steps by which a connection is made, each with its facts. */
function lessonOf(facts: readonly Fact[]): string[] {
  const of = (step: number) => facts.filter((fact) => fact.step === step).map((fact) => `  ${layOut(fact)}`);
  return [
    "1 TCP: the three-way handshake has happened, so each side knows that the other hears it",
    ...of(1),
    "2 ClientHello and ServerHello: each side has said what it can do",
    ...of(2),
    "3 certificate: the server has shown whose key it has, and has signed with it",
    ...of(3),
    "4 keys: both sides have computed the same ones, and neither has sent them; what follows is encrypted",
  ];
}

/* =====================================================================================================================
 * Passwords
 * A password verifier is enough to check a password, and not enough to log in with. scrypt makes a salted password, and
 * that makes two keys (RFC 5802): the client proves that it has ClientKey, the server that it has ServerKey, each over
 * the whole exchange and the server's certificate, so that a relay in the middle has nothing to pass on. With PLAIN,
 * PASS and REGISTER the server gets the password itself and runs scrypt. All end in one verifier.
 * ================================================================================================================== */

export interface Verifier {
  readonly salt: Buffer;
  readonly storedKey: Buffer; // SHA-256 of ClientKey
  readonly serverKey: Buffer;
}

/** What a client keeps instead of the password, to log in again. */
export interface Keys {
  readonly salt: Buffer;
  readonly clientKey: Buffer;
  readonly serverKey: Buffer;
}

export const COST = 2 ** 15; // N of scrypt, and the attribute `i` of SCRAM; with r = 8 that is 32 MiB
const [SALT_BYTES, KEY_BYTES] = [16, 32];

const hmac = (key: Buffer, text: string) => crypto.createHmac("sha256", key).update(text).digest();

/** Makes the keys of RFC 5802, section 3, from a password, which is normalised to NFC; with scrypt in place of Hi(). */
export async function deriveKeys(password: string, salt: Buffer = crypto.randomBytes(SALT_BYTES)): Promise<Keys> {
  const cost = { N: COST, r: 8, p: 3, maxmem: 2 ** 26 };
  const salted = await scrypt(password.normalize("NFC"), salt, KEY_BYTES, cost);
  return { salt, clientKey: hmac(salted, "Client Key"), serverKey: hmac(salted, "Server Key") };
}

/** What a server keeps of a password's keys. */
export function verifierOf({ salt, clientKey, serverKey }: Keys): Verifier {
  return { salt, storedKey: sha256(clientKey), serverKey };
}

/** Formats a verifier as text, in the manner of PostgreSQL's `SCRAM-SHA-256$…`. */
export function formatVerifier({ salt, storedKey, serverKey }: Verifier): string {
  return `SCRAM-SCRYPT$${COST}:${base64(salt)}$${base64(storedKey)}:${base64(serverKey)}`;
}

/** Reads a verifier. @returns undefined if the text does not look like one, "bad" if it does and is not valid */
export function readVerifier(text: string): Verifier | "bad" | undefined {
  if (!/^SCRAM-[A-Z0-9-]+\$\d+:[\w+/=]+\$[\w+/=]+:[\w+/=]+$/i.test(text)) return undefined;
  const [salt, storedKey, serverKey] = text.split(/[$:]/).slice(2).map(fromBase64);
  if (salt?.length !== SALT_BYTES || storedKey?.length !== KEY_BYTES || serverKey?.length !== KEY_BYTES) return "bad";
  return formatVerifier({ salt, storedKey, serverKey }) === text ? { salt, storedKey, serverKey } : "bad";
}

/** The attributes of a SCRAM message, `r=…,s=…,i=…`, by their letters. */
const attributes = (message: string): Partial<Record<string, string>> =>
  Object.fromEntries(message.split(",").map((part) => [part[0], part.slice(2)]));

/** The gs2 header: with channel binding, or of a client that does not support it. */
const gs2 = (binding?: Buffer) => binding ? "p=tls-server-end-point,," : "n,,";
const boundTo = (binding?: Buffer) => base64(Buffer.concat([Buffer.from(gs2(binding)), binding ?? EMPTY]));
const xor = (one: Buffer, other: Buffer) => Buffer.from(one.map((byte, at) => byte ^ (other[at] ?? 0)));
const newNonce = () => base64(crypto.randomBytes(18));

/**
 * The client's side of SCRAM (RFC 5802), with channel binding if `binding` is given. It yields the messages to send and
 * is resumed with the server's answers.
 * @returns whether the server has proved that it knows the verifier
 */
export async function* scramClient(
  name: string,
  keysFor: (salt: Buffer) => Promise<Keys>,
  binding?: Buffer,
  cost: number = COST,
  nonce: string = newNonce(),
): AsyncGenerator<string, boolean, string> {
  const bare = `n=${name.replaceAll("=", "=3D").replaceAll(",", "=2C")},r=${nonce}`;
  const challenge = yield gs2(binding) + bare;
  const { r = "", s, i } = attributes(challenge);
  const salt = fromBase64(s);
  if (!r.startsWith(nonce) || r === nonce || i !== String(cost) || salt.length !== SALT_BYTES) return false;
  const { clientKey, serverKey } = await keysFor(salt);
  const withoutProof = `c=${boundTo(binding)},r=${r}`;
  const authMessage = `${bare},${challenge},${withoutProof}`;
  const proof = xor(clientKey, hmac(sha256(clientKey), authMessage));
  const answer = yield `${withoutProof},p=${base64(proof)}`;
  return answer === `v=${base64(hmac(serverKey, authMessage))}`;
}

/**
 * The server's side of SCRAM, likewise. Its first `next()` starts it.
 * @returns its own proof, `v=…`, or an error, `e=…` (RFC 5802, section 7)
 */
export function* scramServer(
  find: (name: string) => Verifier | undefined,
  binding?: Buffer,
  cost: number = COST,
  nonce: string = newNonce(),
): Generator<string, string, string> {
  const first = yield "";
  const bare = first.slice(gs2(binding).length);
  const { m, n, r } = attributes(bare);
  if (!first.startsWith(gs2(binding)) || m !== undefined || !n || !r) return "e=other-error";
  const verifier = find(n.replaceAll("=2C", ",").replaceAll("=3D", "="));
  if (!verifier) return "e=unknown-user";
  const challenge = `r=${r}${nonce},s=${base64(verifier.salt)},i=${cost}`;
  const [, withoutProof = "", proof] = /^(.*),p=([^,]*)$/.exec(yield challenge) ?? [];
  const authMessage = `${bare},${challenge},${withoutProof}`;
  const storedKey = sha256(xor(hmac(verifier.storedKey, authMessage), fromBase64(proof)));
  const { c, r: nonces } = attributes(withoutProof);
  if (c !== boundTo(binding)) return "e=channel-bindings-dont-match";
  if (nonces !== r + nonce || !crypto.timingSafeEqual(storedKey, verifier.storedKey)) return "e=invalid-proof";
  return `v=${base64(hmac(verifier.serverKey, authMessage))}`;
}

const SASL_CHUNK = 400; // characters of base64 in one AUTHENTICATE (IRCv3 sasl-3.1)

/** Splits a SASL message into the parameters of AUTHENTICATE lines: the last one is shorter than a whole chunk. */
function saslChunks(message: string): string[] {
  const text = base64(Buffer.from(message));
  const chunks: string[] = [];
  for (let at = 0; at <= text.length; at += SASL_CHUNK) chunks.push(text.slice(at, at + SASL_CHUNK) || "+");
  return chunks;
}

/** Puts a SASL message together again. */
class SaslBuffer {
  #received = "";
  /** @returns the message when it is complete, undefined before, "too long" if it is longer than any may be */
  push(chunk: string): { readonly message: string } | "too long" | undefined {
    if (chunk.length > SASL_CHUNK || this.#received.length > 4_000) return "too long";
    if (chunk !== "+") this.#received += chunk;
    if (chunk.length === SASL_CHUNK) return undefined;
    const message = fromBase64(this.#received).toString();
    this.#received = "";
    return { message };
  }
}

/* =====================================================================================================================
 * Accounts
 * An account is a nick with a verifier. The map of accounts is in memory; a journal, if there is one, takes changes.
 * Limits bound how fast passwords can be guessed, and how many nicks one can hoard.
 * ================================================================================================================== */

/** What the map of accounts knows of an account. */
export interface Account {
  nick: string; // as its owner writes it
  verifier: Verifier;
  readonly networks: Set<string>; // from which it has logged in, the latest last
}

/** A client that logs in or registers. It may have disconnected before a password is hashed. */
export interface Visitor {
  readonly address: string;
  readonly closed: boolean;
}

/** Why a login or a registration is refused: a key of REFUSALS, or the words themselves if they depend on the time. */
export type Refusal = keyof typeof REFUSALS | `Too many ${string}`;

const REFUSALS = {
  "wrong": "Wrong password",
  "relayed": "The certificate that the client saw is not this server's: somebody sits in between",
  "unknown": "No account of that name",
  "exists": "That nick has an account already",
  "bad nick": `A nick has 1 to ${LIMITS.nick} letters, digits or any of []\\\`_^{|}- and begins with no digit or -`,
  "closed": "Registration is closed; the operator can admit a nick",
  "barred": "The operator keeps this account out",
  "forgotten": "The operator has deleted this account, and can admit the nick again",
  "full": "The server has as many accounts as it can keep",
  "unwritten": "The server cannot write new accounts down at the moment",
  "gone": "You have disconnected",
} as const;

/** Says why something is refused. */
const reasonOf = (refusal: Refusal) => rowOf<string>(REFUSALS, refusal) ?? refusal;
const tryAgain = (waitMs: number) => `try again in ${Math.ceil(waitMs / 1000)} s`;

/** What follows a message of a SASL exchange: a challenge, success or failure. */
export type SaslStep<A> =
  | { readonly challenge: string }
  | { readonly account: A }
  | { readonly refusal: Refusal; readonly last?: string };

/** A SASL exchange on the server: takes the client's messages one by one. */
export type SaslExchange<A> = (message: string) => SaslStep<A> | Promise<SaslStep<A>>;

/** Writes a record of what has changed. @returns whether that was possible */
export type Journal = (record: string) => Promise<boolean>;

/** Formats a record of the journal: a nick, a date, and the verifier as text, or what happened to the nick. */
const recordOf = (who: string, what: string, wall: number) =>
  `${who} ${new Date(wall).toISOString().replace(/\.\d+/, "")} ${what}`;

/**
 * The accounts, in memory, and the limits on guessing passwords and hoarding nicks. With a journal, a registration or
 * a new password counts when its record has been written.
 */
export class Accounts<A extends Account> {
  locked = false; // registration is closed, except for admitted nicks
  readonly barred = new Map<string, "barred" | "forgotten">(); // folded nicks, and networks
  readonly byNick = new Map<string, A>(); // by folded nick
  readonly #admitted = new Map<string, number>(); // folded nicks that may register, whatever the limits; until when
  readonly #registering = new Set<string>(); // folded nicks whose records are being written
  readonly #clock: Clock;
  readonly #journal: Journal | undefined;
  readonly #make: (nick: string, verifier: Verifier, visitor?: Visitor) => A;
  readonly #hashing = new Semaphore(LIMITS.scrypts);
  readonly #registrations: KeyedRateLimit; // per site
  readonly #tries: KeyedRateLimit; // per account and network
  readonly #siteTries: KeyedRateLimit;
  readonly #unknownTries: KeyedRateLimit; // per account, from networks where it never logged in
  /**
   * @param make makes the account of a nick, whose owner is here or has been
   * @param perAddress how many connections a network may have: so many more attempts
   */
  constructor(
    make: (nick: string, verifier: Verifier, visitor?: Visitor) => A,
    perAddress = 0,
    clock = systemClock,
    journal?: Journal,
  ) {
    this.#make = make;
    this.#clock = clock;
    this.#journal = journal;
    this.#registrations = new KeyedRateLimit(clock, LIMITS.newAccountsPerHour / 3600, LIMITS.newAccountsPerHour);
    this.#tries = new KeyedRateLimit(clock, 1 / 30, LIMITS.triesPerAccount);
    this.#siteTries = new KeyedRateLimit(clock, 1, LIMITS.triesPerNetwork + perAddress);
    this.#unknownTries = new KeyedRateLimit(clock, 1 / 10, LIMITS.triesOfUnknown);
  }

  find(nick: string): A | undefined {
    return this.byNick.get(fold(nick));
  }

  /** Applies a record of a journal, where `#` begins a comment. @returns whether it is one */
  apply(record: string): boolean {
    const text = record.replace(/#.*/s, "").trim();
    if (!text) return true;
    const [who = "", date = "", what = "", ...more] = text.split(" ");
    const [key, verifier] = [fold(who), readVerifier(what)];
    const ageMs = this.#clock.wall() - Date.parse(date);
    const isNetwork = /^[\d.]+$|^[\da-f:]+::\/64$/.test(who); // as networkOf writes it
    if (isNaN(ageMs) || more.length || (!isNick(who) && !isNetwork)) return false;
    if (typeof verifier === "object" && isNick(who)) this.#keep(who, verifier);
    else if (what === "forgotten") {
      this.byNick.delete(key);
      this.barred.set(key, what); // or a running client would register it again
    } else if (what === "barred") {
      this.barred.set(key, what);
      this.#admitted.delete(key);
    } else if (what === "unbarred") this.barred.delete(key);
    else if (what === "admitted") this.#admitted.set(key, this.#clock.now() + LIMITS.admitMs - ageMs);
    else return false;
    return true;
  }
  async #write(who: string, what: string): Promise<boolean> {
    return !this.#journal || await this.#journal(recordOf(who, what, this.#clock.wall()));
  }
  /** Gives an account another password. @returns whether that was possible */
  async change(account: A, verifier: Verifier): Promise<boolean> {
    const isWritten = await this.#write(account.nick, formatVerifier(verifier));
    if (isWritten) account.verifier = verifier;
    return isWritten;
  }
  /** Applies the operator's decision about a nick or a network, and records it in the journal. */
  decide(who: string, what: "admitted" | "barred" | "forgotten" | "unbarred"): void {
    void this.#write(who, what);
    this.apply(recordOf(who, what, this.#clock.wall()));
  }
  /** The folded nicks that are admitted now. */
  get admitted(): string[] {
    return [...this.#admitted.keys()].filter((nick) => this.#isAdmitted(nick));
  }
  #isAdmitted(nick: string): boolean {
    return (this.#admitted.get(fold(nick)) ?? 0) > this.#clock.now();
  }

  /** Makes an account with a password, or with a verifier that the client has made. */
  async register(nick: string, secret: string | Verifier, visitor: Visitor): Promise<A | Refusal> {
    const objection = this.#objectionTo(nick);
    if (objection) return objection;
    const isExempt = isLoopback(visitor.address) || this.#isAdmitted(nick);
    const waitMs = isExempt ? 0 : tryCharge(this.#registrations.of(siteOf(visitor.address)));
    if (waitMs) return `Too many new accounts from your address: ${tryAgain(waitMs)}, or ask the operator for /admit`;
    const verifier = typeof secret === "string" ? await this.#hash(secret, visitor) : secret;
    if (!verifier) return "gone"; // it disconnected before its turn
    const later = this.#objectionTo(nick); // somebody may have been faster
    if (later) return later;
    const key = fold(nick);
    const bar = this.barred.get(key);
    this.#registering.add(key);
    const isWritten = await this.#write(nick, formatVerifier(verifier));
    this.#registering.delete(key);
    const newBar = this.barred.get(key);
    if (!isWritten) return "unwritten";
    const account = this.#keep(nick, verifier, visitor);
    if (newBar && newBar !== bar) this.barred.set(key, newBar); // the operator was faster
    return account;
  }
  /** Gives a nick an account with that verifier, whatever was decided about the nick before. */
  #keep(nick: string, verifier: Verifier, visitor?: Visitor): A {
    const key = fold(nick);
    const account = this.byNick.get(key) ?? this.#make(nick, verifier, visitor);
    account.verifier = verifier;
    this.byNick.set(key, account);
    this.barred.delete(key);
    this.#admitted.delete(key); // which was for once
    return account;
  }
  #objectionTo(nick: string): Refusal | undefined {
    if (!isNick(nick)) return "bad nick";
    if (this.byNick.has(fold(nick)) || this.#registering.has(fold(nick))) return "exists";
    if (this.#isAdmitted(nick)) return undefined;
    if (this.locked) return "closed";
    return this.barred.get(fold(nick)) ?? (this.byNick.size < LIMITS.accounts ? undefined : "full");
  }

  /** Refuses a login to an account that does not exist: as unknown, or with the reason why it cannot be registered. */
  #refusalOfUnknown(nick: string): Refusal {
    return this.#objectionTo(nick) ?? "unknown";
  }

  /** Checks a password. */
  async login(nick: string, password: string, visitor: Visitor): Promise<A | Refusal> {
    const account = this.find(nick);
    if (!account) return this.#refusalOfUnknown(nick);
    const charged = this.#chargeAttempt(account, visitor.address);
    if (typeof charged === "string") return charged;
    const made = await this.#hash(password, visitor, account.verifier.salt);
    const isRight = made && crypto.timingSafeEqual(made.storedKey, account.verifier.storedKey);
    return isRight ? this.#succeed(account, visitor.address, charged) : "wrong";
  }

  /** Hashes a password when it is the network's turn; undefined if the client has disconnected by then. */
  #hash(password: string, visitor: Visitor, salt?: Buffer): Promise<Verifier | undefined> {
    const job = async () => visitor.closed ? undefined : verifierOf(await deriveKeys(password, salt));
    return this.#hashing.run(networkOf(visitor.address), job);
  }

  /** SASL PLAIN (RFC 4616). */
  plain(visitor: Visitor): SaslExchange<A> {
    return async (message) => {
      const [authzid = "", nick = "", password = ""] = message.split("\0");
      if (!password || (authzid && fold(authzid) !== fold(nick))) return { refusal: "wrong" };
      const result = await this.login(nick, password, visitor);
      return typeof result === "string" ? { refusal: result } : { account: result };
    };
  }

  /** SASL SCRAM-SCRYPT-PLUS: the client's first message, its proof, and its consent to the server's proof. */
  scram({ address }: Visitor, binding: Buffer): SaslExchange<A> {
    let account: A | undefined;
    let proved: readonly RateLimit[] | undefined; // what the proof was charged to, once it has been given
    let nick = "";
    const scram = scramServer((name) => (account = this.find(nick = name))?.verifier, binding);
    const refusals: Partial<Record<string, () => Refusal>> = {
      "e=unknown-user": () => this.#refusalOfUnknown(nick),
      "e=channel-bindings-dont-match": () => "relayed",
    };
    scram.next();
    return (message) => {
      if (account && proved) return { account: this.#succeed(account, address, proved) };
      const charged = account && this.#chargeAttempt(account, address);
      if (typeof charged === "string") return { refusal: charged };
      const { value } = scram.next(message);
      if (value.startsWith("e=")) return { refusal: refusals[value]?.() ?? "wrong", last: value };
      proved = charged;
      return { challenge: value };
    };
  }

  /**
   * Charges an attempt, before it is answered. The limits of an account's own networks are apart from all others:
   * strangers cannot use them up.
   * @returns the limits that it was charged to
   */
  #chargeAttempt({ nick, networks }: A, address: string): readonly RateLimit[] | Refusal {
    const [name, network] = [fold(nick), networkOf(address)];
    if (this.barred.has(name)) return "barred";
    const limits = [this.#tries.of(`${name} ${network}`)];
    if (!networks.has(network)) limits.push(this.#siteTries.of(siteOf(address)), this.#unknownTries.of(name));
    const waitMs = tryCharge(...limits);
    return waitMs ? `Too many attempts: ${tryAgain(waitMs)}` : limits;
  }

  /** Gives the charge back for an attempt that was right, and remembers the network. */
  #succeed(account: A, address: string, charged: readonly RateLimit[]): A {
    for (const limit of charged) limit.refund(1);
    const { networks } = account;
    networks.delete(networkOf(address));
    networks.add(networkOf(address));
    const [oldest = ""] = networks;
    if (networks.size > LIMITS.knownNetworks) networks.delete(oldest);
    return account;
  }
}

/* =====================================================================================================================
 * Rooms
 * What happens is an event: it has an id and a time. The messages of a room, or of two people's private talk, are
 * appended to a log. Delivery, history and catching up after a reconnect are readings of that log.
 * ================================================================================================================== */

export interface Event {
  readonly number: number; // rising over the whole server
  readonly time: number; // in ms since 1970; never before that of an earlier event, even if the clock goes back
  readonly kind: "PRIVMSG" | "NOTICE" | "TAGMSG" | "JOIN" | "PART" | "QUIT" | "TOPIC";
  readonly nick: string; // a member's, or the server's name
  readonly target: string; // a room, or the nick that a private message is for
  readonly text: string; // a message, a reason, a topic; of a JOIN the real name
  readonly tags: readonly Tag[]; // the client-only tags of a message
}

/** What becomes an event when it is recorded. */
type Happening = Omit<Event, "number" | "time">;

/** A place in a log: an event, or a time. */
export interface Place {
  readonly time: number;
  readonly number?: number;
}

const isMessage = ({ kind }: Event) => kind === "PRIVMSG" || kind === "NOTICE" || kind === "TAGMSG";

/** Whether an event is before (< 0), at or after (> 0) a place. */
const compare = (event: Event, place: Place) =>
  place.number === undefined ? event.time - place.time : event.number - place.number;

/** Estimates the memory that an event takes, in bytes. */
const sizeOf = ({ text, tags }: Event) =>
  500 + 2 * text.length + sumOf(tags, ([name, value]) => 200 + 2 * (name.length + value.length));

/** The messages of a room or of a private talk, oldest first. */
export class Log {
  readonly messages: Event[] = [];
  onEmpty = (): void => {}; // called when its last message has been dropped
  /** Reads at most `limit` messages between two places, both excluded: the first or the last of them. */
  read(end: "first" | "last", limit: number, after?: Place, before?: Place): readonly Event[] {
    const isBetween = (event: Event) =>
      (!after || compare(event, after) > 0) && (!before || compare(event, before) < 0);
    const found = this.messages.filter(isBetween);
    return end === "first" ? found.slice(0, limit) : found.slice(Math.max(0, found.length - limit));
  }
}

/** All logs of a server. It numbers events, and keeps the logs within their limits. */
export class History {
  readonly #capacity: number; // messages kept in one log
  readonly #clock: Clock;
  readonly #logs = new Set<Log>(); // the one longest without a message first
  position = 0; // the number of the latest event
  #time = 0; // of the latest event
  #bytes = 0;
  constructor(capacity: number, clock: Clock = systemClock) {
    this.#capacity = capacity;
    this.#clock = clock;
  }
  /** Makes an event of what happened. A PRIVMSG or NOTICE is appended to the log, if one is given. */
  record(log: Log | undefined, happened: Happening): Event {
    this.#time = Math.max(this.#time, this.#clock.wall());
    const event = { number: ++this.position, time: this.#time, ...happened };
    if (log && (event.kind === "PRIVMSG" || event.kind === "NOTICE")) this.#append(log, event);
    return event;
  }
  /** Drops a log with all its messages. */
  forget(log: Log): void {
    while (this.#logs.has(log)) this.#dropOldest(log);
  }
  #append(log: Log, event: Event): void {
    this.#logs.delete(log);
    this.#logs.add(log);
    log.messages.push(event);
    this.#bytes += sizeOf(event);
    if (log.messages.length > this.#capacity) this.#dropOldest(log);
    while (this.#bytes > LIMITS.historyBytes) {
      const [quietest = log] = this.#logs;
      this.#dropOldest(quietest);
    }
  }
  #dropOldest(log: Log): void {
    const oldest = log.messages.shift();
    if (oldest) this.#bytes -= sizeOf(oldest);
    if (!log.messages.length && this.#logs.delete(log)) log.onEmpty();
  }
}

export interface Room {
  readonly name: string; // as first written
  readonly log: Log;
  readonly members: Set<Member>;
  topic: Event | undefined;
  emptySince: number; // by the monotonic clock; meaningless while somebody is in it
}

/** A connection of a member, as far as rooms and delivery know it. */
export interface Reader {
  readonly address: string;
  readonly since: number; // when it connected, in ms since 1970
  readonly caps: number; // the capabilities that it has requested
  readonly active: number; // when it last sent a line that was not PING or PONG, by the monotonic clock
  readonly nick: string; // by which it is addressed in replies; "*" before it has named one
  readonly isWelcome: boolean; // it has logged in and got its welcome
  share(bytes: Buffer): void; // queues bytes that other connections may get as well
  send(lines: string): void; // queues lines for it alone
}

/** An account, with the connections that are logged in to it. */
export class Member implements Account {
  nick: string;
  verifier: Verifier;
  readonly networks = new Set<string>();
  readonly sessions = new Set<Reader>();
  readonly rooms = new Set<Room>();
  readonly talks = new Map<Member, Log>(); // logs of private talks, by the other member
  readonly executed = new Map<string, number>(); // the highest idempotency key executed, by client instance
  readonly rate: RateLimit;
  present = false; // as others see it: also during the grace period after the last connection was lost
  lostAt = 0; // when the last connection ended, by the monotonic clock
  readPosition = 0; // the number of the latest event when it last sent a line
  realName = "";
  away = ""; // the away message; empty if it is not away
  constructor(nick: string, verifier: Verifier, rate: RateLimit) {
    this.nick = nick;
    this.verifier = verifier;
    this.rate = rate;
  }
  /** The log of the private talk with another member. */
  talkWith(other: Member): Log {
    const found = this.talks.get(other);
    if (found) return found;
    const log = new Log();
    log.onEmpty = () => this.talks.delete(other) && other.talks.delete(this);
    this.talks.set(other, log);
    other.talks.set(this, log);
    return log;
  }
}

/* =====================================================================================================================
 * Delivery
 * An event is encoded once for all connections with the same capabilities, and they share the bytes. What a connection
 * is to be sent waits in its Outbox until the end of the event-loop turn, and is then written at once, because a write
 * costs more than what is in it. There is no other delay. What its own line causes is a Reply, which knows about labels
 * and batches.
 * ================================================================================================================== */

const SERVER = "chat.server"; // the source of what the server says; only its name has a dot
const ONCE = "chat.local/once"; // the tag of an idempotency key
const REGISTRATION = "draft/account-registration";
const CAPS = [
  ...["message-tags", "server-time", "account-tag", "extended-join"] as const, // the form of an event depends on these
  ...["echo-message", "batch", "labeled-response", "away-notify", "standard-replies", "cap-notify", "sasl"] as const,
  ...["draft/chathistory", REGISTRATION] as const,
  ...["account-notify", "multi-prefix"] as const, // no effect: an account is its nick, without a prefix
];
type Cap = typeof CAPS[number];
const CAP = Object.fromEntries(CAPS.map((name, at) => [name, 1 << at])) as Record<Cap, number>; // their bits
const FORM_BITS = CAP["message-tags"] | CAP["server-time"] | CAP["account-tag"] | CAP["extended-join"];

/** The source of a member's lines. Members have no address here. */
const sourceOf = (nick: string) => nick === SERVER ? SERVER : `${nick}!${nick}@chat`;

/** Formats a line as it is sent, its body cut to what fits. */
const wireLine = (body: string, tags: readonly Tag[] = []) =>
  `${formatTags(tags)}${cut(body, LIMITS.bodyBytes - 2)}\r\n`;

/** The line of an event, as connections with these capabilities get it. */
function lineOf({ kind, nick, target, text, ...event }: Event, caps: number): [body: string, tags: Tag[]] {
  const tags: Tag[] = [];
  if (caps & CAP["server-time"]) tags.push(["time", new Date(event.time).toISOString()]);
  if (caps & CAP["message-tags"]) tags.push(["msgid", `${event.time}-${event.number}`], ...event.tags);
  if (caps & CAP["account-tag"] && nick !== SERVER) tags.push(["account", nick]);
  let params = [target, text];
  if (kind === "QUIT") params = [text];
  else if (kind === "JOIN") params = caps & CAP["extended-join"] ? [target, nick, text] : [target];
  else if (kind === "TAGMSG" || (kind === "PART" && !text)) params = [target];
  return [format(kind, params, sourceOf(nick)), tags];
}

/** Makes a word of a parameter that stands in the middle of a line, and that a client may have sent. */
const toWord = (param: string) => param.replace(/^:+| .*/gs, "") || "*";

/** The replies to one line. They are sent together when it has been executed. */
class Reply {
  readonly connection: Reader;
  readonly #label: Tag | undefined; // IRCv3 labeled-response
  readonly #once: Tag | undefined;
  #lines: { readonly body: string; readonly tags: readonly Tag[] }[] = [];
  #isOver = false;
  static #batches = 0;
  /** @param tags those of the line */
  constructor(connection: Reader, tags = NO_TAGS) {
    const [label, once] = [tags.get("label"), tags.get(ONCE)];
    this.connection = connection;
    if (label && label.length <= 64 && connection.caps & CAP["labeled-response"]) this.#label = ["label", label];
    if (once && connection.isWelcome) this.#once = [ONCE, once];
  }
  line(body: string, tags: readonly Tag[] = []): void {
    this.#lines.push({ body, tags });
  }
  /** Replies with a line of the server's. */
  server(command: string, ...params: readonly string[]): void {
    this.line(format(command, params.map((param, at) => at < params.length - 1 ? toWord(param) : param), SERVER));
  }
  numeric(code: string, ...params: readonly string[]): void {
    this.server(code, this.connection.nick, ...params);
  }
  event(event: Event, extra: readonly Tag[] = []): void {
    const [body, tags] = lineOf(event, this.connection.caps);
    this.line(body, [...extra, ...tags]);
  }
  /**
   * Replies with a batch (IRCv3 batch), where the client knows batches.
   * @param replyWith replies with the lines in it, each with these tags
   * @param own tags of the batch itself
   */
  batch(type: readonly string[], replyWith: (tags: readonly Tag[]) => void, own: readonly Tag[] = []): void {
    if (!(this.connection.caps & CAP.batch)) return replyWith([]);
    const name = (++Reply.#batches).toString(36);
    this.line(format("BATCH", [`+${name}`, ...type], SERVER), own);
    replyWith([["batch", name]]);
    this.server("BATCH", `-${name}`);
  }
  /** Sends the replies. With a label, none become an ACK, and several a batch that carries it. */
  end(): void {
    if (this.#isOver) return;
    this.#isOver = true;
    const lines = this.#lines.splice(0);
    const own = [this.#label, this.#once].filter((tag) => tag !== undefined);
    const isBatch = lines[0]?.body.startsWith(`:${SERVER} BATCH`);
    if (!lines.length && own.length) this.line(`:${SERVER} ACK`, own);
    else if (this.#label && lines.length > 1 && !isBatch && this.connection.caps & CAP.batch) {
      const replyWith = (batch: readonly Tag[]) =>
        lines.forEach(({ body, tags }) => this.line(body, [...batch, ...tags]));
      this.batch(["labeled-response"], replyWith, own);
    } else lines.forEach(({ body, tags }, at) => this.line(body, at === 0 ? [...own, ...tags] : tags));
    let text = "";
    for (const { body, tags } of this.#lines.splice(0)) {
      text += wireLine(body, tags);
      if (text.length < LIMITS.writeBytes / 4) continue;
      this.connection.send(text);
      text = "";
    }
    if (text) this.connection.send(text);
  }
}

/** Sends an event to members. The connection that caused it gets it as a reply, a message only if it wants echoes. */
function deliver(event: Event, members: Iterable<Member>, reply?: Reply): void {
  const forms: Buffer[] = []; // by capabilities
  for (const { sessions } of members) {
    for (const session of sessions) {
      const { caps } = session;
      if (event.kind === "TAGMSG" && !(caps & CAP["message-tags"])) continue;
      if (session !== reply?.connection) {
        session.share(forms[caps & FORM_BITS] ??= Buffer.from(wireLine(...lineOf(event, caps))));
      } else if (!isMessage(event) || caps & CAP["echo-message"]) reply.event(event);
    }
  }
}

/** Sends a line that is not an event to members, on the connections that have requested a capability. */
function announce(body: string, members: Iterable<Member>, cap?: Cap): void {
  const bytes = Buffer.from(wireLine(body));
  for (const { sessions } of members) {
    for (const session of sessions) if (!cap || session.caps & CAP[cap]) session.share(bytes);
  }
}

/** The other end of a connection. */
export interface Peer {
  readonly address: string;
  write(bytes: Buffer): boolean; // false if nothing more should be written until `Outbox.drained` is called
  pending(): number; // bytes that were written and that the network has not taken yet
  read(flowing: boolean): void; // whether to go on reading
  end(atOnce: boolean): void; // closes, when everything has been written or at once
}

/** What is to be written to a connection. */
class Outbox {
  static #due: Outbox[] = []; // to be written at the end of this turn of the event loop
  static #joined: { readonly from: readonly Buffer[]; readonly bytes: Buffer } = { from: [], bytes: EMPTY };
  static readonly #blocked = new Set<Outbox>();
  readonly #peer: Peer;
  readonly #onWritten: () => void;
  readonly #onUnread: () => void;
  #queue: Buffer[] = []; // other outboxes may have the same buffers
  #queuedBytes = 0;
  #isDue = false;
  /**
   * @param onWritten called when the queue has been written and the peer takes more
   * @param onUnread called when this is the longest queue, and all of them are too long
   */
  constructor(peer: Peer, onWritten: () => void, onUnread: () => void) {
    this.#peer = peer;
    this.#onWritten = onWritten;
    this.#onUnread = onUnread;
  }
  /** The peer takes nothing for now. */
  get isBlocked(): boolean {
    return Outbox.#blocked.has(this);
  }
  /** The bytes that the connection has not taken yet. */
  get queued(): number {
    return this.#queuedBytes + this.#peer.pending();
  }
  push(bytes: Buffer): void {
    this.#queue.push(bytes);
    this.#queuedBytes += bytes.length;
    if (this.#isDue || this.isBlocked) return;
    this.#isDue = true;
    if (Outbox.#due.push(this) === 1) setImmediate(() => Outbox.#flushDue());
  }
  /** Writes the queue. `force` does so although the peer is not ready: the connection is about to close. */
  flush(force = false): void {
    this.#isDue = false;
    while (this.#queue.length && (force || !this.isBlocked)) {
      if (!this.#peer.write(Outbox.#join(this.#take()))) Outbox.#blocked.add(this);
    }
    if (!this.isBlocked) this.#onWritten();
  }
  /** Takes from the queue what is written at once: a buffer, and further ones as far as the limit allows. */
  #take(): readonly Buffer[] {
    let [count, bytes] = [0, 0];
    for (const { length } of this.#queue) {
      if (count > 0 && bytes + length > LIMITS.writeBytes) break;
      count++;
      bytes += length;
    }
    this.#queuedBytes -= bytes;
    return this.#queue.splice(0, count);
  }
  /** The peer takes more. */
  drained(): void {
    Outbox.#blocked.delete(this);
    this.flush();
  }
  close(): void {
    this.#queue = [];
    this.#queuedBytes = 0;
    Outbox.#blocked.delete(this);
  }
  static #flushDue(): void {
    const due = Outbox.#due;
    Outbox.#due = [];
    for (const outbox of due) outbox.flush();
    Outbox.#joined = { from: [], bytes: EMPTY };
    Outbox.#bound();
  }
  /** Keeps all queues together within their limit: the longest ones go. */
  static #bound(): void {
    const queues = Array.from(Outbox.#blocked, (outbox) => ({ outbox, bytes: outbox.queued }));
    let excess = sumOf(queues, ({ bytes }) => bytes) - LIMITS.allQueuesBytes;
    if (excess <= 0) return;
    for (const { outbox, bytes } of queues.sort((one, other) => other.bytes - one.bytes)) {
      if (excess <= 0) return;
      excess -= bytes;
      outbox.#onUnread();
    }
  }
  /** Joins buffers. Outboxes with the same buffers, one after the other, share the result. */
  static #join(buffers: readonly Buffer[]): Buffer {
    if (buffers.length === 1 && buffers[0]) return buffers[0];
    const { from } = Outbox.#joined;
    const isSame = from.length === buffers.length && from.every((one, at) => one === buffers[at]);
    if (!isSame) Outbox.#joined = { from: buffers, bytes: Buffer.concat(buffers) };
    return Outbox.#joined.bytes;
  }
}

/* =====================================================================================================================
 * Session
 * A connection as the server sees it. Its Inbox splits what is received into lines and enforces the rate limit; each
 * line is executed with a Reply; its Outbox is what it will be sent. Until it is welcomed it has a Registration; after
 * that it belongs to a member.
 * ================================================================================================================== */

/**
 * The bytes that a connection has sent, and that have not been executed yet. A member over the rate limit is read more
 * slowly; anyone else is disconnected.
 */
class Inbox {
  rate: RateLimit; // of the connection before login, of the member afterwards
  heardAt: number; // when bytes last came, or a line last waited; by the monotonic clock
  isPaused = false; // nothing is read from the connection
  readonly #session: Session;
  readonly #peer: Peer;
  readonly #clock: Clock;
  readonly #splitter = new LineSplitter();
  #running = false; // while an asynchronous command is
  #ended = false; // the client has closed its side of the connection (FIN)
  #cancelTimer: (() => void) | undefined; // of the wait for the rate limit
  constructor(session: Session, peer: Peer, clock: Clock) {
    this.#session = session;
    this.#peer = peer;
    this.#clock = clock;
    this.rate = new RateLimit(clock, LIMITS.loginRate, LIMITS.loginRate * LIMITS.burstSeconds);
    this.heardAt = clock.now();
  }
  /** For how many ms the client has been silent. Time in which one of its lines waits does not count. */
  get silentMs(): number {
    return this.#running || this.#cancelTimer ? 0 : this.#clock.now() - this.heardAt;
  }
  push(chunk: Buffer): void {
    if (this.#session.closed) return;
    this.heardAt = this.#clock.now();
    this.rate.charge(LIMITS.chunkUnits + chunk.length / LIMITS.unitBytes);
    this.#splitter.push(chunk);
    if (this.#splitter.buffered > LIMITS.inputBytes) this.#session.flooded();
    else this.pump();
  }
  /** The client has closed its side. What it sent before is executed nevertheless. */
  end(): void {
    this.#ended = true;
    this.pump();
  }
  stop(): void {
    this.#cancelTimer?.();
  }
  /** Executes lines until one has to wait. While it waits, nothing more is read from the connection. */
  pump(): void {
    while (!this.#session.closed) {
      const { throttleMs, excess } = this.rate;
      if (excess > (this.#session.member ? LIMITS.debtUnits : 0)) return this.#session.flooded();
      if (this.#cancelTimer) return;
      if (throttleMs > 0) this.#cancelTimer = this.#clock.after(throttleMs, () => this.#resume());
      const isBehind = this.#session.outbox.queued > LIMITS.pauseBytes;
      if (throttleMs > 0 || this.#running || isBehind) return this.#read(false);
      const split = this.#splitter.next();
      if (!split) return this.#ended ? this.#session.lost("Connection closed", false) : this.#read(true);
      this.rate.charge(1);
      const running = this.#session.run(split);
      if (running) void this.#waitFor(running);
    }
  }
  #read(flowing: boolean): void {
    this.isPaused = !flowing;
    this.#peer.read(flowing);
  }
  #resume(): void {
    this.#cancelTimer = undefined;
    this.heardAt = this.#clock.now();
    this.pump();
  }
  async #waitFor(running: Promise<void>): Promise<void> {
    this.#running = true;
    await running;
    this.#running = false;
    this.heardAt = this.#clock.now();
    this.pump();
  }
}

/** A login that is under way. */
interface Registration {
  nick: string; // what NICK asked for; the account decides
  realName?: string; // from USER
  password: string; // from PASS, until it is used
  negotiating: boolean; // between CAP LS or REQ, and CAP END
  sasl?: { readonly exchange: SaslExchange<Member>; readonly buffer: SaslBuffer } | undefined;
  wrongPasswords: number;
}

/** What a session needs of its server. */
interface Host {
  readonly clock: Clock;
  execute(session: Session, line: Line, reply: Reply): void | Promise<void>;
  closed(session: Session, reason: string, politely: boolean): void;
  failed(address: string, what: string, why: string): void; // logs it, within limits
  log(line: string): void;
}

/** A connection, from the end of its TLS handshake on. */
export class Session implements Reader, Visitor {
  readonly address: string;
  readonly since: number;
  readonly openedAt: number; // like `since`, by the monotonic clock
  readonly inbox: Inbox;
  readonly outbox: Outbox;
  readonly #host: Host;
  readonly #peer: Peer;
  caps = 0;
  /** Absent once it has been welcomed. */
  registration: Registration | undefined = { nick: "", password: "", negotiating: false, wrongPasswords: 0 };
  member: Member | undefined; // present once it is logged in
  mechanism = ""; // by which it has logged in: PASS, or that of SASL
  active: number;
  pingedAt = 0; // when it was last sent a PING
  closed = false;
  #reply: Reply | undefined; // to the line that is being executed
  constructor(host: Host, peer: Peer) {
    this.#host = host;
    this.#peer = peer;
    this.address = peer.address;
    this.since = host.clock.wall();
    this.active = this.openedAt = host.clock.now();
    this.inbox = new Inbox(this, peer, host.clock);
    this.outbox = new Outbox(
      peer,
      () => this.inbox.isPaused && this.inbox.pump(),
      () => this.close("Not reading", true),
    );
  }
  has(cap: Cap): boolean {
    return (this.caps & CAP[cap]) !== 0;
  }
  get nick(): string {
    return this.member?.nick || this.registration?.nick || "*";
  }
  get isWelcome(): boolean {
    return this.registration === undefined;
  }

  // ---- From the peer

  /** Disconnects a client that sends too much, and reads nothing more from it meanwhile. */
  flooded(): void {
    if (this.closed) return;
    if (!this.member) this.#host.failed(this.address, "a connection was closed", "excess flood");
    this.#peer.read(false);
    this.close("Excess flood", !this.member);
  }

  /** Executes a line. An error in doing so ends this session, and nothing else. */
  run(split: Split): void | Promise<void> {
    const line = parse(split.text);
    const reply = this.#reply = new Reply(this, line.tags);
    try {
      if (split.fault) return this.#refuse(split.fault, line, reply);
      if (line.command !== "PING" && line.command !== "PONG") this.active = this.#host.clock.now();
      const running = this.#host.execute(this, line, reply);
      if (running) return running.then(() => reply.end()).catch((error: unknown) => this.#failed(error));
      reply.end();
    } catch (error) {
      this.#failed(error);
    }
  }
  #refuse(fault: Split["fault"], { command }: Line, reply: Reply): void {
    if (fault === "NUL") return this.close("That is not text");
    if (fault === "too long") reply.numeric("417", "Input line was too long");
    else reply.server("FAIL", /^[A-Z]+$/.test(command) ? command : "*", "INVALID_UTF8", "Only UTF-8 is accepted here");
    reply.end();
  }
  #failed(error: unknown): void {
    const trace = error instanceof Error ? error.stack ?? error.message : String(error);
    this.#host.log(`error in the session of ${this.nick}: ${trace.replace(/\s*\n\s*/g, " | ")}`);
    this.close("Internal error");
  }

  // ---- To the peer

  /** Queues what other connections may get as well. A client that does not read is disconnected. */
  share(bytes: Buffer): void {
    if (this.closed) return;
    this.outbox.push(bytes);
    if (!this.outbox.isBlocked || this.outbox.queued <= LIMITS.queueBytes) return;
    setImmediate(() => this.close("Not reading", true)); // not while an event is being delivered
  }
  reply(body: string): void {
    this.send(wireLine(body));
  }
  send(lines: string): void {
    if (this.closed) return;
    const bytes = Buffer.from(lines);
    this.inbox.rate.charge(bytes.length / LIMITS.replyBytes); // a short line may have a long reply
    this.outbox.push(bytes);
  }
  ping(): void {
    this.pingedAt = this.#host.clock.now();
    this.reply(format("PING", [SERVER]));
  }

  /** Closes the connection and says why; `atOnce` if that would not be read. */
  close(reason: string, atOnce = false): void {
    if (this.closed) return;
    this.#reply?.end();
    this.reply(format("ERROR", [reason]));
    this.#end(reason, true, atOnce);
  }
  /** Makes way for another connection. */
  evict(): void {
    this.close("Too many connections, and you had not logged in", true);
  }
  /** The connection is lost, or over when everything has been written. The client may reconnect. */
  lost(reason: string, atOnce = true): void {
    if (!this.closed) this.#end(reason, false, atOnce);
  }
  #end(reason: string, politely: boolean, atOnce: boolean): void {
    this.closed = true;
    this.inbox.stop();
    this.#host.closed(this, reason, politely);
    if (politely || !atOnce) this.outbox.flush(true);
    this.outbox.close();
    this.#peer.end(atOnce);
  }
}

/* =====================================================================================================================
 * Server
 * The state of a server and its rules: which connections, members and rooms there are, and what it means to arrive, to
 * join, to part and to leave. Nothing here knows about sockets.
 * ================================================================================================================== */

const DEFAULTS = {
  room: "#chat", // where everybody lands
  topic: "", // of that room
  name: "chat", // of the network
  history: 1000, // messages kept per room
  maxClients: 1000, // connections that have logged in
  perAddress: 100, // connections per network
  rate: 10, // units a second that a member may send; 0 lifts the limit
  warning: "", // sent to everybody who enters
  lock: false, // whether registration is closed at the start
  records: [] as readonly string[], // of a journal of accounts
  journal: undefined as Journal | undefined, // continues it
  binding: EMPTY, // the channel binding of logins
  clock: systemClock,
  log: (_line: string): void => {}, // takes the lines of the log
  explain: undefined as ((line: string) => void) | undefined, // takes what happens on the wire
};
export type ServerOptions = Partial<typeof DEFAULTS>;

const KEPT_BOOT = "kept"; // the boot id of every server with a journal

/** What the handler of a command gets. */
interface Context {
  readonly server: Server;
  readonly session: Session;
  readonly member: Member | undefined;
  readonly line: Line;
  readonly params: readonly string[]; // those of the line
  readonly reply: Reply;
}
type MemberContext = Context & { readonly member: Member };

/**
 * A row in the table of commands, with the least number of parameters, and a description for INFO. The handler of an
 * early command runs before login, too. Of the long ones, whose replies may have a thousand lines, one runs at a time.
 */
type Command =
  & { readonly least: number; readonly about: string; readonly long?: true }
  & (
    | { readonly early: true; run(context: Context): void | Promise<void> }
    | { readonly early?: false; run(context: MemberContext): void | Promise<void> }
  );

/** The IRC commands. The chapters Registration and Commands put them here. */
export const COMMANDS: Partial<Record<string, Command>> = {};

/** Whether a line with an idempotency key was executed before. If not, its key counts as executed from now on. */
function isRepeated({ executed }: Member, { tags }: Line): boolean {
  const [, instance, digits] = /^([\w-]{1,32})-(\d{1,15})$/.exec(tags.get(ONCE) ?? "") ?? [];
  if (!instance) return false;
  if (Number(digits) <= (executed.get(instance) ?? 0)) return true;
  executed.delete(instance);
  executed.set(instance, Number(digits));
  const [oldest = ""] = executed.keys();
  if (executed.size > LIMITS.instances) executed.delete(oldest);
  return false;
}

export class Server implements Host {
  readonly options: typeof DEFAULTS;
  readonly clock: Clock;
  readonly started: Date;
  readonly boot: string; // is another one if this server does not know the accounts of the one before
  readonly accounts: Accounts<Member>;
  readonly history: History;
  readonly rooms = new Map<string, Room>(); // by folded name
  readonly lobby: Room; // where everybody lands
  readonly sessions = new Set<Session>();
  readonly occupancy: Occupancy;
  readonly #failures: KeyedRateLimit; // in the log, per network
  readonly #longReplies = new Semaphore(1);
  #sweptAt: number;
  mostPresent = 0; // members at any one time
  constructor(options: ServerOptions = {}) {
    this.options = { ...DEFAULTS, ...options };
    const { clock, rate, perAddress, maxClients, history, room, topic } = this.options;
    this.clock = clock;
    this.started = new Date(clock.wall());
    this.boot = this.options.journal ? KEPT_BOOT : crypto.randomBytes(6).toString("base64url");
    this.occupancy = new Occupancy(perAddress, Math.max(LIMITS.unauthenticated, maxClients / 2));
    this.#sweptAt = clock.now();
    this.#failures = new KeyedRateLimit(clock, LIMITS.failuresPerMinute / 60, LIMITS.failuresPerMinute);
    const register = (nick: string, verifier: Verifier, visitor?: Visitor) => {
      if (visitor) this.log(`${nick} registered from ${visitor.address}`);
      return new Member(nick, verifier, new RateLimit(clock, rate, rate * LIMITS.burstSeconds));
    };
    this.accounts = new Accounts(register, perAddress, clock, this.options.journal);
    this.accounts.locked = this.options.lock;
    for (const [at, record] of this.options.records.entries()) {
      if (!this.accounts.apply(record)) this.log(`line ${at + 1} of the accounts is not an account, and is skipped`);
    }
    this.history = new History(history, clock);
    this.lobby = this.openRoom(room);
    if (topic) this.lobby.topic = this.happens(this.lobby, "TOPIC", SERVER, topic);
  }

  log(line: string): void {
    this.options.log(clean(cut(line, 1000))); // a terminal may show it
  }
  /** Logs what an unauthenticated client failed to do, unless its network fills the log with that. */
  failed(address: string, what: string, why: string): void {
    if (!tryCharge(this.#failures.of(networkOf(address)))) this.log(`${what} from ${address}: ${why}`);
  }

  // ---- Connections

  /** A client has connected. Its session is closed at once if it cannot be let in. */
  open(peer: Peer): Session {
    const { address } = peer;
    const session = new Session(this, peer);
    this.sessions.add(session);
    this.occupancy.enter(session);
    if (this.isFull) session.close("The server is full");
    else if (this.occupancy.isCrowded(address)) session.close("Too many connections from your address");
    else if (this.accounts.barred.has(networkOf(address))) session.close("The operator keeps your address out");
    return session;
  }
  get isFull(): boolean {
    return [...this.sessions].filter(({ isWelcome }) => isWelcome).length >= this.options.maxClients;
  }
  /** Runs the command of a line, if the client may use it. */
  execute(session: Session, line: Line, reply: Reply): void | Promise<void> {
    const command = rowOf(COMMANDS, line.command);
    const { member, isWelcome } = session;
    const { params } = line;
    if (!line.command) return;
    if (!isWelcome && params.at(-1)?.startsWith("HTTP/")) return session.close("This is IRC, not HTTP");
    if (!isWelcome && !command?.early) return reply.numeric("451", "You have not registered");
    if (!command) return reply.numeric("421", line.command, "Unknown command");
    if (params.length < command.least) return reply.numeric("461", line.command, "Not enough parameters");
    if (member && isWelcome) {
      member.readPosition = this.history.position;
      if (isRepeated(member, line)) return;
    }
    const context = { server: this, session, line, reply, params };
    if (command.early) return command.run({ ...context, member });
    if (!member) return;
    if (!command.long) return command.run({ ...context, member });
    return this.#longReplies.run(networkOf(session.address), async () => {
      if (!session.closed) await command.run({ ...context, member });
      await new Promise(setImmediate); // what others have sent meanwhile comes first
    });
  }
  /** A session has closed. With its last session a member leaves: at once, or if it was lost, after a grace period. */
  closed(session: Session, reason: string, politely: boolean): void {
    if (!this.sessions.delete(session)) return;
    const { member, address } = session;
    this.occupancy.leave(session);
    if (member) this.log(`${member.nick} left from ${address}: ${reason}`);
    if (!member?.sessions.delete(session) || member.sessions.size > 0) return;
    member.lostAt = this.clock.now();
    if (politely) this.#leave(member, reason);
  }

  /** Closes and drops what has timed out; to be called once a second. */
  sweep(): void {
    const now = this.clock.now();
    const wasAsleep = now - this.#sweptAt > LIMITS.sleepMs; // what clients sent meanwhile is still to be read
    this.#sweptAt = now;
    if (wasAsleep) return;
    for (const session of this.sessions) this.#checkSilence(session, now);
    for (const member of this.accounts.byNick.values()) {
      const isGone = member.present && !member.sessions.size && now - member.lostAt > LIMITS.graceMs;
      if (isGone) this.#leave(member, "Connection lost");
    }
    for (const room of this.rooms.values()) {
      if (this.#isEmpty(room) && now - room.emptySince > LIMITS.roomIdleMs) this.closeRoom(room);
    }
  }
  #checkSilence(session: Session, now: number): void {
    const { inbox: { silentMs, heardAt }, openedAt, pingedAt } = session;
    if (session.registration) {
      if (silentMs > LIMITS.silenceMs || now - openedAt > LIMITS.loginMs) session.close("You did not log in in time");
    } else if (silentMs > LIMITS.pingMs) {
      if (pingedAt <= heardAt) session.ping();
      else if (now - pingedAt > LIMITS.pingMs) session.lost("Ping timeout");
    }
  }

  // ---- Members

  /** The member of that nick, if the others see it as present. */
  findPresent(nick: string): Member | undefined {
    const member = this.accounts.find(nick);
    return member?.present ? member : undefined;
  }
  get presentMembers(): Member[] {
    return [...this.accounts.byNick.values()].filter(({ present }) => present);
  }
  /** A session has logged in to an account. */
  bindAccount(session: Session, member: Member, mechanism: string): void {
    session.member = member;
    session.mechanism = mechanism;
    session.inbox.rate = member.rate;
    if (session.registration) session.registration.password = ""; // which is not needed any more
    this.log(`${member.nick} logged in from ${session.address}`);
  }
  /** A login was refused. After too many wrong passwords the connection is closed. */
  refuse(session: Session, nick: string, refusal: Refusal): void {
    if (refusal !== "unknown") this.failed(session.address, `${nick} was refused`, reasonOf(refusal).toLowerCase());
    if (!session.registration || refusal !== "wrong") return;
    if (++session.registration.wrongPasswords >= LIMITS.wrongPasswords) session.close("Too many wrong passwords");
  }
  /** Adds a session that has logged in to its member, who arrives with the first one. @returns whether it arrives */
  arrive(session: Session, member: Member): boolean {
    const isFirst = !member.present;
    member.sessions.add(session);
    member.present = true;
    session.registration = undefined;
    this.occupancy.settle(session);
    this.mostPresent = Math.max(this.mostPresent, this.presentMembers.length);
    return isFirst;
  }
  /** Private messages that a member may not have received: those since it last sent a line. */
  missedBy(member: Member): Event[] {
    const after = { time: 0, number: member.readPosition };
    const missed = [...member.talks.values()].flatMap((log) => log.read("last", LIMITS.missed, after))
      .filter(({ target }) => fold(target) === fold(member.nick))
      .sort((one, other) => one.number - other.number).slice(-LIMITS.missed);
    let bytes = 0; // they must fit into the queue, the latest of them if not all
    return missed.slice(missed.findLastIndex((event) => (bytes += sizeOf(event)) > LIMITS.queueBytes / 2) + 1);
  }
  /** Ends all the sessions of a member, also those that have not been welcomed yet. */
  kick(member: Member, reason: string): void {
    for (const session of this.sessions) if (session.member === member) session.close(reason);
    if (member.present) this.#leave(member, reason);
  }
  forget(member: Member): void {
    this.accounts.decide(member.nick, "forgotten");
    this.kick(member, "The account was deleted");
    for (const log of member.talks.values()) this.history.forget(log);
  }
  /** The member, and everybody who shares a room with it. */
  audienceOf(member: Member): Set<Member> {
    return new Set([member, ...[...member.rooms].flatMap((room) => [...room.members])]);
  }
  /** Notifies the others of these members that this one is away, or back. */
  announceAway(member: Member, members: Iterable<Member>): void {
    const others = [...members].filter((one) => one !== member);
    announce(format("AWAY", member.away ? [member.away] : [], sourceOf(member.nick)), others, "away-notify");
  }
  #leave(member: Member, reason: string): void {
    const audience = this.audienceOf(member);
    const wasInRoom = member.rooms.size > 0;
    for (const room of member.rooms) this.#remove(member, room);
    member.present = false;
    member.away = "";
    if (wasInRoom) deliver(this.happens(undefined, "QUIT", member.nick, reason), audience);
  }

  // ---- Rooms

  findRoom(name: string): Room | undefined {
    return this.rooms.get(fold(name));
  }
  openRoom(name: string): Room {
    const room: Room = { name, log: new Log(), members: new Set(), topic: undefined, emptySince: 0 };
    this.rooms.set(fold(name), room);
    return room;
  }
  closeRoom(room: Room): void {
    this.rooms.delete(fold(room.name));
    this.history.forget(room.log);
  }
  /** Makes an event of what somebody did in a room, and appends a message to its log. */
  happens(room: Room | undefined, kind: Event["kind"], nick: string, text: string, tags: readonly Tag[] = []): Event {
    return this.history.record(room?.log, { kind, nick, target: room?.name ?? "", text, tags });
  }
  join(member: Member, room: Room, reply: Reply): void {
    room.members.add(member);
    member.rooms.add(room);
    deliver(this.happens(room, "JOIN", member.nick, member.realName), room.members, reply);
    for (const session of member.sessions) {
      const own = session === reply.connection ? reply : new Reply(session);
      replyWithRoom(own, room);
      if (own !== reply) own.end();
    }
    if (member.away) this.announceAway(member, room.members);
  }
  part(member: Member, room: Room, reason: string, reply: Reply): void {
    deliver(this.happens(room, "PART", member.nick, reason), room.members, reply);
    this.#remove(member, room);
  }
  /** Makes place for one more room, if need be by closing the one that has been empty for longest. */
  makePlaceForRoom(): boolean {
    if (this.rooms.size < LIMITS.rooms) return true;
    const empty = [...this.rooms.values()].filter((room) => this.#isEmpty(room));
    const [oldest] = empty.sort((one, other) => one.emptySince - other.emptySince);
    if (oldest) this.closeRoom(oldest);
    return oldest !== undefined;
  }
  /** A room in which nothing was said closes when it becomes empty; others stay for a while with their log. */
  #remove(member: Member, room: Room): void {
    room.members.delete(member);
    member.rooms.delete(room);
    if (!this.#isEmpty(room)) return;
    room.emptySince = this.clock.now();
    if (!room.log.messages.length) this.closeRoom(room);
  }
  #isEmpty(room: Room): boolean {
    return room.members.size === 0 && room !== this.lobby;
  }
}

/** Replies with what follows one's own JOIN: the topic if there is one, and the names. */
function replyWithRoom(reply: Reply, room: Room): void {
  if (room.topic) replyWithTopic(reply, room);
  replyWithNames(reply, room);
}

function replyWithTopic(reply: Reply, { name, topic }: Room): void {
  if (!topic) return reply.numeric("331", name, "No topic is set");
  reply.numeric("332", name, topic.text);
  reply.numeric("333", name, topic.nick, String(Math.floor(topic.time / 1000)));
}

const LINE_WIDTH = 380; // bytes of a list in one line, which leaves room for what comes before it

function replyWithNames(reply: Reply, room: Room): void {
  const nicks = Array.from(room.members, ({ nick }) => nick);
  for (const line of fill(nicks, LINE_WIDTH)) reply.numeric("353", "=", room.name, line);
  reply.numeric("366", room.name, "End of /NAMES list");
}

/* =====================================================================================================================
 * Registration
 * What a client says before it is welcomed: CAP, NICK, USER, and a password by one of four ways. Whichever it takes, it
 * ends in bindAccount, and when nothing is missing any more, in the welcome.
 * ================================================================================================================== */

/** The mechanisms of SASL, the preferred one first. */
const MECHANISMS: Readonly<Record<string, (server: Server, session: Session) => SaslExchange<Member>>> = {
  "SCRAM-SCRYPT-PLUS": ({ accounts, options }, session) => accounts.scram(session, options.binding),
  "PLAIN": ({ accounts }, session) => accounts.plain(session),
};

/** Welcomes a session when nothing is missing, or says what is. */
function completeRegistration(context: Context): void | Promise<void> {
  const { server, session, reply } = context;
  const { member, registration } = session;
  if (session.closed || !registration || registration.negotiating || registration.realName === undefined) return;
  if (member) {
    const { barred } = server.accounts; // the operator may have acted since the login
    const isOut = barred.has(fold(member.nick)) || server.accounts.find(member.nick) !== member;
    if (isOut || server.isFull) return session.close(isOut ? REFUSALS.barred : "The server is full");
    member.realName = registration.realName;
    return welcome(context, member);
  }
  const { nick, password } = registration;
  if (nick && password) return loginByPass(context, registration);
  if (!nick) return;
  const text = "A password is needed here: it registers a free nick, or logs you in";
  if (session.has("standard-replies")) reply.server("FAIL", "*", "ACCOUNT_REQUIRED_TO_CONNECT", text);
  reply.numeric("464", text);
  reply.server("NOTICE", nick, "Set a server password in your client, or log in by SASL; or type /quote PASS password");
}

/** Logs in by the password of PASS, or registers the nick with it if it is free. */
async function loginByPass(context: Context, registration: Registration): Promise<void> {
  const { server, session, reply } = context;
  const { nick, password } = registration;
  registration.password = "";
  let result = await server.accounts.login(nick, password, session);
  const isNew = result === "unknown";
  if (isNew) result = await server.accounts.register(nick, password, session);
  if (session.closed) return;
  if (typeof result === "string") {
    reply.numeric("464", reasonOf(result));
    return server.refuse(session, nick, result);
  }
  server.options.explain?.(`5 login: ${nick} sent us the password in PASS, within TLS; we keep a verifier of it`);
  server.bindAccount(session, result, "PASS");
  if (isNew) reply.server("NOTICE", result.nick, `${result.nick} is registered now, with this password`);
  return completeRegistration(context);
}

/** Lets a session in: the greeting, its rooms, and the private messages that it may have missed. */
function welcome({ server, session, reply }: Context, member: Member): void {
  const missed = session.has("draft/chathistory") ? [] : server.missedBy(member); // the others can ask for them
  const arrives = server.arrive(session, member);
  const loop = "one event loop reads, executes and writes the lines of all connections in turn";
  server.options.explain?.(`6 the room: ${loop}; there is no thread for ${member.nick}`);
  greet(server, session, reply);
  for (const room of member.rooms) { // a further connection, or one that reconnects
    reply.event(server.happens(room, "JOIN", member.nick, member.realName));
    replyWithRoom(reply, room);
  }
  if (arrives || !member.rooms.size) server.join(member, server.lobby, reply);
  if (server.options.warning) reply.server("NOTICE", member.nick, server.options.warning);
  for (const event of missed) reply.event(event);
}

/** Sends what comes first after the login, up to the end of the message of the day. */
function greet(server: Server, session: Session, reply: Reply): void {
  const { options, started } = server;
  const { targets } = LIMITS;
  reply.numeric("001", `Welcome to the ${options.name} network, ${sourceOf(session.nick)}`);
  reply.numeric("002", `Your host is ${SERVER}, running chat ${VERSION}`);
  reply.numeric("003", `This server was started ${started.toUTCString()}`);
  reply.numeric("004", SERVER, `chat-${VERSION}`, "i", "n");
  const support = [
    `NETWORK=${options.name.replaceAll(" ", "\\x20")}`,
    ..."CASEMAPPING=ascii UTF8ONLY CHANTYPES=# PREFIX=(ov)@+ CHANMODES=b,,,n SAFELIST".split(" "),
    `NICKLEN=${LIMITS.nick}`,
    `CHANNELLEN=${LIMITS.room}`,
    `TOPICLEN=${LIMITS.topic}`,
    `AWAYLEN=${LIMITS.text}`,
    `CHANLIMIT=#:${LIMITS.roomsPerMember}`,
    `TARGMAX=PRIVMSG:${targets},NOTICE:${targets},TAGMSG:${targets},JOIN:,PART:,NAMES:,LIST:,WHOIS:1`,
    `CHATHISTORY=${LIMITS.chathistory}`,
    "MSGREFTYPES=msgid,timestamp",
    `BOOT=${server.boot}`,
  ];
  for (const line of fill(support, 150)) reply.numeric("005", ...line.split(" "), "are supported by this server");
  replyWithCounts(server, reply);
  replyWithMotd(server, reply);
}

function replyWithCounts(server: Server, reply: Reply): void {
  const [present, most] = [server.presentMembers.length, server.mostPresent];
  reply.numeric("251", `There are ${present} users and 0 invisible on 1 servers`);
  reply.numeric("252", "0", "operator(s) online");
  reply.numeric("253", String(server.occupancy.guests), "unknown connection(s)");
  reply.numeric("254", String(server.rooms.size), "channels formed");
  reply.numeric("255", `I have ${present} clients and 0 servers`);
  reply.numeric("265", String(present), String(most), `Current local users ${present}, max ${most}`);
  reply.numeric("266", String(present), String(most), `Current global users ${present}, max ${most}`);
}

function replyWithMotd({ options }: Server, reply: Reply): void {
  const forgets = "Nothing is written to disk: accounts and history end with the server.";
  reply.numeric("375", `- ${SERVER} message of the day -`);
  reply.numeric("372", `- ${options.journal ? "Accounts are kept; what was said ends with the server." : forgets}`);
  reply.numeric("372", "- Members of a room can read its log, also from before they joined.");
  reply.numeric("376", "End of MOTD");
}

/** CAP: agrees on extensions (IRCv3 capability negotiation). */
function handleCap(context: Context): void | Promise<void> {
  const { server, session, reply, params: [word = "", argument = ""] } = context;
  const verb = word.toUpperCase();
  const values: Partial<Record<Cap, string>> = {
    sasl: Object.keys(MECHANISMS).join(),
    [REGISTRATION]: "before-connect",
  };
  const offered = CAPS.filter((name) => name !== REGISTRATION || !server.accounts.locked);
  const { registration } = session;
  if (registration && /^(LS|REQ|END)$/.test(verb)) registration.negotiating = verb !== "END";
  const knowsValues = Number(argument) >= 302;
  if (verb === "LS" && knowsValues) session.caps |= CAP["cap-notify"];
  const all = offered.map((name) => knowsValues && values[name] ? `${name}=${values[name]}` : name);
  const list = (names: readonly string[]) => reply.server("CAP", session.nick, verb, names.join(" "));
  switch (verb) {
    case "LS":
      return list(all);
    case "LIST":
      return list(offered.filter((name) => session.has(name)));
    case "REQ":
      return requestCaps(context, offered, argument);
    case "END":
      return completeRegistration(context);
    default:
      return reply.numeric("410", word, "Invalid CAP command");
  }
}

/** CAP REQ: all of the changes are made, or none. */
function requestCaps({ session, reply }: Context, offered: readonly Cap[], argument: string): void {
  let caps = session.caps;
  for (const word of argument.split(" ").filter(Boolean)) {
    const name = offered.find((one) => one === word.replace(/^-/, ""));
    if (!name) return reply.server("CAP", session.nick, "NAK", argument);
    caps = word.startsWith("-") ? caps & ~CAP[name] : caps | CAP[name];
  }
  session.caps = caps;
  reply.server("CAP", session.nick, "ACK", argument);
}

/** AUTHENTICATE: begins a SASL exchange, aborts it, or brings a chunk of a message (IRCv3 sasl-3.2). */
async function handleAuthenticate(context: Context): Promise<void> {
  const { server, session, reply, params: [chunk = ""] } = context;
  const { registration } = session;
  if (session.member || !registration) return reply.numeric("907", "You are logged in already");
  const { sasl } = registration;
  registration.sasl = undefined;
  if (chunk === "*") return reply.numeric("906", "SASL authentication aborted");
  if (!sasl) {
    session.mechanism = chunk.toUpperCase();
    const exchange = rowOf(MECHANISMS, session.mechanism)?.(server, session);
    if (exchange) {
      registration.sasl = { exchange, buffer: new SaslBuffer() };
      return reply.line("AUTHENTICATE +");
    }
    reply.numeric("908", Object.keys(MECHANISMS).join(","), "are available SASL mechanisms");
    return reply.numeric("904", "SASL authentication failed");
  }
  const whole = sasl.buffer.push(chunk);
  if (whole === "too long") return reply.numeric("905", "SASL message too long");
  registration.sasl = sasl;
  if (!whole) return;
  const step = await sasl.exchange(whole.message);
  if (session.closed) return;
  const answer = "challenge" in step ? step.challenge : "last" in step ? step.last : undefined;
  for (const one of answer ? saslChunks(answer) : []) reply.line(`AUTHENTICATE ${one}`);
  if ("challenge" in step) return;
  registration.sasl = undefined;
  if ("account" in step) return loginBySasl(context, step.account);
  reply.numeric("904", `SASL authentication failed: ${reasonOf(step.refusal)}`);
  server.refuse(session, session.nick, step.refusal);
}

function loginBySasl(context: Context, member: Member): void | Promise<void> {
  const { server, session, reply } = context;
  const { nick } = member;
  const how = session.mechanism === "PLAIN"
    ? `${nick} sent us the password; scrypt made it fit the verifier`
    : `${nick} and we proved to each other that we know the password, for this certificate; neither side sent it`;
  server.options.explain?.(`5 login: ${how}`);
  server.bindAccount(session, member, session.mechanism);
  reply.numeric("900", sourceOf(nick), nick, `You are now logged in as ${nick}`);
  reply.numeric("903", "SASL authentication successful");
  return completeRegistration(context);
}

/** Only the first word of such a password would count, and be all that is needed to log in. */
const COLON_MISSING = "A password with spaces needs a colon before it, as in PASS :two words";

/** REGISTER: makes an account before the welcome, with a password or a verifier (IRCv3 draft/account-registration). */
async function handleRegister(context: Context): Promise<void> {
  const { server, session, reply, params: [name = "", email, secret = "", ...more] } = context;
  const { registration } = session;
  const fail = (code: string, text: string) => reply.server("FAIL", "REGISTER", code, name, text);
  if (session.member || !registration) return fail("ALREADY_AUTHENTICATED", "You are logged in");
  const { nick } = registration;
  if (!nick) return fail("NEED_NICK", "Send NICK first");
  if (name !== "*" && fold(name) !== fold(nick)) return fail("ACCOUNT_NAME_MUST_BE_NICK", "Send NICK with this name");
  if (email !== "*") return fail("UNACCEPTABLE_EMAIL", "No e-mail address is kept here: send *");
  if (more.length) return fail("UNACCEPTABLE_PASSWORD", COLON_MISSING);
  const verifier = readVerifier(secret);
  if (verifier === "bad" || !secret) {
    return fail("UNACCEPTABLE_PASSWORD", "This is neither a password nor a verifier as all are here");
  }
  const result = await server.accounts.register(nick, verifier ?? secret, session);
  if (session.closed) return;
  if (typeof result === "string") {
    server.refuse(session, nick, result);
    const codes: Partial<Record<Refusal, string>> = { "exists": "ACCOUNT_EXISTS", "bad nick": "BAD_ACCOUNT_NAME" };
    return fail(codes[result] ?? "TEMPORARILY_UNAVAILABLE", reasonOf(result));
  }
  reply.server("REGISTER", "SUCCESS", nick, "Account registered");
  if (verifier) return; // which proves nothing: SCRAM follows
  server.bindAccount(session, result, "REGISTER");
  reply.numeric("900", sourceOf(nick), nick, `You are now logged in as ${nick}`);
  return completeRegistration(context);
}

/** PASS: the password to log in with. After a login by SCRAM: the verifier of a new password. */
async function handlePass(context: Context): Promise<void> {
  const { server, session, member, reply, params: [secret = "", ...more] } = context;
  const { registration } = session;
  if (more.length) return reply.numeric("464", COLON_MISSING);
  if (!member) {
    if (registration) registration.password = secret;
    return completeRegistration(context);
  }
  const verifier = readVerifier(secret);
  if (!verifier || !session.mechanism.startsWith("SCRAM")) return reply.numeric("462", "You may not reregister");
  if (verifier === "bad") {
    return reply.server("FAIL", "PASS", "UNACCEPTABLE_PASSWORD", "This looks like a verifier, but is not a valid one");
  }
  if (!await server.accounts.change(member, verifier)) {
    return reply.server("FAIL", "PASS", "TEMPORARILY_UNAVAILABLE", REFUSALS.unwritten);
  }
  server.log(`${member.nick} changed the password`);
  reply.server("NOTE", "PASS", "PASSWORD_CHANGED", "Your password is changed");
}

/** NICK: a wish before the login; after it the nick is the account's, and only its case can change. */
function handleNick(context: Context): void | Promise<void> {
  const { server, session, member, reply, params: [wish = ""] } = context;
  if (!wish) return reply.numeric("431", "No nickname given");
  if (!isNick(wish)) return reply.numeric("432", wish, REFUSALS["bad nick"]);
  if (session.registration) {
    session.registration.nick = wish;
    return completeRegistration(context);
  }
  if (!member || wish === member.nick) return;
  if (fold(wish) !== fold(member.nick)) {
    if (server.accounts.find(wish)) return reply.numeric("433", wish, "That nick is another account");
    return reply.numeric("484", "Your nick is your account and stays");
  }
  const body = format("NICK", [wish], sourceOf(member.nick));
  member.nick = wish;
  announce(body, server.audienceOf(member));
}

function handleUser(context: Context): void | Promise<void> {
  const { session, reply, params: [, , , realName = ""] } = context;
  if (!session.registration) return reply.numeric("462", "You may not reregister");
  if (!realName.trim()) return reply.numeric("461", "USER", "Not enough parameters: the real name is empty");
  session.registration.realName = cut(realName, LIMITS.text);
  return completeRegistration(context);
}

Object.assign(
  COMMANDS,
  {
    CAP: { least: 1, about: "agree on extensions", early: true, run: handleCap },
    AUTHENTICATE: { least: 1, about: "log in by SASL", early: true, run: handleAuthenticate },
    REGISTER: { least: 3, about: "make an account", early: true, run: handleRegister },
    PASS: { least: 1, about: "log in, or register a free nick", early: true, run: handlePass },
    NICK: { least: 0, about: "say which nick you want", early: true, run: handleNick },
    USER: { least: 4, about: "say your real name", early: true, run: handleUser },
  } satisfies Record<string, Command>,
);

/* =====================================================================================================================
 * Commands
 * What a member can say. Each handler gets its context and replies through it; the numerics are those of Modern IRC.
 * ================================================================================================================== */

/** The names in a list, each once. */
function namesIn(text: string): string[] {
  const names = text.split(",").filter(Boolean);
  return [...new Map(names.map((name) => [fold(name), name])).values()];
}

/** A copy of a text. A slice would keep the whole line alive that it was cut from. */
const detached = (text: string) => Buffer.from(text).toString();

/** PRIVMSG, NOTICE and TAGMSG. Each target that a message cannot go to gets a reply of its own. */
function handleMessage(context: MemberContext): void {
  const { server, member, line, params: [targets = "", words = ""], reply } = context;
  const kind = line.command as "PRIVMSG" | "NOTICE" | "TAGMSG";
  const text = kind === "TAGMSG" ? "" : detached(words);
  if (!text && kind === "PRIVMSG") return reply.numeric("412", "No text to send");
  if (!text && kind === "NOTICE") return;
  const tags = [...line.tags].filter(([name]) => name.startsWith("+"))
    .map(([name, value]) => [detached(name), detached(value)] as const);
  const names = namesIn(targets);
  for (const name of names.slice(0, LIMITS.targets)) {
    const [room, other] = [server.findRoom(name), server.accounts.find(name)];
    if (room && member.rooms.has(room)) {
      deliver(server.happens(room, kind, member.nick, text, tags), room.members, reply);
    } else if (other) sendPrivately(context, other, { kind, nick: member.nick, target: other.nick, text, tags });
    else if (kind === "NOTICE") continue; // robots must not answer each other's errors
    else if (room) reply.numeric("404", room.name, "Cannot send to channel");
    else if (name.startsWith("#")) reply.numeric("403", name, "No such channel");
    else reply.numeric("401", name, "No such nick/channel");
  }
  for (const name of names.slice(LIMITS.targets)) {
    reply.numeric("407", name, `Too many targets: a message goes to ${LIMITS.targets}, and not to this one`);
  }
}

function sendPrivately({ server, member, reply }: MemberContext, other: Member, message: Happening): void {
  const log = message.kind === "TAGMSG" ? undefined : member.talkWith(other);
  const event = server.history.record(log, message);
  deliver(event, new Set([member, other]), reply);
  if (other === member) { // the delivered copy has no label, other than the echo (IRCv3 labeled-response)
    const received = new Reply(reply.connection);
    received.event(event);
    received.end();
  }
  if (message.kind !== "PRIVMSG") return;
  if (!other.sessions.size) reply.numeric("301", other.nick, "Is not here, and will read it on return");
  else if (other.away) reply.numeric("301", other.nick, other.away);
}

/** Reads a message reference, `msgid=…` or `timestamp=…` (IRCv3 draft/chathistory). */
function readPlace(reference: string): Place | undefined {
  const [, time, number] = /^msgid=(\d{1,15})-(\d{1,15})$/.exec(reference) ?? [];
  if (time && number) return { time: Number(time), number: Number(number) };
  const moment = reference.startsWith("timestamp=") ? Date.parse(reference.slice(10)) : NaN;
  return isNaN(moment) ? undefined : { time: moment };
}

/** CHATHISTORY: reads the log of a room or a private talk (IRCv3 draft/chathistory). */
function handleChathistory({ server, member, params, reply }: MemberContext): void {
  const [subcommand = "", target = ""] = params;
  const [verb, most = ""] = [subcommand.toUpperCase(), params.at(-1)];
  const fail = (code: string, about: string, text: string) =>
    reply.server("FAIL", "CHATHISTORY", code, subcommand, about, text);
  const limit = /^\d+$/.test(most) ? Math.min(Number(most), LIMITS.chathistory) : 0;
  if (!limit) return fail("INVALID_PARAMS", most, "The limit is a number above 0");
  const places = params.slice(verb === "TARGETS" ? 1 : 2, -1);
  const [from, until] = places.map(readPlace);
  const needsTwo = verb === "BETWEEN" || verb === "TARGETS";
  if (!from && !(verb === "LATEST" && places[0] === "*") || needsTwo && !until) {
    return fail("INVALID_PARAMS", places.join(" "), "This is not a place in a log");
  }
  if (verb === "TARGETS") return replyWithTargets(member, reply, from?.time ?? 0, until?.time ?? 0, limit);
  const [room, other] = [server.findRoom(target), server.accounts.find(target)];
  const mayRead = room ? member.rooms.has(room) : other;
  if (!mayRead) return fail("INVALID_TARGET", target, "You are not in that room, or there is no such account");
  const log = room?.log ?? (other && member.talks.get(other)) ?? new Log();
  const events = readHistory(log, verb, limit, from, until);
  if (!events) return fail("INVALID_PARAMS", subcommand, "There is no such subcommand");
  reply.batch(["chathistory", room?.name ?? target], (tags) => events.forEach((event) => reply.event(event, tags)));
}

/** Reads a log as a subcommand of CHATHISTORY says. @returns undefined if there is no such subcommand */
function readHistory(log: Log, verb: string, limit: number, from?: Place, until?: Place): readonly Event[] | undefined {
  if (verb === "LATEST") return log.read("last", limit, from);
  if (verb === "BEFORE") return log.read("last", limit, undefined, from);
  if (verb === "AFTER") return log.read("first", limit, from);
  if (verb === "BETWEEN") {
    const isBackward = from && until && (from.time > until.time || (from.number ?? 0) > (until.number ?? Infinity));
    return isBackward ? log.read("last", limit, until, from) : log.read("first", limit, from, until);
  }
  if (verb !== "AROUND") return undefined;
  const earlier = log.read("first", Infinity, undefined, from).length;
  const start = Math.max(0, earlier - Math.floor(limit / 2));
  return log.messages.slice(start, start + limit);
}

/** CHATHISTORY TARGETS: the rooms and people with messages between two times, and the time of the latest. */
function replyWithTargets(member: Member, reply: Reply, one: number, other: number, limit: number): void {
  const logs = [...member.rooms, ...Array.from(member.talks, ([{ nick }, log]) => ({ name: nick, log }))];
  const found = logs.map(({ name, log }) => ({ name, time: log.messages.at(-1)?.time ?? -1 }))
    .filter(({ time }) => time > Math.min(one, other) && time < Math.max(one, other))
    .sort((a, b) => a.time - b.time).slice(0, limit);
  reply.batch(["draft/chathistory-targets"], (tags) => {
    for (const { name, time } of found) {
      reply.line(format("CHATHISTORY", ["TARGETS", name, new Date(time).toISOString()], SERVER), tags);
    }
  });
}

function handleJoin({ server, member, params: [names = ""], reply }: MemberContext): void {
  if (names === "0") return [...member.rooms].forEach((room) => server.part(member, room, "", reply));
  for (const name of namesIn(names)) {
    const room = server.findRoom(name);
    const isFull = member.rooms.size >= LIMITS.roomsPerMember;
    if (room && member.rooms.has(room)) continue;
    if (!isRoom(name)) reply.numeric("476", name, `A room is # and at most ${LIMITS.room} bytes, no space, no comma`);
    else if (isFull) reply.numeric("405", name, "You have joined too many channels");
    else if (!room && !server.makePlaceForRoom()) reply.numeric("437", name, "There are too many channels");
    else server.join(member, room ?? server.openRoom(name), reply);
  }
}

/** Runs `act` for each of the named rooms that the member is in, and replies with an error for the others. */
function forRooms({ server, member, reply }: MemberContext, names: string, act: (room: Room) => void): void {
  for (const name of namesIn(names)) {
    const room = server.findRoom(name);
    if (room && member.rooms.has(room)) act(room);
    else if (room) reply.numeric("442", name, "You're not on that channel");
    else reply.numeric("403", name, "No such channel");
  }
}

function handlePart(context: MemberContext): void {
  const { server, member, params: [names = "", reason = ""], reply } = context;
  forRooms(context, names, (room) => server.part(member, room, cut(reason, LIMITS.text), reply));
}

function handleTopic(context: MemberContext): void {
  const { server, member, params: [name = "", text], reply } = context;
  forRooms(context, name, (room) => {
    if (text === undefined) return replyWithTopic(reply, room);
    const event = server.happens(room, "TOPIC", member.nick, cut(text, LIMITS.topic));
    room.topic = text ? event : undefined;
    deliver(event, room.members, reply);
  });
}

/** NAMES: lists the members of the named rooms, or of all rooms that the member has joined. */
function handleNames({ server, member, params: [names], reply }: MemberContext): void {
  if (names === undefined) {
    for (const room of member.rooms) replyWithNames(reply, room);
    return reply.numeric("366", "*", "End of /NAMES list");
  }
  for (const name of namesIn(names)) {
    const room = server.findRoom(name);
    if (room) replyWithNames(reply, room);
    else reply.numeric("366", name, "End of /NAMES list");
  }
}

function handleList({ server, params: [names], reply }: MemberContext): void {
  const wanted = names === undefined ? undefined : namesIn(fold(names));
  reply.numeric("321", "Channel", "Users  Name");
  for (const [key, { name, members, topic }] of server.rooms) {
    if (wanted?.includes(key) ?? true) reply.numeric("322", name, String(members.size), topic?.text ?? "");
  }
  reply.numeric("323", "End of /LIST");
}

/** For how many seconds a member has sent nothing. */
const idleSeconds = ({ clock }: Server, { sessions }: Member) =>
  sessions.size ? Math.floor((clock.now() - Math.max(...[...sessions].map(({ active }) => active))) / 1000) : 0;

/** Whether a name matches a mask, in which `*` stands for any text and `?` for any character. */
function matches(mask: string, name: string): boolean {
  let [at, from] = [0, 0];
  let star: { readonly at: number; from: number } | undefined; // the last star, and where its text ends
  while (from < name.length) {
    if (mask[at] === "*") star = { at: ++at, from };
    else if (mask[at] === "?" || mask[at] === name[from]) [at, from] = [at + 1, from + 1];
    else if (star) [at, from] = [star.at, ++star.from];
    else return false;
  }
  return /^\**$/.test(mask.slice(at));
}

/** WHO for a room, or for those whose nick, user@host or nick!user@host matches a mask. */
function handleWho({ server, params: [mask = "*"], reply }: MemberContext): void {
  const room = server.findRoom(mask);
  const key = mask === "0" ? "*" : fold(mask);
  const isMeant = ({ nick }: Member) => [nick, `${nick}@chat`, sourceOf(nick)].some((name) => matches(key, fold(name)));
  for (const { nick, realName, away, sessions } of room?.members ?? server.presentMembers.filter(isMeant)) {
    const flags = away || !sessions.size ? "G" : "H";
    reply.numeric("352", room?.name ?? "*", nick, "chat", SERVER, nick, flags, `0 ${realName}`);
  }
  reply.numeric("315", mask, "End of /WHO list");
}

function handleWhois({ server, params, reply }: MemberContext): void {
  const name = params.at(-1) ?? "";
  const member = server.findPresent(name);
  if (!member) reply.numeric("401", name, "No such nick/channel");
  else {
    const { nick, realName, rooms, away, sessions } = member;
    const since = Math.floor(Math.min(server.clock.wall(), ...[...sessions].map((one) => one.since)) / 1000);
    reply.numeric("311", nick, nick, "chat", "*", realName);
    for (const line of fill(Array.from(rooms, (room) => room.name), LINE_WIDTH)) reply.numeric("319", nick, line);
    reply.numeric("312", nick, SERVER, server.options.name);
    if (away) reply.numeric("301", nick, away);
    reply.numeric("317", nick, String(idleSeconds(server, member)), String(since), "seconds idle, signon time");
    reply.numeric("330", nick, nick, "is logged in as");
    reply.numeric("671", nick, "is using a secure connection");
  }
  reply.numeric("318", name, "End of /WHOIS list");
}

/** WHOWAS: describes a member who has left since the server was started. */
function handleWhowas({ server, params: [nick = ""], reply }: MemberContext): void {
  const { clock, accounts } = server;
  const member = accounts.find(nick);
  if (!member?.realName || member.present) reply.numeric("406", nick, "There was no such nickname");
  else {
    const left = new Date(clock.wall() - (clock.now() - member.lostAt));
    reply.numeric("314", member.nick, member.nick, "chat", "*", member.realName);
    reply.numeric("312", member.nick, SERVER, `left ${left.toUTCString()}`);
  }
  reply.numeric("369", nick, "End of WHOWAS");
}

function handleUserhost({ server, params, reply }: MemberContext): void {
  const found = params.map((nick) => server.findPresent(nick)).filter((member) => member !== undefined);
  reply.numeric("302", found.map(({ nick, away }) => `${nick}=${away ? "-" : "+"}${nick}@chat`).join(" "));
}

function handleIson({ server, params, reply }: MemberContext): void {
  const found = params.join(" ").split(" ").map((nick) => server.findPresent(nick)?.nick ?? "");
  reply.numeric("303", found.filter(Boolean).join(" "));
}

function handleAway({ server, member, params: [text = ""], reply }: MemberContext): void {
  member.away = cut(text, LIMITS.text);
  reply.numeric(text ? "306" : "305", `You ${text ? "have been" : "are no longer"} marked as being away`);
  server.announceAway(member, server.audienceOf(member));
}

/** MODE: says that there are no modes to set, besides +i on oneself, which changes nothing. */
function handleMode({ server, member, params: [target = "", modes = ""], reply }: MemberContext): void {
  const room = server.findRoom(target);
  if (room && !modes) reply.numeric("324", room.name, "+n");
  else if (room && /^[+-]?b$/.test(modes)) reply.numeric("368", room.name, "End of channel ban list");
  else if (room) reply.numeric("482", room.name, "You're not channel operator: nobody is");
  else if (target.startsWith("#")) reply.numeric("403", target, "No such channel");
  else if (fold(target) !== fold(member.nick)) reply.numeric("502", "Cant change mode for other users");
  else if (!modes) reply.numeric("221", "+i");
  else if (!/^[+-]i*$/.test(modes)) reply.numeric("501", "Unknown MODE flag");
}

function handleInfo({ reply }: MemberContext): void {
  reply.numeric("371", `chat ${VERSION}: an encrypted group chat. The commands of this server:`);
  for (const [name, command] of Object.entries(COMMANDS)) reply.numeric("371", `${name}: ${command?.about}`);
  reply.numeric("374", "End of /INFO list");
}

const handlePing = ({ params: [token = ""], reply }: Context) => reply.server("PONG", SERVER, token);
const handleVersion = ({ reply }: Context) => reply.numeric("351", `chat-${VERSION}`, SERVER, "IRC over TLS 1.3");

function handleQuit({ session, params: [why] }: Context): void {
  session.close(why ? `Quit: ${cut(why, LIMITS.text)}` : "Quit");
}

Object.assign(
  COMMANDS,
  {
    PING: { least: 1, about: "ask for a PONG", early: true, run: handlePing },
    PONG: { least: 0, about: "answer a PING", early: true, run: () => {} },
    ERROR: { least: 0, about: "for servers only", early: true, run: () => {} },
    QUIT: { least: 0, about: "leave", early: true, run: handleQuit },
    JOIN: { least: 1, about: "enter rooms", run: handleJoin },
    PART: { least: 1, about: "leave rooms", run: handlePart },
    TOPIC: { least: 1, about: "show or set a room's topic", run: handleTopic },
    NAMES: { least: 0, about: "list who is in rooms", run: handleNames },
    LIST: { least: 0, about: "list rooms", long: true, run: handleList },
    PRIVMSG: { least: 1, about: "say something to rooms or nicks", run: handleMessage },
    NOTICE: { least: 1, about: "the same, never answered", run: handleMessage },
    TAGMSG: { least: 1, about: "send tags only", run: handleMessage },
    CHATHISTORY: { least: 3, about: "read what was said", long: true, run: handleChathistory },
    WHO: { least: 0, about: "list members", long: true, run: handleWho },
    WHOIS: { least: 1, about: "describe a member", run: handleWhois },
    WHOWAS: { least: 1, about: "describe a member who has left", run: handleWhowas },
    USERHOST: { least: 1, about: "say whether members are away", run: handleUserhost },
    ISON: { least: 1, about: "say which members are here", run: handleIson },
    AWAY: { least: 0, about: "say that you are away, or are back", run: handleAway },
    MODE: { least: 1, about: "show modes", run: handleMode },
    MOTD: { least: 0, about: "show the message of the day", run: ({ server, reply }) => replyWithMotd(server, reply) },
    LUSERS: { least: 0, about: "count who is here", run: ({ server, reply }) => replyWithCounts(server, reply) },
    VERSION: { least: 0, about: "show the version", run: handleVersion },
    TIME: {
      least: 0,
      about: "show the time",
      run: ({ server, reply }) => reply.numeric("391", SERVER, new Date(server.clock.wall()).toUTCString()),
    },
    INFO: { least: 0, about: "list these commands", run: handleInfo },
  } satisfies Record<string, Command>,
);

/* =====================================================================================================================
 * Console
 * What the operator can type. The tables of commands for people, here and in the client, have one shape; help is made
 * from them.
 * ================================================================================================================== */

/** A row in a table of what a person can type. */
interface Row<Run> {
  readonly usage: string; // its parameters; optional ones in brackets
  readonly about: string;
  readonly run: Run;
}
type Table<Run> = Readonly<Partial<Record<string, Row<Run>>>>;
const row = <Run>(usage: string, about: string, run: Run): Row<Run> => ({ usage, about, run });

/** The help for a table: a line for each row. */
function helpLines(table: Table<unknown>, prefix: string): string[] {
  return Object.entries(table).map(([name, entry]) =>
    `${`${prefix}${name} ${entry?.usage}`.padEnd(20)} ${entry?.about}`
  );
}

/** The Levenshtein distance of two words: how many letters have to be added, removed or replaced. */
function distance(one: string, other: string): number {
  const first = Array.from({ length: other.length + 1 }, (_, at) => at);
  return [...one].reduce((row, letter, at) => {
    const next = [at + 1];
    for (let to = 0; to < other.length; to++) {
      const replaced = (row[to] ?? 0) + (letter === other[to] ? 0 : 1);
      next.push(Math.min(replaced, (row[to + 1] ?? 0) + 1, (next[to] ?? 0) + 1));
    }
    return next;
  }, first).at(-1) ?? 0;
}

/** "; did you mean …?" with the known word that is nearest to a wrong one; empty if none is near. */
function suggestion(prefix: string, word: string, known: readonly string[]): string {
  const [nearest = ""] = known.toSorted((one, other) => distance(word, one) - distance(word, other));
  return distance(word, nearest) <= Math.floor(word.length / 2) ? `; did you mean ${prefix}${nearest}?` : "";
}

/** What an operator's command does; it returns what to show. */
type ConsoleCommand = (server: Server, nick: string, rest: string) => string | readonly string[];

/** A duration for people. */
function duration(seconds: number): string {
  if (seconds < 120) return `${seconds} s`;
  return seconds < 7200 ? `${Math.floor(seconds / 60)} min` : `${Math.floor(seconds / 3600)} h`;
}

/** A time of day for people, `HH:MM`. */
const clockTime = (time: number) => new Date(time).toTimeString().slice(0, 5);

export const CONSOLE: Table<ConsoleCommand> = {
  who: row("", "who is here, from where, since when, idle for how long", (server) => {
    const lines = server.presentMembers.map((member) => {
      const from = Array.from(member.sessions, ({ address, since }) => `${address} since ${clockTime(since)}`);
      const where = from.join(", ") || "connection lost";
      return `${member.nick.padEnd(LIMITS.nick)} ${where}, idle ${duration(idleSeconds(server, member))}`;
    });
    return lines.length ? lines : "nobody is here";
  }),
  say: row("TEXT", "say something to everybody; so does a line without a slash", (server, first, rest) => {
    const text = `${first} ${rest}`.trim();
    deliver(server.happens(server.lobby, "NOTICE", SERVER, text), server.presentMembers);
    return `to everybody: ${text}`;
  }),
  rooms: row("", "list the rooms", (server) =>
    Array.from(server.rooms.values(), ({ name, members, log, topic }) => {
      const people = plural(members.size, "person", "people");
      const messages = plural(log.messages.length, "message", "messages");
      return `${name}: ${people}, ${messages}${topic ? `; ${topic.text}` : ""}`;
    })),
  accounts: row("", "list the accounts, and what is barred or admitted", ({ accounts }) => {
    const { barred, admitted } = accounts;
    const nicks = Array.from(accounts.byNick.values(), ({ nick, present }) => present ? `${nick} (here)` : nick);
    return [
      `${plural(nicks.length, "account", "accounts")}${nicks.length ? ": " : ""}${nicks.join(", ")}`,
      ...barred.size
        ? [`barred: ${Array.from(barred, ([key, why]) => why === "forgotten" ? `${key} (deleted)` : key).join(", ")}`]
        : [],
      ...admitted.length ? [`admitted: ${admitted.join(", ")}`] : [],
      ...accounts.locked ? ["registration is closed"] : [],
    ];
  }),
  kick: row("NICK [REASON]", "disconnect a member", (server, nick, rest) => {
    const member = server.accounts.find(nick);
    if (!member) return `no account ${nick}`;
    server.kick(member, rest ? `Kicked: ${rest}` : "Kicked by the operator");
    return `${member.nick} is disconnected, and can come back; /bar ${member.nick} keeps ${member.nick} out`;
  }),
  bar: row("NICK|ADDRESS", "keep an account, or everybody at an address, out", (server, who) => {
    const key = keyToBar(who);
    if (key === undefined) return `${who} is neither a nick nor an address`;
    server.accounts.decide(key, "barred");
    const member = server.accounts.find(who);
    if (member) server.kick(member, REFUSALS.barred);
    for (const session of server.sessions) {
      if (networkOf(session.address) === key) session.close("The operator keeps your address out");
    }
    return `${key} stays out until /unbar ${key}`;
  }),
  unbar: row("NICK|ADDRESS", "undo /bar, or free the nick of a deleted account", (server, who) => {
    const key = keyToBar(who) ?? "";
    if (!server.accounts.barred.has(key)) return `${who} was not barred`;
    server.accounts.decide(key, "unbarred");
    return `${who} is not barred any more`;
  }),
  lock: row("", "stop registration", (server) => setRegistration(server, false)),
  unlock: row("", "let everybody register again", (server) => setRegistration(server, true)),
  admit: row("NICK", "let a nick register once, within the hour, whatever is barred or locked", (server, nick) => {
    if (!isNick(nick)) return REFUSALS["bad nick"];
    if (server.accounts.find(nick)) return `${nick} has an account already; /unbar lets it in if it is barred`;
    server.accounts.decide(nick, "admitted");
    return `whoever comes first within the hour can register ${nick}; the log will say from which address`;
  }),
  forget: row("NICK", "delete an account", (server, nick) => {
    const member = server.accounts.find(nick);
    if (member) server.forget(member);
    return member ? `${nick} is deleted; /admit ${nick} lets somebody register it again` : `no account ${nick}`;
  }),
};

/** What /bar and /unbar mean by a nick, or by an address or network as they are printed; undefined if it is neither. */
function keyToBar(who: string): string | undefined {
  if (isNick(who)) return fold(who);
  const forms = [
    /^(?:::ffff:)?(\d+\.\d+\.\d+\.\d+)(?::\d+)?$/i,
    /^\[(?:::ffff:)?([\da-f:.]+)(?:%[^\]\s/]+)?\](?::\d+)?$/i,
    /^([\da-f:]+)(?:%[^\]\s/]+)?(?:\/64)?$/i,
  ];
  const address = forms.map((form) => form.exec(who)?.[1]).find(Boolean) ?? "";
  const url = address.includes(":") ? `http://[${address}]` : `http://${address}`; // which URL writes in one way
  return URL.canParse(url) ? networkOf(new URL(url).hostname.replace(/[[\]]/g, "")) : undefined;
}

/** Opens or closes registration, and notifies the clients that asked for it (IRCv3 cap-notify). */
function setRegistration(server: Server, open: boolean): string {
  server.accounts.locked = !open;
  const change = open ? ["NEW", `${REGISTRATION}=before-connect`] : ["DEL", REGISTRATION];
  for (const session of server.sessions) {
    if (session.has("cap-notify")) session.reply(format("CAP", [session.nick, ...change], SERVER));
  }
  return open ? "everybody can register again" : "nobody can register now, except those whom you /admit";
}

/** Runs a command that the operator typed, or says to everybody what is none. @returns what to show */
function runConsoleLine(server: Server, table: Table<ConsoleCommand>, line: string): readonly string[] {
  const typed = line.trim();
  const text = typed === "" || typed.startsWith("/") ? typed : `/say ${typed}`;
  const [, name = "", first = "", rest = ""] = /^\/([^ ]*) *([^ ]*) *(.*)$/s.exec(text) ?? [];
  const found = rowOf(table, name);
  if (!name) return [];
  if (name === "help") return helpLines(table, "/");
  if (!found) return [`there is no /${name}${suggestion("/", name, [...Object.keys(table), "help"])}`];
  const isText = /TEXT|REASON/.test(found.usage); // it may have any number of words
  if (Boolean(found.usage) !== Boolean(first) || rest && !isText) {
    return [`${`/${name} ${found.usage}`.trim()}: ${found.about}`];
  }
  return [found.run(server, first, rest)].flat();
}

/* =====================================================================================================================
 * Listener
 * Sockets and TLS. Each connection that completes a handshake becomes a session; how much the others may cost is
 * bounded here.
 * ================================================================================================================== */

export interface ServeOptions extends ServerOptions {
  readonly host: string;
  readonly port: number; // 0 for any that is free
  readonly identity: Identity;
  readonly keylog?: ((line: Buffer) => void) | undefined; // takes the TLS keys
}

export interface Serving {
  readonly server: Server;
  readonly port: number;
  /** Notifies everybody, writes out the queues and closes. */
  stop(reason: string): Promise<void>;
}

/**
 * Opens a room: listens for TLS 1.3 and serves the clients that connect.
 * @throws {Fault} if it cannot listen there
 * @example const { port, stop } = await serve({ host: "127.0.0.1", port: 0, identity: makeIdentity({}) });
 */
export async function serve({ host, port, identity, keylog, ...options }: ServeOptions): Promise<Serving> {
  const { key, cert, binding } = identity;
  const warning = "This server prints its TLS keys, for a class: whoever has them can read along";
  const server = new Server({ ...options, binding, ...keylog && { warning } });
  const sockets = new Map<tls.TLSSocket, Check>();
  const arrivals = new Map<string, Arrival>(); // before the end of the handshake; by address and port of the client
  const watch = watchSilence(server, sockets);
  const settings = { key, cert, minVersion: "TLSv1.3", ALPNProtocols: ["irc"], handshakeTimeout: LIMITS.handshakeMs };
  const certificate = new crypto.X509Certificate(cert);
  const listener = tls.createServer(settings as tls.TlsOptions, (socket) => {
    const { explain } = server.options;
    if (explain) lessonOf(describe(socket, certificate)).forEach((line) => explain(`${farEnd(socket)} ${line}`));
    socket.on("close", () => sockets.delete(socket));
    const arrival = arrivals.get(farEnd(socket));
    arrivals.delete(farEnd(socket));
    if (arrival) server.occupancy.leave(arrival); // its session takes the place
    sockets.set(socket, attach(server, socket, arrival?.socket));
    watch.hurry();
  });
  takeIn(listener, server, arrivals);
  if (keylog) listener.on("keylog", keylog);
  listener.on("tlsClientError", ({ message }, socket) => {
    if (socket.remoteAddress) server.failed(socket.remoteAddress, "no TLS", handshakeProblem(message));
    socket.destroy();
  });
  await new Promise<void>((resolve, reject) => {
    listener.on("error", (error) => reject(listenFault(error, host, port)));
    listener.listen(port, host, resolve);
  });
  const sweeping = setInterval(() => server.sweep(), 1000);
  watch.hurry();
  const stop = async (reason: string) => {
    clearInterval(sweeping);
    watch.stop();
    listener.close();
    for (const session of server.sessions) session.close(reason);
    for (const { socket } of arrivals.values()) socket.destroy();
    const open = [...sockets.keys()];
    const late = setTimeout(() => open.forEach((socket) => socket.destroy()), LIMITS.stopMs);
    await Promise.all(open.map((socket) => new Promise((closed) => socket.on("close", closed))));
    clearTimeout(late);
  };
  const address = listener.address();
  return { server, stop, port: typeof address === "object" && address ? address.port : port };
}

/** A host as it stands before a port. */
const bracketed = (host: string) => host.includes(":") ? `[${host}]` : host;
const farEnd = ({ remoteAddress = "", remotePort }: tls.TLSSocket) => `${bracketed(remoteAddress)}:${remotePort}`;

/** Closes a connection that has sent too many bytes which brought no text. */
type Check = (isBusy: boolean) => void;

/** Checks the silent bytes of all connections: often while there are some that have not logged in. */
function watchSilence(server: Server, sockets: ReadonlyMap<tls.TLSSocket, Check>): { hurry(): void; stop(): void } {
  let timer: NodeJS.Timeout | undefined;
  let dueAt = Infinity;
  const wait = (ms: number) => {
    clearTimeout(timer);
    dueAt = performance.now() + ms;
    timer = setTimeout(run, ms);
  };
  const run = () => {
    const isBusy = performance.now() - dueAt > LIMITS.lateMs;
    for (const check of sockets.values()) check(isBusy);
    wait(server.occupancy.guests ? LIMITS.silentMs : 10 * LIMITS.silentMs);
  };
  const hurry = () => { // but never later than it is due
    if (dueAt - performance.now() > LIMITS.silentMs) wait(LIMITS.silentMs);
  };
  return { hurry, stop: () => clearTimeout(timer) };
}

/** A TCP connection. */
interface Arrival extends Occupant {
  readonly socket: tls.TLSSocket;
}

/**
 * Takes in TCP connections. Each has a place from now on. TLS begins at once, or when its site may have one more
 * handshake: they cost a server far more than its clients.
 */
function takeIn(listener: tls.Server, server: Server, arrivals: Map<string, Arrival>): void {
  const { clock, options: { perAddress } } = server;
  const paces = new KeyedRateLimit(clock, LIMITS.handshakes * perAddress, LIMITS.handshakeBurst);
  const [startTls] = listener.listeners("connection") as ((this: tls.Server, socket: tls.TLSSocket) => void)[];
  listener.removeAllListeners("connection");
  listener.on("connection", (socket: tls.TLSSocket) => {
    const [address = "", end] = [socket.remoteAddress, farEnd(socket)];
    const arrival = { address, socket, evict: () => void socket.destroy() };
    arrivals.set(end, arrival);
    server.occupancy.enter(arrival);
    const pace = paces.of(siteOf(address));
    pace.charge(1);
    let cancelWait: (() => void) | undefined; // while it waits
    const start = () => {
      cancelWait = undefined;
      startTls?.call(listener, socket);
    };
    if (pace.throttleMs > 0) cancelWait = clock.after(pace.throttleMs, start);
    else start();
    socket.on("error", () => {}); // it may be lost before TLS looks after it
    socket.on("close", () => {
      if (cancelWait) pace.refund(1);
      cancelWait?.();
      server.occupancy.leave(arrival);
      if (arrivals.get(end) === arrival) arrivals.delete(end); // else another one has the same port by now
    });
  });
}

/**
 * Node reads from a paused socket until this much waits, and if the records are small, each becomes an object that
 * costs a hundred times its size. So a paused socket is given this much to hold at once.
 */
let filler: Buffer | undefined;

/**
 * Makes a session of a socket.
 * @param raw the TCP socket below TLS
 * @returns the check of the bytes that brought no text, to be called a few times a second
 */
function attach(server: Server, socket: tls.TLSSocket, raw: tls.TLSSocket | undefined): Check {
  const { explain } = server.options;
  const who = farEnd(socket);
  const records = explain && new Folded((text) => explain(`${who} ${text}`));
  const isDeno = "Deno" in globalThis; // where pause() does not stop the reading: the session bounds what comes
  const fill = filler ??= Buffer.alloc(socket.readableHighWaterMark);
  let flowing = true;
  let textBytes = 0; // on the socket that brought text: Node emits a chunk for each record, Deno for several
  let isMerged = false; // a chunk is, of all records that came while the socket was paused
  let silentBytes = raw?.bytesRead ?? 0; // on the socket that brought none: the handshake's, which are not charged
  const silent = new RateLimit(server.clock, LIMITS.silentBytes, LIMITS.silentStart);
  const session = server.open({
    address: socket.remoteAddress ?? "",
    write(bytes) {
      records?.tell(`wrote ${bytes.length}`, `wrote ${recorded(bytes.length)}`);
      return socket.write(bytes);
    },
    pending: () => socket.writableLength,
    read(wanted) {
      if (wanted === flowing || isDeno || socket.readableEnded) return;
      flowing = wanted;
      if (!wanted) return void socket.pause().unshift(fill);
      socket.read(fill.length);
      isMerged = true;
      socket.read(Math.min(socket.readableLength, fill.length)); // emits what has come meanwhile
      isMerged = false;
      if (flowing) socket.resume();
    },
    end(atOnce) {
      if (atOnce) return void socket.destroy();
      socket.end();
      setTimeout(() => socket.destroy(), LIMITS.stopMs).unref();
    },
  });
  socket.setNoDelay(true);
  socket.allowHalfOpen = true;
  socket.on("data", (chunk: Buffer) => {
    if (chunk.buffer === fill.buffer) return;
    records?.tell(`read ${chunk.length}`, `read ${recorded(chunk.length)}`);
    const lines = isMerged ? Math.max(1, chunk.filter((byte) => byte === LF).length) : 1; // about one for each line
    textBytes += chunk.length * (isDeno ? 2 : 1) + RECORD_OVERHEAD * lines;
    session.inbox.push(chunk);
  });
  socket.on("end", () => session.inbox.end());
  socket.on("drain", () => session.outbox.drained());
  socket.on("error", (error) => session.lost(error.message));
  socket.on("close", () => session.lost("Connection closed"));
  return (isBusy) => {
    if (!flowing) return;
    const bytes = (raw?.bytesRead ?? 0) - textBytes; // falls again when the rest of a record has come
    if (bytes === silentBytes) return;
    silent.charge(bytes - silentBytes);
    silentBytes = bytes;
    const isStrict = isBusy && !session.member;
    if (silent.excess > (isStrict ? 0 : LIMITS.silentBurst - LIMITS.silentStart)) session.flooded();
  };
}

/** What went wrong in a handshake, by what the runtimes say about it. */
function handshakeProblem(message: string): string {
  const problems: readonly (readonly [RegExp, string])[] = [
    [/http.request/i, "that was HTTP"],
    [/version.number|record|InvalidMessage|packet/i, "that was not TLS"],
    [/unsupported.protocol|protocol.version|PeerIncompatible/i, "it does not know TLS 1.3"],
    [/timeout/i, "the handshake took too long"],
    [/alert|unknown.ca/i, "it did not trust the certificate"],
  ];
  return problems.find(([pattern]) => pattern.test(message))?.[1] ?? "it hung up";
}

function listenFault({ code = "", message }: NodeJS.ErrnoException, host: string, port: number): Fault {
  const faults: readonly (readonly [pattern: RegExp, what: string, hint: string])[] = [
    [
      /EADDRINUSE|in use/i,
      `port ${port} is in use already`,
      `are you serving already? ${CHAT} serve ${bracketed(host)}:${port + 1} takes another one`,
    ],
    [/EACCES/, `listening on port ${port} is not permitted`, "ports from 1024 on are free to use"],
    [/EADDRNOTAVAIL/, `${host} is not an address of this machine`, "0.0.0.0 means every address of this machine"],
    [/ENOTFOUND/, `there is no host called ${host}`, "127.0.0.1 is this machine"],
  ];
  const [, what, hint] = faults.find(([pattern]) => pattern.test(`${code} ${message}`)) ??
    ["", `cannot listen on ${bracketed(host)}:${port}: ${message}`, `${CHAT} help serve`];
  return new Fault(what, hint);
}

/* =====================================================================================================================
 * Terminal
 * What the user interfaces need to know about terminals: environment variables, colours, how wide a text is and how it
 * breaks into rows, bracketed paste, and readline as a mere editor of a line.
 * ================================================================================================================== */

/** Reads an environment variable. An empty one counts as unset, and so does one that may not be read (Deno). */
export function environment(name: string): string | undefined {
  try {
    return process.env[name] || undefined;
  } catch {
    return undefined;
  }
}

/** How many lines could not be written to a standard stream, because nobody reads it or because it fails. */
const unwritten = new Map<NodeJS.WriteStream, number>();

/**
 * Writes to a standard stream, and never waits for it: a full disk, a reader that has gone and a terminal that nobody
 * reads must not stop a server. What is lost is counted, and the count is written as soon as something can be.
 */
function write(stream: NodeJS.WriteStream, text: string): void {
  if (!unwritten.has(stream)) prepare(stream);
  const missing = unwritten.get(stream) ?? 0;
  const lines = text.split("\n").length - 1;
  if (stream.writableLength > LIMITS.unreadBytes) {
    unwritten.set(stream, missing + lines);
    if (!missing && lines) stream.once("drain", () => write(stream, ""));
    return;
  }
  unwritten.set(stream, 0);
  const notice = missing ? `chat: ${plural(missing, "line", "lines")} not shown\n` : "";
  const isForScript = stream === process.stdout && !stream.isTTY;
  if (notice && isForScript) write(process.stderr, notice);
  const failed = (error: unknown) => error && unwritten.set(stream, (unwritten.get(stream) ?? 0) + missing + lines);
  try {
    stream.write(isForScript ? text : notice + text, failed);
  } catch (error) { // Deno throws
    failed(error);
    stream.emit("error", error);
  }
}

/** Keeps a stream that fails from ending the program, and a terminal that nobody reads from stopping it. */
function prepare(stream: NodeJS.WriteStream): void {
  unwritten.set(stream, 0);
  stream.on("error", () => {});
  if (stream === process.stderr && process.stdout.isTTY) {
    stream.once("error", ({ message }) => write(process.stdout, `chat: cannot write to standard error: ${message}\n`));
  }
  const { _handle: handle } = stream as { _handle?: { setBlocking?(isBlocking: boolean): void } };
  if (stream.isTTY) handle?.setBlocking?.(false); // where the runtime has it
}

/** Waits until what was written has been read, or can be read no more; for a terminal and for the log not long. */
async function flushed(stream: NodeJS.WriteStream): Promise<void> {
  await new Promise<void>((done) => {
    stream.write("", () => done());
    if (stream === process.stderr || stream.isTTY) setTimeout(done, LIMITS.stopMs);
  });
}

/** What keeps a terminal from wrapping rows, and lets it do so again. */
const AUTOWRAP = environment("TERM") === "dumb" ? { off: "", on: "" } : { off: "\x1b[?7l", on: "\x1b[?7h" };

/**
 * Writes a line. On a terminal it becomes rows that the terminal does not wrap, and all but the first have a mark in
 * the margin: what somebody else wrote must not look like a line of the program.
 */
function writeLine(stream: NodeJS.WriteStream, text: Clean): void {
  if (!stream.isTTY) return write(stream, `${text}\n`);
  const rows = wrap(text, (stream.columns || 80) - 3, AUTOWRAP.off ? cells : cellsAtMost);
  write(stream, `${AUTOWRAP.off}${rows.join("\n| ")}${AUTOWRAP.on}\n`);
}

/** How many colours standard output has: 0, 16 or 256. */
function colourDepth(): number {
  const [force, term = ""] = [environment("FORCE_COLOR"), environment("TERM")];
  if (force) return force === "0" || force === "false" ? 0 : force === "1" || force === "true" ? 16 : 256;
  if (environment("NO_COLOR") || !process.stdout.isTTY || term === "dumb") return 0;
  return /256|kitty|direct/.test(term) || environment("COLORTERM") || process.platform === "win32" ? 256 : 16;
}

/** SGR codes (ECMA-48, 8.3.117). */
const [BOLD, DIM] = [1, 2];
/** Colours of nicks that are readable on black and on white, from the palette of 256. */
const NICK_COLOURS = [26, 31, 61, 64, 67, 94, 97, 98, 100, 125, 130, 131, 132, 133, 136, 160, 161, 166, 168, 172];

/** The colours of nicks: always the same one, and in a small group all different. */
class Palette {
  readonly #indexes = new Map<string, number>(); // by folded nick
  /** @returns the SGR code for a terminal with so many colours */
  of(nick: string, depth: number): string {
    const count = depth > 16 ? NICK_COLOURS.length : 6;
    const indexes = this.#indexes;
    let index = indexes.get(fold(nick)) ?? sha256(fold(nick)).readUInt32BE() % count;
    if (!indexes.has(fold(nick)) && indexes.size < count) {
      const taken = new Set(indexes.values());
      while (taken.has(index)) index = (index + 1) % count;
      indexes.set(fold(nick), index);
    }
    return depth > 16 ? `38;5;${NICK_COLOURS[index]}` : String(31 + index);
  }
}

let segmenter: Intl.Segmenter | undefined; // is slow to make, and seldom needed

/** Splits a text into grapheme clusters: what a person sees as characters. */
function graphemes(text: string): string[] {
  if (/^[ -~]*$/.test(text)) return [...text];
  segmenter ??= new Intl.Segmenter(undefined, { granularity: "grapheme" });
  return Array.from(segmenter.segment(text), ({ segment }) => segment);
}

/** Code points that take two columns: East Asian Wide and Fullwidth (UAX #11), and emoji. */
const WIDE = new RegExp(
  "[\\p{EPres}\\u1100-\\u115F\\u2329\\u232A\\u2E80-\\u303E\\u3041-\\uA4CF\\uA960-\\uA97C\\uAC00-\\uD7A3" +
    "\\uF900-\\uFAFF\\uFE10-\\uFE19\\uFE30-\\uFE6F\\uFF01-\\uFF60\\uFFE0-\\uFFE6\\u{16FE0}-\\u{18DF2}" +
    "\\u{1AFF0}-\\u{1B2FB}\\u{1F200}-\\u{1F265}\\u{20000}-\\u{3FFFD}]",
  "u",
);
/** Code points that take none: marks that do not take space, and the vowels and final consonants of Hangul. */
const ZERO = /[\p{Mn}\p{Me}\p{Cf}\u1160-\u11FF\uD7B0-\uD7FF]/u;
const EMOJI_SEQUENCE = /^\p{RI}\p{RI}|^\p{Emoji}.*[\uFE0F\u200D\u{1F3FB}-\u{1F3FF}\u20E3]/u;

/** The column width of a text on a terminal: what most terminals take it for. */
export function cells(text: string): number {
  if (/^[ -~]*$/.test(text)) return text.length;
  const widthOf = (char: string) => WIDE.test(char) ? 2 : ZERO.test(char) ? 0 : 1;
  return sumOf(graphemes(text), (cluster) => EMOJI_SEQUENCE.test(cluster) ? 2 : sumOf([...cluster], widthOf));
}

/** The column width that a text has at most, whatever the terminal takes it for. */
const cellsAtMost = (text: string) => sumOf([...text], (char) => /[ -~]/.test(char) ? 1 : 2);

/** Breaks a text into rows, wherever a row ends, but not within a grapheme cluster. */
function rowsOf(text: string, width: number, measure = cells): string[] {
  const rows = [""];
  let used = 0;
  for (const cluster of graphemes(text)) {
    used += measure(cluster);
    if (used <= width) rows[rows.length - 1] += cluster;
    else {
      rows.push(cluster);
      used = measure(cluster);
    }
  }
  return rows;
}

/**
 * Breaks a text into rows: between words, and within a word that is longer than a row.
 * @param width columns of a row
 */
export function wrap(text: string, width: number, measure = cells): string[] {
  const rows = [""];
  for (const word of text.split(/(?<= )(?=[^ ])/)) {
    const [last = "", length] = [rows.at(-1), measure(word.trimEnd())];
    if (length > width) rows.splice(-1, 1, ...rowsOf(last + word, width, measure));
    else if (measure(last) + length > width) rows.push(word);
    else rows[rows.length - 1] = last + word;
  }
  return rows.map((row) => row.trimEnd());
}

/** What makes a terminal put marks around a paste. Text without them was typed, however fast it came. */
const BRACKETED_PASTE = { on: "\x1b[?2004h", off: "\x1b[?2004l", start: "\x1b[200~", end: "\x1b[201~" } as const;

/** Takes bracketed pastes out of what a terminal sends, before readline sees it: Deno's does not know them. */
function takePastes(input: NodeJS.ReadStream, take: (text: string) => void): void {
  const { start, end } = BRACKETED_PASTE;
  const emit = input.emit.bind(input) as (name: string, ...values: readonly unknown[]) => boolean;
  const toBytes = (text: string) => Buffer.from(text, "latin1");
  const passOn = (text: string) => text !== "" && emit("data", toBytes(text));
  let pending = ""; // what has come and was not passed on, a character per byte
  let pasting = false;
  input.emit = (name: string, ...values: readonly unknown[]) => {
    if (name !== "data") return emit(name, ...values);
    pending += (values[0] as Buffer).toString("latin1");
    for (let at; (at = pending.indexOf(pasting ? end : start)) >= 0;) {
      const text = pending.slice(0, at);
      pending = pending.slice(at + start.length);
      if (pasting) take(toBytes(text).toString());
      else passOn(text);
      pasting = !pasting;
    }
    if (pasting) return true;
    const held = [5, 4, 3, 2].find((length) => pending.endsWith(start.slice(0, length))) ?? 0; // half a mark
    const typed = pending.slice(0, pending.length - held);
    pending = pending.slice(typed.length);
    return passOn(typed);
  };
}

/** A key that readline has recognised. */
interface Key {
  readonly name?: string;
  readonly ctrl?: boolean;
  readonly meta?: boolean;
}

/**
 * Adjusts the line before readline handles a key. readline drops the text behind the cursor when it recalls a line, and
 * it moves and deletes by code points, although a grapheme cluster may have several.
 */
function prepareFor(editor: readline.Interface, { name = "", ctrl = false, meta = false }: Key): void {
  const { line, cursor } = editor;
  const [before, after] = [line.slice(0, cursor), line.slice(cursor)];
  if (/^(up|down)$/.test(name) || (ctrl && /^[pn]$/.test(name))) Object.assign(editor, { cursor: line.length });
  const action = ctrl ? rowOf({ b: "left", f: "right", d: "delete" }, name) : name;
  if (meta || !/^(left|right|backspace|delete)$/.test(action ?? "")) return;
  const isLeft = action === "left" || action === "backspace";
  const points = [...(isLeft ? graphemes(before).at(-1) : graphemes(after)[0]) ?? ""];
  const more = (isLeft ? points.slice(1) : points.slice(0, -1)).join("").length; // than readline takes
  if (action === "backspace") Object.assign(editor, { line: before.slice(0, before.length - more) + after });
  if (action === "delete") Object.assign(editor, { line: before + after.slice(more) });
  else Object.assign(editor, { cursor: isLeft ? cursor - more : cursor + more });
}

/** Reads lines from a terminal, as readline edits them. What it would draw is passed to `echo`. */
function openEditor(echo: (text: string) => void): readline.Interface {
  const output = {
    columns: 1_000_000, // readline must not wrap
    write: echo,
    on: () => output,
    off: () => output,
    removeListener: () => output,
    end: () => output,
  };
  const editor = readline.createInterface({
    input: process.stdin,
    output: output as unknown as NodeJS.WriteStream, // as much of one as readline uses
    terminal: true,
    crlfDelay: Infinity,
    completer: (line: string) => [[], line],
  });
  process.stdin.prependListener("keypress", (_, key: Key = {}) => prepareFor(editor, key));
  return editor;
}

/* =====================================================================================================================
 * Interfaces
 * The user interface, in three implementations: a full terminal (in the next chapter), plain mode, and a pipe.
 * - A terminal shows what was said with its time and nick, and everything else behind `--`.
 * - In a pipe what was said goes to standard output as `TIME<TAB>TARGET<TAB>NICK<TAB>TEXT`, and everything else to
 *   standard error as `chat: …`.
 * - Plain mode is for screen readers and dumb terminals: nothing is drawn twice, and there is no colour.
 * - Text from the wire has the type Clean, and an interface takes nothing else.
 * ================================================================================================================== */

/** A message as a person is to see it. */
interface Message {
  readonly time: number; // in ms since 1970
  readonly nick: Clean;
  readonly target: Clean; // a room or a nick
  readonly text: Clean;
  readonly isAction: boolean; // a `/me`
  readonly isPrivate: boolean;
  readonly isOwn: boolean;
  readonly isOld: boolean; // from the history
  readonly isElsewhere: boolean; // in another room than the one that is talked in
  readonly isForMe: boolean; // private, or it names me
  readonly rings: boolean; // the bell
}

/** How lines were entered: as text, which is never a command, typed, or pasted, which may be one after a question. */
type Input = "text" | "typed" | "pasted";

/** What an interface reports. */
export interface UiEvents {
  onLines(lines: readonly string[], how: Input): void;
  onEnd?(): void; // a pipe has no more input
  onLeave(key: "Ctrl-C" | "Ctrl-D"): void; // pressed when nothing was typed or asked
  onSwitch?(number: number): void; // Alt-1 … 9
  onGone(why?: string): void; // the terminal has gone, nobody reads the output any more, or it cannot be written
  onTab?(before: string): readonly string[]; // what could stand in place of the text before the cursor
  onTyped?(line: string): string | undefined; // what is to stand in place of the line
}

/** A user interface. It leaves out what it has no use for. */
export interface Ui {
  readonly hasPerson: boolean; // somebody who can answer, and wants to see what was said before
  /** Reports what happens from now on, except lines. */
  listen(events: UiEvents): void;
  /** Reports lines from now on, those first that have been entered already. */
  acceptLines(): void;
  message(message: Message): void;
  note(text: Clean): void;
  /** Shows that one is in the first room. */
  welcome(room: Clean, nick: Clean, others: Clean): void;
  /** Shows what only a person wants to know: who joined and left, that a day has begun. */
  aside?(text: Clean): void;
  /** Shows that something else begins: another room, the history. */
  rule?(title: Clean): void;
  /** Asks for a line. @returns undefined if nobody is there to answer, or the person cancels */
  ask(question: Clean, hidden?: boolean): Promise<string | undefined>;
  /** Drops what was typed ahead: it was meant for other questions than those that follow. */
  dropEarly?(): void;
  setPrompt?(prompt: Clean): void;
  /** Stops reading input for a while, where it comes by itself. */
  holdInput?(hold: boolean): void;
  clear?(): void;
  close(): void;
}

/** A person at a terminal: what the full terminal and plain mode have in common. */
abstract class PersonalUi implements Ui {
  readonly hasPerson = true;
  protected readonly editor: readline.Interface;
  protected question: { readonly text: Clean; readonly hidden: boolean } | undefined;
  protected closed = false;
  protected events: UiEvents | undefined;
  readonly #closeEditor: () => void; // readline calls its own `close` at Ctrl-D, which ends nothing here
  #isGone = false; // the terminal
  #answer: ((text: string | undefined) => void) | undefined;
  #asked: Promise<string | undefined> | undefined; // one question at a time
  #accepts = false;
  #early: { readonly lines: readonly string[]; readonly how: Input }[] = []; // entered before lines were accepted
  #hasHidden = false; // an answer, so that one of those lines may be a password
  readonly #palette = new Palette();
  constructor() {
    const editor = this.editor = openEditor((text) => this.echo(text));
    const close = editor.close.bind(editor);
    this.#closeEditor = () => {
      try {
        close();
      } catch {
        // The terminal has gone, and cannot be put into its former mode.
      }
    };
    editor.close = () => this.#isGone ? this.#closeEditor() : this.interrupt("Ctrl-D");
    process.stdin.prependListener("end", () => this.#isGone = true);
    process.stdout.on("error", () => this.#gone());
    editor.on("close", () => this.#gone());
    editor.on("line", (line) => {
      if (this.#isGone) return; // nobody has pressed Enter
      if (!this.#answerWith(line)) this.#enter([line], "typed");
    });
    editor.on("history", (lines) => this.question && lines.shift()); // an answer is not to be recalled
    editor.on("SIGINT", () => this.interrupt("Ctrl-C"));
    process.stdin.on("keypress", (_, key?: Key) => {
      if (key?.meta && /^[1-9]$/.test(key.name ?? "")) this.events?.onSwitch?.(Number(key.name));
      const line = this.question ? undefined : this.events?.onTyped?.(editor.line);
      if (line !== undefined) this.edit(line);
    });
    takePastes(process.stdin, (text) => this.#paste(text));
    this.#markPastes(true);
    editor.on("SIGCONT", () => {
      editor.resume(); // it has paused, and relies on a prompt of its own to go on
      this.#markPastes(true);
    });
  }
  /** Has the terminal put marks around pastes, or no longer. */
  #markPastes(on: boolean): void {
    if (environment("TERM") !== "dumb") write(process.stdout, on ? BRACKETED_PASTE.on : BRACKETED_PASTE.off);
  }
  /** How many colours there are: 0, 16 or 256. */
  protected abstract readonly colours: number;
  /** Shows a text behind a head. @param style an SGR code */
  protected abstract show(head: string, text: Clean, style?: number): void;
  /** Takes what readline would draw. */
  protected abstract echo(text: string): void;
  /** Shows the question and the line that is being typed, after the program has changed them. */
  protected abstract redraw(): void;
  /** A question was answered: `shown` is what remains of it. */
  protected answered(_shown: string): void {}

  listen(events: UiEvents): void {
    this.events = events;
  }
  acceptLines(): void {
    if (this.#accepts) return;
    this.#accepts = true;
    const early = this.#early.splice(0);
    if (early.length && this.#hasHidden) return this.note(clean("what you typed before you were in is not sent"));
    for (const { lines, how } of early) this.events?.onLines(lines, how);
  }
  /** The nick is followed by where it was said, if that is elsewhere: `bo>ana` or `bo#lab`, as no nick looks. */
  message({ time, nick, target, text, ...message }: Message): void {
    const place = message.isPrivate ? `>${target}` : message.isElsewhere ? target : "";
    const width = Math.min(8, this.columns >> 3);
    const padding = message.isAction ? "" : " ".repeat(Math.max(0, width - cells(nick + place)));
    const name = this.paint(message.isOwn ? BOLD : this.#palette.of(nick, this.colours), nick);
    const style = message.isOld ? DIM : message.isForMe ? BOLD : undefined;
    const head = `${this.paint(DIM, clockTime(time))} ${message.isAction ? "* " : ""}${name}${place}${padding} `;
    this.show(head, text, style);
    if (message.rings) write(process.stdout, "\x07");
  }
  note(text: Clean): void {
    this.show(this.paint(DIM, "-- "), text, DIM);
  }
  welcome(room: Clean, nick: Clean, others: Clean): void {
    const here = others ? `Here: ${others}.` : "Nobody else is here yet.";
    this.show("", clean(`Welcome to ${room}, ${nick}. ${here} /help lists what you can type, /exit leaves.`));
  }
  aside(text: Clean): void {
    this.note(text);
  }
  rule(title: Clean): void {
    this.show(this.paint(DIM, "── "), clean(`${title} ──`), DIM);
  }
  dropEarly(): void {
    if (this.#early.splice(0).length) this.note(clean("what you typed ahead is dropped"));
  }
  /** A line that is half typed, or the rest of a paste, is no answer: it is put aside during the question. */
  async ask(question: Clean, hidden = false): Promise<string | undefined> {
    while (this.#asked) await this.#asked;
    try {
      return await (this.#asked = this.#ask(question, hidden));
    } finally {
      this.#asked = undefined;
    }
  }
  async #ask(question: Clean, hidden: boolean): Promise<string | undefined> {
    if (this.closed) return undefined;
    this.#hasHidden ||= hidden;
    const typed = this.#early.findIndex(({ how }) => how === "typed");
    if (typed >= 0) return this.#early.splice(typed, 1)[0]?.lines[0];
    const { line, cursor } = this.editor;
    this.question = { text: question, hidden };
    this.edit("");
    const text = await new Promise<string | undefined>((answer) => this.#answer = answer);
    this.question = undefined;
    this.answered(question + (hidden ? "" : text ?? ""));
    this.edit(line, cursor);
    return text;
  }
  close(): void {
    this.closed = true;
    this.#markPastes(false);
    this.#closeEditor();
  }
  protected get columns(): number {
    return process.stdout.columns || 80;
  }
  /** Paints a text with an SGR code, if there are colours. */
  protected paint(code: number | string | undefined, text: string): string {
    return this.colours && code && text ? `\x1b[${code}m${text}\x1b[0m` : text;
  }
  /** Puts a text in place of the line that is being typed. */
  protected edit(text: string, cursor = text.length): void {
    Object.assign(this.editor, { line: text, cursor });
    this.redraw();
  }
  #enter(lines: readonly string[], how: Input): void {
    if (this.#accepts) this.events?.onLines(lines, how);
    else this.#early.push({ lines, how });
  }
  /**
   * A paste's lines are entered, except for the last if no line break follows it. In an answer, or in a command that is
   * half typed, a paste is a part of that one line: what was meant for one person must not be said to everybody.
   */
  #paste(pasted: string): void {
    const text = pasted.replace(/\r\n?/g, "\n").replace(/[^\P{Cc}\t\n]/gu, "");
    const { line, cursor } = this.editor;
    const [before, after] = [line.slice(0, cursor), line.slice(cursor)];
    if (this.question || before.startsWith("/") || !text.includes("\n")) {
      const inserted = before + text.replace(/\n+$/, "").replaceAll("\n", " ");
      return this.edit(inserted + after, inserted.length);
    }
    const lines = (before + text).split("\n");
    const last = lines.pop() ?? "";
    this.edit(last + after, last.length);
    this.#enter(lines, "pasted");
  }
  /** Answers the question, or cancels it. @returns whether there was one */
  #answerWith(text: string | undefined): boolean {
    const answer = this.#answer;
    this.#answer = undefined;
    answer?.(text);
    return answer !== undefined;
  }
  /** Cancels the question, or clears the line; where there is neither, the person leaves. */
  protected interrupt(key: "Ctrl-C" | "Ctrl-D"): void {
    if (this.#answerWith(undefined)) return;
    const { line } = this.editor;
    this.edit("");
    if (!line) this.events?.onLeave(key);
  }
  #gone(): void {
    this.#answerWith(undefined);
    if (!this.closed) this.events?.onGone();
  }
}

/** Plain mode: readline echoes what is typed, and every line is written once. */
class PlainUi extends PersonalUi {
  protected readonly colours = 0;
  /** A line that is half typed is written again below what is shown. */
  protected show(head: string, text: Clean): void {
    const { line } = this.editor;
    const isTyping = line !== "" || this.question !== undefined;
    if (isTyping) write(process.stdout, "\n");
    writeLine(process.stdout, `${head}${text}` as Clean);
    if (isTyping) this.redraw();
  }
  /** A line break shows that a hidden answer was taken. */
  protected echo(text: string): void {
    if (!this.question?.hidden || !text.trim()) write(process.stdout, text);
  }
  protected redraw(): void {
    write(process.stdout, (this.question?.text ?? "") + (this.question?.hidden ? "" : this.editor.line));
  }
  /** What was half typed stays on the screen, above what is in its place. */
  protected override edit(text: string, cursor?: number): void {
    if (this.editor.line) write(process.stdout, "\n");
    super.edit(text, cursor);
  }
  protected override interrupt(key: "Ctrl-C" | "Ctrl-D"): void {
    if (!this.editor.line) write(process.stdout, "\n");
    super.interrupt(key);
  }
}

/** A pipe on at least one side: a line in, a line out. */
class PipeUi implements Ui {
  readonly hasPerson = false;
  readonly #reader: readline.Interface;
  #events: UiEvents | undefined;
  #ended = false;
  #accepts = false;
  #early: string[] = []; // read before lines were accepted: --timeout counts from the end of the input
  readonly #how: Input;
  /** @param commands whether a line that begins with a slash is a command, as it is where a person types */
  constructor(commands = false) {
    this.#how = commands || process.stdin.isTTY ? "typed" : "text";
    this.#reader = readline.createInterface({ input: process.stdin, crlfDelay: Infinity });
    this.#reader.on("line", (line) => this.#enter(line));
    this.#reader.on("close", () => {
      this.#ended = true;
      this.#events?.onEnd?.();
    });
    process.stdout.on("error", ({ code, message }: NodeJS.ErrnoException) => {
      this.#events?.onGone(code === "EPIPE" ? undefined : `standard output cannot be written: ${message}`);
    });
  }
  listen(events: UiEvents): void {
    this.#events = events;
  }
  acceptLines(): void {
    if (this.#accepts) return;
    this.#accepts = true;
    this.holdInput(false);
    for (const line of this.#early.splice(0)) this.#enter(line);
  }
  #enter(line: string): void {
    if (this.#accepts) this.#events?.onLines([line], this.#how);
    else if (this.#early.push(line) >= LIMITS.outbox) this.holdInput(true);
  }
  message({ time, nick, target, text, isAction, isOwn }: Message): void {
    if (isOwn) return;
    const line = `${new Date(time).toISOString()}\t${target}\t${nick}\t${isAction ? "/me " : ""}${text}`;
    writeLine(process.stdout, line as Clean);
  }
  note(text: Clean): void {
    writeLine(process.stderr, `chat: ${text}` as Clean);
  }
  welcome(room: Clean, nick: Clean, others: Clean): void {
    this.note(clean(`in ${room} as ${nick}; here: ${others || "nobody else"}`));
  }
  ask(): Promise<undefined> {
    return Promise.resolve(undefined);
  }
  holdInput(hold: boolean): void {
    if (this.#ended) return;
    if (hold) this.#reader.pause();
    else this.#reader.resume();
  }
  close(): void {
    this.#reader.close();
  }
}

/* =====================================================================================================================
 * Full terminal
 * The prompt stays at the bottom, and everything else is shown above it. The prompt and the line being typed are drawn
 * here, in rows one column narrower than the terminal, and while they are drawn the terminal does not wrap. The further
 * rows of a text have a mark in the margin, so that whatever its width is, no part of it looks like another line.
 * Whatever comes in during one turn of the event loop is drawn at once at its end.
 * ================================================================================================================== */

const MARGIN = "│ "; // before the further rows of a text
const NOTHING_DRAWN = { rows: [0] as readonly number[], row: 0, column: 0 };

class TerminalUi extends PersonalUi {
  protected readonly colours = colourDepth();
  #prompt = "" as Clean;
  #printed: string[] = []; // rows that are to be shown above the prompt
  #isUnread = false; // nobody reads the terminal
  #unshown = 0; // rows that were dropped meanwhile
  #isDrawDue = false;
  #drawn = NOTHING_DRAWN; // below: the width of each row drawn, and where the cursor is
  #completion: { readonly options: readonly string[]; readonly next: number } | undefined;
  constructor() {
    super();
    process.stdin.on("keypress", (_, key?: Key) => this.#pressed(key));
    process.stdout.on("resize", () => this.redraw());
    this.editor.on("SIGCONT", () => this.redraw());
  }
  setPrompt(prompt: Clean): void {
    this.#prompt = prompt;
    this.redraw();
  }
  clear(): void {
    write(process.stdout, "\x1b[H\x1b[2J\x1b[3J");
    this.#drawn = NOTHING_DRAWN;
    this.redraw();
  }
  override close(): void {
    if (this.closed) return;
    this.#draw(false);
    super.close();
  }
  protected echo(): void {} // the line is drawn here
  protected override answered(shown: string): void {
    this.show("", clean(shown));
  }

  /** The further rows of a long text are indented by the width of the head, if it leaves them half of the terminal. */
  protected show(head: string, text: Clean, style?: number): void {
    const width = cells(head.replace(/\p{Cc}\[[\d;]*m/gu, ""));
    const indent = width > this.columns >> 1 ? MARGIN.length : Math.max(MARGIN.length, width);
    const rows = wrap(text, this.columns - 1 - indent).map((row) => this.paint(style, row));
    const first = width > indent ? head : head + rows.shift();
    const margin = " ".repeat(indent - MARGIN.length) + this.paint(DIM, MARGIN);
    this.#printed.push(first, ...rows.map((row) => margin + row));
    const excess = this.#isUnread ? this.#printed.length - LIMITS.unreadRows : 0;
    if (excess > 0) this.#unshown += this.#printed.splice(0, excess).length;
    this.redraw();
  }
  #pressed(key?: Key): void {
    const { line, cursor } = this.editor;
    if (key?.ctrl && key.name === "l") this.clear();
    if (key?.name === "tab" && (this.question || line[cursor - 1] !== "\t")) this.#complete(); // else it is in a paste
    else this.#completion = undefined;
    this.redraw();
  }
  /** Completes the text before the cursor; pressed again, in the next way. */
  #complete(): void {
    const { line, cursor } = this.editor;
    const typed = line.slice(0, cursor);
    const before = this.question ? typed.replaceAll("\t", "") : typed; // an answer has no tabs
    const { options, next } = this.#completion ??
      { options: this.question ? [] : this.events?.onTab?.(before) ?? [], next: 0 };
    this.#completion = { options, next: (next + 1) % options.length };
    const completed = options[next] ?? before;
    this.edit(completed + line.slice(cursor), completed.length);
  }

  protected redraw(): void {
    if (this.#isDrawDue || this.closed) return;
    this.#isDrawDue = true;
    setImmediate(() => this.#drawNow());
  }
  /** Draws, or waits until somebody reads the terminal. */
  #drawNow(): void {
    if (this.closed) return;
    this.#isUnread = process.stdout.writableLength > LIMITS.unreadBytes;
    if (this.#isUnread) process.stdout.once("drain", () => this.#drawNow());
    else this.#draw(true);
  }
  /** Erases what is drawn below, shows the rows that are to be shown, and draws the prompt again. */
  #draw(withPrompt: boolean): void {
    this.#isDrawDue = false;
    const columns = this.columns; // the terminal may have become narrower, and have wrapped the rows
    const above = this.#drawn.rows.slice(0, this.#drawn.row);
    const rowsAbove = sumOf(above, (width) => Math.max(1, Math.ceil(width / columns)));
    const up = rowsAbove + Math.floor(this.#drawn.column / columns);
    const printed = this.#printed;
    if (this.#unshown) printed.unshift(`-- ${plural(this.#unshown, "line", "lines")} not shown`);
    this.#printed = [];
    this.#unshown = 0;
    this.#drawn = NOTHING_DRAWN;
    let out = `${AUTOWRAP.off}\r${up ? `\x1b[${up}A` : ""}\x1b[J${printed.map((row) => `${row}\r\n`).join("")}`;
    if (withPrompt) {
      const { rows, row, before } = this.#layOut(columns - 1);
      const below = rows.length - 1 - row;
      out += `${rows.join("\r\n")}${below ? `\x1b[${below}A` : ""}\r${before}`; // whatever its width is
      this.#drawn = { rows: rows.map((text) => cells(text)), row, column: cells(before) };
    }
    write(process.stdout, out + AUTOWRAP.on);
  }
  /** Lays out the prompt and the line in rows, no more than fit, with the cursor's row and what is before it there. */
  #layOut(width: number): { rows: string[]; row: number; before: string } {
    const { text, hidden } = this.question ?? { text: this.#prompt, hidden: false };
    const { line, cursor } = hidden ? { line: "", cursor: 0 } : this.editor;
    const shown = (part: string) => graphemes(part).map((one) => clean(one)).join("");
    const rows = rowsOf(text + shown(line), width);
    const before = rowsOf(text + shown(line.slice(0, cursor)), width);
    const most = Math.max(1, (process.stdout.rows || 24) - 1);
    const top = Math.max(0, before.length - most);
    return { rows: rows.slice(top, top + most), row: before.length - 1 - top, before: before.at(-1) ?? "" };
  }
}

/** The interface that suits standard input and output. */
export function openUi({ plain = false, commands = false } = {}): Ui {
  if (!process.stdin.isTTY || !process.stdout.isTTY) return new PipeUi(commands);
  return plain || environment("TERM") === "dumb" ? new PlainUi() : new TerminalUi();
}

/* =====================================================================================================================
 * Link
 * A client's connection: how it is made, and lines in and out. Nothing is sent on it before the server is trusted.
 * ================================================================================================================== */

export interface JoinOptions {
  readonly host: string;
  readonly port: number;
  readonly ui: Ui;
  readonly pin?: string | undefined; // the key that the server must have, whatever its certificate says
  readonly nick?: string | undefined;
  readonly password?: string | undefined;
  readonly room?: string | undefined; // the one to talk in, instead of the server's first
  readonly ca?: string | undefined; // PEM text of the roots to trust instead of the runtime's
  readonly timeoutMs?: number | undefined; // see LIMITS
  readonly listens?: boolean; // whether to stay after the end of the input
  readonly backOffMs?: (tries: number) => number; // how long to wait before connecting once more
  readonly explain?: boolean; // say what happens on the connection
  readonly keylog?: boolean; // write the TLS keys to standard error
  readonly signal?: AbortSignal; // to leave
  readonly clock?: Clock;
}
type Settings = JoinOptions & { readonly clock: Clock };

/** The Fault of a connection that could not be made or has ended: another try may help. */
class Lost extends Fault {
  constructor(why: string, hint = "is the server still running?") {
    super(why, hint);
  }
}

const KNOWN_TAGS: ReadonlySet<string> = new Set(["time", "msgid", "batch", ONCE]); // a client keeps no others

class Link {
  readonly socket: tls.TLSSocket;
  readonly certificate: crypto.X509Certificate | undefined;
  trust = ""; // why the server is trusted; empty while it is not
  ended = ""; // why the connection has ended; empty while it has not
  heardAt: number; // when something was last received
  isPinged = false; // since then a PING was sent
  lesson: Folded | undefined; // receives every line
  #dismissal: Fault | undefined; // the operator has ended it
  readonly #lines: Line[] = []; // not taken yet: the client asks a person, or derives keys
  #unread = 0; // characters in them
  #wake: () => void = () => {};
  constructor(socket: tls.TLSSocket, clock: Clock) {
    this.socket = socket;
    this.certificate = socket.getPeerX509Certificate(); // once: Node 20 does not give it twice
    this.heardAt = clock.now();
    const splitter = new LineSplitter(LIMITS.serverTagBytes);
    socket.on("data", (chunk: Buffer) => {
      this.heardAt = clock.now();
      this.isPinged = false;
      splitter.push(chunk);
      let lines = 0;
      for (let split; (split = splitter.next()); lines++) if (!split.fault) this.#take(split.text, chunk.length);
      if (lines > 1) this.lesson?.tell("←", `← these ${lines} lines came in one: ${recorded(chunk.length)}`);
    });
    socket.on("error", (error) => this.end(error.message));
    socket.on("close", () => this.end("the server closed the connection"));
  }
  /** @param chunkBytes the size of the chunk in which it came */
  #take(text: string, chunkBytes: number): void {
    this.#explainLine("←", text, Buffer.byteLength(text) + 2 === chunkBytes);
    const { tags, ...rest } = parse(text);
    const line = { ...rest, tags: tags.size ? new Map([...tags].filter(([name]) => KNOWN_TAGS.has(name))) : NO_TAGS };
    if (line.command === "PING") return this.send("PONG", line.params);
    if (line.command === "ERROR") {
      this.#dismissal = dismissalOf(wordsOf(line));
      return this.end(wordsOf(line));
    }
    this.#unread = (this.#lines.push(line) === 1 ? 0 : this.#unread) + text.length;
    if (this.#unread > LIMITS.inputBytes) return this.end("it sends more than can be read");
    this.#wake();
  }
  end(why: string): void {
    this.ended ||= why;
    this.socket.destroy();
    this.#wake();
  }
  send(command: string, params: readonly string[], tags: readonly Tag[] = []): void {
    if (this.ended || !this.trust) return;
    const line = `${format(command, params, "", tags)}\r\n`;
    this.#explainLine("→", line.trimEnd(), true);
    this.socket.write(line);
    if (this.socket.writableLength > LIMITS.queueBytes) this.end("it does not read what it is sent");
  }
  /** Shows a line, without its tags and without what belongs to the login. */
  #explainLine(arrow: "→" | "←", line: string, isAlone: boolean): void {
    const text = line.replace(/^@\S* /, "");
    const shown = text.replace(/^(AUTHENTICATE|REGISTER \* \*|PASS) \S{9,}/, "$1 …");
    const [kind = ""] = /^(:\S* )?\S+/.exec(text) ?? [];
    const tags = text === line ? "" : "@… "; // left out, but counted
    const bytes = Buffer.byteLength(line) + 2;
    this.lesson?.tell(arrow + kind, `${arrow} ${tags}${shown}  ${isAlone ? recorded(bytes) : `(${bytes} bytes)`}`);
  }
  /** Drops lines until one has this command, and returns it. @throws {Fault} once the connection has ended */
  async next(command = /^/): Promise<Line> {
    for (;;) {
      const line = this.#lines.shift();
      if (line && command.test(line.command)) return line;
      if (line) continue;
      if (this.ended) throw this.#dismissal ?? new Lost(this.ended);
      await new Promise<void>((wake) => this.#wake = wake);
    }
  }
  /** Describes the connection. */
  facts(): Fact[] {
    return [...describe(this.socket, this.certificate), { step: 3, label: "trusted", text: `because ${this.trust}` }];
  }
}

/** The words of a line from the server, in the way in which the program writes its own. */
const wordsOf = ({ params }: Line) =>
  clean(params.at(-1) ?? "").replace(/^[A-Z](?=[a-z]*:? )/, (first) => first.toLowerCase());

/** The reason in a reply such as `904 ana :SASL authentication failed: Wrong password`. */
const reasonIn = (line: Line) => wordsOf(line).replace(/^[^:]*: ./, (head) => head.slice(-1).toLowerCase());

/** The Fault of a connection that an operator's command has ended: reconnecting would be wrong. */
function dismissalOf(why: string): Fault | undefined {
  if (why.startsWith("kicked")) return new Fault(`you were ${why}`, "you can join again");
  return /^the (operator|account was deleted)/.test(why) ? new Fault(why, "ask the operator") : undefined;
}

/** What goes wrong while connecting, by what the runtimes say about it: what that means, and what to try. */
const CONNECT_FAULTS: readonly (readonly [pattern: RegExp, what: string, hint: string])[] = [
  [/ECONNREFUSED|refused/i, "nobody listens there", `is the server running? ${CHAT} serve starts one`],
  [/ENOTFOUND|EAI_AGAIN|lookup|resolve/i, "there is no such host", "the line to join with is on the server's screen"],
  [/(alert|protocol).*version|unsupported|HandshakeFailure/i, "it does not know TLS 1.3", "chat takes nothing older"],
  [/no.application.protocol/i, "it speaks TLS, but is not a chat server", "is it the right port?"],
  [
    /wrong.version|packet|record|corrupt|Invalid(ContentType|Message)/i,
    "it is not a TLS server",
    "is it the right port?",
  ],
  [
    /RESET|disconnect|closed/i,
    "it closed the connection while TLS was set up",
    "is it a chat server, and has it room?",
  ],
  [/ETIMEDOUT|timed out|unreach/i, "nothing answers there", "is there a firewall in between?"],
];

const isIp = (host: string) => /^[\d.]+$|:/.test(host);

/** Opens a TLS connection. Whether to trust the server is decided afterwards. @throws {Lost} if there is none */
function connect({ host, port, ca, keylog, clock }: Settings): Promise<Link> {
  return new Promise((resolve, reject) => {
    const socket = tls.connect({
      host,
      port,
      ALPNProtocols: ["irc"],
      minVersion: "TLSv1.3",
      rejectUnauthorized: false,
      checkServerIdentity: () => undefined, // the name is checked apart from the chain
      ...!isIp(host) && { servername: host },
      ...ca && { ca },
    });
    const fail = (why: string) => {
      cancelTimeout();
      const [, what, hint] = CONNECT_FAULTS.find(([pattern]) => pattern.test(why)) ?? ["", why, "is it a chat server?"];
      socket.destroy();
      reject(new Lost(`cannot join ${bracketed(host)}:${port}: ${what}`, hint));
    };
    const cancelTimeout = clock.after(LIMITS.joinMs, () => fail("timed out"));
    socket.on("error", (error: NodeJS.ErrnoException) => fail(`${error.code} ${error.message}`));
    socket.on("close", () => fail("closed"));
    if (keylog) socket.on("keylog", (line) => write(process.stderr, line.toString()));
    socket.setNoDelay(true);
    socket.once("secureConnect", () => {
      cancelTimeout();
      socket.removeAllListeners("error").removeAllListeners("close");
      resolve(new Link(socket, clock));
    });
  });
}

/* =====================================================================================================================
 * Login
 * From a connection to the welcome: whether to trust the server, whether it is a chat server, and the proof of the
 * password. The password itself is never sent: only a proof of it, or a verifier made from it.
 * ================================================================================================================== */

/** What a chat server offers, and `join` relies on. */
const REQUIRED_CAPS = ["message-tags", "echo-message", "batch", "draft/chathistory", "sasl"] as const;
const WANTED_CAPS = (Object.keys(CAP) as Cap[]).filter((name) => name !== "labeled-response" && name !== REGISTRATION);
const OTHER_NICK = `${CHAT} join NICK@HOST takes another nick`;

/** Says why a certificate proves nothing; undefined if it is valid, for this name, and from a trusted root. */
function problemOf(certificate: crypto.X509Certificate, host: string, isChainTrusted: boolean): string | undefined {
  const invalid = outsideValidity(certificate);
  if (invalid) return invalid;
  if (!isChainTrusted) return "leads to no root that is trusted here";
  if (isIp(host) ? certificate.checkIP(host) : certificate.checkHost(host)) return undefined;
  return `is for ${clean(certificate.subjectAltName ?? "").replace(/DNS:|IP Address:/g, "") || "nobody"}`;
}

/** Logs in, and again after each reconnect, with what it has learned by then. */
class Login {
  nick: string;
  keys: Keys | undefined; // made from the password
  isReturning = false; // it has been logged in before
  hasAsked = false; // a person, who may have taken longer to answer than the server waited
  readonly #options: Settings;
  #password: string | undefined; // until the keys are made from it
  #pin: string | undefined; // of the key that was accepted: no other is from then on
  #refusal = ""; // why SCRAM has failed
  #cancelDeadline = () => {};
  constructor(options: Settings) {
    this.#options = options;
    this.nick = options.nick ?? "";
    this.#password = options.password;
    this.#pin = options.pin;
  }

  /** Decides on trust and logs in, up to the welcome. @throws {Fault} if that cannot be, {Lost} if a retry may help */
  async run(link: Link): Promise<void> {
    await this.#decideTrust(link);
    this.#startDeadline(link);
    try {
      await this.#negotiate(link);
      while (!await this.#prove(link));
      this.#password = undefined; // from now on the keys are all that is needed
      link.send("CAP", ["END"]);
      const line = await link.next(/^(001|4\d\d)$/);
      if (line.command !== "001") throw new Fault(wordsOf(line), OTHER_NICK);
      this.nick = clean(line.params[0] ?? this.nick);
      this.isReturning = true;
      this.hasAsked = false;
      this.#explain("6 the room: each line is text in a TLS record; lines that are written at once share one");
    } finally {
      this.#cancelDeadline();
    }
  }

  /** The server has to bring the login to its end in time, whatever it sends. */
  #startDeadline(link: Link): void {
    this.#cancelDeadline();
    this.#cancelDeadline = this.#options.clock.after(LIMITS.joinMs, () => {
      link.end("it does not answer as a chat server does");
    });
  }
  /** Asks a person. The server does not have to hurry meanwhile. @throws {Fault} if nobody answers */
  async #ask(link: Link, question: string, hint: string, hidden = false): Promise<string> {
    if (link.ended) throw new Lost(link.ended); // during the question before
    const { ui } = this.#options;
    this.#cancelDeadline();
    const answer = await ui.ask(clean(question), hidden);
    if (answer === undefined) {
      const what = question.charAt(0).toLowerCase() + question.slice(1).replace(/: $/, "");
      throw ui.hasPerson
        ? new Fault("cancelled")
        : new Fault(`no ${what} was given, and there is nobody to ask`, hint, 2);
    }
    this.hasAsked = true;
    this.#startDeadline(link);
    return answer;
  }
  #note(text: string): void {
    this.#options.ui.note(clean(text));
  }
  #explain(text: string): void {
    if (this.#options.explain) this.#note(text);
  }

  // ---- Trust

  /** Decides whether this is the server that was meant. */
  async #decideTrust(link: Link): Promise<void> {
    const { host } = this.#options;
    const { certificate } = link;
    if (!certificate) throw new Fault("the server shows no certificate", "is it a chat server?", 3);
    const pin = pinOf(certificate.publicKey);
    if (this.#pin && pin !== this.#pin) {
      const hint = "somebody may sit in the middle, or it was restarted without CHAT_SECRET: ask whoever runs it";
      throw new Fault(`this server has the key ${pin}, not ${this.#pin}`, hint, 3);
    }
    const problem = problemOf(certificate, host, link.socket.authorized);
    const isOnLoopback = /^(localhost|127\.[\d.]+|::1)$/i.test(host) && isLoopback(link.socket.remoteAddress ?? "");
    const isChecked = this.#options.pin || (problem && !isOnLoopback); // by its pin, or by a person
    if (isChecked && !isPinnable(certificate.publicKey)) {
      const hint = "only a chain that leads to a trusted root can vouch for it";
      throw new Fault("the server's key is neither P-256 nor Ed25519: no pin and no code is safe for it", hint, 3);
    }
    if (this.#pin) link.trust = this.#options.pin ? "its key is the pinned one" : "its key is the one accepted before";
    else if (!problem) link.trust = "its certificate leads to a trusted root and is for this name";
    else if (isOnLoopback) {
      this.#note(`accepted its key ${pin} unchecked: it is this machine`);
      if (this.#options.ca) this.#note(`its certificate ${problem}`);
      link.trust = "it is on this machine";
    } else link.trust = await this.#compare(certificate.publicKey, problem);
    if (problem) this.#pin = pin;
    if (link.ended) throw new Lost(link.ended); // during the question
    if (!this.#options.explain) return;
    lessonOf(link.facts()).forEach((line) => this.#note(line));
    link.lesson = new Folded((text) => this.#note(text));
  }
  /** Has a person compare the check code with what the server's screen shows. @returns why it is trusted then */
  async #compare(key: crypto.KeyObject, problem: string): Promise<string> {
    const { host, port, ui } = this.#options;
    const hint = `${CHAT} join ${bracketed(host)}:${port}/PIN, with the pin from the server's screen`;
    if (!ui.hasPerson) throw new Fault(`cannot verify this server: its certificate ${problem}`, hint, 3);
    this.#note(`cannot verify ${host}: its certificate ${problem}`);
    const code = await checkCodeOf(key);
    for (let tries = 0; tries < LIMITS.codeTries; tries++) {
      const answer = await ui.ask(clean("The check code on the server's screen: "));
      if (answer === undefined) throw new Fault("cancelled", hint, 3);
      if (readBase32(answer, 8) === code) {
        this.hasAsked = true;
        return "somebody compared its check code";
      }
      this.#note("that is not the check code of the server that answers here");
    }
    throw new Fault("this is not the server that you mean, or the code was mistyped", "ask whoever runs it", 3);
  }

  // ---- The login

  /** Finds out whether this is a chat server, and agrees on capabilities with it. */
  async #negotiate(link: Link): Promise<void> {
    const { host, port } = this.#options;
    const offered = new Map<string, string>();
    link.send("CAP", ["LS", "302"]);
    for (let isComplete = false; !isComplete;) {
      const { command, params } = await link.next(/^(CAP|4\d\d|HTTP\/.*)$/);
      if (command.startsWith("HTTP/")) throw new Fault("this is a web server", "is it the right port?");
      isComplete = command !== "CAP" || params[2] !== "*";
      for (const one of params.at(-1)?.split(" ") ?? []) {
        const [name = "", value = ""] = one.split("=");
        if (Object.hasOwn(CAP, name)) offered.set(name, value);
      }
    }
    const hasScram = offered.get("sasl")?.split(",").includes("SCRAM-SCRYPT-PLUS");
    if (!hasScram || !REQUIRED_CAPS.every((name) => offered.has(name))) {
      const hint = "an IRC client such as irssi gets in";
      throw new Fault(`${bracketed(host)}:${port} is an IRC server, but not a chat server`, hint);
    }
    if (!offered.has(REGISTRATION) && !this.isReturning) {
      this.#note("registration is closed here: without an account, ask the operator for /admit NICK");
    }
    // A client without draft/chathistory is sent the private messages that it missed: the first time, that is wanted.
    const isLater = (name: Cap) => name === "draft/chathistory" && !this.isReturning;
    link.send("CAP", ["REQ", WANTED_CAPS.filter((name) => offered.has(name) && !isLater(name)).join(" ")]);
    let answer: string | undefined; // CAP DEL and NEW may come in between
    while (answer !== "ACK" && answer !== "NAK") answer = (await link.next(/^CAP$/)).params[1];
    if (answer !== "ACK") {
      throw new Fault(`${bracketed(host)}:${port} does not keep to what it offers`, "is it a chat server?");
    }
  }
  /** Sends the nick and proves to know the password, after asking for what is missing. @returns whether it is in */
  async #prove(link: Link): Promise<boolean> {
    while (!isNick(this.nick)) {
      if (this.nick && !link.ended) this.#note(REFUSALS["bad nick"]);
      this.nick = (await this.#ask(link, "Nick: ", `${CHAT} join NICK@HOST`)).trim();
    }
    while (!this.keys && !this.#password) {
      this.#password = await this.#ask(link, "Password: ", "CHAT_PASSWORD sets it", true);
    }
    link.send("NICK", [this.nick]);
    link.send("USER", [this.nick, "0", "*", this.nick]);
    const error = await this.#scram(link);
    if (error === "e=unknown-user") await this.#register(link);
    else if (error) {
      const text = `wrong password for ${this.nick}`;
      if (this.#options.password !== undefined) throw new Fault(text, "is it your nick? another one may be free");
      this.#note(`${text} (not yours? Ctrl-C, and join with another nick)`);
      if (link.ended) throw new Fault(link.ended, "try again later"); // too many wrong passwords
      this.#password = this.keys = undefined;
    }
    return !error;
  }
  /** SCRAM-SCRYPT-PLUS. @returns the server's error, such as e=unknown-user; undefined if it is logged in */
  async #scram(link: Link): Promise<string | undefined> {
    const binding = sha256(link.certificate?.raw ?? "");
    this.#explain("5 login: what crosses the wire now proves that we know the password, and does not contain it");
    const scram = scramClient(this.nick, (salt) => this.#keysFor(link, salt), binding);
    link.send("AUTHENTICATE", ["SCRAM-SCRYPT-PLUS"]);
    await link.next(/^(AUTHENTICATE|904)$/);
    let step = await scram.next();
    while (!step.done) {
      link.send("AUTHENTICATE", [base64(Buffer.from(step.value))]); // shorter than SASL_CHUNK
      const answer = await this.#saslAnswer(link);
      if (answer.startsWith("e=")) return answer;
      step = await scram.next(answer);
      if (!step.done) {
        this.#explain(
          "the server gave its salt and the cost of a guess; we prove the password, for this connection only",
        );
      }
    }
    if (!step.value) throw new Fault("this server does not know the password", "it may stand in for the right one", 3);
    this.#explain("the server proved that it knows the password's verifier; neither side sent a secret");
    link.send("AUTHENTICATE", ["+"]);
    await link.next(/^903$/);
    return undefined;
  }
  /** The server's answer in SCRAM, which fits into one line. */
  async #saslAnswer(link: Link): Promise<string> {
    const line = await link.next(/^(AUTHENTICATE|904)$/);
    if (line.command === "904") { // not because of the password
      const why = reasonIn(line);
      throw /operator/.test(why) ? new Fault(why, "ask whoever runs the server") : new Lost(why, "");
    }
    const message = fromBase64(line.params[0]).toString();
    if (message === "e=channel-bindings-dont-match") {
      const hint = "the certificate that you see is not the server's";
      throw new Fault("somebody sits between you and the server", hint, 3);
    }
    if (message.startsWith("e=")) this.#refusal = reasonIn(await link.next(/^904$/));
    return message;
  }
  async #keysFor(link: Link, salt: Buffer): Promise<Keys> {
    if (this.keys?.salt.equals(salt)) return this.keys;
    if (!this.#password) this.#note(`the password of ${this.nick} was changed`);
    this.#password ??= await this.#ask(link, `Password of ${this.nick}: `, "it was changed: join again", true);
    return this.keys = await deriveKeys(this.#password, salt);
  }
  /** Registers the nick with a verifier: the password itself stays here. */
  async #register(link: Link): Promise<void> {
    if (/operator|server/.test(this.#refusal)) return this.#cannotRegister(this.#refusal);
    if (!this.isReturning && this.#options.password === undefined) {
      const question = `${this.nick} is free. Repeat the password to register: `;
      if (await this.#ask(link, question, "", true) !== this.#password) {
        this.#password = undefined;
        if (!link.ended) this.#note("the passwords do not match");
        return;
      }
    }
    this.keys ??= await deriveKeys(this.#password ?? "");
    link.send("REGISTER", ["*", "*", formatVerifier(verifierOf(this.keys))]);
    const line = await link.next(/^(REGISTER|FAIL)$/);
    if (line.params[0] === "SUCCESS") {
      if (this.isReturning) this.#note(`the server has forgotten the account ${this.nick}; registered it again`);
      return this.#explain("registered: the server keeps a verifier, and did not get the password");
    }
    if (line.params[1] === "ACCOUNT_EXISTS") return; // perhaps by this client, before the connection broke
    this.#cannotRegister(wordsOf(line));
  }
  #cannotRegister(why: string): void {
    this.keys = undefined;
    const hint = /operator|server/.test(why) ? "ask whoever runs the server" : OTHER_NICK;
    if (this.#options.nick || this.isReturning) throw new Fault(why, hint);
    this.#note(why);
    this.#options.ui.dropEarly?.(); // a password must not become a nick
    this.nick = "";
    this.#password = this.#options.password; // the one that was typed belongs to the refused nick
  }
}

/* =====================================================================================================================
 * Connection
 * The life of a client's connection: it is made, and made again whenever it is lost, until the client leaves.
 * ================================================================================================================== */

type Phase =
  | { readonly is: "connecting" }
  | { readonly is: "logging in"; readonly link: Link }
  | { readonly is: "online"; readonly link: Link; readonly since: number } // by the monotonic clock
  | { readonly is: "waiting"; readonly retry: () => void }
  | { readonly is: "leaving"; readonly link: Link } // QUIT was sent
  | { readonly is: "left" };

interface ConnectionEvents {
  onWelcome(link: Link, isReturning: boolean): void;
  onLine(line: Line): void;
  onLost(why: string): void; // it will be made again
  onTick(): void; // once a second
}

/** How long to wait before connecting: not at all, then 1, 2, 4 … 30 seconds, each a little more or less. */
const backOff = (tries: number) => tries ? Math.min(30, 2 ** (tries - 1)) * (750 + Math.random() * 500) : 0;

class Connection {
  readonly #options: Settings;
  readonly #login: Login;
  readonly #events: ConnectionEvents;
  quitMessage = "";
  #phase: Phase = { is: "connecting" };
  #tries = 0; // to connect, since a connection lasted
  #refusal = ""; // why the last login was refused, without digits: each reason is shown once
  #stop = () => {};
  constructor(options: Settings, login: Login, events: ConnectionEvents) {
    this.#options = options;
    this.#login = login;
    this.#events = events;
  }
  /** The link while the client is logged in. */
  get link(): Link | undefined {
    return this.#phase.is === "online" ? this.#phase.link : undefined;
  }
  get isOver(): boolean {
    return this.#phase.is === "left" || this.#phase.is === "leaving";
  }
  /** Stays connected until the client leaves. Nothing happens any more when it has returned. */
  async run(): Promise<void> {
    const stopped = new Promise<void>((stop) => this.#stop = stop);
    const ticking = setInterval(() => this.#tick(), 1000);
    try {
      await Promise.race([this.#stayConnected(), stopped]);
    } finally {
      clearInterval(ticking);
      const phase = this.#phase;
      this.#phase = { is: "left" };
      if (phase.is === "waiting") phase.retry();
      if ("link" in phase) phase.link.end("left");
    }
  }
  /** Leaves with a QUIT; at once if there is no connection, or if it is leaving already. */
  leave(): void {
    const { link } = this;
    if (!link) return this.stop();
    link.send("QUIT", this.quitMessage ? [this.quitMessage] : []);
    this.#phase = { is: "leaving", link };
    this.#options.clock.after(1000, () => this.stop());
  }
  stop(): void {
    this.#stop();
  }
  /** Connects once more, now. */
  reconnect(): void {
    this.#tries = 0;
    if (this.#phase.is === "waiting") this.#phase.retry();
    this.link?.end("as you asked");
  }

  async #stayConnected(): Promise<void> {
    while (!this.isOver) {
      let link: Link | undefined;
      try {
        this.#phase = { is: "connecting" };
        link = await connect(this.#options);
        await this.#use(link);
      } catch (error) {
        link?.end("given up");
        if (!this.isOver) await this.#recover(error);
      }
    }
  }
  /** Logs in, and takes lines until the connection is lost. @throws {Lost} then */
  async #use(link: Link): Promise<void> {
    if (this.isOver) return link.end("left");
    this.#phase = { is: "logging in", link };
    const { isReturning } = this.#login;
    await this.#login.run(link);
    if (this.isOver) return link.end("left");
    this.#phase = { is: "online", link, since: this.#options.clock.now() };
    this.#refusal = "";
    this.#events.onWelcome(link, isReturning);
    for (;;) this.#events.onLine(await link.next());
  }
  /** Waits until it is time to connect again. @throws {Fault} if that would not help */
  async #recover(error: unknown): Promise<void> {
    const wasAsking = this.#login.hasAsked; // the server did not wait for the person's answer
    this.#login.hasAsked = false;
    if (!(error instanceof Lost) || !(this.#login.isReturning || wasAsking)) throw error;
    const phase = this.#phase;
    this.#phase = { is: "connecting" };
    if (phase.is === "online") {
      if (this.#options.clock.now() - phase.since >= LIMITS.steadyMs) this.#tries = 0;
      this.#events.onLost(error.message);
    } else if (phase.is === "logging in" && !wasAsking && this.#refusal !== error.message.replace(/\d+/g, "")) {
      this.#options.ui.note(clean(`cannot log in again yet: ${error.message}`));
      this.#refusal = error.message.replace(/\d+/g, "");
    }
    if (!wasAsking) await this.#waitToRetry();
  }
  /** Waits before connecting again. A server that disconnects everybody at once must not be called without end. */
  async #waitToRetry(): Promise<void> {
    const { clock, backOffMs = backOff } = this.#options;
    const delay = backOffMs(this.#tries++);
    if (delay <= 0) return;
    let cancel = () => {};
    await new Promise<void>((retry) => {
      cancel = clock.after(delay, retry);
      this.#phase = { is: "waiting", retry };
    });
    cancel();
  }
  /** Notices a connection that is dead without having ended. */
  #tick(): void {
    this.#events.onTick();
    const { link } = this;
    if (!link) return;
    const silentMs = this.#options.clock.now() - link.heardAt;
    if (silentMs > 2 * LIMITS.hushMs) link.end("nothing heard for a minute");
    else if (silentMs > LIMITS.hushMs && !link.isPinged) {
      link.isPinged = true;
      link.send("PING", ["there?"]);
    }
  }
}

/* =====================================================================================================================
 * Transcript
 * What a person sees of the rooms and of the people who write: which messages, how, and who joined and left in between.
 * ================================================================================================================== */

const HISTORY_SHOWN = 50; // messages, on joining a room
const MOST_ID = 40; // characters of the id of a message
const SHOWN_IDS = 5_000; // of the latest messages, remembered
const MAX_TIME = Date.UTC(9999, 0); // beyond, times have another form
const PRESENCE_MS = 300; // within which people who join and leave are shown together

const nickOf = ({ source }: Line) => clean(source.split("!")[0] ?? "");
/** When a line was sent, by the server's clock. */
function timeOf({ tags }: Line, clock: Clock): number {
  const stamp = Date.parse(tags.get("time") ?? "");
  return stamp > 0 && stamp < MAX_TIME ? stamp : clock.wall();
}
const listed = (names: readonly string[], most: number) =>
  names.slice(0, most).join(", ") + (names.length > most ? ` and ${names.length - most} more` : "");

/** A room that the client is in, or was in when the connection was lost. */
class Conversation {
  readonly name: string;
  readonly nicks = new Map<string, Clean>(); // by folded nick
  cursor: { readonly id: string; readonly time: number } | undefined; // the last message shown
  /** Pages are loaded: the latest one, or those after the cursor. Meanwhile messages are held. */
  state: "absent" | "live" | "latest page" | "page after cursor" | "next page" = "absent";
  joinedAt = 0; // by the server's clock
  topic = "";
  isGreeted = false; // its welcome was shown
  readonly held: Line[] = [];
  constructor(name: string) {
    this.name = name;
  }
  get isLoading(): boolean {
    return this.state !== "absent" && this.state !== "live";
  }
  add(nick: Clean): void {
    this.nicks.set(detached(fold(nick)), detached(nick) as Clean);
    if (this.nicks.size > LIMITS.accounts) throw new Lost("it names too many people");
  }
}

/** How a message is shown: as news, as something old, or again because the person has asked for it. */
type Shown = "new" | "old" | "again";
type Presence = "joined" | "left";

class Transcript {
  readonly ignored = new Set<string>(); // folded nicks
  rings = true; // the bell, for messages to oneself
  correspondent = ""; // who wrote privately last
  latest = 0; // the time of the latest message shown
  readonly #ui: Ui;
  readonly #clock: Clock;
  readonly #me: { readonly nick: string }; // which the server may change
  readonly #shown = new Set<string>(); // ids of messages
  readonly #changes = new Map<string, Presence>(); // in the room that is talked in, by nick; not shown yet
  #changedRoom = "";
  #day = ""; // of the last message shown
  #cancelPresence = () => {};
  constructor(ui: Ui, clock: Clock, me: { readonly nick: string }) {
    this.#ui = ui;
    this.#clock = clock;
    this.#me = me;
  }
  note(text: string): void {
    this.#ui.note(clean(text));
  }
  /**
   * Shows a message, unless it was shown before, and rings if it is for this person.
   * @returns the room or the person that it came from, if it is news from somebody else
   */
  show(line: Line, how: Shown, room: Conversation | undefined, current: Conversation | undefined): string | undefined {
    const { source, tags, params: [target = "", raw = ""] } = line;
    const time = timeOf(line, this.#clock);
    if (this.#markShown(tags.get("msgid"), time, room) && how !== "again") return;
    const nick = nickOf(line);
    const isAction = raw.startsWith("\x01ACTION ");
    if (this.ignored.has(fold(nick)) || (raw.startsWith("\x01") && !isAction)) return;
    const text = clean(isAction ? raw.slice(8).replace("\x01", "") : raw);
    if (!source.includes("!")) return void this.note(`${nick}: ${text}`);
    const isOld = how !== "new";
    this.#showPresence();
    this.#showDay(time, isOld);
    const me = this.#me.nick;
    const isOwn = fold(nick) === fold(me);
    const isPrivate = room === undefined;
    if (isPrivate && !isOwn) this.correspondent = nick;
    const isNamed = new RegExp(`(?<![\\w-])${me.replace(/\W/g, "\\$&")}(?![\\w-])`, "i").test(text);
    const isForMe = !isOwn && !isOld && (isPrivate || isNamed);
    const isElsewhere = !isPrivate && room !== current;
    const kind = { isAction, isPrivate, isOwn, isOld, isElsewhere, isForMe, rings: isForMe && this.rings };
    this.#ui.message({ time, nick, target: clean(target), text, ...kind });
    return isOwn || isOld ? undefined : room?.name ?? nick;
  }
  /** Notes that a message is shown. @returns whether it was shown before */
  #markShown(id: string | undefined, time: number, room: Conversation | undefined): boolean {
    if (id && (id.length > MOST_ID || this.#shown.has(id))) return true;
    if (id && room && time >= (room.cursor?.time ?? 0)) room.cursor = { id, time };
    this.latest = Math.max(this.latest, time);
    if (id) this.#shown.add(detached(id));
    const [oldest = ""] = this.#shown;
    if (this.#shown.size > SHOWN_IDS) this.#shown.delete(oldest);
    return false;
  }
  /** Shows that one is in a room: its names and its history are there. */
  entered(room: Conversation, isOnlyRoom: boolean): void {
    const me = this.#me.nick;
    const here = listed([...room.nicks.values()].filter((nick) => fold(nick) !== fold(me)), 12);
    if (room.isGreeted) return this.note(`back in ${room.name}`);
    room.isGreeted = true;
    if (room.topic) this.note(`topic of ${room.name}: ${room.topic}`);
    if (isOnlyRoom) this.#ui.welcome(clean(room.name), clean(me), clean(here));
    else this.note(`in ${room.name} as ${me}; here: ${here || "nobody else"}`);
  }
  #showDay(time: number, isOld: boolean): void {
    const day = new Date(time).toDateString();
    if ((this.#day || isOld) && day !== this.#day) this.#ui.aside?.(clean(day));
    this.#day = day;
  }
  /** Shows earlier messages between two rules. */
  showPage(title: string, lines: readonly Line[], room: Conversation | undefined, isBeginning: boolean): void {
    this.#ui.rule?.(clean(`history of ${title}`));
    const day = this.#day;
    this.#day = "";
    for (const line of lines) this.show(line, "again", room, room);
    this.#day = day;
    this.#ui.rule?.(clean(isBeginning ? "that was the beginning" : "/history shows what was before"));
  }
  /** Somebody joined or left. Changes in quick succession are shown together, and those that cancel out not at all. */
  presence(nick: string, how: Presence, room: string): void {
    if (room !== this.#changedRoom) this.#showPresence();
    this.#changedRoom = room;
    if (!this.#changes.size) this.#cancelPresence = this.#clock.after(PRESENCE_MS, () => this.#showPresence());
    if ((this.#changes.get(nick) ?? how) === how) this.#changes.set(nick, how);
    else this.#changes.delete(nick);
  }
  /** Shows nothing more by itself. */
  end(): void {
    this.#cancelPresence();
  }
  #showPresence(): void {
    this.#cancelPresence();
    const texts = (["joined", "left"] as const).map((how) => {
      const nicks = [...this.#changes.keys()].filter((nick) => this.#changes.get(nick) === how);
      return nicks.length && `${listed(nicks, 5)} ${how}`;
    }).filter(Boolean);
    this.#changes.clear();
    const time = clockTime(this.#clock.wall());
    if (texts.length) this.#ui.aside?.(clean(`${time} ${this.#changedRoom}: ${texts.join("; ")}`));
  }
}

/* =====================================================================================================================
 * Conversations
 * What a client knows of the rooms that it is in. A cursor in each room lets the client catch up after a reconnect;
 * messages that arrive meanwhile are held, so that all are shown in order and once.
 * ================================================================================================================== */

class Conversations {
  readonly rooms = new Map<string, Conversation>(); // by folded name
  readonly unread = new Map<string, { readonly name: string; count: number }>(); // by folded room or nick
  target = ""; // what is typed goes there: a room, which may not be joined yet, or a nick
  hasEntered = false; // its first room; if there is no target after that, it has left all rooms
  readonly oldest = new Map<string, string>(); // the id of the oldest message on the screen, by folded room or nick
  readonly #asked = new Map<string, number>(); // messages that the person has asked for, likewise
  readonly #transcript: Transcript;
  readonly #sendRequest: (params: readonly string[]) => void;
  #batch: { readonly id: string; readonly target: string; readonly lines: Line[] } | undefined; // a page of history
  #pageSize: number = LIMITS.chathistory; // messages that the server gives at once
  #completeUntil = 0; // up to this time no private message was missed
  #requests = 0; // for history that has not come yet
  /** @param sendRequest sends a CHATHISTORY with these parameters */
  constructor(transcript: Transcript, sendRequest: (params: readonly string[]) => void) {
    this.#transcript = transcript;
    this.#sendRequest = sendRequest;
  }

  find(name: string): Conversation | undefined {
    return this.rooms.get(fold(name));
  }
  /** The room that is talked in, if it is one, and it has been joined. */
  get current(): Conversation | undefined {
    return this.find(this.target);
  }
  /** Rooms and people that one can turn to. */
  get places(): string[] {
    const rooms = [...this.rooms.values()].map(({ name }) => name);
    const people = [...this.unread.values()].map(({ name }) => name).filter((name) => !name.startsWith("#"));
    return [...new Set([...rooms, this.target, ...people])].filter(Boolean);
  }
  /** Says how much is unread in a room or of a person, and which key turns to it; empty if there is nothing to say. */
  unreadIn(place: string): string {
    const at = this.places.findIndex((one) => fold(one) === fold(place)) + 1;
    const count = this.unread.get(fold(place))?.count;
    return (count ? `, ${count} unread` : "") + (at && at < 10 ? `, Alt-${at}` : "");
  }
  /** From now on what is typed goes to this room or person. */
  turnTo(target: string): void {
    this.target = target;
    this.unread.delete(fold(target));
  }
  /** Takes a numeric reply: 005 says how large a page of history is, 332 a topic, 353 nicks, 366 that all have come. */
  numeric({ command, params }: Line): void {
    const room = this.find(params.find((param) => param.startsWith("#")) ?? "");
    const last = params.at(-1) ?? "";
    if (command === "005") {
      const size = Number(params.find((token) => token.startsWith("CHATHISTORY="))?.split("=")[1]);
      if (size > 0) this.#pageSize = Math.min(size, LIMITS.chathistory);
    } else if (!room) return;
    else if (command === "332") room.topic = last;
    else if (command === "353") {
      for (const nick of last.split(" ").filter(Boolean)) room.add(clean(nick));
    } else {
      this.hasEntered ||= this.current !== undefined || !this.target.startsWith("#"); // else --room decides
      if (!room.isLoading) this.#transcript.entered(room, this.rooms.size === 1); // else when its history has come
    }
  }
  /** The connection was lost: what comes from now on is to be asked for on the next one. */
  disconnected(): void {
    if (!this.#requests) this.#completeUntil = this.#transcript.latest || this.#completeUntil;
    this.#requests = 0;
    this.#batch = undefined;
    this.#asked.clear();
    for (const room of this.rooms.values()) room.state = "absent";
  }
  /** Asks in which private talks something was said while the client was not connected. */
  catchUp(): void {
    this.#request(["TARGETS", this.#since, `timestamp=${new Date(MAX_TIME).toISOString()}`]);
  }
  /** The client has joined a room. A cursor at the present keeps what was said before from being loaded. */
  joined(name: string, time: number, wantsHistory: boolean): void {
    const room = this.find(name) ?? new Conversation(name);
    this.#completeUntil ||= time; // by the server's clock, which need not agree with ours
    room.joinedAt = time;
    this.rooms.set(fold(name), room);
    if (this.rooms.size > LIMITS.roomsPerMember) this.#forgetRoom(room);
    room.nicks.clear();
    room.topic = ""; // 332 follows if there is one
    if (room.cursor) {
      room.state = "page after cursor";
      const since = new Date(room.cursor.time - 1).toISOString(); // with the last message, to notice a gap
      this.#request(["AFTER", name, `timestamp=${since}`]);
    } else if (wantsHistory) {
      room.state = "latest page";
      this.#request(["LATEST", name, "*"]);
    } else {
      room.cursor = { id: "", time };
      room.state = "live";
    }
    if (!this.target) this.turnTo(name);
  }
  /** Forgets a room that another connection of this account has left meanwhile. */
  #forgetRoom(entered: Conversation): void {
    const absent = [...this.rooms.values()].find((room) => room.state === "absent" && room !== entered);
    if (!absent) throw new Lost("it says that we are in too many rooms");
    this.parted(absent);
  }
  parted({ name }: Conversation): void {
    this.rooms.delete(fold(name));
    this.unread.delete(fold(name));
    if (fold(name) === fold(this.target)) this.turnTo([...this.rooms.values()].at(-1)?.name ?? "");
  }
  /** Somebody joined or left a room: shown if it is the current one, and not part of catching up. */
  presence(room: Conversation, nick: Clean, how: Presence): void {
    const wasThere = room.nicks.has(fold(nick));
    if (how === "joined") room.add(nick);
    else room.nicks.delete(fold(nick));
    const isChange = wasThere !== (how === "joined");
    if (isChange && room === this.current && !room.isLoading) this.#transcript.presence(nick, how, room.name);
  }
  rename(nick: string, to: Clean): void {
    for (const room of this.rooms.values()) if (room.nicks.delete(fold(nick))) room.add(to);
  }

  // ---- Messages and history

  /** Takes a message: shows it, or holds it until its room has caught up. */
  message(line: Line): void {
    const room = this.find(line.params[0] ?? "");
    if (!room || room.state === "live") return this.#show(line, "new");
    room.held.push(line);
    const held = sumOf([...this.rooms.values()], (one) => one.held.length);
    if (held > LIMITS.held) throw new Lost("it sends messages, but not the history before them");
  }
  #show(line: Line, how: Shown): void {
    const from = this.#transcript.show(line, how, this.find(line.params[0] ?? ""), this.current);
    if (!from || fold(from) === fold(this.target)) return;
    const unread = this.unread.get(fold(from));
    if (unread) unread.count++;
    else if (this.unread.size < LIMITS.roomsPerMember * 2) this.unread.set(fold(from), { name: from, count: 1 });
  }
  /** Takes BATCH, or a line in a batch. @returns whether the line was taken */
  takeBatched(line: Line): boolean {
    const [reference = "", , target = ""] = line.params;
    const id = reference.slice(1);
    const batch = this.#batch;
    if (line.command !== "BATCH") {
      if (!batch || line.tags.get("batch") !== batch.id) return false;
      if (batch.lines.push(line) > LIMITS.chathistory) throw new Lost("it sends more history than was asked for");
      return true;
    }
    const isEnd = !reference.startsWith("+");
    this.#batch = isEnd ? undefined : { id, target, lines: [] };
    if (isEnd && batch?.id === id) this.#pageCame(batch.target, batch.lines);
    return true;
  }
  #request(params: readonly string[], limit = this.#pageSize): void {
    this.#requests++;
    this.#sendRequest([...params, String(limit)]);
  }
  /** Asks for the messages before the oldest one seen, for the person. @returns false if some are being loaded */
  requestEarlier(target: string, limit: number): boolean {
    if (this.find(target)?.isLoading || this.#asked.has(fold(target))) return false;
    const oldest = this.oldest.get(fold(target));
    this.#asked.set(fold(target), limit);
    this.#request(oldest ? ["BEFORE", target, `msgid=${oldest}`] : ["LATEST", target, "*"], limit);
    return true;
  }
  /** Since when private messages may have been missed. Those of that very millisecond come once more. */
  get #since(): string {
    return `timestamp=${new Date(this.#completeUntil - 1).toISOString()}`;
  }
  /** Takes a page of a target's history, and asks for the next one if there may be more; or a list of targets. */
  #pageCame(target: string, lines: readonly Line[]): void {
    this.#requests = Math.max(0, this.#requests - 1);
    if (!target) {
      const nicks = lines.map(({ params: [, name = ""] }) => name).filter((name) => !name.startsWith("#"));
      for (const nick of nicks) this.#request(["AFTER", nick, this.#since]);
      return;
    }
    const room = this.find(target);
    const isLatest = room?.state === "latest page";
    const asked = this.#asked.get(fold(target));
    const first = lines.at(isLatest ? -HISTORY_SHOWN : 0) ?? lines[0];
    const oldest = first?.tags.get("msgid");
    if (oldest && (isLatest || asked)) this.oldest.set(fold(target), oldest);
    if (asked) {
      this.#asked.delete(fold(target));
      return this.#transcript.showPage(target, lines, room, lines.length < asked);
    }
    const expected = room?.state === "page after cursor" && room.cursor?.id;
    if (expected && !lines.some(({ tags }) => tags.get("msgid") === expected)) {
      this.#transcript.note(`${target}: something may be missing, which the server no longer has`);
    }
    for (const line of isLatest ? lines.slice(-HISTORY_SHOWN) : lines) this.#show(line, isLatest ? "old" : "new");
    const last = lines.at(-1)?.tags.get("msgid");
    if (!isLatest && lines.length >= this.#pageSize && last) {
      if (room) room.state = "next page";
      return this.#request(["AFTER", target, `msgid=${last}`]);
    }
    if (room) this.#becomeLive(room);
  }
  /** The server refuses to give a page. */
  pageRefused(target: string): void {
    this.#requests = Math.max(0, this.#requests - 1);
    this.#asked.delete(fold(target));
  }
  #becomeLive(room: Conversation): void {
    room.state = "live";
    room.cursor ??= { id: "", time: room.joinedAt };
    this.#transcript.entered(room, this.rooms.size === 1);
    for (const line of room.held.splice(0)) this.#show(line, "new");
  }
}

/* =====================================================================================================================
 * Client
 * A person's side of the chat: what is to be said goes into a queue, what the server sends into the conversations. Each
 * line has an idempotency key; what was not acknowledged is sent again on the next connection.
 * ================================================================================================================== */

interface Outgoing {
  readonly target: string; // empty for the room that will be talked in first
  readonly text: string;
  readonly enteredAt: number; // by the monotonic clock
  isSent?: boolean; // it was written to a connection, and may have arrived
}

/** An outgoing message as a person would enter it. */
function describeOutgoing({ target, text }: Outgoing): string {
  const words = text.startsWith("\x01ACTION ") ? `/me ${text.slice(8).replace("\x01", "")}` : text;
  return target && !target.startsWith("#") ? `/msg ${target} ${words}` : `${target && `in ${target}: `}${words}`;
}

/**
 * Splits a text into parts that fit into one message each: between words, or else between grapheme clusters.
 * @param wrapping what stands around each part
 */
function splitText(text: string, source: string, target: string, wrapping: string): string[] {
  const head = `:${source} PRIVMSG ${target || "x".repeat(LIMITS.room)} :${wrapping}`;
  const space = LIMITS.bodyBytes - 2 - Buffer.byteLength(head);
  const line = text.replace(/[\0\r\n]/g, " ");
  return Buffer.byteLength(line) <= space ? [line] : wrap(line, space, (part) => Buffer.byteLength(part));
}

/** The messages to be sent, in order. The first of them, a window, are sent and not yet acknowledged. */
class SendQueue {
  readonly #instance = crypto.randomBytes(9).toString("base64url");
  readonly messages = new Map<number, Outgoing>(); // by number; the acknowledged ones are gone
  #number = 0;
  #sent = 0; // the highest number sent on this connection
  add(message: Outgoing): void {
    this.messages.set(++this.#number, message);
  }
  /** The connection was lost: what was not acknowledged has to be sent once more. */
  restart(): void {
    this.#sent = 0;
  }
  /** Drops the messages to people. @returns them */
  dropPrivate(): Outgoing[] {
    const dropped = [...this.messages].filter(([, { target }]) => target && !target.startsWith("#"));
    for (const [number] of dropped) this.messages.delete(number);
    return dropped.map(([, message]) => message);
  }
  /** Sends what fits into the window. @param room where the messages without a target go; empty if that is not known */
  pump(link: Link, room: string): void {
    let inFlight = 0;
    for (const [number, message] of this.messages) {
      const { target, text } = message;
      if (++inFlight > LIMITS.window || !(target || room)) return;
      if (number <= this.#sent) continue;
      this.#sent = number;
      message.isSent = true;
      link.send("PRIVMSG", [target || room, text], [[ONCE, `${this.#instance}-${number}`]]);
    }
  }
  /** Takes the key of a message that the server has executed or refused. @returns the message, if it is one of ours */
  acknowledge(key = ""): Outgoing | undefined {
    const [instance, digits] = key.split(/-(?=\d+$)/);
    const number = Number(digits);
    const message = instance === this.#instance ? this.messages.get(number) : undefined;
    if (message) this.messages.delete(number);
    return message;
  }
}

class Client implements ConnectionEvents {
  readonly ui: Ui;
  readonly connection: Connection;
  readonly transcript: Transcript;
  readonly conversations: Conversations;
  newKeys: Keys | undefined; // of a new password that the server has not confirmed yet
  readonly #options: Settings;
  readonly #login: Login;
  readonly #queue = new SendQueue();
  #isFinishing = false; // it leaves when everything has been sent
  #leaveAskedAt = -Infinity;
  #boot = ""; // the boot id of the server
  #knowsBoot = false; // on this connection the server has sent its boot id
  #progressAt = 0; // when it began to finish, or a message was acknowledged since
  #gaveUp = false;
  #hasFailed = false; // to do something that was entered: a script ends with status 1 then
  constructor(options: Settings) {
    const { ui, clock, room = "" } = options;
    this.ui = ui;
    this.#options = options;
    this.#login = new Login(options);
    this.connection = new Connection(options, this.#login, this);
    this.transcript = new Transcript(ui, clock, this.#login);
    this.conversations = new Conversations(this.transcript, (params) => this.link?.send("CHATHISTORY", params));
    this.conversations.target = room;
  }
  /** Stays in the chat until the person leaves, or all input was sent. @returns the exit status */
  async run(): Promise<number> {
    const { messages } = this.#queue;
    try {
      await this.connection.run();
      const isIncomplete = this.#gaveUp || messages.size || (this.#hasFailed && !this.ui.hasPerson);
      return this.#login.isReturning && !isIncomplete ? 0 : 1;
    } finally {
      this.transcript.end();
      if (this.#login.isReturning && messages.size) {
        this.#list("not sent:", [...messages.values()].filter(({ isSent }) => !isSent));
        this.#list("sent, and may not have arrived:", [...messages.values()].filter(({ isSent }) => isSent));
      }
    }
  }
  #list(what: string, messages: readonly Outgoing[]): void {
    if (messages.length) this.note(`${plural(messages.length, "line was", "lines were")} ${what}`);
    for (const message of messages) this.note(describeOutgoing(message));
  }
  get link(): Link | undefined {
    return this.connection.link;
  }
  get room(): Conversation | undefined {
    return this.conversations.current;
  }
  /** Where what is typed goes: a room or a nick; empty before the first room has been joined. */
  get target(): string {
    return this.conversations.target;
  }
  isMe(nick: string): boolean {
    return fold(nick) === fold(this.#login.nick);
  }
  /** How many messages wait to be sent or acknowledged. */
  get waiting(): number {
    return this.#queue.messages.size;
  }
  note(text: string): void {
    this.transcript.note(text);
  }
  /** Says why something that was entered is not done. */
  fail(text: string): void {
    this.#hasFailed = true;
    this.note(text);
  }

  // ---- The connection

  onWelcome(link: Link, isReturning: boolean): void {
    this.#knowsBoot = false;
    if (!isReturning) link.send("CAP", ["REQ", "draft/chathistory"]); // see Login
    const { rooms, current } = this.conversations;
    for (const { name } of rooms.values()) link.send("JOIN", [name]);
    if (this.target.startsWith("#") && !current) link.send("JOIN", [this.target]);
    if (isReturning) this.conversations.catchUp();
    this.#proceed();
  }
  onLine(line: Line): void {
    const { command, tags } = line;
    const isRefused = /^([45]\d\d|FAIL)$/.test(command);
    const message = this.#queue.acknowledge(tags.get(ONCE));
    if (message) {
      this.#progressAt = this.#options.clock.now();
      if (this.waiting < LIMITS.outbox / 2) this.ui.holdInput?.(false);
      if (isRefused) this.fail(`not sent: ${describeOutgoing(message)}`);
    }
    if (!this.conversations.takeBatched(line)) this.#dispatch(line);
    this.#proceed();
  }
  onLost(why: string): void {
    this.conversations.disconnected();
    this.#queue.restart();
    this.note(`connection lost: ${why}; reconnecting`);
    this.#proceed();
  }
  /** Shows what still waits, and gives up the rest of the input if the server takes none of it. */
  onTick(): void {
    const { clock, timeoutMs = LIMITS.timeoutMs } = this.#options;
    this.#proceed();
    if (!this.#isFinishing || clock.now() - this.#progressAt <= timeoutMs) return;
    this.note(`gave up: the server took nothing for ${timeoutMs / 1000} s`);
    this.#gaveUp = true;
    this.connection.stop();
  }
  /** Does what has become possible: sends, leaves if the input has ended and all of it was taken, shows the prompt. */
  #proceed(): void {
    if (this.connection.isOver) return;
    const { link, room } = this;
    if (link && this.#knowsBoot && room?.state !== "absent") this.#queue.pump(link, this.target);
    if (this.#isFinishing && !this.waiting && this.conversations.hasEntered) return this.connection.leave();
    this.#showPrompt(this.#login.isReturning && (!link || room?.state === "absent"));
  }
  #showPrompt(isOffline: boolean): void {
    const [oldest] = this.#queue.messages.values(); // the first ones are acknowledged soon
    const isSlow = oldest && (isOffline || this.#options.clock.now() - oldest.enteredAt > LIMITS.slowMs);
    const states = [isOffline && "offline", this.#isFinishing && "leaving", isSlow && `${this.waiting} waiting`];
    const state = states.filter(Boolean).join(", ");
    const byKind = [...this.conversations.unread.values()].sort((one, other) => one.name < other.name ? -1 : 1);
    const unread = byKind.map(({ name, count }) => `${name} ${count}`); // rooms first: "#" sorts before letters
    const after = unread.length ? ` [${listed(unread, 3)}]` : "";
    this.ui.setPrompt?.(clean(`${state && `[${state}] `}${this.target}${after}> `));
  }

  // ---- What the person does

  /** Sends a command now, or says that it cannot. */
  request(command: string, ...params: readonly string[]): void {
    if (this.link) this.link.send(command, params);
    else this.fail("not connected: that was not done");
  }
  /** Leaves when everything has been sent. */
  finish(): void {
    this.#isFinishing = true;
    this.#progressAt = this.#options.clock.now();
    this.#proceed();
  }
  /**
   * Says something to a room or a nick, or in the current room; a long text in several messages.
   * @param wrapPart what to put around each part
   */
  say(target: string, text: string, wrapPart = (part: string) => part): void {
    const to = target || this.target;
    this.conversations.unread.delete(fold(to));
    if (!to && this.conversations.hasEntered) return this.fail("you are in no room: /join #ROOM enters one");
    if (this.#isFinishing && this.ui.hasPerson) return this.note(`not sent, as you are leaving: ${text}`);
    for (const part of splitText(text, sourceOf(this.#login.nick), to, wrapPart(""))) {
      if (this.ui.hasPerson && this.waiting >= LIMITS.outbox) return this.note(`not sent, as too much waits: ${part}`);
      this.#queue.add({ target: to, text: wrapPart(part), enteredAt: this.#options.clock.now() });
    }
    if (this.waiting >= LIMITS.outbox) this.ui.holdInput?.(true);
    this.#proceed();
  }
  /** Turns to a room or a person. A room that the client is not in is joined. */
  talkTo(target: string): void {
    const isOther = fold(target) !== fold(this.target);
    this.conversations.turnTo(this.conversations.find(target)?.name ?? target);
    if (target.startsWith("#") && !this.room) this.link?.send("JOIN", [target]);
    if (isOther) this.ui.rule?.(clean(this.target));
    this.#proceed();
  }
  /** Leaves at Ctrl-D, and at a second Ctrl-C. */
  askToLeave(key: "Ctrl-C" | "Ctrl-D"): void {
    const now = this.#options.clock.now();
    if (key === "Ctrl-D" || now - this.#leaveAskedAt < LIMITS.leaveMs) return this.leave();
    this.#leaveAskedAt = now;
    this.note("Ctrl-C again leaves");
  }
  /** Leaves when what waits has been sent; the second time at once. */
  leave(): void {
    const isAgain = this.#isFinishing && this.ui.hasPerson; // a script finishes at the end of its input as well
    if (!this.link || !this.waiting || isAgain) return this.connection.leave();
    this.note(`leaving as soon as ${plural(this.waiting, "line is", "lines are")} sent; /exit again leaves at once`);
    this.finish();
  }

  // ---- What the server sends

  #dispatch(line: Line): void {
    const { conversations } = this;
    const [first = "", second = ""] = line.params;
    const room = conversations.find(first);
    const nick = nickOf(line);
    const isOwn = this.isMe(nick);
    switch (line.command) {
      case "PRIVMSG":
      case "NOTICE":
        return conversations.message(line);
      case "JOIN":
        if (isOwn) return conversations.joined(first, timeOf(line, this.#options.clock), this.ui.hasPerson);
        return room && conversations.presence(room, nick, "joined");
      case "PART":
        if (!room || !isOwn) return room && conversations.presence(room, nick, "left");
        this.note(`you left ${room.name}`);
        conversations.parted(room);
        return this.ui.rule?.(clean(this.target || "no room"));
      case "QUIT":
        if (!first.startsWith("Kicked")) {
          return conversations.rooms.forEach((one) => conversations.presence(one, nick, "left"));
        }
        conversations.rooms.forEach(({ nicks }) => nicks.delete(fold(nick)));
        return this.note(`${nick} was ${wordsOf(line)}`);
      case "NICK":
        if (isOwn) this.#login.nick = clean(first);
        return conversations.rename(nick, clean(first));
      case "TOPIC":
        if (room) room.topic = second;
        return this.note(`${nick} ${second ? "set" : "removed"} the topic of ${first}${second && `: ${second}`}`);
      case "NOTE":
      case "FAIL":
        if (first === "PASS" && line.command === "NOTE") this.#login.keys = this.newKeys ?? this.#login.keys;
        if (first === "CHATHISTORY") conversations.pageRefused(line.params[3] ?? "");
        return this.note(wordsOf(line));
      case "376": // the end of what comes first
      case "422":
        this.#knowsBoot = true;
        return;
      case "005":
        this.#noteBoot(line.params.find((token) => token.startsWith("BOOT="))?.slice(5));
        return conversations.numeric(line);
      case "332":
      case "353":
        return conversations.numeric(line);
      case "366":
        conversations.numeric(line);
        if (conversations.hasEntered) this.ui.acceptLines(); // what was entered before this goes to the first room
        return;
      default:
        return showReply(this, line);
    }
  }
  /** A nick may belong to somebody else after a restart in which the accounts were lost: nothing private goes there. */
  #noteBoot(boot: string | undefined): void {
    const isOther = boot && this.#boot && boot !== this.#boot;
    this.#boot = boot ?? this.#boot;
    if (!isOther || boot === KEPT_BOOT) return;
    this.note("the server was restarted without its accounts: nicks may belong to others now");
    for (const message of this.#queue.dropPrivate()) this.fail(`not sent: ${describeOutgoing(message)}`);
  }
}

/** Shows the list of rooms, replies about people, and errors. Without a person it ends if its room cannot be joined. */
function showReply(client: Client, line: Line): void {
  const { conversations } = client;
  const { command, params } = line;
  const [, room = "", count = "", topic] = params;
  if (command === "322") {
    const about = plural(Number(count), "person", "people") + conversations.unreadIn(room);
    client.note(`${room}: ${about}${topic && `; ${topic}`}`);
  } else if (command === "323") {
    for (const { name } of conversations.unread.values()) {
      if (!name.startsWith("#")) client.note(`${name}${conversations.unreadIn(name)}`);
    }
  } else if (command === "301") {
    const text = wordsOf(line); // an away message, or the server says that nobody of that account is here
    client.note(`${room} ${text.startsWith("is not here") ? text : `is away: ${text}`}`);
  } else if (/^(30[2-6]|4(?!22)\d\d|5\d\d)$/.test(command)) {
    client.note([...params.slice(1, -1), wordsOf(line)].join(": "));
  }
  const { target, current, rooms } = conversations;
  const isRefused = /^4/.test(command) && target.startsWith("#") && fold(room) === fold(target);
  if (!isRefused || current) return;
  if (!client.ui.hasPerson) throw new Fault(params.slice(1).map(clean).join(" "), "--room names another room", 2);
  conversations.turnTo([...rooms.values()].at(-1)?.name ?? "");
  if (client.target) client.ui.rule?.(clean(client.target));
  conversations.hasEntered = true;
  client.ui.acceptLines();
}

/* =====================================================================================================================
 * Slash commands
 * What a person can enter in the client.
 * ================================================================================================================== */

type SlashCommand = (client: Client, rest: string) => void | Promise<void>;

const SLASH: Table<SlashCommand> = {
  msg: row("NICK TEXT", "say something to one person: /msg bo are you there?", (client, rest) => {
    const [nick = "", text] = rest.split(/ +(.*)/s);
    if (text && (isNick(nick) || isRoom(nick))) client.say(nick, text);
    else client.fail(text ? `${nick} is not a valid nick` : "/msg NICK TEXT: say what?");
  }),
  r: row("TEXT", "answer who wrote to you last", (client, rest) => {
    const { correspondent } = client.transcript;
    if (correspondent) client.say(correspondent, rest);
    else client.fail("nobody has written to you yet");
  }),
  query: row("NICK", "talk to one person from now on, until /join or Alt-1", (client, rest) => {
    if (isNick(rest) && !client.isMe(rest)) client.talkTo(rest);
    else client.fail(isNick(rest) ? "that is you" : `${rest} is not a valid nick`);
  }),
  me: row("TEXT", "say what you do: /me pours coffee", (client, rest) => {
    client.say("", rest, (part) => `\x01ACTION ${part}\x01`);
  }),
  join: row("#ROOM", "enter a room, or switch to it; Alt-1 … Alt-9 switch as well", (client, rest) => {
    const name = roomIn(rest);
    if (isRoom(name)) client.talkTo(name);
    else client.fail(`${name} is not a valid name of a room: ${LIMITS.room} bytes at most, no space, no comma`);
  }),
  part: row("[#ROOM]", "leave this room, or another one", (client, rest) => {
    const name = rest ? roomIn(rest) : client.target;
    if (name.startsWith("#")) client.request("PART", name);
    else client.fail(noRoom(name));
  }),
  rooms: row("", "list all rooms", (client) => client.request("LIST")),
  who: row("", "list who is in this room", (client) => {
    const { room, target } = client;
    if (!room) return client.fail(target.startsWith("#") ? `you are not in ${target} yet` : noRoom(target));
    const { name, nicks } = room;
    client.note(`${plural(nicks.size, "person", "people")} in ${name}: ${[...nicks.values()].join(", ")}`);
  }),
  topic: row("[TEXT]", "show or set the room's topic; /topic - removes it", (client, rest) => {
    const { room, target } = client;
    if (!target.startsWith("#")) return client.fail(noRoom(target));
    if (rest || !room) return client.request("TOPIC", target, ...rest ? [rest === "-" ? "" : rest] : []);
    client.note(room.topic ? `topic of ${room.name}: ${room.topic}` : `${room.name} has no topic`);
  }),
  history: row("[N]", "show what was said before, N lines of it; again for what was before that", showHistory),
  away: row("[TEXT]", "say that you are away, or are back", (client, rest) => client.request("AWAY", rest)),
  ignore: row("[NICK]", "hide what somebody says, or show it again", (client, rest) => {
    const { ignored } = client.transcript;
    if (rest && !isNick(rest)) return client.fail(`${rest} is not a valid nick`);
    if (client.isMe(rest)) return client.fail("you cannot ignore yourself");
    const wasHidden = ignored.delete(fold(rest));
    if (rest && !wasHidden) ignored.add(fold(rest));
    if (wasHidden) client.conversations.oldest.clear(); // so that /history shows it
    const isHere = [...client.conversations.rooms.values()].some(({ nicks }) => nicks.has(fold(rest)));
    const unknown = isHere || wasHidden ? "" : "; nobody of that nick is here";
    if (rest) client.note(`${rest} is ${wasHidden ? "no longer ignored" : "ignored"}${unknown}`);
    else client.note(ignored.size ? `you ignore ${[...ignored].join(", ")}` : "you ignore nobody");
  }),
  bell: row("[on|off]", "ring when you are named", (client, rest) => {
    const { transcript } = client;
    if (!/^(on|off)?$/.test(rest)) return misused(client, "bell");
    if (rest) transcript.rings = rest === "on";
    client.note(`the bell is ${transcript.rings ? "on" : "off"}`);
  }),
  tls: row("", "describe the connection", (client) => {
    if (!client.link) return client.fail("not connected: that was not done");
    for (const fact of client.link.facts()) client.note(layOut(fact));
  }),
  password: row("", "change your password", askNewPassword),
  reconnect: row("", "reconnect now", ({ connection }) => connection.reconnect()),
  clear: row("", "clear the screen; /history fills it again", ({ ui, conversations }) => {
    ui.clear?.();
    conversations.oldest.clear();
  }),
  help: row("[COMMAND]", "list what you can type", showHelp),
  exit: row("[TEXT]", "leave, with a last word; Ctrl-D leaves as well", (client, rest) => {
    client.connection.quitMessage = rest;
    client.leave();
  }),
};

/** The room that an argument names, with its "#" or without. */
const roomIn = (rest: string) => rest.replace(/^#?/, "#").replace(/ .*/, "");
const noRoom = (target: string) => target ? `you are talking to ${target}, not in a room` : "you are in no room";

/** What other programs call these commands. */
const ALIASES = { quit: "exit", leave: "part", list: "rooms", names: "who", j: "join", m: "msg", w: "msg", q: "query" };

function showHelp(client: Client, rest: string): void {
  const name = rest.replace(/^\//, "");
  const found = findCommand(name);
  if (name && !found) return client.fail(`there is no /${name}`);
  const table = found ? { [name]: found } : SLASH;
  for (const line of helpLines(table, "/")) client.note(line);
  if (!name) client.note("//TEXT               say something that begins with a slash");
}

function showHistory(client: Client, rest: string): void {
  const { link, target, conversations } = client;
  if (!/^([1-9]\d*)?$/.test(rest)) return misused(client, "history");
  const wanted = rest ? Number(rest) : HISTORY_SHOWN;
  if (!link || !target) return client.fail(link ? noRoom("") : "not connected: that was not done");
  if (!conversations.requestEarlier(target, Math.min(wanted, LIMITS.chathistory))) {
    client.fail("the history is being loaded");
  } else if (wanted > LIMITS.chathistory) {
    client.note(`${LIMITS.chathistory} lines come at a time; /history again shows more`);
  }
}

const findCommand = (name: string) => rowOf(SLASH, rowOf(ALIASES, name) ?? name);

/** Says how a command is meant that was not entered like that. */
function misused(client: Client, name: string): void {
  const { usage = "", about = "" } = findCommand(name) ?? {};
  client.fail(`${`/${name} ${usage}`.trim()}: ${about}`);
}

/** What is done with lines that were entered: the commands among them are said, or run; or nothing is. */
type Treatment = "say" | "run" | "no";

/**
 * Takes lines that were entered. They go where the person talked then, even if a question comes in between. A slash
 * begins a command if it was typed, in a paste only if the person says so.
 */
async function enter(client: Client, texts: readonly string[], how: Input): Promise<void> {
  const { target } = client;
  let mode: Treatment = how === "text" ? "say" : "run";
  if (how === "pasted") mode = await askAboutPaste(client, texts, target);
  for (const text of mode === "no" ? [] : texts) {
    const [, slash, name = "", rest = ""] = /^\/(\/?)([^ ]*) *(.*)$/s.exec(text) ?? [];
    const isLiteral = mode === "say" || (how === "pasted" && !isCommand(text));
    const to = mode === "say" ? target : client.target; // a command before it may have changed that
    if (slash === undefined || isLiteral) client.say(to, text);
    else if (slash) client.say(to, text.slice(1));
    else await runCommand(client, name.toLowerCase(), rest.trim());
  }
}

function runCommand(client: Client, name: string, rest: string): void | Promise<void> {
  const found = findCommand(name);
  if (name === "nick") return client.fail("your nick is your account: leave, and join with another one");
  if (!found) {
    return client.fail(`there is no /${name}${suggestion("/", name, Object.keys(SLASH))}; /help lists all`);
  }
  const isOptional = found.usage.startsWith("[");
  if (!isOptional && Boolean(found.usage) !== Boolean(rest)) return misused(client, name);
  return found.run(client, rest);
}

/** Whether a text would be run if it was typed. */
const isCommand = (text: string) => findCommand(/^\/([^ /]+)/.exec(text)?.[1]?.toLowerCase() ?? "") !== undefined;

async function askNewPassword(client: Client): Promise<void> {
  if (!client.link) return client.fail("not connected: that was not done");
  const password = await client.ui.ask(clean("New password: "), true);
  const again = password && await client.ui.ask(clean("Repeat it: "), true);
  if (!password || again === undefined) return client.note("nothing is changed");
  if (password !== again) {
    client.note("the passwords do not match");
    return askNewPassword(client);
  }
  client.newKeys = await deriveKeys(password);
  client.request("PASS", formatVerifier(verifierOf(client.newKeys)));
}

/** What could stand in place of the text before the cursor: with its last word completed. */
function completionsOf(before: string, { room, conversations: { rooms } }: Client): readonly string[] {
  const [, start = "", word = ""] = /^(.* )?([^ ]*)$/s.exec(before) ?? [];
  const nicks = [...room?.nicks.values() ?? []].map((nick) => start ? `${nick} ` : `${nick}: `);
  const commands = start ? [] : Object.keys(SLASH).map((name) => `/${name} `);
  const all = [...commands, ...[...rooms.values()].map(({ name }) => `${name} `), ...nicks];
  return word ? all.filter((one) => fold(one).startsWith(fold(word))).map((one) => start + one) : [];
}

/** Asks whether to say the lines of a paste, or to run the commands among them, if there is a doubt. */
async function askAboutPaste(client: Client, texts: readonly string[], target: string): Promise<Treatment> {
  const { waiting } = client;
  if (texts.length + waiting > LIMITS.outbox) {
    const many = plural(texts.length, "line is", "lines are");
    client.note(`${many} too many, with ${waiting} waiting to be sent; nothing of it is sent`);
    return "no";
  }
  const [command, ...more] = texts.filter(isCommand);
  let question = "";
  if (command !== undefined) {
    const others = more.length ? ` and ${plural(more.length, "more command", "more commands")}` : "";
    const all = texts.length > 1 ? `all ${texts.length} pasted lines` : "it";
    question = `Run the pasted "${cut(command, 60)}"${others}, or say ${all} to ${target}? (run/say/no) `;
  } else if (texts.length > 5) question = `Send these ${texts.length} lines to ${target}? (yes/no) `;
  if (!question) return "say";
  for (;;) {
    const answer = (await client.ui.ask(clean(question)))?.trim().toLowerCase() ?? "no";
    if (command !== undefined && (answer === "run" || answer === "say")) return answer;
    if (command === undefined && /^y(es)?$/.test(answer)) return "say";
    if (!/^no?$/.test(answer)) continue;
    client.note("nothing is sent");
    return "no";
  }
}

/**
 * Joins a chat, and stays until the person leaves.
 * @returns the exit status
 * @throws {Fault} if it cannot join, or cannot trust the server any more
 */
export async function join(options: JoinOptions): Promise<number> {
  const client = new Client({ ...options, clock: options.clock ?? systemClock });
  const leave = () => client.connection.leave();
  options.signal?.addEventListener("abort", leave);
  options.ui.listen({
    onLines: (lines, how) => {
      const isPasted = how === "pasted"; // pasted code keeps its empty lines
      const texts = isPasted ? lines.map((line) => line || " ") : lines.filter((line) => line.trim());
      void enter(client, texts, how);
    },
    onEnd: () => options.listens || client.finish(),
    onLeave: (key) => client.askToLeave(key),
    onSwitch: (number) => {
      const place = client.conversations.places[number - 1];
      if (place) client.talkTo(place);
    },
    onGone: (why) => {
      if (client.connection.isOver) return;
      if (why) client.fail(why);
      leave();
    },
    onTab: (before) => completionsOf(before, client),
    onTyped: (line) =>
      line === "/r " && client.transcript.correspondent
        ? `/msg ${client.transcript.correspondent} ` // also if somebody else writes before Enter is pressed
        : undefined,
  });
  return await client.run();
}

/* =====================================================================================================================
 * Options
 * What the program takes is a table, and help is made from it. Secrets are passed in environment variables, never as
 * arguments.
 * ================================================================================================================== */

/** Reads the value of an option: undefined if it is not valid. An option without a reader takes no value. */
type Read = ((text: string) => string | number | undefined) | undefined;
const option = (usage: string, about: string, run?: Read) => row(usage, about, run);
const least = (minimum: number) => (text: string) =>
  /^\d{1,9}$/.test(text) && Number(text) >= minimum ? Number(text) : undefined;
const words = (text: string) => clean(text) === text && text || undefined;
const roomName = (text: string) => {
  const name = text.replace(/^#?/, "#");
  return isRoom(name) ? name : undefined;
};
const EXPLAIN = option("", "describe what happens on the wire, as it happens");
const KEYLOG = option("", "print the TLS keys; whoever has them can read along");

const OPTIONS: Readonly<Record<"serve" | "join", Table<Read>>> = {
  serve: {
    "room": option("#NAME", "the room where everybody lands (#chat)", roomName),
    "topic": option("TEXT", "its topic", words),
    "name": option("TEXT", "what the network is called (chat)", words),
    "history": option("N", "messages kept in a room (1000)", least(0)),
    "max-clients": option("N", "connections at once (1000)", least(1)),
    "per-address": option("N", "connections from one address (100)", least(1)),
    "accounts": option("", "keep the accounts in a file, as shown below"),
    "lock": option("", "nobody can register, until /unlock"),
    "rate": option("N", "lines a second from one member (10), 0 for any number", least(0)),
    "explain": EXPLAIN,
    "keylog": KEYLOG,
  },
  join: {
    "nick": option("NAME", "who you are", words),
    "room": option("#NAME", "the room to talk in", roomName),
    "timeout": option("SECONDS", "for piped input after its end, if the server takes nothing (30)", least(1)),
    "commands": option("", "piped input: a line that begins with a slash is a command"),
    "listen": option("", "piped input: stay after its end"),
    "plain": option("", "for screen readers: no colour, the cursor only goes forward"),
    "explain": EXPLAIN,
    "keylog": KEYLOG,
  },
};

const USAGE = `chat: an encrypted group chat

  chat serve [HOST][:PORT]               open a room; 127.0.0.1:8080 by default
  chat join  [NICK@]HOST[:PORT][/PIN]    enter it; port 8080 by default
  chat verifier NICK                     print a line for --accounts
  chat help  [serve|join]                tell all options
  chat version`;

const MORE_HELP = {
  serve: `To keep the accounts over a restart:
  umask 077; chat serve --accounts <accounts.txt >>accounts.txt
  An empty line ends them; what follows are commands with a slash.

Environment:
  CHAT_SECRET          24 random characters or more: the server's key is made of
                       them, and survives a restart. Whoever guesses them has
                       the key. To make one:
                       export CHAT_SECRET=$(openssl rand -base64 24)
  CHAT_KEY, CHAT_CERT  PEM texts of your own key and certificate chain`,
  join: `Environment:
  CHAT_PASSWORD        the password, instead of the question; registers a free nick
  CHAT_CA              PEM text of the roots to trust instead of the runtime's`,
};

function help(command = ""): string {
  if (command !== "serve" && command !== "join") return USAGE;
  const synopsis = USAGE.split("\n").find((line) => line.startsWith(`  chat ${command}`))?.trim();
  return [synopsis, "", ...helpLines(OPTIONS[command], "  --"), "", MORE_HELP[command]].join("\n");
}

/** The options given, by name, of the types that the readers in OPTIONS return. An option without a value is true. */
interface Options extends Omit<ServerOptions, "explain"> {
  accounts?: true;
  explain?: true;
  keylog?: true;
  nick?: string;
  timeout?: number;
  plain?: true;
  commands?: true;
  listen?: true;
}

const wrong = (message: string, hint: string) => new Fault(message, hint, 2);

/** Reads options and at most one address. @throws {Fault} that names the wrong option, and the nearest right one */
function readArguments(command: "serve" | "join", args: readonly string[]): { address: string; options: Options } {
  const options: Record<string, string | number | true> = {};
  const addresses: string[] = [];
  const known = OPTIONS[command];
  for (const left = [...args]; left.length;) {
    const word = left.shift() ?? "";
    const [, name, attached] = /^--?([^=]+)(?:=(.*))?$/s.exec(word) ?? [];
    if (name === undefined) {
      addresses.push(word);
      continue;
    }
    const found = rowOf(known, name);
    if (!found) {
      const near = suggestion("--", name, Object.keys(known)).slice(2);
      throw wrong(`chat ${command} has no option ${word.replace(/=.*/s, "")}`, near || `${CHAT} help ${command}`);
    }
    const { usage, about, run } = found;
    const text = attached ?? (run && left.shift()) ?? "";
    const value = run ? run(text) : true;
    if (!run && text) throw wrong(`--${name} takes no value`, `--${name}: ${about}`);
    if (value === undefined) throw wrong(`--${name} cannot be "${text}"`, `--${name} ${usage}: ${about}`);
    options[name.replace(/-./g, (match) => match.charAt(1).toUpperCase())] = value; // maxClients for --max-clients
  }
  if (options["keylog"] && "Deno" in globalThis) throw wrong("--keylog is not possible on Deno", "Node tells the keys");
  if (addresses.length > 1) throw wrong(`one address is enough: ${addresses.join(" ")}`, `${CHAT} help ${command}`);
  return { address: addresses[0] ?? "", options };
}

/** Reads `HOST`, `HOST:PORT`, `PORT`, `:PORT` or `[IPv6]:PORT`. */
function readAddress(text: string): { host: string; port: number } {
  const [, ipv6, host, port = "8080"] = /^(?:\[([^\]]+)\]|([^:[\]/]*))(?::(\d{1,5}))?$/
    .exec(text.replace(/^\d+$/, ":$&")) ?? [];
  if ((ipv6 ?? host) === undefined || Number(port) > 65535) {
    throw wrong(`${text} is not an address`, "HOST:PORT, or [IPV6]:PORT");
  }
  return { host: ipv6 ?? (host || "127.0.0.1"), port: Number(port) };
}

/* =====================================================================================================================
 * Operator
 * The server as it is run from a shell: what it prints, where its accounts come from and go, and who gives it commands.
 * ================================================================================================================== */

async function mainServe(args: readonly string[]): Promise<number> {
  const { address, options: { explain, keylog, accounts, ...options } } = readArguments("serve", args);
  const { host, port } = readAddress(address);
  const [secret, key, cert] = ["CHAT_SECRET", "CHAT_KEY", "CHAT_CERT"].map(environment);
  const identity = makeIdentity({ ...secret && { secret }, ...key && { key }, ...cert && { cert } });
  const names = namesOf(host); // before a socket opens: afterwards the report would resolve its addresses by DNS
  const log = new OperatorLog();
  const kept = accounts && await readAccounts(log);
  const serving = await serve({
    ...options,
    host,
    port,
    identity,
    records: kept?.records ?? [],
    journal: kept?.journal,
    log: (line) => log.timed(line),
    keylog: keylog && ((line) => write(process.stderr, line.toString())),
    explain: explain && ((line) => log.print(line)),
  });
  if (keylog) log.print("warning: the TLS keys go to standard error; whoever has them can read along");
  const invitations = announceServer(serving, identity, { host, names, log });
  await new Promise<void>((stop) => {
    onSignal(stop);
    const run = commandRunner(serving.server, invitations, (line) => log.print(line), stop);
    if (log.hasConsole) log.ui = openConsole(run, stop);
    else if (kept) kept.onCommand(run);
    else log.print("no commands here: standard input and output are no terminal");
  });
  log.timed("stopping");
  await serving.stop("The server is stopping");
  log.ui?.close();
  return 0;
}

/** Where the operator reads what happens: on the console, if there is one, and on standard error. */
class OperatorLog {
  readonly hasConsole = process.stdin.isTTY && process.stdout.isTTY;
  ui: Ui | undefined; // the console, once the server listens
  readonly #streams = this.hasConsole && !process.stderr.isTTY ? [process.stderr, process.stdout] : [process.stderr];
  print(line: string): void {
    this.ui?.note(clean(line));
    for (const stream of this.#streams) if (!this.ui || !stream.isTTY) writeLine(stream, clean(`chat: ${line}`));
  }
  timed(line: string): void {
    this.print(`${new Date().toTimeString().slice(0, 8)} ${line}`);
  }
  /** Prints a command that is to be copied: it is not broken into rows. */
  printWhole(line: string): void {
    for (const stream of this.#streams) write(stream, `chat: ${line}\n`);
  }
}

/** Says where the server is and how to join it. @returns the lines of /invite */
function announceServer(
  { server, port }: Serving,
  { publicKey, pin }: Identity,
  { host, names, log }: { host: string; names: readonly string[]; log: OperatorLog },
): readonly string[] {
  const suffix = isPinnable(publicKey) ? `/${pin}` : ""; // else only the chain verifies it
  const invitations = names.map((name) => `${CHAT} join ${name}:${port}${suffix}`);
  log.print(`serving ${server.lobby.name} on ${bracketed(host)}:${port}`);
  for (const invitation of invitations) log.printWhole(`to join: ${invitation}`);
  if (!isLoopback(host)) log.print("others need a copy of this program on their machine, and one of these lines");
  if (names[0] === UNKNOWN) log.print(`${UNKNOWN} stands for an address of this machine: put it there`);
  log.print(`IRC clients: ${names[0]}:${port} with TLS; your password as server password`);
  if (server.options.journal) {
    log.print(`${plural(server.accounts.byNick.size, "account", "accounts")} read; new ones go to standard output`);
  } else log.print("nothing is written to disk: accounts and history end with this process");
  if (isLoopback(host)) {
    log.print(`only this machine can join: to let others in, stop this and run ${CHAT} serve 0.0.0.0:${port}`);
  }
  const tellCode = (code: string) => {
    invitations.push(`check code: ${code}, which join asks for where the pin was left out`);
    log.print(invitations.at(-1) ?? "");
  };
  const failed = ({ message }: Error) => log.print(`no check code: ${message}`);
  if (suffix) checkCodeOf(publicKey).then(tellCode, failed); // it takes a moment, and must not delay the rest
  return invitations;
}

/** The journal of accounts on the standard streams. */
interface KeptAccounts {
  readonly records: readonly string[];
  readonly journal: Journal;
  onCommand(run: (line: string) => void): void; // what comes on standard input later
}

/**
 * Reads the journal of accounts from standard input: up to an empty line, or its end. It is continued on standard
 * output.
 * @throws {Fault} if either is a terminal
 */
async function readAccounts(log: OperatorLog): Promise<KeptAccounts> {
  if (process.stdin.isTTY || process.stdout.isTTY) {
    throw wrong("--accounts reads and writes files", `${CHAT} serve --accounts <accounts.txt >>accounts.txt`);
  }
  const records: string[] = [];
  const early: string[] = []; // commands that came before the server listens
  let take = (_line: string) => {};
  const mayBeCut = await new Promise<boolean>((done) => {
    let end = (rest: string) => {
      if (rest) log.print("the last line of the accounts has no line break: it may have been cut off");
      if (rest) records.push(rest);
      done(rest !== "");
    };
    take = (line) => {
      if (line.trim()) return void records.push(line);
      take = (command) => early.push(command);
      end = (command) => take(command); // which needs no line break
      done(records.length > 0); // the shell may have added the empty line to a file that ends within a line
    };
    readInput((line) => take(line), (rest) => end(rest));
  });
  const onCommand = (run: (line: string) => void) => {
    take = (line) => {
      if (line.startsWith("/")) run(line);
      else if (/ SCRAM-SCRYPT\$/.test(line)) log.print("an account after an empty line is not read");
      else if (line.trim()) log.print("commands begin with a slash");
    };
    early.forEach(take);
  };
  return { records, journal: continueJournal(mayBeCut, log), onCommand };
}

/** Reads lines from standard input. @param onEnd takes what follows the last line break */
function readInput(onLine: (line: string) => void, onEnd: (rest: string) => void): void {
  let rest = "";
  process.stdin.setEncoding("utf8");
  process.stdin.on("data", (chunk: string) => {
    const lines = (rest + chunk).split("\n");
    rest = lines.pop() ?? "";
    lines.forEach(onLine);
  });
  process.stdin.on("end", () => onEnd(rest));
}

/**
 * Continues a journal on standard output, one record after the other. A record counts when its line break has been
 * written: a disk that is full takes a part of a record without an error.
 * @param mayBeCut whether the journal may end within a line
 */
function continueJournal(mayBeCut: boolean, log: OperatorLog): Journal {
  let ending = mayBeCut ? "#\n" : ""; // ends the last line; on a line of its own it is a comment
  let last: Promise<unknown> = Promise.resolve();
  const append = (record: string) =>
    new Promise<boolean>((resolve) => {
      const failed = ({ message }: Error) => {
        log.print(`the accounts cannot be written: ${message}`);
        resolve(false);
      };
      const written = (error?: Error | null) => error && failed(error);
      try {
        process.stdout.write(ending + record, written);
        ending = "?\n"; // a record whose registration was refused is invalid, even if it is complete
        process.stdout.write("\n", (error) => {
          if (error) return failed(error);
          ending = "";
          resolve(true);
        });
      } catch (error) { // Deno throws, and writes nothing more
        failed(error as Error);
      }
    });
  prepare(process.stdout);
  return async (record) => {
    const result = last.then(() => append(record));
    last = result;
    return await result;
  };
}

/** Calls `stop` when the program is to end. Without a terminal a hang-up means nothing: it is what nohup is for. */
function onSignal(stop: () => void): void {
  const hasTerminal = [process.stdin, process.stdout, process.stderr].some(({ isTTY }) => isTTY);
  for (const signal of ["SIGINT", "SIGTERM"] as const) process.once(signal, stop); // a second one ends it at once
  process.on("SIGHUP", () => hasTerminal && stop());
}

/** Makes the function that runs what the operator enters. Stopping a room that is not empty is confirmed. */
function commandRunner(
  server: Server,
  invitations: readonly string[],
  print: (line: string) => void,
  stop: () => void,
): (line: string) => void {
  let askedAt = -Infinity;
  const askToStop = (): string | readonly string[] => {
    const here = server.presentMembers.length;
    const isConfirmed = performance.now() - askedAt < LIMITS.againMs;
    askedAt = performance.now();
    const seconds = LIMITS.againMs / 1000;
    if (here && !isConfirmed) {
      return `${plural(here, "person is", "people are")} here; again within ${seconds} s to stop`;
    }
    stop();
    return [];
  };
  const table: Table<ConsoleCommand> = {
    ...CONSOLE,
    invite: row("", "print how to join", () => invitations),
    stop: row("", "stop the server", askToStop),
  };
  return (line) => {
    if (!line.startsWith("/stop")) askedAt = -Infinity; // something else was meant
    runConsoleLine(server, table, line).forEach(print);
  };
}

function openConsole(run: (line: string) => void, stop: () => void): Ui {
  const ui = openUi();
  ui.listen({
    onLines: (lines) => lines.forEach(run),
    onLeave: () => run("/stop"),
    onGone: stop,
  });
  ui.acceptLines();
  ui.setPrompt?.(clean("> "));
  return ui;
}

const UNKNOWN = "ADDRESS";

/**
 * The names by which others reach a server that listens on `host`: where that means every address of this machine, all
 * that lead to it from elsewhere, those of private networks first. UNKNOWN where the runtime does not tell (Deno).
 */
function namesOf(host: string): readonly string[] {
  if (!/^(0\.0\.0\.0|::)$/.test(host)) return [bracketed(host)];
  type Report = { header: { networkInterfaces: { internal: boolean; address: string }[] } };
  let interfaces: Report["header"]["networkInterfaces"] = [];
  try {
    interfaces = (process.report.getReport() as unknown as Report).header.networkInterfaces;
  } catch {
    return [UNKNOWN];
  }
  const isIpv6 = (address: string) => address.includes(":");
  const isPrivate = (address: string) => /^(10|192\.168|172\.(1[6-9]|2\d|3[01])|f[cd]..)[.:]/i.test(address);
  const rank = (address: string) => (isIpv6(address) ? 2 : 0) + (isPrivate(address) ? 0 : 1);
  const reachable = interfaces.filter(({ internal }) => !internal).map(({ address }) => address)
    .filter((address) => !/^(169\.254\.|fe[89ab].:)/i.test(address) && (host === "::" || !isIpv6(address)))
    .sort((one, other) => rank(one) - rank(other));
  return reachable.length ? [...new Set(reachable)].map(bracketed) : [UNKNOWN];
}

/* =====================================================================================================================
 * Command line
 * The commands of the program.
 * ================================================================================================================== */

/** Prints an account line for `serve --accounts`. */
async function mainVerifier([nick = "", ...more]: readonly string[]): Promise<number> {
  if (more.length) throw wrong("one nick is enough", `${CHAT} verifier NICK`);
  if (!isNick(nick)) throw wrong(`"${nick}" is not a nick`, `${CHAT} verifier NICK; ${REFUSALS["bad nick"]}`);
  const password = environment("CHAT_PASSWORD") ?? await askTwice(`Password of ${nick}: `);
  const verifier = verifierOf(await deriveKeys(password));
  write(process.stdout, `${recordOf(nick, formatVerifier(verifier), Date.now())}\n`);
  await flushed(process.stdout);
  if (unwritten.get(process.stdout)) throw new Fault("the line could not be written");
  return 0;
}

/** Asks for a password on standard error: standard output is for the line. @throws {Fault} if there is none */
async function askTwice(question: string): Promise<string> {
  if (!process.stdin.isTTY) throw new Fault("no password was given", "CHAT_PASSWORD sets it");
  const answers: string[] = [];
  const editor = openEditor(() => {}); // before the question, or the terminal echoes an answer that comes at once
  write(process.stderr, question);
  await new Promise<void>((done) => {
    editor.on("line", (line) => {
      if (answers.push(line) === 1) write(process.stderr, "\nRepeat it: ");
      else editor.close();
    });
    editor.on("SIGINT", () => editor.close());
    editor.on("close", done);
  });
  write(process.stderr, "\n");
  const [password = "", again] = answers;
  if (password !== again) throw new Fault(again === undefined ? "cancelled" : "the passwords do not match");
  return password || askTwice(question);
}

async function mainJoin(args: readonly string[]): Promise<number> {
  const { address, options } = readArguments("join", args);
  const [, who, target = "", written] = /^(?:([^@]*)@)?([^/]*)(?:\/(.*))?$/s.exec(address) ?? [];
  if (!target) throw wrong("join which server?", `${CHAT} join HOST:PORT`);
  if (/^\w+:\/\//.test(address)) throw wrong(`${address} is not an address`, `${CHAT} join HOST:PORT`);
  const pin = written === undefined ? undefined : readPin(written);
  if (written !== undefined && !pin) {
    throw wrong(`${written} is not a pin`, "a pin is six groups of four, of a-z and 2-7");
  }
  if (who && options.nick && who !== options.nick) {
    throw wrong(`who are you, ${who} or ${options.nick}?`, "one is enough");
  }
  const { nick = who, room, timeout, plain = false, commands = false, listen: listens = false } = options;
  const { explain = false, keylog = false } = options;
  if (nick !== undefined && !isNick(nick)) throw wrong(`${nick} is not a valid nick`, REFUSALS["bad nick"]);
  const [password, ca] = ["CHAT_PASSWORD", "CHAT_CA"].map(environment);
  if (ca && !readPem("CHAT_CA", ca, "certificate", (text) => new crypto.X509Certificate(text)).ca) {
    throw new Fault("the certificate in CHAT_CA is not that of an authority", "it is the issuer's that belongs there");
  }
  const ui = openUi({ plain, commands });
  const leave = new AbortController();
  onSignal(() => leave.abort());
  try {
    const timeoutMs = timeout && 1000 * timeout;
    const settings = { pin, nick, room, password, ca, explain, keylog, timeoutMs, listens, ui, signal: leave.signal };
    return await join({ ...readAddress(target), ...settings });
  } finally {
    ui.close();
  }
}

/** Runs a command line. @returns the exit status */
export async function main([command = "", ...args]: readonly string[]): Promise<number> {
  try {
    const run = rowOf({ serve: mainServe, join: mainJoin, verifier: mainVerifier }, command);
    if (run && !args.some((arg) => /^(--help|-h)$/.test(arg))) return await run(args);
    if (run || /^(help|--help|-h)$/.test(command)) write(process.stdout, `${help(run ? command : args[0])}\n`);
    else if (/^(version|--version)$/.test(command)) write(process.stdout, `chat ${VERSION}\n`);
    else if (!command) throw wrong("serve or join?", `${CHAT} help`);
    else {
      const near = suggestion(`${CHAT} `, command, ["serve", "join", "verifier", "help", "version"]).slice(2);
      throw wrong(`there is no chat ${command}`, near || `${CHAT} help`);
    }
    return 0;
  } catch (error) {
    const { message, hint, status = 1 } = error as Partial<Fault>;
    writeLine(process.stderr, clean(`chat: ${message}`));
    if (hint) writeLine(process.stderr, clean(`chat: hint: ${hint}`));
    return status;
  }
}

if (import.meta.main) {
  void main(process.argv.slice(2)).then(async (status) => {
    await Promise.all([process.stdout, process.stderr].map(flushed));
    process.exit(status);
  });
}
