/**
 * chat: an encrypted group chat in one file. `serve` opens a room, `join` enters it, and the wire between them is IRC
 * over TLS 1.3, so that any IRC client can sit in the room as well. It reads from top to bottom, each chapter on those
 * above it: Terms, Lines, Identity, Accounts, Rooms, Server, Screen, Client, Main.
 *
 * There are three imports. The program cannot open a file or start another one: accounts, keys and history live in
 * memory and end with the process.
 */
import crypto from "node:crypto";
import readline from "node:readline";
import tls from "node:tls";

/* =====================================================================================================================
 * Terms
 * Every limit stands in this one table, so that an operator can see what a peer may cost; below it is what keeps to it.
 * ================================================================================================================== */

export const VERSION = "1.0.0";

export const LIMITS = Object.freeze({
  // A line and what is in it.
  bodyBytes: 512, // without its tags, CR LF included (RFC 1459, 2.3)
  clientTagBytes: 4096, // the tags that a client sends, "@" and the space included
  serverTagBytes: 8191, // the tags that a server sends, likewise
  targets: 4, // of one message
  nick: 20, // characters
  room: 50, // bytes of a room's name
  topic: 300, // bytes
  text: 200, // bytes of a real name, an away message, a reason
  password: 300, // characters
  // Connections.
  handshakeMs: 10_000, // for TLS
  silenceMs: 60_000, // of a stranger, which is who has not logged in yet
  strangerMs: 300_000, // from connecting to being logged in
  strangers: 500, // at once, or half of all connections that there may be
  pingMs: 60_000, // a member's silence before a PING; as long again, and the connection is lost
  lateMs: 10_000, // since the last sweep: nobody is taken for lost in this one
  gatherMs: 100, // in a large room, what is said within it is written together,
  gathered: 10, // but that many events wait for no more
  lingerMs: 15_000, // a member whose last connection is lost stays present for so long
  stopMs: 1_500, // to write out what everybody is owed when the server stops
  // Work. A member has a rate, by --rate, of so many units a second. A line is one of them.
  burstMs: 5_000, // may be used up at once
  loginRate: 10, // units a second of a connection before its login, whatever --rate says
  chunkUnits: 0.1, // for each chunk that is received, with a line in it or not,
  unitBytes: 512, // and one for so many bytes of it
  debt: 1_000, // units over the rate of a member who is not being read; more, and the connection is closed
  silentBytes: 4_096, // a second on the socket that bring no text: handshakes, KeyUpdates, empty records
  silentBurst: 32_768, // of them, at once
  silentMs: 250, // between two looks at them
  entryMs: 1_000, // are what it costs to enter, of which others are told
  workFactor: 100, // times as long as it took costs executing, or a line for each ms if that is less,
  workMs: 20, // but it is not taken to have lasted longer: others may have kept the processor busy
  turnMs: 0.5, // of executing lines of one session; then it is the others' turn. Shorter ones make a lone sender slow
  // Memory.
  inputBytes: 256 * 1024, // received from a session and not yet executed
  owedBytes: 1024 * 1024, // not yet taken by a session; over a quarter of it, its own lines have to wait
  pieceBytes: 1000, // written at once to a newcomer: TLS keeps room for the largest write, which is the greeting,
  newcomerBytes: 32 * 1024, // and that is who was not written so many yet
  writeBytes: 32 * 1024, // written at once to the others
  historyBytes: 64 * 1024 * 1024, // all logs together
  presence: 200, // joins, parts and topics kept in a log
  chathistory: 100, // events read by one CHATHISTORY
  missed: 1_000, // private messages handed over to somebody who returns
  rooms: 1_000,
  roomsPerMember: 20,
  roomIdleMs: 600_000, // an empty room stays so long
  accounts: 10_000,
  instances: 8, // clients per account whose numbered lines are remembered
  failures: 60, // lines in the log, per network and minute, on who did not get in
  // Guessing and hoarding. Attempts are counted before they are answered.
  newAccounts: 20, // per address and hour, loopback excepted
  wrongPasswords: 3, // per connection
  triesPerAccount: 10, // from one address in ten minutes
  triesPerAddress: 100, // in ten minutes, besides those of as many as may be connected from it
  triesOfStrangers: 100, // per account in ten minutes, from all addresses that it was never logged in from
  scrypts: 2, // password hashings at once
  scryptQueue: 100, // hashings that wait, per network
  againMs: 10_000, // within which stopping a room that is not empty is confirmed
  // The client.
  outbox: 500, // lines that wait for the connection
  steadyMs: 10_000, // a connection that lasted so long is tried again at once when it is lost
  timeoutMs: 30_000, // after the end of the input without progress, the rest of it is given up
  hushMs: 30_000, // a server's silence before a PING; as long again, and the connection is lost
});

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

/** What ends the program, or one try of it, in words for a person; `status` is the exit status. */
export class Fault extends Error {
  readonly hint: string;
  readonly status: number;
  constructor(message: string, hint = "", status = 1) {
    super(message);
    this.hint = hint;
    this.status = status;
  }
}

/** The Fault of a connection that could not be made or has ended: another try may help. */
class Lost extends Fault {}

// Small buffers are not cut out of a common one, which each of them would keep alive: tls keeps one per connection.
Buffer.poolSize = 0;

const now = () => Date.now();
const sha256 = (data: Buffer | string) => crypto.createHash("sha256").update(data).digest();
const base64 = (data: Buffer) => data.toString("base64");
const fromBase64 = (text = "") => Buffer.from(text, "base64");

/** A row of a table, which has no others than its own. */
const rowOf = <T>(table: Readonly<Partial<Record<string, T>>>, name: string) =>
  Object.hasOwn(table, name) ? table[name] : undefined;

/** Counts what happens under a key in a window of time. */
class Counter {
  readonly #counts = new Map<string, number>();
  readonly #windowMs: number;
  #window = 0;
  constructor(windowMs: number) {
    this.#windowMs = windowMs;
  }
  /** Counts one more; false if `limit` of them are counted already. */
  take(key: string, limit: number): boolean {
    const window = Math.floor(now() / this.#windowMs);
    if (window !== this.#window || this.#counts.size > 100_000) this.#counts.clear();
    this.#window = window;
    const count = this.#counts.get(key) ?? 0;
    if (count < limit) this.#counts.set(key, count + 1);
    return count < limit;
  }
  /** Takes one back: what was counted turned out to be all right. */
  giveBack(key: string): void {
    this.#counts.set(key, Math.max(0, (this.#counts.get(key) ?? 0) - 1));
  }
}

/** Who wants something that may take its time, and may be gone before it is done. */
export interface Visitor {
  readonly address: string;
  readonly closed: boolean;
}

/** Runs LIMITS.scrypts jobs at once. Of those that wait, the kinds take turns, and in each kind the networks. */
class FairQueue {
  #waiting: { kind: string; visitor: Visitor; network: string; round: number; start: () => void }[] = [];
  readonly #rounds = new Map<string, number>(); // of each kind: a network has one job in every round
  #running = 0;
  #last = "";
  /** Runs a job when its turn has come; undefined at once if too many of the same network wait. */
  async run<T>(kind: string, visitor: Visitor, job: () => Promise<T>): Promise<T | undefined> {
    const network = networkOf(visitor.address);
    this.#waiting = this.#waiting.filter((one) => !one.visitor.closed);
    const own = this.#waiting.filter((one) => one.kind === kind && one.network === network).length;
    if (own >= LIMITS.scryptQueue) return undefined;
    if (this.#running < LIMITS.scrypts) this.#running++;
    else {
      await new Promise<void>((start) => {
        this.#waiting.push({ kind, visitor, network, round: (this.#rounds.get(kind) ?? 0) + own, start });
        this.#waiting.sort((one, other) => one.round - other.round);
      });
    }
    try {
      return await job();
    } finally {
      this.#running--;
      this.#next();
    }
  }
  #next(): void {
    const waiting = this.#waiting.filter((one) => !one.visitor.closed);
    const next = waiting.find(({ kind }) => kind !== this.#last) ?? waiting[0];
    this.#waiting = waiting.filter((one) => one !== next);
    if (!next) return;
    this.#running++;
    this.#last = next.kind;
    this.#rounds.set(next.kind, next.round);
    next.start();
  }
}

/** Where attempts are counted: at an IPv4 address, or at the /64 that is one customer's in IPv6. */
export function networkOf(address: string): string {
  const plain = address.replace(/^::ffff:(?=\d+\.)/i, "").replace(/%.*/, "");
  if (!plain.includes(":")) return plain;
  const [left = [], right = []] = plain.split("::").map((part) => part.split(":").filter(Boolean));
  const zeros = Array<string>(Math.max(0, 8 - left.length - right.length)).fill("0");
  return `${[...left, ...zeros, ...right].slice(0, 4).join(":")}::/64`;
}

export const isLoopback = (address: string): boolean => /^(::ffff:)?127\.|^::1$/i.test(address);

/* =====================================================================================================================
 * Lines
 * A line of the protocol is `@tags :source COMMAND param param :last param` and ends with CR LF. What others wrote is
 * bytes until it went through a Splitter, and reaches no terminal but through `clean`.
 * References: modern.ircdocs.horse, IRCv3 message-tags, RFC 1459.
 * ================================================================================================================== */

export type Tag = readonly [name: string, value: string];

export interface Line {
  readonly tags: ReadonlyMap<string, string>;
  readonly source: string; // `nick!user@host` or a server's name; empty if the line names none
  readonly command: string; // in upper case
  readonly params: readonly string[];
}

/**
 * Parses a line without its CR LF (Modern IRC, "Message Format"). What is missing is empty.
 * @example parse(":bo!bo@chat PRIVMSG #chat :good morning").params // ["#chat", "good morning"]
 */
export function parse(text: string): Line {
  const [, tags, source = "", command = "", rest = ""] = LINE.exec(text) ?? [];
  const [middle = "", last] = ` ${rest}`.split(/ :(.*)/s);
  const params = middle.split(" ").filter(Boolean);
  if (last !== undefined) params.push(last);
  return { tags: tags ? parseTags(tags) : NO_TAGS, source, command: command.toUpperCase(), params };
}

const LINE = /^(?:@([^ ]*) *)?(?::([^ ]*) *)?([^ ]*) *(.*)$/s;
const NO_TAGS: Line["tags"] = new Map();
const ESCAPES = [[";", ":"], [" ", "s"], ["\r", "r"], ["\n", "n"], ["\\", "\\"]] as const;
const ESCAPED = new Map<string, string>(ESCAPES);
const UNESCAPED = new Map<string, string>(ESCAPES.map(([plain, code]) => [code, plain]));

function parseTags(text: string): Line["tags"] {
  const pairs = text.split(";").map((pair) => pair.split(/=(.*)/s)).filter(([name]) => name);
  const unescape = (value: string) => value.replace(/\\(.?)/gs, (_, code: string) => UNESCAPED.get(code) ?? code);
  return new Map(pairs.map(([name = "", value = ""]) => [name, unescape(value)]));
}

/** What people write stands behind a colon, whether it needs one or not: there is software that counts on that. */
const TEXTUAL = /^(PRIVMSG|NOTICE|QUIT|PART|TOPIC|AWAY|ERROR|301|319|332|353)$/;

/** Formats a line without its CR LF. Only the last parameter may be empty, begin with a colon or hold spaces. */
export function format(command: string, params: readonly string[], source = "", tags: readonly Tag[] = []): string {
  const escape = (value: string) => value.replace(/[; \r\n\\]/g, (char) => `\\${ESCAPED.get(char)}`);
  let text = tags.length ? `@${tags.map(([name, value]) => value ? `${name}=${escape(value)}` : name).join(";")} ` : "";
  text += source ? `:${source} ${command}` : command;
  for (const [index, param] of params.entries()) {
    const colon = param === "" || param[0] === ":" || param.includes(" ") || TEXTUAL.test(command);
    text += colon && index === params.length - 1 && (index > 0 || !/^[PT]/.test(command)) ? ` :${param}` : ` ${param}`;
  }
  return text;
}

/** Folds a name for comparison: CASEMAPPING=ascii. */
export const fold = (name: string): string => name.replace(/[A-Z]+/g, (upper) => upper.toLowerCase());

const JOINING = "Arab Syrc Mong Deva Beng Guru Gujr Orya Taml Telu Knda Mlym Sinh".split(" ");
const KEPT = [
  "\\uFE0F", // asks for an emoji in colour
  "\\p{ExtPict}[\\u{1F3FB}-\\u{1F3FF}]?\\uFE0F?\\u200D(?=\\p{ExtPict})", // joins two emoji to one
  "\\u{1F3F4}[\\u{E0030}-\\u{E007A}]{1,6}\\u{E007F}", // the flags of Scotland and the like
  `[${JOINING.map((script) => `\\p{sc=${script}}`).join("")}][\\u200C\\u200D](?=\\p{L})`, // shapes letters
].join("|");
/** Controls, bidirectional overrides and whatever shows nothing, but for KEPT. */
const HARMFUL = new RegExp(`(${KEPT})|[\\p{Cc}\\p{Cf}\\p{Cs}\\p{Co}\\p{Zl}\\p{Zp}\\p{DI}]`, "gu");
/** IRC's colours, with their numbers, and its other formatting. */
const FORMATTING = new RegExp(
  `${"\x03"}(\\d{1,2}(,\\d{1,2})?)?|${"\x04"}([\\dA-F]{6})?|[${"\x02\x0f\x11\x16\x1d\x1e\x1f"}]`,
  "gi",
);

/** Makes what somebody else wrote safe to show: IRC's formatting goes, what else is harmful becomes U+FFFD. */
export function clean(text: string): string {
  if (/^[ -~]*$/.test(text)) return text;
  const plain = text.replace(FORMATTING, "").replaceAll("\t", " ").replace(
    HARMFUL,
    (_, kept?: string) => kept ?? "\uFFFD",
  );
  return plain.replace(/(\p{M}{4})\p{M}+/gu, "$1"); // towers of marks reach into other lines
}

/** Whether a nick is one: ASCII, so that no two look alike, and no "…serv", to which clients send passwords unasked. */
export const isNick = (name: string): boolean =>
  name.length <= LIMITS.nick && /^[A-Za-z[\]\\`_^{|}][-\w[\]\\`^{|}]*$/.test(name) && !/serv$/i.test(name);

/** Whether a room's name is one: # and no space, comma or character that does not show. */
export const isRoom = (name: string): boolean =>
  /^#[^ ,]+$/.test(name) && Buffer.byteLength(name) <= LIMITS.room && clean(name) === name;

/** Cuts a text to a number of bytes, but not inside a character. */
export function cut(text: string, bytes: number): string {
  if (text.length * 3 <= bytes) return text;
  const raw = Buffer.from(text);
  let end = Math.min(bytes, raw.length);
  while (end > 0 && end < raw.length && ((raw[end] ?? 0) & 0xc0) === 0x80) end--;
  return raw.toString("utf8", 0, end);
}

/** Puts words into lines of at most `width` characters. */
function inLines(words: Iterable<string>, width = 380): string[] {
  const lines: string[] = [];
  for (const word of words) {
    const last = lines.at(-1);
    if (last !== undefined && last.length + word.length < width) lines[lines.length - 1] = `${last} ${word}`;
    else lines.push(word);
  }
  return lines;
}

const NOTHING: Buffer = Buffer.alloc(0);
const UTF8 = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });

/** Splits a stream of bytes into lines that end with CR, LF or both. An endless line is told once and skipped. */
export class Splitter {
  readonly #tagBytes: number;
  #bytes = NOTHING;
  #skipping = false;
  /** `tagBytes` is what the tags of a line may take, "@" and the space included. */
  constructor(tagBytes: number = LIMITS.clientTagBytes) {
    this.#tagBytes = tagBytes;
  }
  /** Bytes that were pushed and not yet taken. */
  get size(): number {
    return this.#bytes.length;
  }
  push(chunk: Buffer): void {
    this.#bytes = this.#bytes.length ? Buffer.concat([this.#bytes, chunk]) : chunk;
  }
  /** The next line that is not empty, or why it is none; undefined until more bytes come. */
  next(): { readonly text?: string; readonly fault?: "too long" | "not UTF-8" | "NUL" } | undefined {
    for (;;) {
      let ends = 0; // a line is not empty
      while (!this.#skipping && (this.#bytes[ends] === 10 || this.#bytes[ends] === 13)) ends++;
      if (ends) this.#bytes = this.#bytes.subarray(ends);
      const most = LIMITS.bodyBytes + (this.#bytes[0] === 0x40 ? this.#tagBytes : 0);
      const searched = this.#skipping ? this.#bytes : this.#bytes.subarray(0, most + 1);
      const lf = searched.indexOf(10);
      const cr = (lf < 0 ? searched : searched.subarray(0, lf)).indexOf(13);
      const end = cr < 0 ? lf : cr;
      if (end < 0 && (this.#skipping || this.#bytes.length <= most)) return this.#keep(this.#skipping);
      const [line, skipped] = [this.#bytes.subarray(0, Math.max(0, end)), this.#skipping];
      this.#skipping = end < 0;
      if (end < 0) return { fault: "too long" };
      this.#bytes = this.#bytes.subarray(end + 1);
      if (!skipped) return this.#decode(line);
    }
  }
  /** Keeps what is left, but not the runtime's large piece of memory that it may be a small part of. */
  #keep(nothing: boolean): undefined {
    this.#bytes = nothing || !this.#bytes.length ? NOTHING : Buffer.from(this.#bytes);
  }
  #decode(line: Buffer): { text: string } | { fault: "too long" | "not UTF-8" | "NUL" } {
    const tags = line[0] === 0x40 ? line.indexOf(32) + 1 || line.length : 0;
    if (tags > this.#tagBytes || line.length - tags > LIMITS.bodyBytes - 2) return { fault: "too long" };
    if (line.includes(0)) return { fault: "NUL" };
    try {
      return { text: UTF8.decode(line) };
    } catch {
      return { fault: "not UTF-8" };
    }
  }
}
/* =====================================================================================================================
 * Identity
 * A server is known by its public key. The key is made at the start, or derived from a secret that the operator keeps,
 * or it is the operator's own, with a certificate chain. A pin is the key's short name: people compare it, and put it
 * into the command that joins.
 * ================================================================================================================== */

export interface Identity {
  readonly key: string; // PEM text of the private key
  readonly cert: string; // PEM text of the certificate, with the operator's chain behind it
  readonly pin: string;
  readonly binding: Buffer; // SHA-256 over the certificate, to which logins are bound (RFC 5929, tls-server-end-point)
}

/** One DER element (X.690) of less than 64 KiB, which is more than a certificate needs. */
function der(tag: number, ...parts: readonly (Uint8Array | readonly number[])[]): Buffer {
  const body = Buffer.concat(parts.map((part) => Buffer.from(part)));
  const size = body.length;
  const length = size < 0x80 ? [size] : size < 0x100 ? [0x81, size] : [0x82, size >> 8, size & 0xff];
  return Buffer.concat([Buffer.from([tag, ...length]), body]);
}
const derText = (tag: number, text: string) => der(tag, Buffer.from(text));

/** A time; from 2050 on it is written with its century (RFC 5280, 4.1.2.5). */
function derTime(date: Date): Buffer {
  const digits = date.toISOString().replace(/[-:T]|\.\d+/g, "");
  return date.getUTCFullYear() < 2050 ? derText(0x17, digits.slice(2)) : derText(0x18, digits);
}

/** Writes a self-signed certificate (RFC 5280) for a P-256 key, as PEM text: for ten years, for this machine's names. */
export function selfSigned(privateKey: crypto.KeyObject): string {
  const algorithm = der(0x30, der(0x06, [0x2a, 0x86, 0x48, 0xce, 0x3d, 4, 3, 2])); // ecdsa-with-SHA256
  const name = der(0x30, der(0x31, der(0x30, der(0x06, [0x55, 4, 3]), derText(0x0c, "chat")))); // a common name
  const [from, until] = [new Date(now() - 86_400_000), new Date()]; // the others' clocks may be behind
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

/** The P-256 key that belongs to a secret, the same on every machine and runtime. */
function keyFromSecret(secret: string): crypto.KeyObject {
  const order = 0xffffffff00000000ffffffffffffffffbce6faada7179e84f3b9cac2fc632551n;
  const cost = { N: 2 ** 17, r: 8, p: 1, maxmem: 256 * 1024 * 1024 };
  const wide = crypto.scryptSync(secret, "chat identity v1", 48, cost).toString("hex");
  const scalar = Buffer.from((BigInt(`0x${wide}`) % (order - 1n) + 1n).toString(16).padStart(64, "0"), "hex");
  const curve = crypto.createECDH("prime256v1");
  curve.setPrivateKey(scalar);
  const [d, point] = [scalar.toString("base64url"), curve.getPublicKey()]; // 0x04, x, y
  const [x, y] = [point.toString("base64url", 1, 33), point.toString("base64url", 33)];
  return crypto.createPrivateKey({ format: "jwk", key: { kty: "EC", crv: "P-256", d, x, y } });
}

/** A public key's SubjectPublicKeyInfo in DER. */
export const spki = (key: crypto.KeyObject): Buffer => key.export({ type: "spki", format: "der" });

/** The pin of a public key: 120 bits of SHA-256 over its SubjectPublicKeyInfo, in base32, in groups of four. */
export function pinOf(key: crypto.KeyObject): string {
  const bits = BigInt(`0x${sha256(spki(key)).toString("hex", 0, 15)}`).toString(2).padStart(120, "0");
  return grouped(bits.replace(/.{5}/g, (five) => "abcdefghijklmnopqrstuvwxyz234567"[parseInt(five, 2)] ?? ""));
}

/** Reads a pin as people write it, whatever its case and hyphens; undefined if it is none. */
export function readPin(text: string): string | undefined {
  const digits = text.toLowerCase().replaceAll("-", "");
  return /^[a-z2-7]{24}$/.test(digits) ? grouped(digits) : undefined;
}

const grouped = (digits: string) => digits.replace(/.{4}(?=.)/g, "$&-");

/** The server's identity: of the operator's PEM texts, of a secret, or new. @throws {Fault} for unfit ones. */
export function makeIdentity({ secret, key, cert }: { secret?: string; key?: string; cert?: string }): Identity {
  if (secret !== undefined && secret.length < 24) {
    throw new Fault("CHAT_SECRET is too short to be safe", "export CHAT_SECRET=$(openssl rand -base64 24)");
  }
  const privateKey = key || cert
    ? readPem("CHAT_KEY", key, "private key", crypto.createPrivateKey)
    : secret
    ? keyFromSecret(secret)
    : crypto.generateKeyPairSync("ec", { namedCurve: "P-256" }).privateKey;
  const chain = key || cert ? cert : selfSigned(privateKey);
  const leaf = readPem("CHAT_CERT", chain, "certificate", (text) => new crypto.X509Certificate(text));
  if (!spki(crypto.createPublicKey(privateKey)).equals(spki(leaf.publicKey))) {
    const hint = "the server's own certificate comes first in CHAT_CERT, those of its issuers follow";
    throw new Fault("CHAT_KEY and CHAT_CERT do not fit: the certificate is for another key", hint);
  }
  const problem = outsideValidity(leaf);
  if (problem) throw new Fault(`the certificate in CHAT_CERT ${problem}`, "nobody could trust it: get a new one");
  const pem = privateKey.export({ type: "pkcs8", format: "pem" }).toString();
  return { key: pem, cert: chain ?? "", pin: pinOf(leaf.publicKey), binding: sha256(leaf.raw) };
}

/** Reads a PEM text out of the environment. @throws {Fault} that tells the ways of getting it wrong apart. */
export function readPem<T>(name: string, text: string | undefined, what: string, read: (text: string) => T): T {
  if (!text) throw new Fault(`${name} is not set`, "CHAT_KEY and CHAT_CERT go together");
  if (!text.includes("-----BEGIN ")) {
    const path = /^[\w./~-]{1,200}$/.test(text) ? text : "FILE";
    const hint = `export ${name}="$(cat ${path})"`;
    throw new Fault(`${name} must hold the PEM text of a ${what}${path === text ? ", not its path" : ""}`, hint);
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

/** In what way a certificate is outside its time, if it is. */
export function outsideValidity({ validFrom, validTo }: crypto.X509Certificate): string | undefined {
  const day = (date: string) => new Date(date).toISOString().slice(0, 10);
  if (now() > Date.parse(validTo)) return `expired on ${day(validTo)}`;
  return now() < Date.parse(validFrom) ? `is not valid before ${day(validFrom)}` : undefined;
}

const RECORD_OVERHEAD = 22; // bytes of a TLS 1.3 record besides its text: a header of 5, a type, a tag of 16

/** A length in clear, and in TLS records, which hold up to 16 KiB each. */
const recorded = (bytes: number) =>
  `${bytes} bytes, in TLS records ${bytes + RECORD_OVERHEAD * Math.max(1, Math.ceil(bytes / 16384))} (computed)`;

/** What there is to know about a connection, in plain words. What the runtime does not tell is left out. */
function facts(socket: tls.TLSSocket, certificate: crypto.X509Certificate | undefined): string[] {
  const group = (socket.getEphemeralKeyInfo() as { name?: string } | null)?.name;
  const quantum = /MLKEM|KYBER/i.test(group ?? "")
    ? "a quantum computer does not break it"
    : "a quantum computer would break it";
  const about = [
    `TCP from ${socket.localAddress}:${socket.localPort} to ${socket.remoteAddress}:${socket.remotePort}`,
    `${socket.getProtocol()}, ${socket.getCipher()?.name}: encrypts, and tells if a byte was changed`,
    group ? `keys agreed by ${group}: ${quantum}` : "",
    socket.alpnProtocol ? `ALPN: both sides want to speak ${socket.alpnProtocol}` : "",
  ];
  if (certificate) {
    const { subject, issuer, validFrom, validTo, publicKey } = certificate;
    const { asymmetricKeyType, asymmetricKeyDetails } = publicKey;
    about.push(
      `certificate of ${clean(subject)}, issued by ${
        issuer === subject ? "itself" : clean(issuer)
      }, from ${validFrom} to ${validTo}`,
      `its key: ${asymmetricKeyType} ${
        asymmetricKeyDetails?.namedCurve ?? asymmetricKeyDetails?.modulusLength ?? ""
      }, pin ${pinOf(publicKey)}`,
      `SHA-256 of its SubjectPublicKeyInfo: ${base64(sha256(spki(publicKey)))}`,
    );
  }
  return about.filter(Boolean);
}

/* =====================================================================================================================
 * Accounts
 * An account is a nick with a password verifier: enough to check a password, not enough to log in. scrypt makes a
 * salted password, and that makes two keys (RFC 5802). The client proves that it has ClientKey and the server that it
 * has ServerKey, each over everything that was said, the server's certificate included: one in the middle has nothing
 * to pass on. By PLAIN, PASS and REGISTER the server is told the password itself, and does the scrypt. All roads end
 * in the same verifier.
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

/** Makes the salted password: scrypt here, Hi() in RFC 5802. `cost` is the `i` on the wire. */
export type Derivation = (password: string, salt: Buffer, cost: number) => Promise<Buffer>;

export const COST = 2 ** 15; // N of scrypt; with r = 8 that is 32 MiB
const [SALT_BYTES, KEY_BYTES] = [16, 32];

/** scrypt (RFC 7914), off the event loop. */
export const scrypt: Derivation = (password, salt, cost) =>
  new Promise((resolve, reject) => {
    const options = { N: cost, r: 8, p: 3, maxmem: 64 * 1024 * 1024 };
    crypto.scrypt(password, salt, KEY_BYTES, options, (error, key) => error ? reject(error) : resolve(key));
  });

const hmac = (key: Buffer, text: string) => crypto.createHmac("sha256", key).update(text).digest();

/** Makes the keys of RFC 5802, 3, from a password, which is normalised to NFC. */
export async function deriveKeys(
  password: string,
  salt: Buffer = crypto.randomBytes(SALT_BYTES),
  cost: number = COST,
  derive: Derivation = scrypt,
): Promise<Keys> {
  const salted = await derive(password.normalize("NFC"), salt, cost);
  return { salt, clientKey: hmac(salted, "Client Key"), serverKey: hmac(salted, "Server Key") };
}

export function verifierOf({ salt, clientKey, serverKey }: Keys): Verifier {
  return { salt, storedKey: sha256(clientKey), serverKey };
}

/** A verifier as text, in the manner of PostgreSQL. */
export function formatVerifier({ salt, storedKey, serverKey }: Verifier): string {
  return `SCRAM-SCRYPT$${COST}:${base64(salt)}$${base64(storedKey)}:${base64(serverKey)}`;
}

/** Reads a verifier: undefined if the text does not mean to be one, "bad" if it is not as all of them are. */
export function readVerifier(text: string): Verifier | "bad" | undefined {
  if (!/^SCRAM-/i.test(text)) return undefined;
  const [salt, storedKey, serverKey] = text.split(/[$:]/).slice(2).map(fromBase64);
  if (salt?.length !== SALT_BYTES || storedKey?.length !== KEY_BYTES || serverKey?.length !== KEY_BYTES) return "bad";
  return formatVerifier({ salt, storedKey, serverKey }) === text ? { salt, storedKey, serverKey } : "bad";
}

/** The attributes of a SCRAM message, `r=…,s=…,i=…`, by their letters. */
const attributes = (message: string): Partial<Record<string, string>> =>
  Object.fromEntries(message.split(",").map((part) => [part[0], part.slice(2)]));

/** The gs2 header: bound to the channel, or like a client that cannot be. */
const gs2 = (binding?: Buffer) => binding ? "p=tls-server-end-point,," : "n,,";
const bound = (binding?: Buffer) => base64(Buffer.concat([Buffer.from(gs2(binding)), binding ?? Buffer.alloc(0)]));
const xor = (one: Buffer, other: Buffer) => Buffer.from(one.map((byte, at) => byte ^ (other[at] ?? 0)));
const newNonce = () => base64(crypto.randomBytes(18));

/**
 * The client's side of SCRAM (RFC 5802), of the -PLUS kind if there is a binding: yields what to send, is resumed with
 * what the server sent, and returns whether the server has proved that it knows the account.
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
  const withoutProof = `c=${bound(binding)},r=${r}`;
  const all = `${bare},${challenge},${withoutProof}`;
  const last = yield `${withoutProof},p=${base64(xor(clientKey, hmac(sha256(clientKey), all)))}`;
  return last === `v=${base64(hmac(serverKey, all))}`;
}

/** The server's side, likewise. What it returns is its own proof, `v=…`, or a refusal, `e=…` (RFC 5802, 7). */
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
  const all = `${bare},${challenge},${withoutProof}`;
  const known = sha256(xor(hmac(verifier.storedKey, all), fromBase64(proof)));
  const { c, r: nonces } = attributes(withoutProof);
  if (c !== bound(binding)) return "e=channel-bindings-dont-match";
  if (nonces !== r + nonce || !crypto.timingSafeEqual(known, verifier.storedKey)) return "e=invalid-proof";
  return `v=${base64(hmac(verifier.serverKey, all))}`;
}

/** A message of a SASL exchange in the pieces that AUTHENTICATE takes (IRCv3 sasl-3.1). */
function saslPieces(message: string): string[] {
  const pieces = base64(Buffer.from(message)).match(/.{1,400}/g) ?? [];
  return pieces.at(-1)?.length === 400 || !pieces.length ? [...pieces, "+"] : pieces;
}

/** What an account is to the map of accounts. */
export interface Account {
  nick: string; // as its owner writes it
  verifier: Verifier;
  readonly networks: Set<string>; // where it was logged in from, the latest last
}

/** Why there is no getting in. */
export type Refusal = "wrong" | "unknown" | "exists" | "bad nick" | "closed" | "barred" | "often";

/** A SASL exchange on the server: yields challenges, is resumed with the answers, returns whose account it is. */
export type Exchange<A> = AsyncGenerator<string, { account?: A; refusal?: Refusal; last?: string }, string>;

/** The accounts, in memory, and what keeps people from guessing passwords and from hoarding nicks. */
export class Accounts<A extends Account> {
  closed = false; // to all nicks but those that the operator admits
  readonly admitted = new Set<string>();
  readonly barred = new Set<string>(); // nicks that the operator keeps out
  readonly all = new Map<string, A>(); // by folded nick
  readonly #make: (nick: string, verifier: Verifier, visitor: Visitor) => A;
  readonly #perAddress: number;
  readonly #tries = new Counter(600_000);
  readonly #births = new Counter(3_600_000);
  readonly #queue = new FairQueue();
  /** `perAddress` is how many may be connected from an address. */
  constructor(make: (nick: string, verifier: Verifier, visitor: Visitor) => A, perAddress = 0) {
    this.#make = make;
    this.#perAddress = perAddress;
  }

  find(nick: string): A | undefined {
    return this.all.get(fold(nick));
  }

  /** Makes an account, with a password or with a verifier that was made elsewhere. */
  async register(nick: string, secret: string | Verifier, visitor: Visitor): Promise<A | Refusal> {
    const { address } = visitor;
    if (!isNick(nick)) return "bad nick";
    const objection = this.#objection(nick);
    if (objection) return objection;
    if (!isLoopback(address) && !this.#births.take(networkOf(address), LIMITS.newAccounts)) return "often";
    const keys = typeof secret === "string"
      ? await this.#queue.run("registration", visitor, () => deriveKeys(secret))
      : undefined;
    const verifier = keys ? verifierOf(keys) : secret;
    if (typeof verifier === "string") return "often";
    const later = this.#objection(nick); // somebody may have been faster
    if (later) return later;
    const account = this.#make(nick, verifier, visitor);
    this.all.set(fold(nick), account);
    return account;
  }
  #objection(nick: string): Refusal | undefined {
    const key = fold(nick);
    if (this.barred.has(key)) return "barred";
    if (this.all.has(key)) return "exists";
    if (this.closed && !this.admitted.has(key)) return "closed";
    return this.all.size < LIMITS.accounts ? undefined : "often";
  }

  /** Logs in by a password. */
  async login(nick: string, password: string, visitor: Visitor): Promise<A | Refusal> {
    const account = this.find(nick);
    if (!account) return "unknown";
    const refusal = this.#attempt(account, visitor.address);
    if (refusal) return refusal;
    const keys = await this.#queue.run("login", visitor, () => deriveKeys(password, account.verifier.salt));
    if (!keys) return "often";
    const right = crypto.timingSafeEqual(sha256(keys.clientKey), account.verifier.storedKey);
    return right ? this.#succeed(account, visitor.address) : "wrong";
  }

  /** SASL PLAIN (RFC 4616). */
  async *plain(visitor: Visitor): Exchange<A> {
    const [as = "", nick = "", password = ""] = (yield "").split("\0");
    if (!password || (as && fold(as) !== fold(nick))) return { refusal: "wrong" };
    const result = await this.login(nick, password, visitor);
    return typeof result === "string" ? { refusal: result } : { account: result };
  }

  /** SASL SCRAM-SCRYPT-PLUS. */
  async *scram({ address }: Visitor, binding: Buffer): Exchange<A> {
    let account: A | undefined;
    const server = scramServer((name) => (account = this.find(name))?.verifier, binding);
    server.next();
    const first = server.next(yield "").value;
    if (!account) return { refusal: first === "e=unknown-user" ? "unknown" : "wrong", last: first };
    const answer = yield first;
    const refusal = this.#attempt(account, address);
    if (refusal) return { refusal };
    const last = server.next(answer).value;
    if (last.startsWith("e=")) return { refusal: "wrong", last };
    yield last;
    return { account: this.#succeed(account, address) };
  }

  /** Counts an attempt, before it is answered. Strangers cannot use up the attempts of those who were in. */
  #attempt(account: A, address: string): Refusal | undefined {
    if (this.barred.has(fold(account.nick))) return "barred";
    return this.#counts(account, address).every(([key, limit]) => this.#tries.take(key, limit)) ? undefined : "often";
  }

  /** The attempt that was counted is a good one. */
  #succeed(account: A, address: string): A {
    for (const [key] of this.#counts(account, address)) this.#tries.giveBack(key);
    const { networks } = account;
    networks.delete(networkOf(address));
    networks.add(networkOf(address));
    const [oldest = ""] = networks;
    if (networks.size > 16) networks.delete(oldest);
    return account;
  }

  #counts({ nick, networks }: A, address: string): (readonly [string, number])[] {
    const [name, network] = [fold(nick), networkOf(address)];
    const perAddress = LIMITS.triesPerAddress + this.#perAddress;
    const stranger = networks.has(network) ? [] : [[`${name} *`, LIMITS.triesOfStrangers] as const];
    return [[`${name} ${network}`, LIMITS.triesPerAccount], [network, perAddress], ...stranger];
  }
}
/* =====================================================================================================================
 * Rooms
 * Whatever happens in a room, or in the talk of two people, is an event. Appending it to the log gives it an id and a
 * time. Delivery, history and catching up are readings of that log.
 * ================================================================================================================== */

export interface Event {
  readonly number: number; // rising over the whole server
  readonly time: number; // in milliseconds; never before that of an earlier event, whatever the clock does
  readonly kind: "PRIVMSG" | "NOTICE" | "TAGMSG" | "JOIN" | "PART" | "QUIT" | "TOPIC";
  readonly nick: string; // whose doing it is: a member's, or the server's
  readonly target: string; // a room, or the nick that a private message is for
  readonly text: string; // a message, a reason, a topic; of a JOIN the real name
  readonly tags: readonly Tag[]; // the client-only tags of a message
}

/** A place in a log: that of an event, or of a moment. */
export interface Place {
  readonly time: number;
  readonly number?: number;
}

/** Whether an event is before (< 0), at or behind (> 0) a place. */
const compare = (event: Event, place: Place) =>
  place.number === undefined ? event.time - place.time : event.number - place.number;
const byNumber = (one: Event, other: Event) => one.number - other.number;
const isMessage = ({ kind }: Event) => kind === "PRIVMSG" || kind === "NOTICE" || kind === "TAGMSG";
/** How many events at the beginning of a list fulfil a condition that no later one does. */
function leading(list: readonly Event[], fulfils: (event: Event) => boolean): number {
  let [low, high] = [0, list.length];
  while (low < high) {
    const [middle, event] = [(low + high) >> 1, list[(low + high) >> 1]];
    if (event && fulfils(event)) low = middle + 1;
    else high = middle;
  }
  return low;
}
/** Roughly what an event costs, with its share of everything around it. */
const sizeOf = ({ text, tags }: Event) =>
  500 + 2 * text.length + tags.reduce((sum, [name, value]) => sum + 200 + 2 * (name.length + value.length), 0);

/** The events of a room or of a talk. */
export class Log {
  readonly messages: Event[] = [];
  readonly presence: Event[] = []; // joins, parts, topics
  readonly emptied: () => void; // called when nothing is left in it
  constructor(emptied: () => void = () => {}) {
    this.emptied = emptied;
  }
  /** At most `limit` events between two places, the first or the last of them, oldest first. */
  read(end: "first" | "last", limit: number, presence: boolean, after?: Place, before?: Place): readonly Event[] {
    const part = (list: readonly Event[]) => {
      const from = after ? leading(list, (event) => compare(event, after) <= 0) : 0;
      const to = before ? leading(list, (event) => compare(event, before) < 0) : list.length;
      return end === "first"
        ? list.slice(from, Math.min(to, from + limit))
        : list.slice(Math.max(from, to - limit), to);
    };
    const found = presence ? [...part(this.messages), ...part(this.presence)].sort(byNumber) : part(this.messages);
    return end === "first" ? found.slice(0, limit) : found.slice(Math.max(0, found.length - limit));
  }
}

/** All the logs of a server: numbers their events, and keeps them within their limits. */
export class History {
  readonly #capacity: number; // messages kept in a log
  readonly #logs = new Set<Log>(); // the one longest without a message first
  #last = { number: 0, time: 0 };
  #bytes = 0;
  constructor(capacity: number) {
    this.#capacity = capacity;
  }
  /** Makes an event and appends it to the log; a TAGMSG is delivered only. */
  record(log: Log, happened: Omit<Event, "number" | "time">): Event {
    this.#last = { number: this.#last.number + 1, time: Math.max(this.#last.time, now()) };
    const event = { ...this.#last, ...happened };
    if (event.kind === "TAGMSG") return event;
    if (isMessage(event)) this.#logs.delete(log);
    this.#logs.add(log);
    const [list, capacity] = isMessage(event) ? [log.messages, this.#capacity] : [log.presence, LIMITS.presence];
    list.push(event);
    this.#bytes += sizeOf(event);
    if (list.length > capacity) this.#drop(list);
    for (const oldest of this.#logs) {
      while (this.#bytes > LIMITS.historyBytes && this.#logs.has(oldest)) this.#trim(oldest);
      if (this.#bytes <= LIMITS.historyBytes) break;
    }
    return event;
  }
  forget(log: Log): void {
    for (const list of [log.messages, log.presence]) {
      for (const event of list.splice(0)) this.#bytes -= sizeOf(event);
    }
    if (this.#logs.delete(log)) log.emptied();
  }
  #trim(log: Log): void {
    this.#drop(log.messages.length ? log.messages : log.presence);
    if (!log.messages.length && !log.presence.length && this.#logs.delete(log)) log.emptied();
  }
  #drop(list: Event[]): void {
    const oldest = list.shift();
    if (oldest) this.#bytes -= sizeOf(oldest);
  }
}

export class Room {
  readonly name: string; // as first written
  readonly log = new Log();
  readonly members = new Set<Member>();
  topic: Event | undefined;
  emptySince = now();
  constructor(name: string) {
    this.name = name;
  }
}

/** Somebody with an account, and all the sessions that are logged in to it. */
export class Member implements Account {
  nick: string;
  verifier: Verifier;
  readonly networks = new Set<string>();
  readonly sessions = new Set<Session>();
  readonly rooms = new Set<Room>();
  readonly talks = new Map<Member, Log>(); // the logs of private talks, by the other
  readonly done = new Map<string, number>(); // see `isDone`
  readonly pace: Pace = { until: 0 };
  present = false; // others see it; for LIMITS.lingerMs without a session too
  leftAt = now(); // when the last session ended
  reachedAt = now(); // up to then it has read for sure: what was said since is told on return, rather twice than never
  realName = "";
  away = ""; // the message; empty if it is not away
  constructor(nick: string, verifier: Verifier) {
    this.nick = nick;
    this.verifier = verifier;
  }
  /** The log of the talk with somebody. */
  talkWith(other: Member): Log {
    const found = this.talks.get(other);
    if (found) return found;
    const log = new Log(() => this.talks.delete(other) && other.talks.delete(this));
    this.talks.set(other, log);
    other.talks.set(this, log);
    return log;
  }
}

/** How far the lines of a member are paid for in time: each costs 1/rate of a second. */
interface Pace {
  until: number;
}
/* =====================================================================================================================
 * Server
 * A session is handed bytes and a peer to send bytes to; nothing here knows of sockets but `serve`, at the end. Each
 * line runs its row in the table of commands. An event is encoded once for all sessions with the same capabilities, who
 * share the bytes. What a session is owed gathers in its queue: answers are written in the same turn of the event loop,
 * what others say waits for company, up to 100 ms where many read, since a write costs more than what is in it.
 * ================================================================================================================== */

/** The other end of a session's connection. */
export interface Peer {
  readonly address: string;
  write(bytes: Buffer): boolean; // false if nothing more should be written until `Session.drained` is called
  pending(): number; // bytes that were written and that nobody has taken yet
  read(flowing: boolean): void; // whether to hand over what comes in
  end(atOnce: boolean): void; // closes, when everything is written or at once
}

/** What `serve` and `Server` may be told, and what they go by if they are not. */
const DEFAULTS = {
  room: "#chat", // where everybody lands
  topic: "", // of that room
  name: "chat", // of the network
  history: 1000, // messages kept in a room
  maxClients: 1000, // connections at once
  perAddress: 100, // of them, from one address
  rate: 10, // lines a second that a member may send, and five times that in a burst; 0 lifts it
  warning: "", // something to tell everybody who enters
  binding: Buffer.alloc(0) as Buffer, // what SCRAM binds a login to, see Identity
  log: (_line: string): void => {}, // takes the lines of the log
  explain: undefined as ((line: string) => void) | undefined, // takes what happens on the wire
};
export type ServerOptions = Partial<typeof DEFAULTS>;

const SERVER = "chat.server";
const ONCE = "chat.local/once";
const REGISTRATION = "draft/account-registration";

/** The capabilities by their bits. Which form an event takes depends on the first four. */
const CAP = {
  "message-tags": 1,
  "server-time": 2,
  "account-tag": 4,
  "extended-join": 8,
  "echo-message": 16,
  "batch": 32,
  "labeled-response": 64,
  "away-notify": 128,
  "standard-replies": 256,
  "cap-notify": 512,
  "sasl": 1024,
  "draft/chathistory": 2048,
  "draft/event-playback": 4096,
  [REGISTRATION]: 8192,
} as const;
type Cap = keyof typeof CAP;
const FORM = 15;

/** Where something comes from. Members have no address here, and only the server's name has a dot. */
const source = (nick: string) => nick === SERVER ? SERVER : `${nick}!${nick}@chat`;
const toLine = (body: string, tags: readonly Tag[] = []) => `${format(body, [], "", tags)}\r\n`;
const toBytes = (body: string, tags?: readonly Tag[]) => Buffer.from(toLine(body, tags));

/** The form that an event takes for sessions with these capabilities. */
function encode({ kind, nick, target, text, ...event }: Event, caps: number): { body: string; tags: Tag[] } {
  const tags: Tag[] = [];
  if (caps & CAP["server-time"]) tags.push(["time", new Date(event.time).toISOString()]);
  if (caps & CAP["message-tags"]) tags.push(["msgid", `${event.time}-${event.number}`], ...event.tags);
  if (caps & CAP["account-tag"] && nick !== SERVER) tags.push(["account", nick]);
  let params = [target, text];
  if (kind === "QUIT") params = [text];
  else if (kind === "JOIN") params = caps & CAP["extended-join"] ? [target, nick, text] : [target];
  else if (kind === "TAGMSG" || (kind === "PART" && !text)) params = [target];
  return { body: cut(format(kind, params, source(nick)), LIMITS.bodyBytes - 2), tags };
}

/** A connection, from its first byte on. */
export class Session {
  readonly server: Server;
  readonly address: string;
  readonly network: string;
  readonly since = now();
  active = now(); // when it last did something of its own accord
  askedAt = 0; // when a PING was sent that it has not answered yet
  told = false; // a private message was sent to it since
  closed = false;
  caps = 0; // the capabilities that it asked for
  negotiating = false; // between CAP LS or REQ, and CAP END
  wish = ""; // what NICK asked for; the account decides
  realName: string | undefined; // what USER gave
  password = ""; // what PASS gave, until it is tried
  mechanism = ""; // that of SASL which it tried last, or PASS if that let it in
  exchange: Exchange<Member> | undefined; // of SASL
  received = ""; // the first pieces of a message of that
  wrongPasswords = 0;
  member: Member | undefined; // who it is, once it has logged in
  welcome = false; // it was let in, too
  pace: Pace = { until: 0 }; // its own before, the member's afterwards

  readonly #peer: Peer;
  readonly #splitter = new Splitter();
  #queue: Buffer[] = []; // what it is owed; others may be owed the same buffers
  #queued = 0;
  #written = 0;
  #said = ""; // the answers that come after those; they will be written in this turn
  #blocked = false; // the peer takes no more for now
  #busy = false; // a command is running that takes its time
  #ended = false; // no more bytes will come
  readonly #silent = { bytes: 0, until: 0 }; // what came without text, and when that will be within its rate
  quietSince = now(); // since then nothing came of it, and nothing that had come was executed
  #timer: ReturnType<typeof setTimeout> | undefined;
  #label: Tag[] = []; // what the answers to the line that is being executed must carry
  #answers: { body: string; tags: readonly Tag[] }[] | undefined; // these answers, if they must
  constructor(server: Server, peer: Peer) {
    this.server = server;
    this.address = peer.address;
    this.network = networkOf(peer.address);
    this.#peer = peer;
  }
  has(cap: Cap): boolean {
    return (this.caps & CAP[cap]) !== 0;
  }
  get nick(): string {
    return this.member?.nick || this.wish || "*";
  }
  get owed(): number {
    return this.#queued + this.#said.length + this.#peer.pending();
  }

  /** For how long nothing came of it, in ms; not while something that came waits to be executed. */
  get silentMs(): number {
    return this.#busy || this.#timer ? 0 : now() - this.quietSince;
  }
  /** How long it has to wait until it is within its pace again, in ms. */
  get early(): number {
    return Math.max(0, this.pace.until - performance.now() - LIMITS.burstMs);
  }
  /** Whether it does all the time more than its pace allows. */
  get floods(): boolean {
    return this.pace.until - performance.now() > LIMITS.burstMs / 2;
  }
  get rate(): number {
    return this.member ? this.server.options.rate : LIMITS.loginRate;
  }
  /** Counts what it did against its rate: in ms, and in units. */
  charge(ms: number, units = 0): void {
    const { rate } = this;
    if (rate) this.pace.until = Math.max(this.pace.until, performance.now()) + ms + units * 1000 / rate;
  }
  /** Whether it is further over its rate than slow reading can mend. */
  get excessive(): boolean {
    return this.early * this.rate / 1000 > (this.member ? LIMITS.debt : 0);
  }

  /** Takes bytes from the peer. They are charged here, whatever comes of them. */
  receive(chunk: Buffer): void {
    if (this.closed) return;
    this.charge(0, LIMITS.chunkUnits + chunk.length / LIMITS.unitBytes);
    this.#splitter.push(chunk);
    if (this.excessive || this.#splitter.size > LIMITS.inputBytes) this.#closeForFlood();
    else this.#goOn();
  }
  /**
   * Takes how many bytes have come on the socket without bringing text, since the connection began. A record of which
   * only a part has come is among them until the rest is there: then the number falls again.
   */
  countSilent(bytes: number): void {
    const perMs = LIMITS.silentBytes / 1000;
    const at = performance.now();
    this.#silent.until = Math.max(at, Math.max(at, this.#silent.until) + (bytes - this.#silent.bytes) / perMs);
    this.#silent.bytes = bytes;
    if (this.#silent.until - at > LIMITS.silentBurst / perMs && !this.closed) this.#closeForFlood(true);
  }
  /** Closes the connection, and reads nothing more of it meanwhile. */
  #closeForFlood(atOnce = false): void {
    if (!this.member) this.server.failed(this.address, "a connection was closed", "excess flood");
    this.#peer.read(false);
    this.close("Excess flood", atOnce);
  }
  /** Asks whether it is there. When it answers, it has read all that was sent to it until now. */
  ask(): void {
    this.askedAt = now();
    this.told = false;
    this.send(toBytes(format("PING", [SERVER])));
  }
  /** It has answered. */
  pong(): void {
    if (this.member && this.askedAt) this.member.reachedAt = Math.max(this.member.reachedAt, this.askedAt);
    this.askedAt = 0;
  }
  /** The peer will send nothing more. The lines that are there are executed nevertheless. */
  ended(): void {
    this.#ended = true;
    this.#goOn();
  }
  /** Executes lines, unless they wait for their time to come. */
  #goOn(): void {
    this.quietSince = now();
    if (!this.#timer) this.#run();
  }
  /** Executes the lines that are there, until one has to wait; then nothing more is read meanwhile. */
  #run(): void {
    const began = performance.now();
    while (!this.closed) {
      if (this.excessive) return this.#closeForFlood();
      const [at, { early }] = [performance.now(), this];
      const late = at - began > LIMITS.turnMs && this.#splitter.size > 0;
      if (this.#busy || this.owed > LIMITS.owedBytes / 4 || early || late) {
        if (early || late) this.#timer = setTimeout(() => this.#resume(), early || 1);
        return this.#peer.read(false);
      }
      const split = this.#splitter.next();
      if (!split) return this.#ended ? this.lost("Connection closed", false) : this.#peer.read(true);
      this.charge(0, 1);
      void this.#execute(split);
      const took = Math.min(performance.now() - at, LIMITS.workMs);
      if (this.member) this.charge(took * Math.min(LIMITS.workFactor, 1000 / this.server.options.rate));
    }
  }
  #resume(): void {
    this.#timer = undefined;
    this.#goOn();
  }

  /** Executes a line. This is the one place where an error in handling a session ends that session, and nothing else. */
  async #execute({ text = "", fault }: { text?: string; fault?: string }): Promise<void> {
    try {
      const line = parse(text);
      if (line.command !== "PING" && line.command !== "PONG") this.active = now();
      const [label, once] = [line.tags.get("label"), line.tags.get(ONCE)];
      this.#label = label && label.length <= 64 && this.has("labeled-response") ? [["label", label]] : [];
      if (once && this.welcome) this.#label.push([ONCE, once]);
      this.#answers = this.#label.length ? [] : undefined;
      if (fault === "NUL") return this.close("That is not text");
      if (fault === "too long") return this.numeric("417", "Input line was too long");
      if (fault) return this.reply("FAIL", "*", "INVALID_UTF8", "Only UTF-8 is taken here; the line was dropped");
      const running = this.server.execute(this, line);
      this.#busy = running !== undefined;
      if (running) await running;
      this.#answered();
    } catch (error) {
      const trace = error instanceof Error ? error.stack ?? error.message : String(error);
      this.server.options.log(`error in the session of ${this.nick}: ${trace.replace(/\s*\n\s*/g, " | ")}`);
      this.close("Internal error");
    }
    if (!this.#busy) return;
    this.#busy = false;
    this.#goOn();
  }

  /** Sends the answers to a labelled line: none is an ACK, one carries the label, several are a batch that does. */
  #answered(): void {
    let [answers, label] = [this.#answers, this.#label];
    this.#answers = undefined;
    if (!answers) return;
    if (!answers.length) answers = [{ body: `:${SERVER} ACK`, tags: [] }];
    else if (answers.length > 1 && label[0]?.[0] === "label" && !answers[0]?.body.startsWith(`:${SERVER} BATCH`)) {
      const all = answers;
      answers = this.#answers = [];
      this.batch(["labeled-response"], (tags) => all.forEach((one) => this.answer(one.body, [...tags, ...one.tags])));
      this.#answers = undefined;
    }
    for (const { body, tags } of answers) {
      this.#say(body, [...label, ...tags]);
      label = [];
    }
  }

  /** Answers the line that is being executed: with any line, one of the server's, a numeric, an event, a batch. */
  answer(line: string, tags: readonly Tag[] = []): void {
    const body = cut(line, LIMITS.bodyBytes - 2);
    if (this.#answers) this.#answers.push({ body, tags });
    else this.#say(body, tags);
  }
  reply(command: string, ...params: readonly string[]): void {
    const word = (param: string) => param.replace(/^:+| .*/gs, "") || "*"; // what a client sent may be none
    this.answer(format(command, params.map((param, at) => at < params.length - 1 ? word(param) : param), SERVER));
  }
  numeric(code: string, ...params: readonly string[]): void {
    this.reply(code, this.nick, ...params);
  }
  tell(event: Event, extra: readonly Tag[] = []): void {
    const { body, tags } = encode(event, this.caps);
    this.answer(body, [...extra, ...tags]);
  }
  batch(type: readonly string[], tell: (tags: readonly Tag[]) => void): void {
    if (!this.has("batch")) return tell([]);
    const name = this.server.batchName();
    this.reply("BATCH", `+${name}`, ...type);
    tell([["batch", name]]);
    this.reply("BATCH", `-${name}`);
  }

  /** Sends what others say; who lets too much of it pile up goes. */
  send(bytes: Buffer): void {
    if (this.closed) return;
    if (this.#said) this.#queueAnswers();
    if (this.#queue.push(bytes) === 1) this.server.owes(this);
    this.#queued += bytes.length;
    if (this.#blocked && this.owed > LIMITS.owedBytes) setImmediate(() => this.close("Not reading", true));
  }
  /** Sends an answer: it is written in this turn of the event loop, and so is what waited before it. */
  #say(body: string, tags: readonly Tag[] = []): void {
    if (this.closed) return;
    if (!this.#said) setImmediate(() => this.flush());
    this.#said += toLine(body, tags);
  }
  #queueAnswers(): void {
    const bytes = Buffer.from(this.#said);
    this.#said = "";
    this.#queue.push(bytes);
    this.#queued += bytes.length;
  }
  /** Writes what it is owed, unless its peer is not ready for it. */
  flush(): void {
    if (this.#blocked) return;
    if (this.#said) this.#queueAnswers();
    if (this.#queue.length === 0) return;
    const bytes = this.#next(this.#written < LIMITS.newcomerBytes ? LIMITS.pieceBytes : LIMITS.writeBytes);
    this.#queued -= bytes.length;
    this.#written += bytes.length;
    this.#blocked = !this.#peer.write(bytes);
    if (this.#blocked) return;
    if (this.#queue.length > 0) setImmediate(() => this.flush());
    if (this.#splitter.size > 0 && !this.#timer) this.#run(); // its lines may have waited for this
  }
  /** Takes from the queue what is to be written at once: all of it, if it is closed. */
  #next(most: number): Buffer {
    const [first = NOTHING] = this.#queue;
    if (first.length > most && !this.closed) {
      this.#queue[0] = first.subarray(most);
      return first.subarray(0, most);
    }
    let [count, size] = [1, first.length];
    for (; count < this.#queue.length; count++) {
      size += this.#queue[count]?.length ?? 0;
      if (size > most && !this.closed) break;
    }
    return this.server.joined(this.#queue.splice(0, count));
  }
  /** The peer is ready for more. */
  drained(): void {
    this.#blocked = false;
    this.flush();
    this.#goOn();
  }

  /** Closes the connection and says why; `atOnce` if that would not be read either. */
  close(reason: string, atOnce = false): void {
    if (this.closed) return;
    this.#answered();
    this.#say(format("ERROR", [reason]));
    this.#end(reason, true, atOnce);
  }
  /** The connection is lost, or over when everything is written. It may be taken up again. */
  lost(reason: string, atOnce = true): void {
    if (!this.closed) this.#end(reason, false, atOnce);
  }
  #end(reason: string, closed: boolean, atOnce: boolean): void {
    this.closed = true;
    clearTimeout(this.#timer);
    this.server.left(this, reason, closed);
    this.#blocked = false;
    if (closed || !atOnce) this.flush();
    this.#peer.end(atOnce);
  }
}

/** Who is there, which rooms there are, and who gets what. */
export class Server {
  readonly options: typeof DEFAULTS;
  readonly started = new Date();
  readonly accounts: Accounts<Member>;
  readonly history: History;
  readonly rooms = new Map<string, Room>(); // by folded name
  readonly sessions = new Set<Session>();
  readonly lobby: Room; // where everybody lands
  readonly #empty = { silent: new Set<Room>(), spoken: new Set<Room>() }; // the other rooms, the longest empty first
  #owing: Session[] = []; // who has something in the queue
  #gathered = 0; // events that wait in the queues
  #flushedAt = 0;
  #calm = false; // something waits that was not said by one who floods
  #calmAt = 0; // when such a thing was written
  #timer: ReturnType<typeof setTimeout> | undefined;
  #joined: { of: readonly Buffer[]; bytes: Buffer } = { of: [], bytes: Buffer.alloc(0) };
  #batches = 0;
  #sweptAt = now();
  readonly #failures = new Counter(60_000);
  constructor(options: ServerOptions = {}) {
    const { log = DEFAULTS.log } = options;
    this.options = { ...DEFAULTS, ...options, log: (line) => log(clean(cut(line, 1000))) }; // a terminal may show it
    const register = (nick: string, verifier: Verifier, { address }: Visitor) => {
      this.options.log(`${nick} registered from ${address}`);
      return new Member(nick, verifier);
    };
    this.accounts = new Accounts(register, this.options.perAddress);
    this.history = new History(this.options.history);
    this.lobby = this.openRoom(this.options.room);
    if (options.topic) this.lobby.topic = this.happens(this.lobby, "TOPIC", SERVER, options.topic);
  }

  /** A peer has connected. Its session is closed at once if there are too many. */
  open(peer: Peer): Session {
    const session = new Session(this, peer);
    this.sessions.add(session);
    let [here, strangers] = [0, 0];
    for (const { network, welcome } of this.sessions) {
      if (network === session.network) here++;
      if (!welcome) strangers++;
    }
    if (this.sessions.size > this.options.maxClients) session.close("The server is full");
    else if (here > this.options.perAddress) session.close("Too many connections from your address");
    else if (strangers > this.mostStrangers) session.close("Too many connections are just logging in");
    return session;
  }

  get mostStrangers(): number {
    return Math.max(LIMITS.strangers, this.options.maxClients / 2);
  }

  // ---- Delivery

  owes(session: Session): void {
    if (this.#owing.push(session) === 1) setImmediate(() => this.#settle());
  }
  /**
   * Writes what sessions are owed, unless many were written to a moment ago: what is said within the moment shares a
   * write, which is most of what a delivery costs. It is the longer the more they are, and too short to be seen. What
   * flooders say makes nobody else wait: it is written at its own moments, or with what the others say.
   */
  #settle(): void {
    const moment = Math.min(LIMITS.gatherMs, this.#owing.length / 4);
    const wait = (this.#calm ? this.#calmAt : this.#flushedAt) + moment - performance.now();
    clearTimeout(this.#timer);
    if (wait > 0 && this.#gathered < LIMITS.gathered) this.#timer = setTimeout(() => this.flush(), wait);
    else this.flush();
  }
  flush(): void {
    clearTimeout(this.#timer);
    this.#flushedAt = performance.now();
    if (this.#calm) this.#calmAt = this.#flushedAt;
    this.#calm = false;
    this.#gathered = 0;
    const owing = this.#owing;
    this.#owing = [];
    for (const session of owing) session.flush();
    this.#joined = { of: [], bytes: Buffer.alloc(0) };
  }
  /** Joins the buffers of a queue. Sessions that are owed the same, one after the other, share the result. */
  joined(queue: readonly Buffer[]): Buffer {
    if (queue.length === 1 && queue[0]) return queue[0];
    const { of } = this.#joined;
    const same = of.length === queue.length && of.every((bytes, at) => bytes === queue[at]);
    if (!same) this.#joined = { of: queue, bytes: Buffer.concat(queue) };
    return this.#joined.bytes;
  }
  /** Delivers an event. Whose line caused it gets it as the answer, a message only if it asked for echoes. */
  deliver(event: Event, members: Iterable<Member>, origin?: Session): void {
    const calm = !origin?.floods;
    if (calm && !this.#calm && this.#owing.length) setImmediate(() => this.#settle()); // it need not wait as long
    this.#calm ||= calm;
    if (++this.#gathered === LIMITS.gathered) setImmediate(() => this.flush());
    const forms: Buffer[] = [];
    const form = (caps: number) => {
      const { body, tags } = encode(event, caps);
      return toBytes(body, tags);
    };
    for (const { sessions } of members) {
      for (const session of sessions) {
        if (event.kind === "TAGMSG" && !session.has("message-tags")) continue;
        if (session !== origin) session.send(forms[session.caps & FORM] ??= form(session.caps));
        else if (!isMessage(event) || session.has("echo-message")) session.tell(event);
      }
    }
  }
  /** Sends a line that is no event, to the sessions that have the capability for it. */
  announce(body: string, members: Iterable<Member>, cap?: Cap): void {
    const bytes = toBytes(body);
    for (const { sessions } of members) {
      for (const session of sessions) if (!cap || session.has(cap)) session.send(bytes);
    }
  }
  batchName(): string {
    return (++this.#batches).toString(36);
  }

  // ---- Rooms

  openRoom(name: string): Room {
    const room = new Room(name);
    this.rooms.set(fold(name), room);
    return room;
  }
  closeRoom(room: Room): void {
    this.rooms.delete(fold(room.name));
    this.#noLongerEmpty(room);
    this.history.forget(room.log);
  }
  #noLongerEmpty(room: Room): void {
    this.#empty.silent.delete(room);
    this.#empty.spoken.delete(room);
  }
  /** The empty room that will be missed least: the longest empty one, but first those in which nothing was said. */
  get dullest(): Room | undefined {
    const [[silent], [spoken]] = [this.#empty.silent, this.#empty.spoken];
    return silent ?? spoken;
  }
  /** Appends to a room's log what somebody did. */
  happens(room: Room, kind: Event["kind"], nick: string, text: string, tags: readonly Tag[] = []): Event {
    return this.history.record(room.log, { kind, nick, target: room.name, text, tags });
  }
  join(member: Member, room: Room, session: Session): void {
    this.#noLongerEmpty(room);
    room.members.add(member);
    member.rooms.add(room);
    this.deliver(this.happens(room, "JOIN", member.nick, member.realName), room.members, session);
    for (const own of member.sessions) tellRoom(own, room);
    if (member.away) this.announceAway(member, room.members);
  }
  part(member: Member, room: Room, reason: string, session: Session): void {
    this.deliver(this.happens(room, "PART", member.nick, reason), room.members, session);
    this.#remove(member, room);
  }
  #remove(member: Member, room: Room): void {
    room.members.delete(member);
    member.rooms.delete(room);
    if (room.members.size > 0 || room === this.lobby) return;
    room.emptySince = now();
    this.#empty[room.log.messages.length ? "spoken" : "silent"].add(room);
  }
  announceAway({ nick, away }: Member, members: Iterable<Member>): void {
    this.announce(format("AWAY", away ? [away] : [], source(nick)), members, "away-notify");
  }
  /** The member, and everybody who is in a room with it. */
  audience(member: Member): Set<Member> {
    return new Set([member, ...[...member.rooms].flatMap((room) => [...room.members])]);
  }
  present(nick: string): Member | undefined {
    const member = this.accounts.find(nick);
    return member?.present ? member : undefined;
  }

  // ---- Coming and going

  /** Lets a session in if everything is said that has to be, or says what is missing. */
  complete(session: Session): void | Promise<void> {
    const { member, wish, password } = session;
    if (session.closed || session.welcome || session.negotiating || session.realName === undefined) return;
    const { barred } = this.accounts; // the operator may have changed it since the login
    if (member && (barred.has(fold(member.nick)) || this.accounts.find(member.nick) !== member)) {
      return session.close(REFUSALS["barred"]);
    }
    if (member && !member.present && session.early) { // it came and went too often
      return new Promise((later) => setTimeout(later, session.early)).then(() => this.complete(session));
    }
    if (member) return this.#letIn(session, member);
    if (wish && password) return this.#passIn(session, wish, password);
    if (!wish) return;
    const text = "A password is needed here: it registers a free nick, or logs you in";
    if (session.has("standard-replies")) session.reply("FAIL", "*", "ACCOUNT_REQUIRED_TO_CONNECT", text);
    session.numeric("464", text);
    session.reply(
      "NOTICE",
      wish,
      "Set a server password in your client, or log in by SASL; or type /quote PASS password",
    );
  }
  /** PASS logs in; or it registers the nick, if that is free. */
  async #passIn(session: Session, nick: string, password: string): Promise<void> {
    session.password = "";
    let result = await this.accounts.login(nick, password, session);
    const fresh = result === "unknown" && !session.mechanism;
    if (fresh) result = await this.accounts.register(nick, password, session);
    if (session.closed) return;
    if (typeof result === "string") {
      session.numeric("464", REFUSALS[result]);
      return this.refuse(session, nick, result);
    }
    session.mechanism = "PASS";
    this.admit(session, result);
    if (fresh) session.reply("NOTICE", result.nick, `${result.nick} is registered now, with this password`);
    return this.complete(session);
  }
  /** A session has shown who it is. */
  admit(session: Session, member: Member): void {
    session.member = member;
    session.pace = member.pace;
    this.options.log(`${member.nick} logged in from ${session.address}`);
  }
  /** Somebody was not let in; too many wrong passwords end the connection. */
  refuse(session: Session, nick: string, why: Refusal): void {
    if (why !== "unknown") this.failed(session.address, `${nick} was refused`, REFUSALS[why].toLowerCase());
    if (why === "wrong" && ++session.wrongPasswords >= LIMITS.wrongPasswords) session.close("Too many wrong passwords");
  }
  /** Logs what a stranger did not manage, unless its network fills the log with that. */
  failed(address: string, what: string, why: string): void {
    if (this.#failures.take(networkOf(address), LIMITS.failures)) this.options.log(`${what} from ${address}: ${why}`);
  }
  #letIn(session: Session, member: Member): void {
    const since = { time: member.reachedAt - 1 };
    const missed = [...member.talks.values()].flatMap((log) => log.read("last", LIMITS.missed, false, since))
      .sort(byNumber);
    member.sessions.add(session);
    member.realName = session.realName || member.realName || member.nick;
    const arrives = !member.present;
    member.present = session.welcome = true;
    greet(session);
    for (const room of member.rooms) { // a further session, or one that takes up a lost connection
      const params = session.has("extended-join") ? [room.name, member.nick, member.realName] : [room.name];
      session.answer(format("JOIN", params, source(member.nick)));
      tellRoom(session, room);
    }
    if (arrives) {
      session.charge(LIMITS.entryMs);
      this.join(member, this.lobby, session);
    }
    if (this.options.warning) session.reply("NOTICE", member.nick, this.options.warning);
    const toMe = missed.filter(({ target }) => fold(target) === fold(member.nick));
    let bytes = 0; // the latest of them, as many as one can be owed; the others are in the history
    const from = toMe.findLastIndex((event) => (bytes += sizeOf(event)) > LIMITS.owedBytes / 2) + 1;
    for (const event of toMe.slice(Math.max(from, toMe.length - LIMITS.missed))) session.tell(event);
    session.told = toMe.length > 0;
  }

  /** A session is over. With its last session a member leaves, or a little later if the connection was lost. */
  left(session: Session, reason: string, closed: boolean): void {
    this.sessions.delete(session);
    const { member, address } = session;
    if (member) this.options.log(`${member.nick} left from ${address}: ${reason}`);
    if (!member?.sessions.delete(session) || member.sessions.size > 0) return;
    member.leftAt = now();
    if (closed) this.#leave(member, reason);
  }
  #leave(member: Member, reason: string): void {
    const audience = this.audience(member);
    let event: Event | undefined;
    for (const room of member.rooms) {
      event = this.happens(room, "QUIT", member.nick, reason);
      this.#remove(member, room);
    }
    member.present = false;
    member.away = "";
    if (event) this.deliver(event, audience);
  }
  /** Ends all the sessions of a member. */
  kick(member: Member, reason: string): void {
    for (const session of this.sessions) if (session.member === member) session.close(reason);
    if (member.present) this.#leave(member, reason);
  }
  /** Deletes an account and its talks. */
  forget(member: Member): void {
    this.kick(member, "The account was deleted");
    for (const log of member.talks.values()) this.history.forget(log);
    this.accounts.all.delete(fold(member.nick));
  }

  /** Does what is due; to be called once a second. */
  sweep(): void {
    const late = now() - this.#sweptAt > LIMITS.lateMs; // the machine slept, or the clock was set: whoever was asked
    this.#sweptAt = now(); // may have answered in the meantime
    if (late) return;
    for (const session of this.sessions) {
      const [silent, age] = [session.silentMs, now() - session.since];
      if (!session.welcome) {
        if (silent > LIMITS.silenceMs || age > LIMITS.strangerMs) session.close("You did not log in in time");
        continue;
      }
      const quiet = silent > LIMITS.pingMs;
      if (quiet ? session.askedAt <= session.quietSince : session.told && !session.askedAt) session.ask();
      else if (quiet && now() - session.askedAt > LIMITS.pingMs) session.lost("Ping timeout");
    }
    for (const member of this.accounts.all.values()) {
      const gone = member.present && !member.sessions.size && now() - member.leftAt > LIMITS.lingerMs;
      if (gone) this.#leave(member, "Connection lost");
    }
    for (const room of [...this.#empty.silent, ...this.#empty.spoken]) {
      if (now() - room.emptySince > LIMITS.roomIdleMs) this.closeRoom(room);
    }
  }

  // ---- Commands

  /** Runs a line's row in the table of commands, if the sender may. */
  execute(session: Session, line: Line): void | Promise<void> {
    const command = COMMANDS[line.command];
    if (!line.command) return;
    if (!session.welcome && line.params.at(-1)?.startsWith("HTTP/")) return session.close("This is IRC, not HTTP");
    if (!session.welcome && !command?.early) return session.numeric("451", "You have not registered");
    if (!command) return session.numeric("421", line.command, "Unknown command");
    if (line.params.length < command.least) return session.numeric("461", line.command, "Not enough parameters");
    if (!this.#isDone(session, line)) return command.run(session, line.params, line);
  }
  /** Whether a numbered line was executed before. If not, it is now. */
  #isDone({ member }: Session, { tags }: Line): boolean {
    const [, instance, digits] = /^([\w-]{1,32})-(\d{1,15})$/.exec(tags.get(ONCE) ?? "") ?? [];
    if (!member || !instance) return false;
    const { done } = member; // by client instance, the latest last: the highest number that was executed or refused
    if (Number(digits) <= (done.get(instance) ?? 0)) return true;
    done.delete(instance);
    done.set(instance, Number(digits));
    const [oldest = ""] = done.keys();
    if (done.size > LIMITS.instances) done.delete(oldest);
    return false;
  }
}
const REFUSALS: Readonly<Record<Refusal, string>> = {
  "wrong": "Wrong password",
  "unknown": "No account of that name",
  "exists": "That nick has an account already",
  "bad nick": `A nick has 1 to ${LIMITS.nick} letters, digits or any of []\\\`_^{|}- and begins with no digit or -`,
  "closed": "Registration is closed; the operator can admit a nick",
  "barred": "The operator keeps this account out",
  "often": "Too many attempts; try again later",
};

/** How many targets a command takes: a message goes to a few, the other lists are as long as a line. */
const TARGMAX = [
  ...["PRIVMSG", "NOTICE", "TAGMSG"].map((name) => `${name}:${LIMITS.targets}`),
  ...["JOIN", "PART", "NAMES", "LIST"].map((name) => `${name}:`),
  "WHOIS:1",
].join(",");

/** What comes first after logging in, up to the end of the MOTD. */
function greet(session: Session): void {
  const { server: { options, started }, nick } = session;
  session.numeric("001", `Welcome to the ${options.name} network, ${source(nick)}`);
  session.numeric("002", `Your host is ${SERVER}, running chat ${VERSION}`);
  session.numeric("003", `This server was started ${started.toUTCString()}`);
  session.numeric("004", SERVER, `chat-${VERSION}`, "i", "n");
  const support =
    `NETWORK=${options.name.replaceAll(" ", "\\x20")} CASEMAPPING=ascii UTF8ONLY CHANTYPES=# PREFIX=(ov)@+ WHOX ` +
    `CHANMODES=b,,,n SAFELIST NICKLEN=${LIMITS.nick} CHANNELLEN=${LIMITS.room} TOPICLEN=${LIMITS.topic} ` +
    `AWAYLEN=${LIMITS.text} CHANLIMIT=#:${LIMITS.roomsPerMember} TARGMAX=${TARGMAX} ` +
    `CHATHISTORY=${LIMITS.chathistory} MSGREFTYPES=msgid,timestamp`;
  for (const line of inLines(support.split(" "), 150)) {
    session.numeric("005", ...line.split(" "), "are supported by this server");
  }
  tellUsers(session);
  tellMotd(session);
}

function tellMotd(session: Session): void {
  session.numeric("375", `- ${SERVER} message of the day -`);
  session.numeric("372", "- Nothing is written to disk: accounts and history end with the server.");
  session.numeric("372", "- Whoever is in a room may read its log, also from before they came.");
  session.numeric("376", "End of MOTD");
}

function tellUsers(session: Session): void {
  const { accounts, sessions, rooms } = session.server;
  const present = [...accounts.all.values()].filter((member) => member.present).length;
  session.numeric("251", `There are ${present} users and 0 invisible on 1 servers`);
  session.numeric("253", String([...sessions].filter(({ welcome }) => !welcome).length), "unknown connection(s)");
  session.numeric("254", String(rooms.size), "channels formed");
  session.numeric("255", `I have ${present} clients and 0 servers`);
}

/** What follows one's own JOIN: the topic if there is one, and the names. */
function tellRoom(session: Session, room: Room): void {
  if (room.topic) tellTopic(session, room);
  tellNames(session, room);
}

function tellNames(session: Session, room: Room): void {
  for (const line of inLines([...room.members].map(({ nick }) => nick))) session.numeric("353", "=", room.name, line);
  session.numeric("366", room.name, "End of /NAMES list");
}

function tellTopic(session: Session, { name, topic }: Room): void {
  if (!topic) return session.numeric("331", name, "No topic is set");
  session.numeric("332", name, topic.text);
  session.numeric("333", name, topic.nick, String(Math.floor(topic.time / 1000)));
}

const idleSeconds = ({ sessions }: Member) =>
  sessions.size ? Math.floor((now() - Math.max(...[...sessions].map(({ active }) => active))) / 1000) : 0;

/** WHO for a room, a nick or everybody: 352, or 354 with the fields that a WHOX asks for. */
function who(session: Session, [mask = "*", what = ""]: readonly string[]): void {
  const { rooms, accounts } = session.server;
  const [, fields, t = "0"] = /^[^%]*%([a-z]*),?(\d{1,3})?$/i.exec(what) ?? [];
  const [room, one] = [rooms.get(fold(mask)), accounts.find(mask)];
  const everybody = /^[*0]$/.test(mask) ? accounts.all.values() : [];
  for (const member of room?.members ?? (one ? [one] : everybody)) {
    const { nick: n, realName: r, away, sessions, rooms: [shared] } = member;
    const [c, u, s, f] = [room?.name ?? shared?.name ?? "*", n, SERVER, away || !sessions.size ? "G" : "H"];
    if (!member.present) continue;
    if (fields === undefined) session.numeric("352", c, u, "chat", s, n, f, `0 ${r}`);
    else {
      const hidden = "255.255.255.255"; // what WHOX has for an address that is not told
      const values = {
        t,
        c,
        u,
        i: hidden,
        h: "chat",
        s,
        n,
        f,
        d: "0",
        l: String(idleSeconds(member)),
        a: n,
        o: "n/a",
        r,
      };
      const wanted = Object.entries(values).filter(([field]) => fields.includes(field));
      session.numeric("354", ...wanted.map(([, value]) => value));
    }
  }
  session.numeric("315", mask, "End of /WHO list");
}

function whois(session: Session, params: readonly string[]): void {
  const name = params.at(-1) ?? "";
  const member = session.server.present(name);
  if (!member) session.numeric("401", name, "No such nick/channel");
  else {
    const { nick, realName, rooms, away, sessions } = member;
    const since = Math.floor(Math.min(now(), ...[...sessions].map((one) => one.since)) / 1000);
    session.numeric("311", nick, nick, "chat", "*", realName);
    for (const line of inLines([...rooms].map((room) => room.name))) session.numeric("319", nick, line);
    session.numeric("312", nick, SERVER, session.server.options.name);
    if (away) session.numeric("301", nick, away);
    session.numeric("317", nick, String(idleSeconds(member)), String(since), "seconds idle, signon time");
    session.numeric("330", nick, nick, "is logged in as");
    session.numeric("671", nick, "is using a secure connection");
  }
  session.numeric("318", name, "End of /WHOIS list");
}

/** The names in a list, each once. */
const list = (text: string) => [
  ...new Map(text.split(",").filter(Boolean).map((name) => [fold(name), name])).values(),
];

/** A text of its own: a part of a line would keep the whole line in memory. */
const copied = (text: string) => Buffer.from(text).toString();

/**
 * PRIVMSG, NOTICE and TAGMSG. A NOTICE is not answered with an error, so that robots do not answer each other; but to
 * whom it did not go because of a limit is said.
 */
function say(session: Session, [targets = "", words = ""]: readonly string[], line: Line): void {
  const { server, member } = session;
  const kind = line.command as "PRIVMSG" | "NOTICE" | "TAGMSG";
  const refuse = (code: string, ...params: string[]) =>
    kind === "NOTICE" ? undefined : session.numeric(code, ...params);
  const text = kind === "TAGMSG" ? "" : copied(words);
  if (!member || (!text && kind !== "TAGMSG")) return refuse("412", "No text to send");
  const relayed = line.tags.size ? [...line.tags].filter(([name]) => name.startsWith("+")) : [];
  const tags = relayed.map(([name, value]) => [copied(name), copied(value)] as const);
  const all = list(targets);
  for (const target of all.slice(LIMITS.targets)) {
    session.numeric("407", target, `Too many targets: a message goes to ${LIMITS.targets}, and not to this one`);
  }
  for (const target of all.slice(0, LIMITS.targets)) {
    const [room, other] = [server.rooms.get(fold(target)), server.accounts.find(target)];
    if (room && member.rooms.has(room)) {
      server.deliver(server.happens(room, kind, member.nick, text, tags), room.members, session);
    } else if (room) refuse("404", room.name, "Cannot send to channel");
    else if (other) {
      const happened = { kind, nick: member.nick, target: other.nick, text, tags };
      const log = kind === "TAGMSG" ? new Log() : member.talkWith(other); // an empty talk would stay for ever
      const event = server.history.record(log, happened);
      server.deliver(event, new Set([member, other]), session);
      for (const one of other.sessions) one.told = true;
      if (other === member) session.tell(event); // besides the echo, if there is one: it is also the one that is told
      if (kind !== "PRIVMSG") continue;
      if (!other.sessions.size) session.numeric("301", other.nick, "Is not here, and reads it on return");
      else if (other.away) session.numeric("301", other.nick, other.away);
    } else if (target.startsWith("#")) refuse("403", target, "No such channel");
    else refuse("401", target, "No such nick/channel");
  }
}

/** Reads `msgid=…` or `timestamp=…`. */
function placeOf(reference = ""): Place | undefined {
  const [, time, number] = /^msgid=(\d{1,15})-(\d{1,15})$/.exec(reference) ?? [];
  if (time && number) return { time: Number(time), number: Number(number) };
  const moment = reference.startsWith("timestamp=") ? Date.parse(reference.slice(10)) : NaN;
  return isNaN(moment) ? undefined : { time: moment };
}

/** CHATHISTORY: a room's log, or a talk's, is read from a place (IRCv3 draft/chathistory). */
function chathistory(session: Session, params: readonly string[]): void {
  const { server, member } = session;
  const [way = "", target = ""] = params;
  const [most = "", kind] = [params.at(-1), way.toUpperCase()];
  const refuse = (code: string, text: string, context: string) =>
    session.reply("FAIL", "CHATHISTORY", code, way, context || "*", text);
  const limit = /^\d+$/.test(most) ? Math.min(Number(most), LIMITS.chathistory) : 0;
  if (!limit) return refuse("INVALID_PARAMS", "The limit is a number above 0", most);
  const places = params.slice(kind === "TARGETS" ? 1 : 2, -1);
  const [from, until] = places.map(placeOf);
  const both = kind === "BETWEEN" || kind === "TARGETS";
  if (!from && !(kind === "LATEST" && places[0] === "*") || both && !until) {
    return refuse("INVALID_PARAMS", "This is no place in a log", places.join(" "));
  }
  if (kind === "TARGETS") return historyTargets(session, from?.time ?? 0, until?.time ?? 0, limit);
  const [room, other] = [server.rooms.get(fold(target)), server.accounts.find(target)];
  if (!member || (room ? !member.rooms.has(room) : !other)) {
    return refuse("INVALID_TARGET", "Messages could not be retrieved", target);
  }
  const log = room?.log ?? (other && member.talks.get(other));
  const read = (end: "first" | "last", after?: Place, before?: Place, limited = limit) =>
    log?.read(end, limited, session.has("draft/event-playback"), after, before) ?? [];
  const earlier = kind === "AROUND" ? read("last", undefined, from, Math.floor(limit / 2)) : [];
  const justBefore = from && { time: from.time - 1, ...from.number !== undefined && { number: from.number - 1 } };
  const backward = from && until && (from.time > until.time || (from.number ?? 0) > (until.number ?? Infinity));
  const ways: Partial<Record<string, () => readonly Event[]>> = {
    LATEST: () => read("last", from),
    BEFORE: () => read("last", undefined, from),
    AFTER: () => read("first", from),
    BETWEEN: () => backward ? read("last", until, from) : read("first", from, until),
    AROUND: () => [...earlier, ...read("first", earlier.at(-1) ?? justBefore, undefined, limit - earlier.length)],
  };
  const events = ways[kind]?.();
  if (!events) return refuse("INVALID_PARAMS", "There is no such subcommand", way);
  session.batch(["chathistory", room?.name ?? target], (tags) => events.forEach((event) => session.tell(event, tags)));
}

/** CHATHISTORY TARGETS: where something was said between two moments, and when last. */
function historyTargets(session: Session, one: number, other: number, limit: number): void {
  const rooms = [...session.member?.rooms ?? []].map(({ name, log }) => ({ name, log }));
  const talks = [...session.member?.talks ?? []].map(([{ nick }, log]) => ({ name: nick, log }));
  const found = [...rooms, ...talks].map(({ name, log }) => ({ name, time: log.messages.at(-1)?.time ?? -1 }))
    .filter(({ time }) => time > Math.min(one, other) && time < Math.max(one, other))
    .sort((a, b) => a.time - b.time).slice(0, limit);
  session.batch(["draft/chathistory-targets"], (tags) => {
    for (const { name, time } of found) {
      session.answer(format("CHATHISTORY", ["TARGETS", name, new Date(time).toISOString()], SERVER), tags);
    }
  });
}

/** The mechanisms of SASL, the better one first. */
const MECHANISMS: Readonly<Partial<Record<string, (session: Session) => Exchange<Member>>>> = {
  "SCRAM-SCRYPT-PLUS": (session) => session.server.accounts.scram(session, session.server.options.binding),
  "PLAIN": (session) => session.server.accounts.plain(session),
};

/** AUTHENTICATE: begins an exchange, breaks it off, or brings a piece of a message (IRCv3 sasl-3.2). */
async function authenticate(session: Session, [text = ""]: readonly string[]): Promise<void> {
  const { exchange, received } = session;
  session.exchange = undefined;
  session.received = "";
  if (session.member) return session.numeric("907", "You are logged in already");
  if (text === "*") return session.numeric("906", "SASL authentication aborted");
  if (!exchange) {
    session.mechanism = text.toUpperCase();
    session.exchange = MECHANISMS[session.mechanism]?.(session);
    await session.exchange?.next("");
    if (session.exchange) return session.answer("AUTHENTICATE +");
    session.numeric("908", Object.keys(MECHANISMS).join(","), "are available SASL mechanisms");
    return session.numeric("904", "SASL authentication failed");
  }
  if (text.length > 400 || received.length > 4000) return session.numeric("905", "SASL message too long");
  session.exchange = exchange;
  const whole = text === "+" ? received : received + text;
  if (text.length === 400) session.received = whole;
  if (text.length === 400) return;
  const { done, value } = await exchange.next(fromBase64(whole).toString());
  const challenge = done ? value.last : value;
  for (const piece of challenge ? saslPieces(challenge) : []) session.answer(`AUTHENTICATE ${piece}`);
  if (!done || session.closed) return;
  session.exchange = undefined;
  const { account: member, refusal = "wrong" } = value;
  if (!member) {
    session.numeric("904", `SASL authentication failed: ${REFUSALS[refusal]}`);
    return session.server.refuse(session, session.nick, refusal);
  }
  session.server.options.explain?.(
    session.mechanism === "PLAIN"
      ? `${member.nick} told us the password; scrypt made it fit the verifier`
      : `${member.nick} and we proved to each other that we know the password, for this certificate, and told it neither way`,
  );
  session.server.admit(session, member);
  session.numeric("900", source(member.nick), member.nick, `You are now logged in as ${member.nick}`);
  session.numeric("903", "SASL authentication successful");
  return session.server.complete(session);
}

/** Only the first word of such a password would count, and be all that is needed to log in. */
const COLON_MISSING = "A password with spaces needs a colon before it, as in PASS :two words";

/** REGISTER: makes an account before connecting, of a password or of a verifier (IRCv3 draft/account-registration). */
async function register(session: Session, [name = "", email, secret = "", ...more]: readonly string[]): Promise<void> {
  const { server, wish } = session;
  const fail = (code: string, text: string) => session.reply("FAIL", "REGISTER", code, name, text);
  if (session.member) return fail("ALREADY_AUTHENTICATED", "You are logged in");
  if (!wish) return fail("NEED_NICK", "Send NICK first");
  if (name !== "*" && fold(name) !== fold(wish)) return fail("ACCOUNT_NAME_MUST_BE_NICK", "Send NICK with this name");
  if (email !== "*") return fail("UNACCEPTABLE_EMAIL", "No e-mail address is kept here: send *");
  if (more.length) return fail("UNACCEPTABLE_PASSWORD", COLON_MISSING);
  const verifier = readVerifier(secret);
  if (verifier === "bad" || !secret || secret.length > LIMITS.password) {
    return fail("UNACCEPTABLE_PASSWORD", "This is neither a password nor a verifier as all are here");
  }
  const result = await server.accounts.register(wish, verifier ?? secret, session);
  if (session.closed) return;
  if (typeof result === "string") {
    const codes: Partial<Record<Refusal, string>> = { "exists": "ACCOUNT_EXISTS", "bad nick": "BAD_ACCOUNT_NAME" };
    return fail(codes[result] ?? "TEMPORARILY_UNAVAILABLE", REFUSALS[result]);
  }
  session.reply("REGISTER", "SUCCESS", wish, "Account registered");
  if (verifier) return;
  server.admit(session, result);
  session.numeric("900", source(wish), wish, `You are now logged in as ${wish}`);
  return server.complete(session);
}

/** PASS: a password to log in with; after that, from who logged in by SCRAM, the verifier of a new one. */
function pass(session: Session, [secret = "", ...more]: readonly string[]): void | Promise<void> {
  const { member, mechanism, server } = session;
  if (more.length) return session.numeric("464", COLON_MISSING);
  const verifier = readVerifier(secret);
  if (member && !(verifier && mechanism.startsWith("SCRAM"))) return session.numeric("462", "You may not reregister");
  if (verifier === "bad" || (verifier && !member)) {
    return session.reply("FAIL", "PASS", "UNACCEPTABLE_PASSWORD", "This looks like a verifier, and is none for here");
  }
  if (!member || !verifier) {
    session.password = secret;
    return server.complete(session);
  }
  member.verifier = verifier;
  server.options.log(`${member.nick} changed the password`);
  session.reply("NOTE", "PASS", "PASSWORD_CHANGED", "Your password is changed");
}

/** NICK: a wish before logging in; after that the nick is the account's, and only its case can change. */
function nick(session: Session, [wish = ""]: readonly string[]): void | Promise<void> {
  const { server, member, welcome } = session;
  if (!wish) return session.numeric("431", "No nickname given");
  if (!isNick(wish)) return session.numeric("432", wish.split(" ")[0] || "*", REFUSALS["bad nick"]);
  if (!member || !welcome) {
    session.wish = wish;
    return server.complete(session);
  }
  if (fold(wish) !== fold(member.nick)) return session.numeric("484", "Your nick is your account and stays");
  const line = format("NICK", [wish], source(member.nick));
  if (wish === member.nick) return;
  member.nick = wish;
  server.announce(line, server.audience(member));
}

/** CAP: which extensions both sides know (IRCv3 capability negotiation). */
function cap(session: Session, [verb = "", argument = ""]: readonly string[]): void | Promise<void> {
  const { server, nick } = session;
  const values: Record<string, string> = { sasl: Object.keys(MECHANISMS).join(","), [REGISTRATION]: "before-connect" };
  const names = (Object.keys(CAP) as Cap[]).filter((name) => name !== REGISTRATION || !server.accounts.closed);
  const answer = (words: string[]) => {
    const lines = inLines(words);
    for (const line of lines.slice(0, -1)) session.reply("CAP", nick, verb.toUpperCase(), "*", line);
    session.reply("CAP", nick, verb.toUpperCase(), lines.at(-1) ?? "");
  };
  if (/^(LS|REQ)$/i.test(verb)) session.negotiating = !session.welcome;
  if (/^LS$/i.test(verb)) {
    const valued = Number(argument) >= 302;
    if (valued) session.caps |= CAP["cap-notify"];
    answer(names.map((name) => valued && values[name] ? `${name}=${values[name]}` : name));
  } else if (/^LIST$/i.test(verb)) answer(names.filter((name) => session.has(name)));
  else if (/^REQ$/i.test(verb)) {
    const wanted = argument.split(" ").filter(Boolean);
    const bits = wanted.map((word) =>
      names.includes(word.replace(/^-/, "") as Cap) && CAP[word.replace(/^-/, "") as Cap]
    );
    for (const [at, bit] of bits.every(Boolean) ? bits.entries() : []) {
      session.caps = wanted[at]?.startsWith("-") ? session.caps & ~bit : session.caps | Number(bit);
    }
    session.reply("CAP", nick, bits.every(Boolean) ? "ACK" : "NAK", argument);
  } else if (/^END$/i.test(verb)) {
    session.negotiating = false;
    return server.complete(session);
  } else session.numeric("410", verb || "*", "Invalid CAP command");
}

function joinRooms(session: Session, [names = ""]: readonly string[]): void {
  const { server, member } = session;
  if (!member) return;
  if (names === "0") return [...member.rooms].forEach((room) => server.part(member, room, "", session));
  for (const name of list(names)) {
    const room = server.rooms.get(fold(name));
    const dullest = !room && server.rooms.size >= LIMITS.rooms ? server.dullest : undefined;
    if (room && member.rooms.has(room)) continue;
    if (!isRoom(name)) session.numeric("476", name, `A room is # and ${LIMITS.room} bytes at most, no space, no comma`);
    else if (member.rooms.size >= LIMITS.roomsPerMember) {
      session.numeric("405", name, "You have joined too many channels");
    } else if (!room && server.rooms.size >= LIMITS.rooms && !dullest) {
      session.numeric("437", name, "There are too many channels");
    } else {
      if (dullest) server.closeRoom(dullest);
      server.join(member, room ?? server.openRoom(name), session);
    }
  }
}

/** MODE tells that there are none to set, beyond +i on oneself, which changes nothing. */
function mode(session: Session, [target = "", modes = ""]: readonly string[]): void {
  const room = session.server.rooms.get(fold(target));
  if (room && !modes) session.numeric("324", room.name, "+n");
  else if (room && /^[+-]?b$/.test(modes)) session.numeric("368", room.name, "End of channel ban list");
  else if (room) session.numeric("482", room.name, "You're not channel operator: nobody is");
  else if (target.startsWith("#")) session.numeric("403", target, "No such channel");
  else if (fold(target) !== fold(session.nick)) session.numeric("502", "Cant change mode for other users");
  else if (!modes) session.numeric("221", "+i");
  else if (!/^[+-]i*$/.test(modes)) session.numeric("501", "Unknown MODE flag");
}

/** Runs `act` for each room named that the member is in, and answers for the others. */
function forRooms(session: Session, names: string, act: (room: Room, member: Member) => void): void {
  const { server, member } = session;
  for (const name of list(names)) {
    const room = server.rooms.get(fold(name));
    if (room && member?.rooms.has(room)) act(room, member);
    else if (room) session.numeric("442", name, "You're not on that channel");
    else session.numeric("403", name, "No such channel");
  }
}

/** A row in the table of commands. */
interface Command {
  readonly least: number; // the parameters that it needs
  readonly about: string;
  readonly run: (session: Session, params: readonly string[], line: Line) => void | Promise<void>;
  readonly early: boolean; // it is there for those who have not logged in, too
}
const row = (least: number, about: string, run: Command["run"], early = false): Command => ({
  least,
  about,
  run,
  early,
});

export const COMMANDS: Readonly<Partial<Record<string, Command>>> = {
  CAP: row(1, "agree on extensions", cap, true),
  AUTHENTICATE: row(1, "log in by SASL", authenticate, true),
  REGISTER: row(3, "make an account", register, true),
  PASS: row(1, "log in, or register a free nick", pass, true),
  NICK: row(0, "say which nick you want", nick, true),
  USER: row(4, "say your real name", (session, params) => {
    if (session.welcome) return session.numeric("462", "You may not reregister");
    session.realName = cut(params[3] ?? "", LIMITS.text);
    return session.server.complete(session);
  }, true),
  PING: row(1, "ask for a PONG", (session, [token = ""]) => session.reply("PONG", SERVER, token), true),
  PONG: row(0, "answer a PING", (session) => session.pong(), true),
  ERROR: row(0, "for servers only", () => {}, true),
  QUIT: row(0, "leave", (session, [why]) => {
    if (session.member) session.member.reachedAt = now();
    session.close(why ? `Quit: ${cut(why, LIMITS.text)}` : "Quit");
  }, true),
  JOIN: row(1, "enter rooms", joinRooms),
  PART: row(
    1,
    "leave rooms",
    (session, [names = "", why = ""]) =>
      forRooms(session, names, (room, member) => session.server.part(member, room, cut(why, LIMITS.text), session)),
  ),
  TOPIC: row(
    1,
    "show or set a room's topic",
    (session, [name = "", text]) =>
      forRooms(session, name, (room, member) => {
        if (text === undefined) return tellTopic(session, room);
        const event = session.server.happens(room, "TOPIC", member.nick, cut(text, LIMITS.topic));
        room.topic = text ? event : undefined;
        session.server.deliver(event, room.members, session);
      }),
  ),
  NAMES: row(0, "list who is in rooms", (session, [names = "*"]) => {
    for (const name of list(names)) {
      const room = session.server.rooms.get(fold(name));
      if (room) tellNames(session, room);
      else session.numeric("366", name, "End of /NAMES list");
    }
  }),
  LIST: row(0, "list rooms", (session, [names]) => {
    session.numeric("321", "Channel", "Users  Name");
    const wanted = names === undefined ? undefined : list(fold(names));
    for (const [key, { name, members, topic }] of session.server.rooms) {
      if (wanted?.includes(key) ?? true) session.numeric("322", name, String(members.size), topic?.text ?? "");
    }
    session.numeric("323", "End of /LIST");
  }),
  PRIVMSG: row(1, "say something to rooms or nicks", say),
  NOTICE: row(1, "the same, never answered", say),
  TAGMSG: row(1, "send tags only", say),
  CHATHISTORY: row(3, "read what was said", chathistory),
  WHO: row(0, "list members", who),
  WHOIS: row(1, "tell about a member", whois),
  USERHOST: row(1, "tell whether members are away", (session, nicks) => {
    const found = nicks.map((nick) => session.server.present(nick)).filter((member) => member !== undefined);
    session.numeric("302", found.map(({ nick, away }) => `${nick}=${away ? "-" : "+"}${nick}@chat`).join(" "));
  }),
  ISON: row(1, "tell which members are here", (session, params) => {
    const found = params.join(" ").split(" ").map((nick) => session.server.present(nick)?.nick ?? "");
    session.numeric("303", found.filter(Boolean).join(" "));
  }),
  AWAY: row(0, "say that you are away, or are back", (session, [text = ""]) => {
    const { server, member } = session;
    if (!member) return;
    member.away = cut(text, LIMITS.text);
    session.numeric(text ? "306" : "305", `You ${text ? "have been" : "are no longer"} marked as being away`);
    server.announceAway(member, server.audience(member));
  }),
  MODE: row(1, "show modes", mode),
  MOTD: row(0, "show the message of the day", tellMotd),
  LUSERS: row(0, "count who is here", tellUsers),
  VERSION: row(
    0,
    "tell the version",
    (session) => session.numeric("351", `chat-${VERSION}`, SERVER, "IRC over TLS 1.3"),
  ),
  TIME: row(0, "tell the time", (session) => session.numeric("391", SERVER, new Date().toUTCString())),
  INFO: row(0, "list these commands", (session) => {
    session.numeric("371", `chat ${VERSION}: an encrypted group chat. The commands of this server:`);
    for (const [name, command] of Object.entries(COMMANDS)) session.numeric("371", `${name}: ${command?.about}`);
    session.numeric("374", "End of /INFO list");
  }),
};

// ---- The operator's console

/** A row in a table of what a person can type: what it takes, what it does. */
interface Row<Run> {
  readonly usage: string;
  readonly about: string;
  readonly run: Run;
}
export type Table<Run> = Readonly<Partial<Record<string, Row<Run>>>>;
/** An order of the operator's; what it returns is shown. */
type Order = (server: Server, nick: string, rest: string) => string | readonly string[];
const order = (usage: string, about: string, run: Order): Row<Order> => ({ usage, about, run });

export const CONSOLE: Table<Order> = {
  who: order(
    "",
    "who is here, from where, since when, idle for how long",
    ({ accounts }) =>
      [...accounts.all.values()].filter(({ present }) => present).map((member) => {
        const from = [...member.sessions].map(({ address, since }) => `${address} since ${clock(since)}`);
        return `${member.nick.padEnd(LIMITS.nick)} ${from.join(", ") || "connection lost"}, idle ${
          idleSeconds(member)
        } s`;
      }),
  ),
  say: order("TEXT", "say something to everybody", (server, nick, rest) => {
    for (const room of server.rooms.values()) {
      server.deliver(server.happens(room, "NOTICE", SERVER, `${nick} ${rest}`.trim()), room.members);
    }
    return "said";
  }),
  kick: order("NICK [REASON]", "end somebody's connections and keep the account out", (server, nick, rest) => {
    const member = server.accounts.find(nick);
    if (!member) return `no account ${nick}`;
    server.accounts.barred.add(fold(nick));
    server.kick(member, rest ? `Kicked: ${rest}` : "Kicked by the operator");
    return `${member.nick} is out, and stays out until /admit ${member.nick}`;
  }),
  lock: order("", "stop registration", (server) => lock(server, true)),
  unlock: order("", "let everybody register again", (server) => lock(server, false)),
  admit: order("NICK", "let a nick register though locked, or back in after /kick", ({ accounts }, nick) => {
    accounts.barred.delete(fold(nick));
    accounts.admitted.add(fold(nick));
    return `${nick} may come in`;
  }),
  forget: order("NICK", "delete an account", (server, nick) => {
    const member = server.accounts.find(nick);
    if (member) server.forget(member);
    return member ? `${nick} is no account any more` : `no account ${nick}`;
  }),
};

const clock = (time: number) => new Date(time).toTimeString().slice(0, 5);

function lock(server: Server, closed: boolean): string {
  server.accounts.closed = closed;
  const change = closed ? ["DEL", REGISTRATION] : ["NEW", `${REGISTRATION}=before-connect`];
  for (const session of server.sessions) {
    if (session.has("cap-notify")) session.send(toBytes(format("CAP", [session.nick, ...change], SERVER)));
  }
  return closed ? "nobody can register now, but those whom you /admit" : "everybody can register again";
}

// ---- The listener

export interface ServeOptions extends ServerOptions {
  readonly host: string;
  readonly port: number; // 0 is any that is free
  readonly identity: Identity;
  readonly keylog?: ((line: Buffer) => void) | undefined; // takes the TLS keys
}

export interface Serving {
  readonly server: Server;
  readonly port: number;
  stop(reason: string): Promise<void>; // tells everybody, writes out what they are owed, and closes
}

/**
 * Opens a room: listens for TLS 1.3 and serves who connects. @throws {Fault} if it cannot listen there.
 * @example const { port, stop } = await serve({ host: "127.0.0.1", port: 0, identity: makeIdentity({}) });
 */
export async function serve({ host, port, identity, keylog, ...options }: ServeOptions): Promise<Serving> {
  const warning = keylog && "This server prints its TLS keys, for a class: whoever has them can read along";
  const server = new Server({ ...options, binding: identity.binding, ...warning && { warning } });
  const sockets = new Map<tls.TLSSocket, () => void>(); // and what to do a few times a second
  const raw = new Map<string, tls.TLSSocket>(); // the sockets below TLS, by their other end
  const farEnd = ({ remoteAddress, remotePort }: tls.TLSSocket) => `${remoteAddress} ${remotePort}`;
  const { key, cert } = identity;
  const { handshakeMs: handshakeTimeout, stopMs } = LIMITS;
  const settings = { key, cert, minVersion: "TLSv1.3", ALPNProtocols: ["irc"], handshakeTimeout } as const;
  const certificate = new crypto.X509Certificate(cert);
  const listener = tls.createServer(settings, (socket) => {
    socket.on("close", () => sockets.delete(socket));
    sockets.set(socket, attach(server, socket, raw.get(farEnd(socket)), certificate));
  });
  const knocking = new Map<string, number>(); // connections of each network, those without TLS among them
  listener.on("connection", (socket: tls.TLSSocket) => {
    const network = networkOf(socket.remoteAddress ?? "");
    const count = (knocking.get(network) ?? 0) + 1;
    if (count > 2 * server.options.perAddress) return void socket.destroy();
    knocking.set(network, count);
    const end = farEnd(socket);
    raw.set(end, socket);
    socket.on("close", () => {
      raw.delete(end);
      const left = (knocking.get(network) ?? 0) - 1;
      void (left > 0 ? knocking.set(network, left) : knocking.delete(network));
    });
  });
  if (keylog) listener.on("keylog", keylog);
  listener.maxConnections = server.options.maxClients + server.mostStrangers;
  listener.on("tlsClientError", ({ message }, socket) => {
    const [, what] = HANDSHAKE_PROBLEMS.find(([pattern]) => pattern.test(message)) ?? [];
    if (socket.remoteAddress) server.failed(socket.remoteAddress, "no TLS", what ?? "it hung up");
    socket.destroy();
  });
  await new Promise<void>((resolve, reject) => {
    listener.on("error", (error) => reject(listenFault(error, host, port)));
    listener.listen(port, host, resolve);
  });
  const timers = [
    setInterval(() => server.sweep(), 1000),
    setInterval(() => sockets.forEach((look) => look()), LIMITS.silentMs),
  ];
  const address = listener.address();
  const stop = async (reason: string) => {
    timers.forEach(clearInterval);
    listener.close();
    for (const session of server.sessions) session.close(reason);
    const late = setTimeout(() => [...sockets.keys()].forEach((socket) => socket.destroy()), stopMs);
    await Promise.all([...sockets.keys()].map((socket) => new Promise((closed) => socket.on("close", closed))));
    clearTimeout(late);
  };
  return { server, stop, port: typeof address === "object" && address ? address.port : port };
}

/**
 * A paused socket reads on until so many bytes wait. If they come one by one each of them is an object, and they cost a
 * hundred times their size. So a socket that is paused is made to believe that they wait already: this is put there.
 */
let enough: Buffer | undefined;

/** Makes a session of a socket, and returns what is to be done for it a few times a second. `raw` is the one below TLS. */
function attach(
  server: Server,
  socket: tls.TLSSocket,
  raw: tls.TLSSocket | undefined,
  certificate: crypto.X509Certificate,
): () => void {
  const { explain } = server.options;
  const who = `${socket.remoteAddress}:${socket.remotePort}`;
  if (explain) facts(socket, certificate).forEach((fact) => explain(`${who} ${fact}`));
  let flowing = true;
  let textual = 0; // bytes on the socket that brought text: Node gives a chunk for each record, Deno for several
  const stop = enough ??= Buffer.alloc(socket.readableHighWaterMark);
  const session = server.open({
    address: socket.remoteAddress ?? "",
    write: (bytes) => {
      explain?.(`${who} wrote ${recorded(bytes.length)}`);
      return socket.write(bytes);
    },
    pending: () => socket.writableLength,
    read: (wanted) => {
      // Deno goes on reading a paused socket, without end: there the bytes are to come, and to be counted.
      if (wanted === flowing || "Deno" in globalThis) return;
      flowing = wanted;
      if (!wanted) return void socket.pause().unshift(stop);
      socket.read(stop.length);
      socket.read(Math.min(socket.readableLength, stop.length)); // what waits, as one piece
      if (flowing) socket.resume();
    },
    end: (atOnce) => {
      if (atOnce) return void socket.destroy();
      socket.end();
      setTimeout(() => socket.destroy(), LIMITS.stopMs).unref();
    },
  });
  socket.setNoDelay(true);
  socket.allowHalfOpen = true;
  socket.on("data", (chunk: Buffer) => {
    if (chunk.buffer === stop.buffer) return;
    textual += chunk.length * ("Deno" in globalThis ? 2 : 1) + RECORD_OVERHEAD;
    explain?.(`${who} read ${recorded(chunk.length)}`);
    session.receive(chunk);
  });
  socket.on("end", () => session.ended());
  socket.on("drain", () => session.drained());
  socket.on("error", (error) => session.lost(error.message));
  socket.on("close", () => session.lost("Connection closed"));
  return () => {
    if (flowing) session.countSilent((raw?.bytesRead ?? 0) - textual);
  };
}

/** What went wrong before there was TLS, for the log. */
const HANDSHAKE_PROBLEMS: readonly (readonly [RegExp, string])[] = [
  [/http.request/i, "that was HTTP"],
  [/version.number|record|InvalidMessage|packet/i, "that was not TLS"],
  [/unsupported.protocol|protocol.version|PeerIncompatible/i, "it does not know TLS 1.3"],
  [/timeout/i, "the handshake took too long"],
  [/alert|unknown.ca/i, "it did not trust the certificate"],
];

function listenFault({ code = "", message }: NodeJS.ErrnoException, host: string, port: number): Fault {
  if (/EADDRINUSE|in use/i.test(code + message)) {
    return new Fault(`port ${port} is in use already`, `${CHAT} serve :${port + 1} takes the next one`);
  }
  if (code === "EACCES") {
    return new Fault(`listening on port ${port} is not permitted`, "ports from 1024 on are free to use");
  }
  if (code === "EADDRNOTAVAIL") {
    return new Fault(`${host} is not an address of this machine`, "0.0.0.0 is all that it has");
  }
  if (code === "ENOTFOUND") return new Fault(`there is no host called ${host}`, "127.0.0.1 is this machine");
  return new Fault(`cannot listen on ${host}:${port}: ${message}`, `${CHAT} help serve`);
}
/* =====================================================================================================================
 * Screen
 * - What was said goes to standard output, in a pipe as `TIME<TAB>NICK<TAB>TEXT`. Everything else goes to standard
 *   error as `chat: …` in lower case, with a `chat: hint: …` where there is something to try.
 * - On a terminal both go above the prompt, which stays at the bottom. readline edits the line but draws nothing; the
 *   prompt and the line are drawn here, in rows one cell narrower than the terminal, so that it never wraps them
 *   itself. A turn of the event loop draws once, whatever came in.
 * - Plain mode is for screen readers and dumb terminals: nothing is drawn twice, and there is no colour.
 * - Every text goes through `clean` here, so that nothing that came from the wire can control the terminal. Only the
 *   head of a message is taken as it is: its names are clean, and `paint` has put its colours around them.
 * ================================================================================================================== */

/** Reads an environment variable. Empty is unset, and so is what may not be read (Deno without --allow-env). */
export function environment(name: string): string | undefined {
  try {
    return process.env[name] || undefined;
  } catch {
    return undefined;
  }
}

/** Writes to a standard stream. A failure is an `error` event of it, also where the runtime throws instead (Deno). */
function write(stream: NodeJS.WriteStream, text: string | Buffer): boolean {
  try {
    return stream.write(text);
  } catch (error) {
    return stream.emit("error", error);
  }
}

/** How many colours there are: 0, 16 or 256. */
function colours(): number {
  const [force, term = ""] = [environment("FORCE_COLOR"), environment("TERM")];
  if (force) return force === "0" || force === "false" ? 0 : force === "1" || force === "true" ? 16 : 256;
  if (environment("NO_COLOR") || !process.stdout.isTTY || term === "dumb") return 0;
  return /256|kitty|direct/.test(term) || environment("COLORTERM") || process.platform === "win32" ? 256 : 16;
}

let segmenter: Intl.Segmenter | undefined; // is slow to make, and many a run needs none

/** What one sees as the characters of a text. */
function graphemes(text: string): string[] {
  if (/^[ -~]*$/.test(text)) return [...text];
  segmenter ??= new Intl.Segmenter(undefined, { granularity: "grapheme" });
  return Array.from(segmenter.segment(text), ({ segment }) => segment);
}

const WIDE = new RegExp(
  "[\\p{EPres}\\uFE0F\\u1100-\\u115F\\u2E80-\\u303E\\u3041-\\uA4CF\\uA960-\\uA97C\\uAC00-\\uD7A3\\uF900-\\uFAFF" +
    "\\uFE30-\\uFE6F\\uFF01-\\uFF60\\uFFE0-\\uFFE6\\u{20000}-\\u{3FFFD}]",
  "u",
);

/** The cells that a text takes on a terminal. */
export function cells(text: string): number {
  if (/^[ -~]*$/.test(text)) return text.length;
  return graphemes(text).reduce((sum, one) => sum + (WIDE.test(one) ? 2 : /^[\p{M}\p{Cf}]/u.test(one) ? 0 : 1), 0);
}

/** Puts what one sees as characters into pieces that measure at most `most` each. */
function pieces(chars: readonly string[], most: number, measure: (char: string) => number): string[] {
  const found = [""];
  let used = 0;
  for (const one of chars) {
    if (used + measure(one) > most) used = found.push("") * 0;
    found[found.length - 1] += one;
    used += measure(one);
  }
  return found;
}
const rowsOf = (text: string, width: number) => pieces(graphemes(text), width, cells);

/**
 * Breaks a text into rows of at most `width` cells: between words, and within one that is longer than a row. But a link
 * stays whole, so that one can click it; the terminal wraps it.
 */
export function wrap(text: string, width: number): string[] {
  const rows = [""];
  for (const word of text.split(/(?<= )(?=[^ ])/)) {
    const [last = "", length] = [rows.at(-1), cells(word.trimEnd())];
    if (cells(last) + length <= width) rows[rows.length - 1] = last + word;
    else rows.push(...length <= width || word.includes("://") ? [word] : rowsOf(word, width));
  }
  return rows.map((row) => row.trimEnd()).filter((row, at) => row || at || rows.length === 1);
}

/** What makes a terminal put marks around a paste; everything without them was typed, however fast it came. */
const BRACKETED_PASTE = { on: "\x1b[?2004h", off: "\x1b[?2004l", start: "\x1b[200~", end: "\x1b[201~" } as const;

/** Takes bracketed pastes out of what a terminal sends, before readline sees it: Deno's does not know them. */
function takePastes(input: NodeJS.ReadStream, take: (text: string) => void): void {
  const { start, end } = BRACKETED_PASTE;
  const emit = input.emit.bind(input) as (name: string, ...values: readonly unknown[]) => boolean;
  const toBytes = (text: string) => Buffer.from(text, "latin1");
  const handOn = (text: string) => text !== "" && emit("data", toBytes(text));
  let pending = ""; // what came and was not handed on, a character per byte
  let pasting = false;
  input.emit = (name: string, ...values: readonly unknown[]) => {
    if (name !== "data") return emit(name, ...values);
    pending += (values[0] as Buffer).toString("latin1");
    for (let at; (at = pending.indexOf(pasting ? end : start)) >= 0;) {
      const text = pending.slice(0, at);
      pending = pending.slice(at + start.length);
      if (pasting) take(toBytes(text).toString());
      else handOn(text);
      pasting = !pasting;
    }
    if (pasting) return true;
    const held = [5, 4, 3, 2].find((length) => pending.endsWith(start.slice(0, length))) ?? 0; // half a mark
    const typed = pending.slice(0, pending.length - held);
    pending = pending.slice(typed.length);
    return handOn(typed);
  };
}

/** The person's side of the program: a terminal, a plain one, or a pipe. */
export class Screen {
  readonly kind: "terminal" | "plain" | "pipe";
  #onLines: ((lines: readonly string[], pasted: boolean) => void) | undefined;
  onEnd: () => void = () => {}; // there is no more input, or the terminal has gone
  onInterrupt: () => void = () => {}; // Ctrl-C or Ctrl-D where no line is typed and nothing is asked
  onTab: (before: string) => readonly string[] = () => []; // what could stand in place of the text before the cursor
  readonly #readline: readline.Interface;
  readonly #close: () => void; // readline itself calls its `close` at Ctrl-D, which does not end anything here
  readonly #colours: number;
  #prompt = "";
  #asking: { question: string; hidden: boolean; answer: (text: string | undefined) => void } | undefined;
  #early: { readonly lines: readonly string[]; readonly pasted: boolean }[] = []; // entered before it was taken
  #printed: string[] = []; // to be shown
  #due = false;
  #drawn = { rows: [0], row: 0, column: 0 }; // at the bottom: the cells of each row, and where the cursor is
  #tabs: { options: readonly string[]; next: number } | undefined;
  #gone = false; // the terminal is
  #closed = false;

  constructor(plain = false) {
    const tty = process.stdin.isTTY && process.stdout.isTTY;
    this.kind = !tty ? "pipe" : plain || environment("TERM") === "dumb" ? "plain" : "terminal";
    this.#colours = this.kind === "plain" ? 0 : colours();
    const nowhere = {
      columns: 1_000_000,
      write: this.#echo,
      on: () => nowhere,
      off: () => nowhere,
      end: () => nowhere,
    };
    this.#readline = readline.createInterface({
      input: process.stdin,
      ...tty
        ? { output: Object.assign(nowhere, { removeListener: nowhere.off }) as unknown as NodeJS.WriteStream }
        : {},
      terminal: tty,
      crlfDelay: Infinity,
      completer: (line: string) => [[], line],
    });
    this.#readline.on("line", (line) => this.#entered(line));
    const { close } = this.#readline;
    this.#close = () => {
      try {
        close.call(this.#readline);
      } catch {
        // The terminal has gone, and cannot be put into its former mode.
      }
    };
    this.#readline.on("history", (lines) => this.#asking && lines.shift()); // an answer is not to be recalled
    this.#readline.on("SIGINT", () => this.#interrupt());
    this.#readline.on("SIGCONT", () => {
      this.#readline.resume(); // it has paused, and counts on a prompt of its own to go on
      this.#redraw();
    });
    this.#readline.on("close", () => {
      this.#asking?.answer(undefined);
      if (!this.#closed) this.onEnd();
    });
    process.stdout.on("error", () => tty ? this.onEnd() : this.onInterrupt()); // nobody reads on
    if (!tty) return;
    process.stdin.prependListener("end", () => this.#gone = true);
    this.#readline.close = () => this.#gone ? this.#close() : this.#interrupt(); // by Ctrl-D
    if (this.kind !== "terminal") return;
    write(process.stdout, BRACKETED_PASTE.on);
    takePastes(process.stdin, (text) => this.#paste(text));
    process.stdin.on("keypress", (_, key?: { name?: string; ctrl?: boolean }) => this.#pressed(key));
    process.stdout.on("resize", () => this.#redraw());
  }
  /** What readline draws is seen in plain mode only, and there but for what is hidden. */
  #echo = (text: string): boolean =>
    this.kind !== "plain" || this.#asking?.hidden && text.trim() ? true : write(process.stdout, text);
  get columns(): number {
    return process.stdout.columns || 80;
  }
  /** Takes what is entered, also what was entered before. */
  set onLines(take: (lines: readonly string[], pasted: boolean) => void) {
    this.#onLines = take;
    for (const { lines, pasted } of this.#early.splice(0)) take(lines, pasted);
  }
  set prompt(text: string) {
    this.#prompt = text;
    this.#redraw();
  }
  /** Paints with an SGR code, if there are colours. */
  paint(code: number | string, text: string): string {
    return this.#colours && text ? `\x1b[${code}m${text}\x1b[0m` : text;
  }
  /** A nick in its colour, which is always the same, and readable on black and on white. */
  nick(name: string): string {
    const hash = sha256(fold(name)).readUInt32BE();
    const many = [26, 31, 61, 64, 67, 94, 97, 98, 100, 125, 130, 131, 132, 133, 136, 160, 161, 166, 168, 172];
    return this.paint(this.#colours > 16 ? `38;5;${many[hash % many.length]}` : 31 + hash % 6, name);
  }
  /** Shows a line of what is said. On a terminal a long text goes on behind its head, not under it. */
  say(head: string, text: string, code: number | string = ""): void {
    text = clean(text);
    if (this.kind !== "terminal") return void write(process.stdout, `${head}${text}\n`);
    const indent = Math.min(cells(head.replace(/\p{Cc}\[[\d;]*m/gu, "")), this.columns >> 1);
    const paint = (row: string) => code === "" ? row : this.paint(code, row);
    const [first = "", ...rest] = wrap(text, this.columns - 1 - indent);
    this.#print(head + paint(first), ...rest.map((row) => " ".repeat(indent) + paint(row)));
  }
  /** Shows a line of the program's; `--` marks it as one, where what people say may stand beside it. */
  note(text: string, mark = "-- "): void {
    if (this.kind === "pipe") write(process.stderr, `chat: ${clean(text)}\n`);
    else this.say(this.paint(2, mark), text, 2);
  }
  bell(): void {
    if (this.kind !== "pipe") write(process.stdout, "\x07");
  }
  clear(): void {
    if (this.kind !== "terminal") return;
    write(process.stdout, "\x1b[H\x1b[2J\x1b[3J");
    this.#drawn = { rows: [0], row: 0, column: 0 };
    this.#redraw();
  }
  /**
   * Asks a person for a line; undefined if nobody is there to answer, or the person cancels. What is hidden is never
   * shown. A line that is half typed, or the rest of a paste, is no answer: it is put aside for as long.
   */
  async ask(question: string, hidden = false): Promise<string | undefined> {
    if (this.kind === "pipe" || this.#closed) return undefined;
    question = clean(question);
    const typed = this.#early.findIndex(({ pasted }) => !pasted);
    if (typed >= 0) return this.#early.splice(typed, 1)[0]?.lines[0];
    const { line, cursor } = this.#readline;
    this.#edit("");
    if (this.kind === "plain") write(process.stdout, question);
    const text = await new Promise<string | undefined>((answer) => {
      this.#asking = { question, hidden, answer };
      this.#redraw();
    });
    this.#asking = undefined;
    if (this.kind === "terminal") this.#print(question + (hidden ? "" : text ?? ""));
    this.#edit(line, cursor);
    return text;
  }
  close(): void {
    if (this.#closed) return;
    this.#draw(false);
    this.#closed = true;
    if (this.kind === "terminal") write(process.stdout, BRACKETED_PASTE.off);
    this.#close();
  }

  #entered(line: string): void {
    const { answer } = this.#asking ?? {};
    this.#asking = undefined;
    if (answer) answer(line);
    else if (!this.#gone) this.#enter([line], false); // else nobody has pressed Enter
  }
  #enter(lines: readonly string[], pasted: boolean): void {
    if (this.#onLines) this.#onLines(lines, pasted);
    else this.#early.push({ lines, pasted });
  }
  /** Puts a text in place of the line that is being typed. */
  #edit(text: string, cursor = text.length): void {
    if (this.kind === "plain" && text) write(process.stdout, text);
    Object.assign(this.#readline, { line: text, cursor });
    this.#redraw();
  }
  /** Cancels the question, or else clears the line; what it means where there is neither is for others to say. */
  #interrupt(): void {
    const [{ line }, asking] = [this.#readline, this.#asking];
    if (this.kind === "plain") write(process.stdout, "\n");
    this.#edit("");
    this.#asking = undefined;
    if (asking) asking.answer(undefined);
    else if (!line) this.onInterrupt();
  }
  /**
   * A paste's lines are entered, but for the last if no line break follows it. In an answer, or in a command that is
   * half typed, a paste is a part of that one line: what was meant for one person must not be said to everybody.
   */
  #paste(pasted: string): void {
    const text = pasted.replace(/\r\n?/g, "\n").replace(/[^\P{Cc}\t\n]/gu, "");
    const [before, after] = [
      this.#readline.line.slice(0, this.#readline.cursor),
      this.#readline.line.slice(this.#readline.cursor),
    ];
    if (this.#asking || before.startsWith("/") || !text.includes("\n")) {
      const inserted = before + text.replace(/\n+$/, "").replaceAll("\n", " ");
      return this.#edit(inserted + after, inserted.length);
    }
    const lines = (before + text).split("\n");
    const last = lines.pop() ?? "";
    this.#edit(last + after, last.length);
    this.#enter(lines, true);
  }
  #pressed(key?: { name?: string; ctrl?: boolean }): void {
    if (key?.ctrl && key.name === "l") this.clear();
    const { line, cursor } = this.#readline; // where readline has put a tab that was pasted
    if (key?.name === "tab" && (this.#asking || line[cursor - 1] !== "\t")) this.#complete();
    else this.#tabs = undefined;
    this.#redraw();
  }
  #complete(): void {
    const before = this.#readline.line.slice(0, this.#readline.cursor).replace(this.#asking ? /\t/g : "", "");
    const { options, next } = this.#tabs ?? { options: this.#asking ? [] : this.onTab(before), next: 0 };
    this.#tabs = { options, next: (next + 1) % options.length };
    this.#readline.write(null, { ctrl: true, name: "u" }); // removes what is before the cursor
    this.#readline.write(options[next] ?? before);
  }
  #print(...rows: readonly string[]): void {
    this.#printed.push(...rows);
    this.#redraw();
  }
  #redraw(): void {
    if (this.#due || this.#closed || this.kind !== "terminal") return;
    this.#due = true;
    setImmediate(() => this.#closed || this.#draw(true));
  }
  /** Erases what is drawn at the bottom, shows what is to be shown, and draws the prompt again. */
  #draw(withPrompt: boolean): void {
    this.#due = false;
    if (this.kind !== "terminal") return;
    const { columns } = this; // the terminal may have become narrower, and have wrapped the rows
    const above = this.#drawn.rows.slice(0, this.#drawn.row).map((width) => Math.max(1, Math.ceil(width / columns)));
    const up = above.reduce((sum, rows) => sum + rows, 0) + Math.floor(this.#drawn.column / columns);
    let out = `\r${up ? `\x1b[${up}A` : ""}\x1b[J${this.#printed.map((row) => `${row}\r\n`).join("")}`;
    this.#printed = [];
    this.#drawn = { rows: [0], row: 0, column: 0 };
    if (withPrompt) {
      const { rows, row, column } = this.#layOut(columns - 1);
      const below = rows.length - 1 - row;
      out += `${rows.join("\r\n")}${below ? `\x1b[${below}A` : ""}\r${column ? `\x1b[${column}C` : ""}`;
      this.#drawn = { rows: rows.map(cells), row, column };
    }
    write(process.stdout, out);
  }
  /** The prompt and the line as rows, no more than fit, and where the cursor is in them. */
  #layOut(width: number): { rows: string[]; row: number; column: number } {
    const { question, hidden } = this.#asking ?? { question: this.#prompt, hidden: false };
    const [line, cursor] = hidden ? ["", 0] : [this.#readline.line, this.#readline.cursor];
    const shown = (text: string) => graphemes(text).map((one) => clean(one)).join("");
    const rows = rowsOf(question + shown(line), width);
    const before = rowsOf(question + shown(line.slice(0, cursor)), width);
    const most = Math.max(1, (process.stdout.rows || 24) - 1);
    const top = Math.max(0, before.length - most);
    return { rows: rows.slice(top, top + most), row: before.length - 1 - top, column: cells(before.at(-1) ?? "") };
  }
}
/* =====================================================================================================================
 * Client
 * Connect, decide whether to trust, log in, talk; and again when the connection is lost, until somebody leaves. What is
 * said stays in the outbox until the server has acknowledged it. Each line has a number, by which the server knows one
 * that it has already.
 * ================================================================================================================== */

export interface JoinOptions {
  readonly host: string;
  readonly port: number;
  readonly screen: Screen;
  readonly pin?: string | undefined; // the key that the server must have, whoever vouches for another
  readonly nick?: string | undefined;
  readonly password?: string | undefined;
  readonly room?: string | undefined; // the one to talk in; the server's first
  readonly ca?: string | undefined; // PEM text of the roots to trust instead of the runtime's
  readonly timeoutMs?: number | undefined; // see LIMITS
  readonly backOffMs?: (tries: number) => number; // how long to wait before connecting once more
  readonly explain?: boolean; // tell what happens on the connection
  readonly keylog?: boolean; // print the TLS keys to standard error
}

/** A connection to a server: lines in and out. */
class Link {
  readonly socket: tls.TLSSocket;
  readonly certificate: crypto.X509Certificate | undefined;
  trust = ""; // why the server is trusted
  welcomedAt = 0; // when one was logged in, by the monotonic clock; 0 if one is not
  ended = ""; // why the connection ended; empty while it has not
  heard = now();
  asked = false; // a PING has asked since
  readonly caps = new Set<string>();
  scram = false; // it is a server of ours, which knows SCRAM-SCRYPT-PLUS and numbered lines
  explain: (text: string) => void = () => {};
  readonly #lines: Line[] = [];
  #wake: () => void = () => {};
  constructor(socket: tls.TLSSocket) {
    this.socket = socket;
    this.certificate = socket.getPeerX509Certificate(); // once: Node 20 does not give it twice
    const splitter = new Splitter(LIMITS.serverTagBytes);
    socket.on("data", (chunk: Buffer) => {
      this.heard = now();
      this.asked = false;
      this.explain(`read ${recorded(chunk.length)}`);
      splitter.push(chunk);
      for (let split; (split = splitter.next());) if (split.text) this.#take(parse(split.text));
    });
    socket.on("error", (error) => this.end(error.message));
    socket.on("close", () => this.end("the server closed the connection"));
  }
  #take(line: Line): void {
    if (line.command === "PING") return this.send("PONG", line.params);
    if (line.command === "ERROR") return this.end(said(line));
    this.#lines.push(line);
    this.#wake();
  }
  end(why: string): void {
    this.ended ||= why;
    this.socket.destroy();
    this.#wake();
  }
  send(command: string, params: readonly string[], tags: readonly Tag[] = []): void {
    const line = `${format(command, params, "", tags)}\r\n`;
    if (this.ended) return;
    this.explain(`wrote ${recorded(Buffer.byteLength(line))}`);
    this.socket.write(line);
  }
  facts(): string[] {
    return [...facts(this.socket, this.certificate), this.trust && `trusted, because ${this.trust}`];
  }
  /** Sends a message of a SASL exchange. */
  authenticate(message: string): void {
    for (const piece of saslPieces(message)) this.send("AUTHENTICATE", [piece]);
  }
  /** The next line, of these commands if any are named. @throws {Fault} once the connection has ended. */
  async next(...commands: readonly string[]): Promise<Line> {
    for (;;) {
      const line = this.#lines.shift();
      if (line && (!commands.length || commands.includes(line.command))) return line;
      if (!line && this.ended) throw new Lost(this.ended, "is the server still running?");
      if (!line) await new Promise<void>((wake) => this.#wake = wake);
    }
  }
}

/** What goes wrong while connecting, by what the runtimes say about it: what that means, and what to try. */
const CONNECT_FAULTS: readonly (readonly [pattern: RegExp, what: string, hint: string])[] = [
  [/ECONNREFUSED|refused/i, "nobody listens there", `is the server running? ${CHAT} serve starts one`],
  [/ENOTFOUND|EAI_AGAIN|lookup|resolve/i, "there is no such host", "the line to join with is on the server's screen"],
  [
    /alert.*version|unsupported.protocol|protocol.version|HandshakeFailure/i,
    "it does not know TLS 1.3",
    "chat takes nothing older",
  ],
  [/no.application.protocol/i, "it knows TLS, but is no chat", "is it the right port?"],
  [
    /wrong.version|packet|record|corrupt|InvalidContentType|InvalidMessage/i,
    "it is no TLS server",
    "is it the right port?",
  ],
  [
    /ECONNRESET|disconnected|closed/i,
    "it closed the connection while TLS was set up",
    "is it a chat server, and has it room?",
  ],
  [
    /ETIMEDOUT|EHOSTUNREACH|ENETUNREACH|timed out|unreachable/i,
    "nothing answers there",
    "is there a firewall in between?",
  ],
];

const isIp = (host: string) => /^[\d.]+$|:/.test(host);

/** Opens a TLS connection. Whether to trust the server is decided afterwards, before anything is sent. */
function connect({ host, port, ca, keylog }: JoinOptions): Promise<Link> {
  return new Promise((resolve, reject) => {
    const socket = tls.connect({
      host,
      port,
      ALPNProtocols: ["irc"],
      minVersion: "TLSv1.3",
      rejectUnauthorized: false,
      checkServerIdentity: () => undefined, // the chain is judged apart from the name
      ...isIp(host) ? {} : { servername: host },
      ...ca ? { ca } : {},
    });
    const fail = (why: string) => {
      clearTimeout(timer);
      const [, what, hint] = CONNECT_FAULTS.find(([pattern]) => pattern.test(why)) ?? ["", why, "is it a chat server?"];
      socket.destroy();
      reject(new Lost(`cannot join ${host}:${port}: ${what}`, hint));
    };
    const timer = setTimeout(() => fail("timed out"), LIMITS.handshakeMs);
    socket.on("error", (error: NodeJS.ErrnoException) => fail(`${error.code} ${error.message}`));
    socket.on("close", () => fail("closed"));
    if (keylog) socket.on("keylog", (line) => write(process.stderr, line));
    socket.setNoDelay(true);
    socket.once("secureConnect", () => {
      clearTimeout(timer);
      socket.removeAllListeners("error").removeAllListeners("close");
      resolve(new Link(socket));
    });
  });
}

/** A room that one is in, or was when the connection was lost. */
interface Entered {
  readonly name: string;
  readonly nicks: Map<string, string>; // who is in it, by folded nick
  here: boolean; // it was entered on this connection
  greeted: boolean;
  last?: { readonly id: string; readonly time: number }; // the last message that was shown
  topic?: string | undefined;
  told?: string | undefined; // the last topic that was shown
  asked?: "first" | "missed" | "more" | undefined; // its history was asked for: what is said meanwhile waits
  held: Line[];
}

/** The capabilities that the client knows. */
const WANTED = Object.keys(CAP).filter((name) => name !== "labeled-response" && name !== REGISTRATION);
const HISTORY_SHOWN = 50; // messages, on joining
/** What a server has to say, as the program says things itself. */
const said = ({ params }: Line) =>
  clean(params.at(-1) ?? "").replace(/^[A-Z](?=[a-z]* )/, (first) => first.toLowerCase());
const nickOf = ({ source }: Line) => clean(source.split("!")[0] ?? "");
const plural = (count: number, one: string, many: string) => `${count} ${count === 1 ? one : many}`;
const isYes = (answer = "") => /^y(es)?$/i.test(answer.trim());
const named = (nicks: readonly string[], most: number) =>
  nicks.slice(0, most).join(", ") + (nicks.length > most ? ` and ${nicks.length - most} more` : "");

/** At once, then after 1, 2, 4 … 30 seconds, a little sooner or later than that. */
const backOff = (tries: number) => tries ? Math.min(30, 2 ** (tries - 1)) * (750 + Math.random() * 500) : 0;

/** Joins a chat, and stays until the person leaves. @returns the exit status. @throws {Fault} if there is no joining. */
export const join = (options: JoinOptions): Promise<number> => new Client(options).run();

class Client {
  readonly options: JoinOptions;
  readonly screen: Screen;
  link: Link | undefined;
  nick: string;
  room: Entered | undefined; // where it is talked
  wanted: string; // the room to talk in once it is entered
  readonly rooms = new Map<string, Entered>();
  readonly ignored = new Set<string>();
  bell = true;
  correspondent = ""; // who wrote privately last
  #password: string | undefined; // until the keys are made of it
  #keys: Keys | undefined;
  #newKeys: Keys | undefined; // of a new password that the server has not confirmed
  #pin: string | undefined; // of the key that was accepted: no other will do any more
  #scram = false; // the server knew SCRAM: it is told no password any more
  #wasIn = false;
  #leaving = false;
  #roomless = false; // one has left the last room
  #draining = false; // there is no more input: it leaves when everything is sent
  #progressAt = 0; // when the input ended, or the last line since was acknowledged
  #tries = 0; // to connect, since a connection lasted
  #slow = false; // a person was asked, and may have taken longer to answer than the server waited
  #refused = 0;
  readonly #outbox = new Map<number, readonly [command: string, target: string, text: string]>();
  readonly #instance = crypto.randomBytes(9).toString("base64url");
  #number = 0;
  #mask = "x".repeat(100); // what the server puts before our lines, as their source; its length counts
  #page: number = LIMITS.chathistory; // events that the server gives at once
  readonly #seen = new Set<string>(); // ids of messages that were shown lately
  #latest = 0; // the time of the latest
  #known = 0; // up to this time nothing was missed
  #asked = 0; // histories that were asked for and have not come yet
  #day = "";
  readonly #batches = new Map<string, { readonly type: string; readonly target: string; readonly lines: Line[] }>();
  readonly #presence = { joined: new Set<string>(), left: new Set<string>() }; // until it is told
  #stop: (status: number) => void = () => {};
  #retry: () => void = () => {};
  constructor(options: JoinOptions) {
    this.options = options;
    this.screen = options.screen;
    this.nick = options.nick ?? "";
    this.wanted = options.room ?? "";
    this.#password = options.password;
    this.#pin = options.pin;
  }

  async run(): Promise<number> {
    this.screen.onInterrupt = () => this.leave();
    this.screen.onEnd = () => {
      this.#draining = true;
      this.#progressAt = performance.now();
      if (this.screen.kind !== "pipe" || (this.#wasIn && !this.#outbox.size)) this.leave();
    };
    if (this.screen.kind === "pipe") {
      const person = process.stdin.isTTY; // of whom just the output goes into a pipe
      this.screen.onLines = (lines) =>
        person ? void this.entered(lines, false) : lines.filter(Boolean).forEach((line) => this.say("", line));
    }
    this.screen.onTab = (before) => this.#completions(before);
    const timer = setInterval(() => this.#watch(), 1000);
    try {
      return await Promise.race([this.#talk(), new Promise<number>((stop) => this.#stop = stop)]);
    } finally {
      clearInterval(timer);
      this.#leaving = true;
      this.#retry();
      this.link?.end("left");
      if (this.#wasIn && this.#outbox.size) {
        this.screen.note(`${plural(this.#outbox.size, "line was", "lines were")} not sent:`);
        for (const [, target, text] of this.#outbox.values()) {
          this.screen.note(`${target || this.room?.name || this.wanted} ${text}`);
        }
      }
    }
  }
  get #status(): number {
    return this.#outbox.size || this.#refused ? 1 : 0;
  }
  /** Leaves politely; at once if it is leaving already, or if there is nobody to be polite to. */
  leave(): void {
    const { link } = this;
    if (this.#leaving || !this.#wasIn || !link || link.ended) return this.#stop(this.#wasIn ? this.#status : 1);
    this.#leaving = true;
    link.send("QUIT", []);
    setTimeout(() => this.#stop(this.#status), 1000);
  }
  async #talk(): Promise<number> {
    for (;;) {
      let link: Link | undefined;
      try {
        link = this.link = await connect(this.options);
        if (this.#leaving) link.end("left"); // meanwhile
        if (this.#leaving) return this.#status;
        await this.#trust(link);
        await this.#logIn(link);
        this.#slow = false;
        for (;;) this.#handle(await link.next());
      } catch (error) {
        if (this.#leaving) return this.#status;
        const lost = error instanceof Lost && (this.#wasIn || this.#slow && this.link?.ended);
        if (!lost) throw error;
        if (link?.welcomedAt) this.#connectionLost(link.welcomedAt, error.message);
        if (!this.#slow) await this.#waitToRetry();
        if (this.#leaving) return this.#status;
        this.#slow = false;
      }
    }
  }
  #connectionLost(since: number, why: string): void {
    if (performance.now() - since >= LIMITS.steadyMs) this.#tries = 0;
    if (!this.#asked) this.#known = this.#latest;
    this.#asked = 0;
    for (const room of this.rooms.values()) room.here = false;
    this.#batches.clear();
    this.#showPrompt();
    this.screen.note(`connection lost: ${why}; taking it up again`);
  }
  /** Waits before connecting again. A server that disconnects everybody at once must not be called without end. */
  async #waitToRetry(): Promise<void> {
    const { backOffMs = backOff } = this.options;
    const delay = backOffMs(this.#tries++);
    if (delay <= 0) return;
    await new Promise<void>((retry) => {
      const timer = setTimeout(retry, delay);
      this.#retry = () => {
        clearTimeout(timer);
        retry();
      };
    });
  }
  /** Notices a connection that is dead without having ended, and that input which has ended cannot be sent. */
  #watch(): void {
    const { link, options: { timeoutMs = LIMITS.timeoutMs } } = this;
    if (this.#draining && performance.now() - this.#progressAt > timeoutMs) {
      this.screen.note(`gave up: the server took nothing for ${timeoutMs / 1000} s`);
      return this.#stop(1);
    }
    const silent = link && this.#wasIn ? now() - link.heard : 0;
    if (silent > 2 * LIMITS.hushMs) link?.end("nothing heard for a minute");
    else if (silent > LIMITS.hushMs && link && !link.asked) {
      link.asked = true;
      link.send("PING", ["there?"]);
    }
  }
  reconnect(): void {
    this.#tries = 0;
    this.#retry();
    this.link?.end("on your word");
  }
  #explain(...lines: readonly string[]): void {
    for (const line of this.options.explain ? lines : []) this.screen.note(line);
  }

  // ---- Trusting

  /** Decides whether this is the server that was meant, before a single byte is sent to it. */
  async #trust(link: Link): Promise<void> {
    const { host, port, ca } = this.options;
    const { certificate } = link;
    if (!certificate) throw new Fault("the server shows no certificate", "is it a chat server?", 3);
    const pin = pinOf(certificate.publicKey);
    if (this.#pin && pin !== this.#pin) {
      const hint = "somebody may sit in the middle, or it was started anew without CHAT_SECRET: ask whoever runs it";
      throw new Fault(`this server has the key ${pin}, not ${this.#pin}`, hint, 3);
    }
    const named = isIp(host) ? certificate.checkIP(host) : certificate.checkHost(host);
    const names = clean(certificate.subjectAltName ?? "").replace(/DNS:|IP Address:/g, "") || "nobody";
    const chain = link.socket.authorized ? undefined : "leads to no root that is trusted here";
    const problem = outsideValidity(certificate) ?? chain ?? (named ? undefined : `is for ${names}`);
    if (this.#pin) link.trust = "its key is the pinned one";
    else if (!problem) link.trust = "its certificate leads to a trusted root and is for this name";
    else if (/^(localhost|127\.[\d.]+|::1)$/i.test(host) && isLoopback(link.socket.remoteAddress ?? "")) {
      this.screen.note(`${host} is this machine: took its key ${pin} unchecked`, "");
      if (ca) this.screen.note(`its certificate ${problem}`, "");
      link.trust = "it is on this machine";
    } else {
      const question = `The certificate of ${host} ${problem}. Which two groups end the key on the server's screen? `;
      const answer = (await this.screen.ask(question))?.toLowerCase().replace(/[^a-z2-7]/g, "");
      if (answer === undefined) {
        const hint = `${CHAT} join ${host}:${port}/PIN, with the pin from the server's screen`;
        throw new Fault(`nobody vouches for this server: its certificate ${problem}`, hint, 3);
      }
      if (answer.length < 8 || !pin.replaceAll("-", "").endsWith(answer)) {
        throw new Fault("that is not how the key of this server ends", "this may be another server than yours", 3);
      }
      link.trust = "somebody compared its key";
      this.#slow = true;
    }
    if (problem) this.#pin = pin;
    if (link.ended) throw new Lost(link.ended, "is the server still running?");
    this.#explain(...link.facts());
    if (this.options.explain) link.explain = (text) => this.#explain(text);
  }

  // ---- Logging in

  /** Agrees on capabilities, logs in, and waits to be welcomed. */
  async #logIn(link: Link): Promise<void> {
    const late = setTimeout(() => link.end("it does not answer as a chat server does"), LIMITS.handshakeMs);
    link.send("CAP", ["LS", "302"]);
    const offered = new Map<string, string>();
    for (let more = true; more;) {
      const { command, params } = await link.next();
      if (command.startsWith("HTTP/")) throw new Fault("this is a web server", "is it the right port?");
      if (command !== "CAP" && !/^4\d\d$/.test(command)) continue;
      more = command === "CAP" && params[2] === "*";
      for (const one of params.at(-1)?.split(" ") ?? []) offered.set(one.split("=")[0] ?? "", one.split("=")[1] ?? "");
    }
    clearTimeout(late);
    const caps = WANTED.filter((name) => offered.has(name));
    if (caps.length) link.send("CAP", ["REQ", caps.join(" ")]);
    if (caps.length && (await link.next("CAP")).params[1] === "ACK") caps.forEach((name) => link.caps.add(name));
    const mechanisms = offered.has("sasl") ? (offered.get("sasl") || "PLAIN").split(",") : [];
    link.scram = mechanisms.includes("SCRAM-SCRYPT-PLUS");
    if (this.#scram && !link.scram) {
      throw new Fault("this server could check passwords untold, and now wants to be told", "it may be another one", 3);
    }
    this.#scram ||= link.scram;
    if (link.scram) await this.#logInByScram(link);
    else await this.#logInElsewhere(link, mechanisms.includes("PLAIN"));
    link.send("CAP", ["END"]);
    for (;;) {
      const line = await link.next();
      if (line.command === "001") return this.#welcomed(link, clean(line.params[0] ?? this.nick));
      if (/^4\d\d$/.test(line.command)) throw new Fault(said(line), `${CHAT} join NICK@HOST takes another nick`);
    }
  }
  /** Asks a person. If that takes longer than the server waits, everything begins anew, with the answer. */
  async #ask(question: string, hint: string, hidden = false): Promise<string> {
    const answer = await this.screen.ask(question, hidden);
    if (answer === undefined && this.screen.kind === "pipe") throw new Fault("there is nobody to ask", hint, 2);
    if (answer === undefined) throw new Fault("cancelled");
    this.#slow = true;
    return answer;
  }
  /** Introduces itself, after asking for what is missing. */
  async #introduce(link: Link, withPassword: boolean): Promise<void> {
    while (!isNick(this.nick)) {
      if (this.nick) this.screen.note(REFUSALS["bad nick"]);
      this.nick = (await this.#ask("Nick: ", `${CHAT} join NICK@HOST`)).trim();
    }
    if (withPassword && !this.#keys) {
      while (!this.#password) this.#password = await this.#ask("Password: ", "CHAT_PASSWORD sets it", true);
    }
    link.send("NICK", [this.nick]);
    link.send("USER", [this.nick, "0", "*", this.nick]);
  }
  async #logInByScram(link: Link): Promise<void> {
    for (let result = ""; result !== "in";) {
      await this.#introduce(link, true);
      result = await this.#prove(link);
      if (result === "unknown") await this.#register(link);
      else if (result !== "in") {
        if (this.options.password !== undefined) throw new Fault(result, "another nick, or another password");
        this.screen.note(result);
        if (link.ended) throw new Fault(link.ended, "try again later");
        this.#password = this.#keys = undefined;
      }
    }
    this.#password = undefined; // the keys are all that is needed from now on
  }
  /** SCRAM-SCRYPT-PLUS: "in", "unknown" if there is no such account, or what went wrong. */
  async #prove(link: Link): Promise<string> {
    const binding = sha256(link.certificate?.raw ?? "");
    const scram = scramClient(this.nick, (salt) => this.#keysFor(salt), binding);
    let { value: message } = await scram.next();
    link.send("AUTHENTICATE", ["SCRAM-SCRYPT-PLUS"]);
    await link.next("AUTHENTICATE", "904");
    for (;;) {
      link.authenticate(String(message));
      const line = await link.next("AUTHENTICATE", "904");
      if (line.command === "904") { // not because of the password
        const why = said(line).replace(/^.*: ./, (head) => head.slice(-1).toLowerCase());
        throw /operator/.test(why) ? new Fault(why, "ask whoever runs the server") : new Lost(why, "try again later");
      }
      const answer = fromBase64(line.params[0]).toString();
      if (answer === "e=channel-bindings-dont-match") {
        throw new Fault(
          "somebody sits between you and the server",
          "the certificate that you see is not the server's",
          3,
        );
      }
      if (answer.startsWith("e=")) await link.next("904");
      if (answer === "e=unknown-user") return "unknown";
      if (answer.startsWith("e=")) return `${this.nick} is registered here, and not with this password`;
      const step = await scram.next(answer);
      if (!step.done) {
        this.#explain(
          "the server gave its salt and a number; we prove the password by an answer that fits this connection only",
        );
        message = step.value;
        continue;
      }
      if (!step.value) {
        throw new Fault("this server does not know the password", "it may stand in for the right one", 3);
      }
      this.#explain("the server proved that it knows the password's verifier; neither side told the other a secret");
      link.send("AUTHENTICATE", ["+"]);
      await link.next("903");
      return "in";
    }
  }
  async #keysFor(salt: Buffer): Promise<Keys> {
    if (this.#keys?.salt.equals(salt)) return this.#keys;
    this.#password ??= await this.#ask(`Password of ${this.nick}: `, "it was changed: join anew", true);
    return this.#keys = await deriveKeys(this.#password, salt);
  }
  /** Registers the nick with a verifier; the password itself stays here. */
  async #register(link: Link): Promise<void> {
    if (this.#wasIn) this.screen.note(`the server has forgotten the account ${this.nick}; told it again`);
    else if (this.options.password === undefined) {
      const question = `No account ${this.nick} here yet. The same password again registers it: `;
      if (await this.#ask(question, "", true) !== this.#password) {
        this.#password = undefined;
        return this.screen.note("these were two different passwords; nothing is registered");
      }
    }
    this.#keys ??= await deriveKeys(this.#password ?? "");
    link.send("REGISTER", ["*", "*", formatVerifier(verifierOf(this.#keys))]);
    const line = await link.next("REGISTER", "FAIL");
    if (line.params[0] === "SUCCESS") {
      return this.#explain("registered: the server keeps a verifier, and was not told the password");
    }
    if (line.params[1] === "ACCOUNT_EXISTS") return; // perhaps by ourselves, before the connection broke
    this.#keys = undefined;
    const why = said(line);
    if (this.options.nick || this.screen.kind === "pipe") {
      throw new Fault(why, `${CHAT} join NICK@HOST takes another nick`);
    }
    this.screen.note(why);
    this.nick = "";
  }
  /** Logs in to a server that is not one of ours: with a password if there is one, after asking whether to tell it. */
  async #logInElsewhere(link: Link, plain: boolean): Promise<void> {
    if (plain) this.#password ??= await this.screen.ask("Password (empty for none): ", true) ?? "";
    if (this.#password && !this.#wasIn && !/pinned|root/.test(link.trust)) {
      const answer = await this.screen.ask(
        "Nobody vouches for this server, and it is told the password. Go on? (yes/no) ",
      );
      const hint = `${CHAT} join HOST:PORT/PIN vouches for it`;
      if (!isYes(answer)) throw new Fault("a password is told only to a server that somebody vouches for", hint, 3);
    }
    if (this.#password && !plain) link.send("PASS", [this.#password]);
    await this.#introduce(link, false);
    if (!this.#password || !plain) return;
    link.send("AUTHENTICATE", ["PLAIN"]);
    await link.next("AUTHENTICATE");
    link.authenticate(`\0${this.nick}\0${this.#password}`);
    if ((await link.next("903", "904")).command === "904") throw new Fault("wrong password", "CHAT_PASSWORD sets it");
  }

  // ---- Saying

  /** Takes what was entered. A slash begins a command, in a paste only if a person says so; a pipe brings text alone. */
  async entered(lines: readonly string[], pasted: boolean): Promise<void> {
    const texts = lines.filter((line) => line.trim());
    const how = pasted ? await this.#howToTake(texts) : "run";
    for (const text of how ? texts : []) {
      const [, slash, name = "", rest = ""] = /^\/(\/?)([^ ]*) *(.*)$/s.exec(text) ?? [];
      if (slash === undefined || pasted && !(how === "run" && isCommand(text))) this.say("", text);
      else if (slash) this.say("", text.slice(1));
      else await this.#command(name.toLowerCase(), rest.trim());
    }
  }
  /** Whether to say the lines of a paste, or to run the commands among them; undefined if neither. */
  async #howToTake(texts: readonly string[]): Promise<"say" | "run" | undefined> {
    const { screen } = this;
    const waiting = this.#outbox.size;
    if (texts.length + waiting > LIMITS.outbox) {
      const many = plural(texts.length, "line is", "lines are");
      return void screen.note(`${many} too many, with ${waiting} waiting to be sent; nothing of it is sent`);
    }
    const [command, ...more] = texts.filter(isCommand);
    let how = "say";
    if (command !== undefined) {
      const commands = `"${cut(command, 60)}"${
        more.length ? ` and ${plural(more.length, "more command", "more commands")}` : ""
      }`;
      const room = this.room?.name ?? this.wanted;
      const all = texts.length > 1 ? `all ${texts.length} pasted lines` : "it";
      const answer = await screen.ask(`Run the pasted ${commands}, or say ${all} in ${room}? (run/say/no) `);
      how = answer?.trim().toLowerCase() ?? "";
    } else if (texts.length > 5 && !isYes(await screen.ask(`Send these ${texts.length} lines? (yes/no) `))) how = "no";
    if (how === "run" || how === "say") return how;
    return void screen.note("nothing is sent");
  }
  #command(name: string, rest: string): void | Promise<void> {
    const row = rowOf(SLASH, name);
    if (!row) {
      return this.screen.note(
        `there is no /${name}; did you mean /${nearest(name, Object.keys(SLASH))}? /help lists all`,
      );
    }
    if (/^[^[]/.test(row.usage) && !rest) return this.screen.note(`/${name} ${row.usage}: ${row.about}`);
    return row.run(this, rest);
  }
  /** Says something to a room or a nick, here if none is named; what is too long for one line in several. */
  say(target: string, text: string, command = "PRIVMSG", around = (piece: string) => piece): void {
    const to = target || this.room?.name || this.wanted;
    if (!to && this.#roomless) return this.screen.note("you are in no room: /join #ROOM enters one");
    const space = LIMITS.bodyBytes - 2 - Buffer.byteLength(`:${this.#mask} ${command} ${to} :${around("")}`);
    const bytes = (char: string) => Buffer.byteLength(char);
    const chars = graphemes(text.replace(/[\0\r\n]/g, " ")).flatMap((one) => bytes(one) > space ? [...one] : [one]);
    for (const piece of pieces(chars, space, bytes)) {
      if (this.#outbox.size >= LIMITS.outbox && this.screen.kind !== "pipe") {
        return this.screen.note("too much waits; dropped");
      }
      this.#outbox.set(++this.#number, [command, target || this.room?.name || "", around(piece)]);
      if (this.#online) this.#transmit(this.#number);
    }
    this.#showPrompt();
  }
  /** Sends a line of the outbox. It stays there until the server has said that it has it. */
  #transmit(number: number): void {
    const [command = "", target = "", text = ""] = this.#outbox.get(number) ?? [];
    const { link, room: { name: here } = { name: "" } } = this;
    if (!link || !(target || here)) return;
    const params = [target || here, text];
    link.send(command, params, link.caps.has("message-tags") ? [[ONCE, `${this.#instance}-${number}`]] : []);
    if (!link.scram) link.send("PING", [`${ONCE}=${number}`]); // servers that are not ours know no numbers
    if (!link.caps.has("echo-message")) this.#show(parse(format(command, params, this.#mask)));
  }
  /** The server has executed a line, or refused it. */
  #acknowledged(number: number): void {
    this.#outbox.delete(number);
    this.#progressAt = performance.now();
    this.#showPrompt();
    if (this.#draining && !this.#outbox.size) this.leave();
  }

  // ---- Hearing

  #handle(line: Line): void {
    const once = line.tags.get(ONCE)?.split(/-(?=\d+$)/) ?? [];
    if (once[0] === this.#instance) {
      if (/^([45]\d\d|FAIL)$/.test(line.command)) this.#refused++;
      this.#acknowledged(Number(once[1]));
    }
    const batch = this.#batches.get(line.tags.get("batch") ?? "");
    if (batch && line.command !== "BATCH") batch.lines.push(line);
    else this.#dispatch(line);
  }
  #dispatch(line: Line): void {
    const [first = "", second = "", third = ""] = line.params;
    const room = this.rooms.get(fold(first));
    const nick = nickOf(line);
    const mine = fold(nick) === fold(this.nick);
    const text = line.params.slice(1).map(clean).join(" ");
    switch (line.command) {
      case "PRIVMSG":
      case "NOTICE":
        return room?.asked ? void room.held.push(line) : this.#show(line);
      case "BATCH":
        if (first.startsWith("-")) return this.#batchEnded(first.slice(1));
        return void this.#batches.set(first.slice(1), { type: second, target: third, lines: [] });
      case "JOIN":
        return mine ? this.#entered(first, line.source) : room && this.#cameOrWent(room, nick, "joined");
      case "PART":
        return room && (mine ? this.#parted(room) : this.#cameOrWent(room, nick, "left"));
      case "KICK":
        return room && fold(second) === fold(this.nick) ? this.#parted(room) : undefined;
      case "QUIT":
        return this.rooms.forEach((one) => this.#cameOrWent(one, nick, "left"));
      case "NICK":
        for (const { nicks } of this.rooms.values()) if (nicks.delete(fold(nick))) nicks.set(fold(first), clean(first));
        if (mine) this.nick = clean(first);
        return;
      case "TOPIC":
        if (room) room.topic = second;
        return this.#tellTopic(line);
      case "332":
        if (this.rooms.has(fold(second))) Object.assign(this.rooms.get(fold(second)) ?? {}, { topic: third });
        return;
      case "353":
        for (const name of (line.params[3] ?? "").split(" ").filter(Boolean)) {
          const one = clean(name.replace(/^[@+%&~!]+/, "").split("!")[0] ?? "");
          this.rooms.get(fold(third))?.nicks.set(fold(one), one);
        }
        return;
      case "366":
        return this.#greet(this.rooms.get(fold(second)));
      case "322":
        return this.screen.note(`${second}: ${third} in it${line.params[3] ? `; ${line.params[3]}` : ""}`);
      case "005":
        this.#page = Math.min(this.#page, Number(/ CHATHISTORY=(\d+)/.exec(text)?.[1] || this.#page));
        return;
      case "PONG":
        return second.startsWith(`${ONCE}=`) ? this.#acknowledged(Number(second.split("=")[1])) : undefined;
      case "NOTE":
      case "FAIL":
        if (first === "PASS" && line.command === "NOTE") this.#keys = this.#newKeys;
        return this.screen.note(said(line));
    }
    if (/^(30[1-6]|4(?!22)\d\d|5\d\d)$/.test(line.command)) {
      this.screen.note([...line.params.slice(1, -1).map(clean), said(line)].join(": "));
    }
    if (!/^4/.test(line.command) || !this.wanted || fold(second) !== fold(this.wanted)) return;
    if (this.screen.kind === "pipe") throw new Fault(text, "--room names another room", 2);
    this.wanted = "";
  }
  #welcomed(link: Link, nick: string): void {
    this.nick = nick;
    if (link.scram) this.#mask = source(nick);
    const names = [...this.rooms.values()].map(({ name }) => name);
    if (this.wanted) names.push(this.wanted);
    else if (!names.length && !link.scram && !this.#roomless) names.push("#chat");
    for (const name of names) link.send("JOIN", [name]);
    if (this.#wasIn && link.caps.has("draft/chathistory")) { // private messages may have been missed
      this.#askHistory("TARGETS", this.#since, `timestamp=${new Date(now() + 86_400_000).toISOString()}`);
    }
    this.#known ||= now();
    this.#wasIn = true;
    link.welcomedAt = performance.now();
    for (const number of this.#roomless ? this.#outbox.keys() : []) this.#transmit(number);
    if (this.screen.kind !== "pipe") this.screen.onLines = (lines, pasted) => void this.entered(lines, pasted);
  }
  #entered(name: string, source: string): void {
    const { link } = this;
    const fresh: Entered = { name, nicks: new Map(), here: true, greeted: false, held: [] };
    const room = this.rooms.get(fold(name)) ?? fresh;
    this.rooms.set(fold(name), room);
    room.nicks.clear();
    room.here = true;
    room.topic = undefined; // 332 follows if there is one
    this.#mask = source;
    const fromNow = this.screen.kind === "pipe" && !room.last; // a script does not hear what was said before
    if (fromNow) room.last = { id: "", time: this.#latest || now() };
    if (this.wanted ? fold(this.wanted) === fold(name) : !this.room) {
      this.wanted = "";
      this.room = room;
      this.#roomless = false;
    }
    if (link?.caps.has("draft/chathistory") && !fromNow) {
      room.asked = room.last ? "missed" : "first";
      const since = new Date((room.last?.time ?? 1) - 1).toISOString(); // with the last one once more, or there is a gap
      if (room.last) this.#askHistory("AFTER", name, `timestamp=${since}`);
      else this.#askHistory("LATEST", name, "*");
    }
    for (const number of room === this.room ? this.#outbox.keys() : []) this.#transmit(number);
    if (room === this.room && this.#draining && !this.#outbox.size) this.leave();
    this.#showPrompt();
  }
  #askHistory(...params: readonly string[]): void {
    this.#asked++;
    this.link?.send("CHATHISTORY", [...params, String(this.#page)]);
  }
  /** The time since when something may have been missed; what is of that very millisecond is told once more. */
  get #since(): string {
    return `timestamp=${new Date(this.#known - 1).toISOString()}`;
  }
  /** Tells that one is in a room, once its names and its history are there. */
  #greet(room: Entered | undefined): void {
    if (!room || room.asked) return;
    const { screen } = this;
    const here = named([...room.nicks.values()].filter((nick) => fold(nick) !== fold(this.nick)), 12);
    const name = clean(room.name);
    if (room.topic && room.topic !== room.told && !room.greeted) screen.note(`topic of ${name}: ${clean(room.topic)}`);
    if (room.greeted) screen.note(`back in ${name}`);
    else if (screen.kind === "pipe" || this.rooms.size > 1) {
      screen.note(`in ${name} as ${this.nick}; here: ${here || "nobody else"}`);
    } else {
      const who = here ? `Here: ${here}.` : "Nobody else is here yet.";
      screen.say("", `Welcome to ${name}, ${this.nick}. ${who} /help lists what you can type, /exit leaves.`);
    }
    room.greeted = true;
  }
  /** A batch is complete: of a log, or of the talks in which something was missed. */
  #batchEnded(name: string): void {
    const { type, target, lines } = this.#batches.get(name) ?? { type: "", target: "", lines: [] };
    this.#batches.delete(name);
    if (type.includes("chathistory")) this.#asked = Math.max(0, this.#asked - 1);
    if (type === "chathistory") return this.#showHistory(target, lines);
    if (type !== "draft/chathistory-targets") return lines.forEach((line) => this.#dispatch(line));
    for (const { params: [, nick = "#"] } of lines) {
      if (!nick.startsWith("#")) this.#askHistory("AFTER", nick, this.#since);
    }
  }
  #showHistory(target: string, lines: readonly Line[]): void {
    const room = this.rooms.get(fold(target));
    const { asked, last } = room ?? { asked: "more", last: undefined };
    if (asked === "missed" && last?.id && !lines.some(({ tags }) => tags.get("msgid") === last?.id)) {
      this.screen.note("something may be missing here: the server no longer has it");
    }
    const messages = lines.filter(({ command }) => command === "PRIVMSG" || command === "NOTICE");
    const from = asked === "first" ? messages.at(-HISTORY_SHOWN) : undefined;
    for (const line of from ? lines.slice(lines.indexOf(from)) : lines) {
      const nick = nickOf(line);
      if (line.command === "PRIVMSG" || line.command === "NOTICE") {
        this.#show(line, !asked || asked === "first", !asked);
      } else if (line.command === "TOPIC") this.#tellTopic(line);
      else if (fold(nick) !== fold(this.nick)) this.#notePresence(nick, line.command === "JOIN" ? "joined" : "left");
    }
    this.#tellPresence();
    const id = lines.at(-1)?.tags.get("msgid");
    if ((asked === "missed" || asked === "more") && lines.length >= this.#page && id) {
      if (room) room.asked = "more";
      return this.#askHistory("AFTER", target, `msgid=${id}`);
    }
    if (!room || !asked) return;
    room.asked = undefined;
    this.#greet(room);
    for (const line of room.held.splice(0)) this.#show(line);
  }
  #tellTopic(line: Line): void {
    const [name = "", topic = ""] = line.params.map(clean);
    Object.assign(this.rooms.get(fold(line.params[0] ?? "")) ?? {}, { told: line.params[1] });
    this.screen.note(
      `${nickOf(line)} ${topic ? `set the topic of ${name}: ${topic}` : `removed the topic of ${name}`}`,
    );
  }
  #cameOrWent(room: Entered, nick: string, how: "joined" | "left"): void {
    const known = room.nicks.has(fold(nick));
    if (how === "joined") room.nicks.set(fold(nick), nick);
    else room.nicks.delete(fold(nick));
    if (known === (how === "joined") || room !== this.room || room.asked) return;
    const { joined, left } = this.#presence;
    if (!joined.size && !left.size) setTimeout(() => this.#tellPresence(), 300);
    this.#notePresence(nick, how);
  }
  #notePresence(nick: string, how: "joined" | "left"): void {
    if (!this.#presence[how === "joined" ? "left" : "joined"].delete(nick)) this.#presence[how].add(nick);
  }
  /** Tells who came and who went: in one line, however many. */
  #tellPresence(): void {
    const told = Object.entries(this.#presence).filter(([, nicks]) => nicks.size)
      .map(([how, nicks]) => `${named([...nicks], 5)} ${how}`);
    for (const nicks of Object.values(this.#presence)) nicks.clear();
    if (told.length && this.screen.kind !== "pipe") this.screen.note(told.join("; "));
  }
  #parted(room: Entered): void {
    this.rooms.delete(fold(room.name));
    this.screen.note(`you left ${clean(room.name)}`);
    if (room === this.room) this.room = [...this.rooms.values()].at(-1);
    this.#roomless = !this.room;
    this.#showPrompt();
  }
  turnTo(room: Entered): void {
    this.room = room;
    this.#showPrompt();
  }
  /** Whether what is said goes to the server at once: the room is entered, or one has left the last. */
  get #online(): boolean {
    return Boolean(this.link?.welcomedAt) && !this.link?.ended && (this.room?.here ?? this.#roomless);
  }
  #showPrompt(): void {
    const { size } = this.#outbox; // a few are always under way
    const waiting = size > (this.#online ? 20 : 0) ? `${size} waiting` : "";
    const state = [this.#wasIn && !this.#online && "offline", waiting].filter(Boolean).join(", ");
    this.screen.prompt = `${state && `[${state}] `}${clean(this.room?.name ?? "")}> `;
  }
  /** Shows a message; `dim` if it is old, and `again` even if it was shown before. */
  #show(line: Line, dim = false, again = false): void {
    const { screen, rooms, nick: me } = this;
    const [target = "", raw = ""] = line.params;
    const [id, nick, room] = [line.tags.get("msgid"), nickOf(line), rooms.get(fold(target))];
    const time = Date.parse(line.tags.get("time") ?? "") || now();
    if (id && this.#seen.has(id) && !again) return;
    if (room && id) room.last = { id, time };
    this.#latest = Math.max(this.#latest, time);
    if (id) this.#seen.add(id);
    const [oldest = ""] = this.#seen;
    if (this.#seen.size > 5000) this.#seen.delete(oldest);
    const act = raw.startsWith("\x01ACTION ") ? raw.slice(8).replace("\x01", "") : undefined;
    const mine = fold(nick) === fold(me);
    if (this.ignored.has(fold(nick)) || (raw.startsWith("\x01") && act === undefined)) return;
    const text = clean(act ?? raw);
    if (!line.source.includes("!")) return screen.note(`${nick}: ${text}`);
    if (screen.kind === "pipe") {
      if (!mine) screen.say(`${new Date(time).toISOString()}\t${nick}\t`, act === undefined ? text : `/me ${text}`);
      return;
    }
    this.#tellPresence();
    const day = new Date(time).toDateString();
    if (this.#day && day !== this.#day) screen.note(day);
    this.#day = day;
    if (!room && !mine) this.correspondent = nick;
    const called = !mine && !dim &&
      (!room || new RegExp(`(?<![\\w-])${me.replace(/\W/g, "\\$&")}(?![\\w-])`, "i").test(text));
    if (this.bell && called) screen.bell();
    const longest = Math.max(5, ...[...this.room?.nicks.values() ?? []].map(cells));
    const padding = " ".repeat(Math.max(0, Math.min(12, screen.columns >> 3, longest) - cells(nick)));
    const elsewhere = room && room !== this.room ? `${clean(room.name)} ` : "";
    const who = room ? screen.nick(nick) : `${screen.nick(nick)} > ${screen.nick(clean(target))}`;
    const head = `${screen.paint(2, clock(time))} ${elsewhere}${
      act === undefined ? who + (room ? padding : "") : `* ${who}`
    } `;
    screen.say(head, text, dim ? 2 : called && room ? 1 : "");
  }

  // ---- Typing

  /** What could stand in the place of the text before the cursor: with its last word completed. */
  #completions(before: string): readonly string[] {
    const [, start = "", word = ""] = /^(.* )?([^ ]*)$/s.exec(before) ?? [];
    const nicks = [...this.room?.nicks.values() ?? []].map((nick) => start ? `${nick} ` : `${nick}: `);
    const commands = start ? [] : Object.keys(SLASH).map((name) => `/${name} `);
    const all = [...commands, ...[...this.rooms.values()].map(({ name }) => `${name} `), ...nicks];
    return word ? all.filter((one) => fold(one).startsWith(fold(word))).map((one) => start + one) : [];
  }
  async changePassword(): Promise<void> {
    if (!this.link?.scram) return this.screen.note("this server has no way to do that");
    const password = await this.screen.ask("New password: ", true);
    const again = password && await this.screen.ask("The same again: ", true);
    if (!password || again === undefined) return this.screen.note("nothing is changed");
    if (password !== again) {
      this.screen.note("these were two different passwords");
      return this.changePassword();
    }
    this.#newKeys = await deriveKeys(password);
    this.link.send("PASS", [formatVerifier(verifierOf(this.#newKeys))]);
  }
}

/** Whether a text would be run if it was typed. */
const isCommand = (text: string) => rowOf(SLASH, /^\/([^ /]+)/.exec(text)?.[1]?.toLowerCase() ?? "") !== undefined;

/** The known word that is nearest to another: by the letters to insert, remove or replace. */
function nearest(word: string, known: readonly string[]): string {
  const distance = (other: string) =>
    [...word].reduce((row, letter, at) => {
      const next = [at + 1];
      for (let to = 0; to < other.length; to++) {
        const replaced = (row[to] ?? 0) + (letter === other[to] ? 0 : 1);
        next.push(Math.min(replaced, (row[to + 1] ?? 0) + 1, (next[to] ?? 0) + 1));
      }
      return next;
    }, Array.from({ length: other.length + 1 }, (_, at) => at)).at(-1) ?? 0;
  return known.toSorted((one, other) => distance(one) - distance(other))[0] ?? "";
}

/** What a person types after a slash. */
type Slash = (client: Client, rest: string) => void | Promise<void>;
const slash = (usage: string, about: string, run: Slash): Row<Slash> => ({ usage, about, run });
const exit = slash("", "leave", (client) => client.leave());

export const SLASH: Table<Slash> = {
  exit,
  quit: exit,
  help: slash("[COMMAND]", "tell what you can type", ({ screen }, rest) => {
    const name = rest.replace(/^\//, "");
    const row = rowOf(SLASH, name);
    for (const line of rows(row ? { [name]: row } : SLASH, "/")) screen.note(line);
    if (!row) screen.note("//TEXT               say something that begins with a slash");
  }),
  who: slash("", "list who is in this room", ({ screen, room }) => {
    const nicks = [...room?.nicks.values() ?? []];
    screen.note(
      `${plural(nicks.length, "person", "people")} in ${clean(room?.name ?? "no room")}: ${nicks.join(", ")}`,
    );
  }),
  msg: slash("NICK TEXT", "say something to one person", (client, rest) => {
    const [nick = "", text] = rest.split(/ +(.*)/s);
    return text ? client.say(nick, text) : client.screen.note("/msg NICK TEXT: say what?");
  }),
  r: slash(
    "TEXT",
    "answer who wrote to you last",
    (client, rest) =>
      client.correspondent
        ? client.say(client.correspondent, rest)
        : client.screen.note("nobody has written to you yet"),
  ),
  me: slash(
    "TEXT",
    "say what you do",
    (client, rest) => client.say("", rest, "PRIVMSG", (one) => `\x01ACTION ${one}\x01`),
  ),
  join: slash("#ROOM", "enter a room, or turn to it", (client, rest) => {
    const name = rest.replace(/^#?/, "#").replace(/ .*/, "");
    const room = client.rooms.get(fold(name));
    if (room) return client.turnTo(room);
    client.wanted = name;
    client.link?.send("JOIN", [name]);
  }),
  part: slash("", "leave this room", ({ link, room }) => room && link?.send("PART", [room.name])),
  topic: slash(
    "[TEXT]",
    "show or set the room's topic",
    ({ link, room, screen }, rest) => {
      if (!room) return screen.note("you are in no room");
      if (rest) return link?.send("TOPIC", [room.name, rest]);
      const name = clean(room.name);
      screen.note(room.topic ? `topic of ${name}: ${clean(room.topic)}` : `${name} has no topic`);
    },
  ),
  rooms: slash("", "list the rooms", ({ link }) => link?.send("LIST", [])),
  history: slash("[N]", "show what was said, N lines of it", ({ link, room, screen }, rest) => {
    if (!link?.caps.has("draft/chathistory")) return screen.note("this server keeps no history");
    link.send("CHATHISTORY", ["LATEST", room?.name ?? "*", "*", String(Number(rest) || HISTORY_SHOWN)]);
  }),
  ignore: slash("NICK", "hide what somebody says, or show it again", ({ ignored, screen }, rest) => {
    const hidden = !ignored.delete(fold(rest)) && ignored.add(fold(rest));
    screen.note(`${rest} is ${hidden ? "ignored" : "heard again"}`);
  }),
  bell: slash("on|off", "ring when you are named", (client, rest) => {
    client.bell = rest !== "off";
    client.screen.note(`the bell is ${client.bell ? "on" : "off"}`);
  }),
  tls: slash(
    "",
    "tell about the connection",
    ({ link, screen }) => (link?.ended ? ["not connected"] : link?.facts())?.forEach((fact) => screen.note(fact)),
  ),
  password: slash("", "change your password", (client) => client.changePassword()),
  reconnect: slash("", "connect anew, now", (client) => client.reconnect()),
  clear: slash("", "clear the screen", ({ screen }) => screen.clear()),
};

/** A table as help: a line for each row. */
function rows(table: Table<unknown>, dash: string): string[] {
  return Object.entries(table).map(([name, row]) => `${`${dash}${name} ${row?.usage}`.padEnd(20)} ${row?.about}`);
}
/* =====================================================================================================================
 * Main
 * The command line: what it takes is a table, and help is made from it. Secrets come by environment, never by argument.
 * ================================================================================================================== */

/** How the value of an option is read; undefined if it is no good. An option without that takes no value. */
type Read = ((text: string) => string | number | undefined) | undefined;
const option = (usage: string, about: string, run?: Read): Row<Read> => ({ usage, about, run });
const least = (minimum: number) => (text: string) =>
  /^\d{1,9}$/.test(text) && Number(text) >= minimum ? Number(text) : undefined;
const words = (text: string) => clean(text) === text && text || undefined;
const roomName = (text: string) => isRoom(text.replace(/^#?/, "#")) ? text.replace(/^#?/, "#") : undefined;
const EXPLAIN = option("", "tell what happens on the wire, as it happens");
const KEYLOG = option("", "print the TLS keys; whoever has them can read along");

const OPTIONS: Readonly<Record<"serve" | "join", Table<Read>>> = {
  serve: {
    "room": option("#NAME", "the room where everybody lands (#chat)", roomName),
    "topic": option("TEXT", "its topic", words),
    "name": option("TEXT", "what the network is called (chat)", words),
    "history": option("N", "messages kept in a room (1000)", least(0)),
    "max-clients": option("N", "connections at once (1000)", least(1)),
    "per-address": option("N", "connections from one address (100)", least(1)),
    "rate": option("N", "lines a second from one member (10), 0 for any number", least(0)),
    "explain": EXPLAIN,
    "keylog": KEYLOG,
  },
  join: {
    "nick": option("NAME", "who you are", words),
    "room": option("#NAME", "the room to talk in", roomName),
    "timeout": option("SECONDS", "for piped input after its end, if the server takes nothing (30)", least(1)),
    "plain": option("", "for screen readers: no colour, nothing drawn twice"),
    "explain": EXPLAIN,
    "keylog": KEYLOG,
  },
};

const USAGE = `chat: an encrypted group chat

  chat serve [HOST][:PORT]               open a room; 127.0.0.1:8080 if not said
  chat join  [NICK@]HOST[:PORT][/PIN]    enter it; port 8080 if not said
  chat help  [serve|join]                tell all options
  chat version`;

const SECRETS = {
  serve: `Environment:
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
  return [synopsis, "", ...rows(OPTIONS[command], "  --"), "", SECRETS[command]].join("\n");
}

const wrong = (message: string, hint: string) => new Fault(message, hint, 2);

/** Reads options and one address. @throws {Fault} that names what is wrong, and what is nearest to it. */
function readArguments(command: "serve" | "join", args: readonly string[]) {
  const options: Record<string, string | number | true> = {};
  const rest: string[] = [];
  for (const words = [...args]; words.length;) {
    const [, name, attached] = /^--?([^=]+)(?:=(.*))?$/s.exec(words[0] ?? "") ?? [];
    const word = words.shift() ?? "";
    const row = rowOf(OPTIONS[command], name ?? "");
    if (name === undefined) rest.push(word);
    else if (!row) {
      const hint = `did you mean --${nearest(name, Object.keys(OPTIONS[command]))}?`;
      throw wrong(`chat ${command} has no option --${name}`, hint);
    } else {
      const text = row.run ? attached ?? words.shift() ?? "" : attached ?? "";
      const value = row.run ? row.run(text) : !text || undefined;
      if (value === undefined) throw wrong(`--${name} cannot be "${text}"`, `--${name} ${row.usage}: ${row.about}`);
      if (name === "keylog" && "Deno" in globalThis) {
        throw wrong("--keylog is not possible on Deno", "Node tells the keys");
      }
      options[name] = value;
    }
  }
  if (rest.length > 1) throw wrong(`one address is enough: ${rest.join(" ")}`, `${CHAT} help ${command}`);
  return { address: rest[0] ?? "", options };
}

/** Reads `HOST`, `HOST:PORT`, `:PORT` or `[IPv6]:PORT`. */
function readAddress(text: string): { host: string; port: number } {
  const [, ipv6, host, port = "8080"] = /^(?:\[([^\]]+)\]|([^:[\]/]*))(?::(\d{1,5}))?$/.exec(text) ?? [];
  if ((ipv6 ?? host) === undefined || Number(port) > 65535) {
    throw wrong(`${text} is no address`, "HOST:PORT, or [IPV6]:PORT");
  }
  return { host: ipv6 ?? (host || "127.0.0.1"), port: Number(port) };
}

async function mainServe(args: readonly string[]): Promise<number> {
  const { address, options: { keylog, explain, "max-clients": maxClients, "per-address": perAddress, ...others } } =
    readArguments("serve", args);
  const { host, port } = readAddress(address);
  const [secret, key, cert] = ["CHAT_SECRET", "CHAT_KEY", "CHAT_CERT"].map(environment);
  const identity = makeIdentity({ ...secret && { secret }, ...key && { key }, ...cert && { cert } });
  let screen: Screen | undefined;
  const tell = (line: string) => screen ? screen.note(line) : write(process.stderr, `chat: ${line}\n`);
  const log = (line: string) => void tell(`${new Date().toTimeString().slice(0, 8)} ${line}`);
  const watch = {
    ...keylog && { keylog: (line: Buffer) => void write(process.stdout, line) },
    ...explain && { explain: (line: string) => void tell(line) },
  };
  const limits = { ...maxClients && { maxClients: +maxClients }, ...perAddress && { perAddress: +perAddress } };
  const names = namesOf(host); // before a socket is open: then the runtime would look up who is at its other end
  const serving = await serve({ ...others, ...limits, host, port, identity, log, ...watch });
  const reach = names.map((name) => `${name}:${serving.port}`);
  const invitations = reach.map((name) => `${CHAT} join ${name}/${identity.pin}`);
  if (keylog) tell("warning: the TLS keys go to standard output; whoever has them can read along");
  tell(`serving ${serving.server.lobby.name} on ${bracketed(host)}:${serving.port}`);
  for (const invitation of invitations) tell(`to join:      ${invitation}`);
  if (names[0] === UNKNOWN) tell(`${UNKNOWN} stands for an address of this machine: put it there`);
  tell(`IRC clients:  ${reach[0]} with TLS; your password as server password`);
  tell("nothing is written to disk: accounts and history end with this process");
  if (isLoopback(host)) {
    tell(`only this machine can join: to let others in, stop this and run ${CHAT} serve 0.0.0.0:${serving.port}`);
  }
  return await new Promise<number>((resolve) => {
    let stopping = false;
    const stop = async () => {
      if (stopping) return;
      stopping = true;
      log("stopping");
      await serving.stop("The server is stopping");
      screen?.close();
      resolve(0);
    };
    for (const signal of ["SIGINT", "SIGTERM", "SIGHUP"] as const) process.on(signal, stop);
    if (!process.stdin.isTTY || !process.stdout.isTTY) return;
    screen = new Screen();
    screen.prompt = "> ";
    let askedAt = -Infinity;
    const askToStop = (): readonly string[] => {
      const here = [...serving.server.accounts.all.values()].filter(({ present }) => present).length;
      const again = performance.now() - askedAt < LIMITS.againMs;
      askedAt = performance.now();
      if (here && !again) return [`${plural(here, "person is", "people are")} here; again to stop`];
      void stop();
      return [];
    };
    screen.onInterrupt = () => askToStop().forEach(tell);
    screen.onEnd = stop;
    const own = {
      invite: order("", "tell how to join", () => invitations),
      stop: order("", "stop the server", askToStop),
    };
    screen.onLines = (lines) =>
      lines.forEach((line) => obey(serving.server, { ...CONSOLE, ...own }, line).forEach(tell));
  });
}

const UNKNOWN = "ADDRESS";
const bracketed = (host: string) => host.includes(":") ? `[${host}]` : host;

/**
 * The names by which others reach a server that listens on `host`: where that means every address of this machine, all
 * that lead to it from elsewhere, those of private networks first. UNKNOWN where the runtime does not tell (Deno).
 */
function namesOf(host: string): readonly string[] {
  if (!/^(0\.0\.0\.0|::)$/.test(host)) return [bracketed(host)];
  type Report = { header: { networkInterfaces: { internal: boolean; address: string }[] } };
  let addresses: string[] = [];
  try {
    const { networkInterfaces } = (process.report.getReport() as unknown as Report).header;
    addresses = networkInterfaces.filter(({ internal }) => !internal).map(({ address }) => address);
  } catch {
    return [UNKNOWN];
  }
  const rank = (address: string) =>
    Number(address.includes(":")) * 2 + Number(!/^(10|192\.168|172\.(1[6-9]|2\d|3[01])|f[cd]..)[.:]/i.test(address));
  const reachable = addresses
    .filter((address) => !/^(169\.254\.|fe[89ab].:)/i.test(address) && (host === "::" || !address.includes(":")))
    .sort((one, other) => rank(one) - rank(other));
  return reachable.length ? [...new Set(reachable)].map(bracketed) : [UNKNOWN];
}

/** Runs an order of the operator's. */
function obey(server: Server, table: Table<Order>, line: string): readonly string[] {
  const [, name = "", nick = "", rest = ""] = /^\/?([^ ]*) *([^ ]*) *(.*)$/s.exec(line.trim()) ?? [];
  const row = rowOf(table, name);
  if (!name) return [];
  if (name === "help") return rows(table, "/");
  if (!row) return [`there is no /${name}; did you mean /${nearest(name, [...Object.keys(table), "help"])}?`];
  return row.usage && !nick ? [`/${name} ${row.usage}: ${row.about}`] : [row.run(server, nick, rest)].flat();
}

async function mainJoin(args: readonly string[]): Promise<number> {
  const { address, options } = readArguments("join", args);
  const [, who, target = "", written] = /^(?:([^@]*)@)?([^/]*)(?:\/(.*))?$/s.exec(address) ?? [];
  if (!target) throw wrong("join whom?", `${CHAT} join HOST:PORT`);
  const pin = written === undefined ? undefined : readPin(written);
  if (written !== undefined && !pin) throw wrong(`${written} is no pin`, "a pin is six groups of four, of a-z and 2-7");
  const [nick, room] = [options["nick"] ?? who, options["room"]].map((value) => value?.toString());
  if (nick !== undefined && !isNick(nick)) throw wrong(`${nick} is no nick`, REFUSALS["bad nick"]);
  const [password, ca] = ["CHAT_PASSWORD", "CHAT_CA"].map(environment);
  if (ca && !readPem("CHAT_CA", ca, "certificate", (text) => new crypto.X509Certificate(text)).ca) {
    throw new Fault("the certificate in CHAT_CA is none of an authority", "it is the issuer's that belongs there");
  }
  const screen = new Screen(options["plain"] === true);
  for (const signal of ["SIGINT", "SIGTERM", "SIGHUP"]) process.on(signal, () => screen.onInterrupt());
  try {
    const flags = { explain: options["explain"] === true, keylog: options["keylog"] === true };
    const timeoutMs = options["timeout"] === undefined ? undefined : 1000 * Number(options["timeout"]);
    return await join({ ...readAddress(target), ...flags, timeoutMs, pin, nick, room, password, ca, screen });
  } finally {
    screen.close();
  }
}

/** Runs a command line. @returns the exit status. */
export async function main([command = "", ...args]: readonly string[]): Promise<number> {
  // A log that cannot be written (its reader has gone, the disk is full) must not end the server with all accounts.
  for (const stream of [process.stdout, process.stderr]) stream.on("error", () => {});
  try {
    const run = rowOf({ serve: mainServe, join: mainJoin }, command);
    if (run && !/^(--help|-h)$/m.test(args.join("\n"))) return await run(args);
    if (run || /^(help|--help|-h)$/.test(command)) write(process.stdout, `${help(run ? command : args[0])}\n`);
    else if (/^(version|--version)$/.test(command)) write(process.stdout, `chat ${VERSION}\n`);
    else if (!command) throw wrong("serve or join?", `${CHAT} help`);
    else {throw wrong(
        `there is no chat ${command}`,
        `did you mean ${CHAT} ${nearest(command, ["serve", "join", "help", "version"])}?`,
      );}
    return 0;
  } catch (error) {
    const { message, hint, status = 1 } = error as Partial<Fault>;
    write(process.stderr, `chat: ${clean(`${message}`)}\n${hint ? `chat: hint: ${clean(hint)}\n` : ""}`);
    return status;
  }
}

if (import.meta.main) void main(process.argv.slice(2)).then((status) => process.exit(status));
