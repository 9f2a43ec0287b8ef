// Peers that mean no good, or mean nothing at all: others notice none of it.
// FUZZ_SECONDS and FUZZ_SEED let the fuzzer run for longer, or the same way again.
import assert from "node:assert/strict";
import crypto from "node:crypto";
import fs from "node:fs";
import net from "node:net";
import { mock, test, type TestContext } from "node:test";
import * as chat from "../chat.ts";
import {
  dial,
  enter,
  Irc,
  logIn,
  quickScrypt,
  register,
  Running,
  serveHere,
  serveProcess,
  until,
  wants,
} from "./helpers.ts";

quickScrypt();
const { LIMITS } = chat;
const OPENSSL = wants("openssl");
const turn = () => new Promise((next) => setImmediate(next));

// ---- The fuzzer: a server without sockets

/** A connection without a socket. What the server writes is kept for those who look at it. */
class Wire implements chat.Peer {
  readonly address = "127.0.0.1";
  readonly session: chat.Session;
  readonly keeps: boolean;
  out = "";
  ended = false;
  flowing = true;
  constructor(server: chat.Server, keeps = false) {
    this.keeps = keeps;
    this.session = server.open(this);
  }
  write(bytes: Buffer): boolean {
    if (this.keeps) this.out += bytes.toString("utf8");
    return true;
  }
  pending(): number {
    return 0;
  }
  read(flowing: boolean): void {
    this.flowing = flowing;
  }
  end(): void {
    this.ended = true;
  }
  send(...lines: readonly string[]): void {
    this.session.receive(Buffer.from(lines.map((line) => `${line}\r\n`).join("")));
  }
  wait(pattern: RegExp): Promise<void> {
    return until(() => pattern.test(this.out), () => `no ${pattern} in:\n${this.out.slice(-3000)}`);
  }
  /** Waits until what was sent is executed; lines may have to wait for their turn. Forgets what was written before. */
  async sync(): Promise<void> {
    this.out = "";
    this.send("PING sync");
    await this.wait(/ PONG chat\.server sync\r\n/);
  }
}

/** Random numbers that are the same again for the same seed (mulberry32). */
function random(seed: number): (below: number) => number {
  return (below) => {
    seed = seed + 0x6d2b79f5 | 0;
    let mixed = Math.imul(seed ^ seed >>> 15, 1 | seed);
    mixed = mixed + Math.imul(mixed ^ mixed >>> 7, 61 | mixed) ^ mixed;
    return ((mixed ^ mixed >>> 14) >>> 0) % below;
  };
}

const WORDS = [
  ..."ana bo mal0 mal1 mal2 mal3 chat.server nickserv #chat #lab #chat,#lab * + - 0 1 302 99999999999 +i +b b".split(
    " ",
  ),
  ..."LS LIST REQ END LATEST BEFORE AFTER AROUND BETWEEN TARGETS PLAIN SCRAM-SCRYPT-PLUS msgid=1-1 %tcuihsnfdlaor"
    .split(" "),
  ..."timestamp=2026-01-01T00:00:00.000Z timestamp=x sasl message-tags batch -batch echo-message AGFuYQBzZWNyZXQ="
    .split(" "),
  ...[
    "",
    ":",
    ": ",
    "@",
    "é",
    "😀",
    "\u202e",
    "a".repeat(600),
    ",".repeat(50),
    "\0",
    "\x01ACTION x\x01",
    "=",
    "labeled-response",
  ],
];
const TAGS = [
  "@label=1",
  "@chat.local/once=a-1",
  "@chat.local/once=;;=",
  "@+typing=active",
  "@",
  "@a=\\",
  "@" + "x".repeat(5000),
];

/** A line that means something, or nearly. */
function line(below: (limit: number) => number): Buffer {
  const pick = (from: readonly string[]) => from[below(from.length)] ?? "";
  const words = [pick([...Object.keys(chat.COMMANDS), "JUNK"]), ...Array.from({ length: below(6) }, () => pick(WORDS))];
  if (!below(3)) words.splice(-1, 1, `:${words.at(-1)}`);
  if (!below(4)) words.unshift(pick(TAGS));
  const bytes = Buffer.from(words.join(" ") + pick(["\r\n", "\n", "\r", "\r\n"]));
  if (below(8)) return bytes;
  for (let times = below(4); times >= 0; times--) bytes[below(bytes.length)] = below(256);
  return bytes.subarray(0, below(bytes.length + 1));
}

/** What every line of the server looks like: tags, a source or a command of its own, 512 bytes of body. */
function conforms(text: string): boolean {
  const [, tags = "", body = ""] = /^(@[^ ]+ )?(.*)$/s.exec(text) ?? [];
  return tags.length <= LIMITS.serverTagBytes && Buffer.byteLength(body) <= LIMITS.bodyBytes - 2 &&
    /^(:[^ ]+ )?([A-Z]+|\d{3})( |$)/.test(body) && !/[\0\r\n]/.test(text);
}

test("whatever is sent, in whatever state: the server goes on, and a witness gets every line as it must be", async (t) => {
  const seed = Number(process.env["FUZZ_SEED"] ?? Math.floor(Math.random() * 2 ** 31));
  const below = random(seed);
  const log: string[] = [];
  const server = new chat.Server({ rate: 0, perAddress: 1000, log: (text) => log.push(text) });
  const caps = "message-tags server-time account-tag batch away-notify extended-join cap-notify labeled-response";
  const [witness, friend] = [new Wire(server, true), new Wire(server)];
  witness.send(`CAP REQ :${caps}`, "PASS right", "NICK witness", "USER w 0 * :w", "CAP END");
  await witness.wait(/ 366 witness /); // else the friend may be there first
  friend.send("PASS right", "NICK friend", "USER f 0 * :f");
  await witness.wait(/friend!friend@chat JOIN/);
  witness.out = "";
  const peers: Wire[] = [];
  let [lines, said, seen] = [0, 0, 0];
  const end = Date.now() + Number(process.env["FUZZ_SECONDS"] ?? 5) * 1000;
  while (Date.now() < end) {
    const at = below(20);
    let peer = peers[at];
    if (!peer || peer.ended || !below(200)) {
      if (peer && !peer.ended) peer.session.lost("gone");
      peer = peers[at] = new Wire(server);
      const start = [["PASS secret", `NICK mal${below(4)}`, "USER x 0 * :x"], [`CAP REQ :${caps}`], ["CAP LS"], []];
      peer.send(...start[below(start.length)] ?? []);
    }
    const pieces = Array.from({ length: 1 + below(20) }, () => line(below));
    lines += pieces.length;
    const bytes = Buffer.concat(pieces);
    const middle = below(bytes.length + 1); // packets end anywhere
    peer.session.receive(bytes.subarray(0, middle));
    peer.session.receive(bytes.subarray(middle));
    if (below(50)) continue;
    friend.send(`PRIVMSG #chat :number ${++said}`);
    witness.send("PING x"); // who is not heard is lost
    await turn();
    if (!below(20)) server.sweep();
    if (witness.out.length < 1_000_000) continue;
    await witness.wait(new RegExp(`friend@chat PRIVMSG #chat :number ${said}\r\n`));
    check(witness);
  }
  friend.send(`PRIVMSG #chat :number ${++said}`);
  await witness.wait(new RegExp(`friend@chat PRIVMSG #chat :number ${said}\r\n`));
  check(witness);
  t.diagnostic(`${lines} lines of seed ${seed}, ${said} of a friend, ${server.accounts.all.size} accounts`);
  assert.deepEqual(log.filter((text) => text.startsWith("error")), []);
  assert.ok(said > 10 && seen === said, `${seen} of ${said}`);
  for (const peer of [...peers, witness, friend]) peer.session.close("The test is over");

  function check(wire: Wire): void {
    const all = wire.out.split("\r\n");
    wire.out = all.pop() ?? "";
    assert.deepEqual(all.filter((one) => !conforms(one)), [], `seed ${seed}`);
    for (const one of all) {
      const number = / :friend!friend@chat PRIVMSG #chat :number (\d+)$/.exec(one)?.[1];
      if (number) assert.equal(Number(number), ++seen, `seed ${seed}`);
    }
  }
});

test("a hundred thousand new rooms leave no more than there may be", async () => {
  const server = new chat.Server({ rate: 0 });
  const wire = new Wire(server, true);
  wire.send("PASS secret", "NICK mal", "USER x 0 * :x");
  await wire.wait(/ 366 mal #chat /);
  for (let at = 0; at < 100_000; at++) {
    wire.send(`JOIN #room${at}`, `PART #room${at}`);
    if (at % 1000 === 999) await wire.sync();
  }
  assert.equal(server.rooms.size, LIMITS.rooms);
  wire.session.close("The test is over");
});

test("an error in a session ends that session with a reason in the log, and nothing else", async (t) => {
  const log: string[] = [];
  const { port, server } = await serveHere(t, { log: (text) => log.push(text) });
  const [ana, bo] = [await enter(t, port, "ana"), await enter(t, port, "bo")];
  const find = server.accounts.find.bind(server.accounts);
  mock.method(server.accounts, "find", (nick: string) => {
    if (nick === "boom") throw new Error("a mistake of ours");
    return find(nick);
  });
  ana.send("WHOIS boom");
  await ana.wait(/ERROR :Internal error\r\n/);
  await ana.closed;
  await bo.wait(/:ana!ana@chat QUIT :Internal error\r\n/);
  assert.match(log.join("\n"), /^error in the session of ana: Error: a mistake of ours/m);
  await bo.sync();
});

test("what others say reaches the log, which a terminal may show, without escape sequences", async (t) => {
  const log: string[] = [];
  const { port } = await serveHere(t, { log: (text) => log.push(text) });
  const ana = await enter(t, port, "ana");
  ana.send("QUIT :\x1b[2J\x1b[31mchat: to join: ./chat join evil");
  await ana.closed;
  const bo = await dial(t, port);
  bo.send("PASS \x1b[2J", "NICK \x1b[2J", "USER x 0 * :x", "QUIT");
  await bo.closed;
  assert.match(log.join("\n"), /^ana left .*: Quit: \uFFFD\[2J/m);
  // deno-lint-ignore no-control-regex -- that is what must not be there
  assert.doesNotMatch(log.join(""), /[\x00-\x1f]/);
});

test("who is logged in and not let in yet is kicked as well, and gets in no more", async () => {
  const server = new chat.Server();
  const [inside, halfway] = [new Wire(server, true), new Wire(server, true)];
  inside.send("PASS secret", "NICK eve", "USER e 0 * :e");
  await inside.wait(/ 366 eve /);
  const plain = Buffer.from("\0eve\0secret").toString("base64");
  halfway.send("CAP REQ sasl", "NICK eve", "USER e 0 * :e", "AUTHENTICATE PLAIN", `AUTHENTICATE ${plain}`);
  await halfway.wait(/ 903 /);
  const eve = server.accounts.find("eve");
  assert.ok(eve);
  server.accounts.barred.add("eve");
  server.kick(eve, "out");
  assert.deepEqual([inside.ended, halfway.ended], [true, true]);
  assert.equal(eve.sessions.size, 0);
});

// ---- Limits, and who goes over them

test("there are only so many who have not logged in", () => {
  const server = new chat.Server({ perAddress: 10_000, maxClients: 1000 });
  const wires = Array.from({ length: LIMITS.strangers + 1 }, () => new Wire(server));
  assert.deepEqual([wires.at(-2)?.ended, wires.at(-1)?.ended], [false, true]);
  for (const wire of wires) wire.session.close("The test is over");
});

test("who shakes hands a byte at a time, or not at all, is let go", async (t) => {
  const { port } = await serveHere(t);
  const hello = Buffer.from("1603010200010001fc0303".padEnd(1000, "0"), "hex");
  const began = Date.now();
  await Promise.all([0, 1].map(async (bytes) => {
    const socket = net.connect(port, "127.0.0.1");
    let sent = 0;
    const drip = setInterval(() => socket.write(hello.subarray(sent, sent += bytes)), 100);
    t.after(() => socket.destroy());
    await new Promise((closed) => socket.on("error", () => {}).on("close", closed));
    clearInterval(drip);
  }));
  assert.ok(Date.now() - began > LIMITS.handshakeMs - 1000);
});

test("who logs in by a byte a second has five minutes for it", (t) => {
  t.mock.timers.enable({ apis: ["Date"] });
  const server = new chat.Server({ rate: 0 }); // of which the clock is another one
  const wire = new Wire(server, true);
  const seconds = LIMITS.strangerMs / 1000;
  for (let second = 0; second <= seconds + 1; second++) {
    assert.equal(wire.ended, second > seconds, `after ${second} seconds`);
    t.mock.timers.tick(1000);
    wire.session.receive(Buffer.from("x"));
    server.sweep();
  }
});

test("a network has twice as many sockets, TLS or not, as it may have connections", async (t) => {
  const { port } = await serveHere(t, { perAddress: 2 });
  const sockets = Array.from({ length: 5 }, () => net.connect(port, "127.0.0.1"));
  const closed = sockets.map((socket) =>
    new Promise((gone) => socket.resume().on("error", () => {}).on("close", () => gone(socket)))
  );
  assert.equal(await Promise.race(closed), sockets[4]);
  for (const socket of sockets) socket.destroy();
  await Promise.all(closed);
  const later = await enter(t, port, "ana");
  await later.sync();
});

test("who sends more than may wait for its execution, to a server that goes on reading, is closed", async () => {
  const server = new chat.Server({ rate: 1 });
  const { wire } = await inside(server, "ana");
  const lines = "PING x\r\n".repeat(1024);
  for (let bytes = 0; bytes <= LIMITS.inputBytes; bytes += lines.length) {
    assert.equal(wire.ended, false);
    wire.session.receive(Buffer.from(lines));
  }
  assert.equal(wire.ended, true);
  await wire.wait(/ERROR :Excess flood\r\n$/);
});

test("what a newcomer is told comes in small pieces, whole and in order, also if it leaves at once", async () => {
  const server = new chat.Server({ rate: 0 });
  const nicks = Array.from({ length: 200 }, (_, at) => `somebody_called_${at}`);
  for (const nick of nicks) {
    const member = await server.accounts.register(nick, "secret", { address: "127.0.0.1", closed: false });
    if (typeof member !== "string") server.lobby.members.add(member);
  }
  for (const [more, end] of [["PING last", /PONG chat\.server last\r\n/], ["QUIT", /ERROR :Quit\r\n$/]] as const) {
    const wire = new Wire(server, true);
    const sizes: number[] = [];
    const write = wire.write.bind(wire);
    wire.write = (bytes) => sizes.push(bytes.length) > 0 && write(bytes);
    wire.send("PASS secret", "NICK ana", "USER x 0 * :x", more);
    await wire.wait(end);
    const names = [...wire.out.matchAll(/ 353 ana = #chat :(.*)\r\n/g)].flatMap(([, line = ""]) => line.split(" "));
    assert.deepEqual(names.slice(0, 200), nicks);
    const last = more === "QUIT" ? sizes.pop() : 0; // all the rest of it
    assert.ok(Math.max(...sizes) <= LIMITS.pieceBytes, `${sizes} and ${last} bytes`);
  }
});

test("one whose lines come without end, and without a limit on the rate, takes turns with the others", async () => {
  const server = new chat.Server({ rate: 0 });
  const [{ wire: busy }, other] = [await inside(server, "busy"), new Wire(server, true)];
  const count = 20_000;
  busy.session.receive(Buffer.from("PING x\r\n".repeat(count)));
  other.send("PING y");
  await other.wait(/PONG chat\.server y\r\n/);
  const answers = () => busy.out.split("PONG").length - 1;
  assert.ok(answers() < count, "the other had to wait for all of them");
  await until(() => answers() === count, () => `${answers()} answers`);
});

/** Somebody without a socket who is in. */
async function inside(server: chat.Server, nick: string): Promise<{ wire: Wire; member: chat.Member }> {
  const wire = new Wire(server, true);
  wire.send("PASS secret", `NICK ${nick}`, "USER x 0 * :x");
  await wire.wait(new RegExp(` 366 ${nick} `));
  const member = server.accounts.find(nick);
  assert.ok(member);
  return { wire, member };
}

/** How many seconds a member is ahead of its pace. */
const ahead = ({ pace }: chat.Member) => (pace.until - performance.now()) / 1000;

test("time counts as well: a line that takes long to execute costs as much as many", async (t) => {
  const server = new chat.Server({ rate: 10 });
  const { wire, member } = await inside(server, "ana");
  const { VERSION } = chat.COMMANDS;
  assert.ok(VERSION);
  t.mock.method(VERSION, "run", () => {
    for (const end = performance.now() + 2 * LIMITS.workMs; performance.now() < end;);
  });
  const before = ahead(member);
  wire.send("VERSION");
  await until(() => ahead(member) > before, () => "it was not executed");
  const [cost, most] = [ahead(member) - before, LIMITS.workMs * LIMITS.workFactor / 1000];
  assert.ok(cost > most - 0.1 && cost < most + 0.2, `${cost} seconds; a standstill of the machine costs no more`);
});

for (const chunk of ["x", "\n", "\r\n\n", "\r\n".repeat(256), "PING x\r\n"]) {
  test(`before login, who sends more than its rate is closed: ${JSON.stringify(chunk.slice(0, 8))}`, (t) => {
    t.mock.method(performance, "now", () => 0);
    const log: string[] = [];
    const server = new chat.Server({ rate: 0, log: (text) => log.push(text) }); // that limit is for members
    const wire = new Wire(server, true);
    let count = 0;
    while (count < 10_000 && !wire.ended) count += Number(wire.session.receive(Buffer.from(chunk)) ?? 1);
    const units = LIMITS.chunkUnits + chunk.length / LIMITS.unitBytes + Number(chunk.startsWith("PING"));
    const most = LIMITS.burstMs / 1000 * LIMITS.loginRate / units;
    assert.ok(Math.abs(count - most) < 2, `${count} chunks, not about ${most}`);
    assert.equal(wire.ended, true);
    assert.equal(wire.flowing, false);
    assert.match(log.join("\n"), /^a connection was closed from 127\.0\.0\.1: excess flood$/);
  });

  test(`a member who sends more than its rate is read slowly, and closed if it cannot be: ${JSON.stringify(chunk.slice(0, 8))}`, async () => {
    const server = new chat.Server({ rate: 10 });
    const { wire } = await inside(server, "ana");
    const send = () => wire.session.receive(Buffer.from(chunk));
    for (let count = 0; wire.flowing && count < 10_000; count++) send();
    assert.deepEqual([wire.flowing, wire.ended], [false, false]);
    for (let count = 0; !wire.ended && count < 100_000; count++) send(); // as Deno does, which reads on
    assert.equal(wire.ended, true);
  });
}

test("who types a login letter by letter is within the rate", async () => {
  const server = new chat.Server();
  const wire = new Wire(server, true);
  for (const letter of "PASS secret\r\nNICK ana\r\nUSER x 0 * :x\r\n") wire.session.receive(Buffer.from(letter));
  await wire.wait(/ 366 ana /);
});

for (const runtime of ["binary", "deno"] as const) {
  for (const state of ["before login", "a member"] as const) {
    test(`bytes that bring no text have a rate: KeyUpdates (${state}, ${runtime})`, OPENSSL, async (t) => {
      const server = await serveProcess(t, ["--rate", "0"], { runtime });
      const witness = await enter(t, server.port, "witness");
      const client = new Running(t, ["openssl", "s_client", "-connect", `127.0.0.1:${server.port}`, "-tls1_3"]);
      await client.out.wait(/---\n/);
      if (state === "a member") client.write("PASS secret\nNICK ana\nUSER a 0 * :a\n");
      if (state === "a member") await witness.wait(/ana!ana@chat JOIN/);
      const flood = setInterval(() => client.write("k\n"), 1); // makes openssl send a KeyUpdate
      t.after(() => clearInterval(flood));
      await client.ended; // Deno's TLS closes the connection of its own accord
      if (state === "a member") await witness.wait(/ana!ana@chat QUIT :(Excess flood|Connection lost)\r\n/);
      else if (runtime === "binary") await server.err.wait(/a connection was closed from 127\.0\.0\.1: excess flood\n/);
      await witness.sync();
    });
  }
}

for (const runtime of ["binary", "deno"] as const) {
  test(`text has no rate of that kind, however small and however large the records are (${runtime})`, async (t) => {
    const { port } = await serveProcess(t, ["--rate", "0"], { runtime });
    const irc = await enter(t, port, "ana");
    const started = performance.now();
    for (let at = 0; performance.now() - started < 4 * LIMITS.silentMs || at < 5000; at++) {
      irc.send(`PING ${at}`);
      if (at % 100 === 0) await irc.sync();
    }
    for (const letter of `PING ${"x".repeat(400)}`) irc.socket.write(letter);
    irc.send("");
    for (let at = 0; at < 50; at++) irc.send(`@+x=${"x".repeat(4000)} PING ${at}`, ...Array(30).fill(`PING ${at}`));
    await irc.sync();
  });
}

test("a member who is read slowly costs little, however small its records are", async (t) => {
  const { port, child } = await serveProcess(t);
  const before = residentKiB(child.pid);
  const flooders = await Promise.all(Array.from({ length: 5 }, async (_, at) => {
    const { socket } = await enter(t, port, `flooder${at}`);
    for (let count = 0; count < 20_000; count++) await new Promise((sent) => socket.write("x\n", sent)); // a record each
    return socket;
  }));
  const witness = await enter(t, port, "witness");
  for (let at = 0; at < 20; at++) await witness.sync();
  const after = residentKiB(child.pid);
  assert.deepEqual(flooders.map(({ destroyed }) => destroyed), flooders.map(() => false));
  for (const socket of flooders) socket.destroy();
  t.diagnostic(`${before} KiB before, ${after} KiB after`);
  assert.ok(after < before + 19_500, `${before} KiB before, ${after} KiB after`);
});

test("a long line costs as much as several", async () => {
  const server = new chat.Server({ rate: 10 });
  const { wire, member } = await inside(server, "ana");
  const before = ahead(member);
  wire.send(`@+x=${"x".repeat(4000)} PRIVMSG #chat :x`);
  assert.ok(ahead(member) - before > 0.7);
});

test("the clock may jump, and the machine sleep: nobody is lost who was not asked and given time", async (t) => {
  t.mock.timers.enable({ apis: ["Date"], now: Date.now() });
  const server = new chat.Server();
  const { wire } = await inside(server, "ana");
  wire.session.ask();
  t.mock.timers.tick(3 * LIMITS.pingMs);
  server.sweep();
  assert.equal(wire.ended, false, "its answer may be on its way");
  wire.send("PONG chat.server");
  t.mock.timers.tick(LIMITS.pingMs + 1);
  for (let at = 0; at <= LIMITS.pingMs; at += 1000) {
    t.mock.timers.tick(1000);
    server.sweep();
    assert.equal(wire.ended, false);
  }
  t.mock.timers.tick(2000);
  server.sweep();
  assert.equal(wire.ended, true);
});

test("who comes and goes all the time has to wait before it enters again", async () => {
  const server = new chat.Server({ rate: 100 });
  const { wire: witness } = await inside(server, "witness");
  const { member } = await inside(server, "ana");
  for (const session of [...member.sessions]) session.close("out");
  member.pace.until = performance.now() + LIMITS.burstMs + 300;
  const again = new Wire(server, true);
  again.send("PASS secret", "NICK ana", "USER x 0 * :x");
  await until(() => again.session.member !== undefined, () => "it is not logged in");
  await witness.sync();
  assert.deepEqual([again.session.welcome, member.present], [false, false]);
  await again.wait(/ 366 ana /);
  assert.ok(ahead(member) > LIMITS.burstMs / 1000, "and this time cost something, too");
});

test("who waits for the execution of its lines is not taken for lost", async () => {
  const server = new chat.Server({ rate: 10 });
  const { wire } = await inside(server, "ana");
  wire.send(...Array.from({ length: 70 }, (_, at) => `PING ${at}`));
  await until(() => !wire.flowing, () => "it need not wait");
  wire.session.quietSince -= 3 * LIMITS.pingMs;
  await wire.wait(/PONG chat\.server 69\r\n/);
  server.sweep();
  assert.equal(wire.ended, false);
});

test("a password is hashed for as long as it takes, which is no silence", async (t) => {
  const server = new chat.Server();
  let hashed = () => {};
  t.mock.method(crypto, "scrypt", (...args: unknown[]) => {
    hashed = () => (args.at(-1) as (error: null, key: Buffer) => void)(null, Buffer.alloc(32));
  });
  const log = t.mock.method(server.options, "log");
  const [wire, gone] = [new Wire(server, true), new Wire(server)];
  wire.send("PASS secret", "NICK ana", "USER x 0 * :x");
  await until(() => hashed.name !== "", () => "nothing is hashed");
  wire.session.quietSince -= 2 * LIMITS.silenceMs;
  server.sweep();
  assert.equal(wire.ended, false);
  hashed();
  await wire.wait(/ 366 ana /);
  gone.send("PASS secret", "NICK bo", "USER x 0 * :x");
  await turn();
  gone.session.close("gone");
  hashed();
  await until(() => server.accounts.find("bo") !== undefined, () => "bo is not registered");
  assert.ok(
    log.mock.calls.some(({ arguments: [text] }) => text === "bo registered from 127.0.0.1"),
    "the log tells it",
  );
});

test("tags that are sent to nicks leave nothing behind, nor does an account that is forgotten", async () => {
  const server = new chat.Server({ rate: 0 });
  const [{ wire, member: ana }, { member: bo }] = [await inside(server, "ana"), await inside(server, "bo")];
  wire.send("@+typing=active TAGMSG bo");
  await wire.sync();
  assert.deepEqual([ana.talks.size, bo.talks.size], [0, 0]);
  wire.send("PRIVMSG bo :hi");
  await wire.sync();
  assert.deepEqual([ana.talks.size, bo.talks.size], [1, 1]);
  server.forget(bo);
  assert.equal(ana.talks.size, 0);
});

test("a new verifier is taken from who is in by SCRAM, not from who tried it", async () => {
  const server = new chat.Server({ rate: 0 });
  await inside(server, "ana");
  const wire = new Wire(server, true);
  wire.send("AUTHENTICATE SCRAM-SCRYPT-PLUS", "AUTHENTICATE *", "PASS secret", "NICK ana", "USER x 0 * :x");
  await wire.wait(/ 366 ana /);
  wire.send("AUTHENTICATE SCRAM-SCRYPT-PLUS", "AUTHENTICATE *");
  const verifier = chat.formatVerifier(chat.verifierOf(await chat.deriveKeys("other")));
  wire.send(`PASS ${verifier}`);
  await wire.wait(/ 462 ana :You may not reregister\r\n/);
});

for (const runtime of ["binary", "node", "deno"] as const) {
  test(`who ends its side after its last line has all its lines executed, and gets the answers (${runtime})`, async (t) => {
    const { port } = await serveProcess(t, ["--rate", "20"], { runtime });
    const witness = await enter(t, port, "witness");
    const irc = await dial(t, port);
    irc.send("PASS secret", "NICK ana", "USER x 0 * :x", "PRIVMSG #chat :first");
    for (let at = 0; at < 100; at++) irc.send(`PING ${at}`); // which is more than a burst
    irc.socket.end("PRIVMSG #chat :last\r\n");
    await irc.wait(/PONG chat\.server 99\r\n/);
    await irc.closed;
    await witness.wait(/PRIVMSG #chat :first\r\n[\s\S]*PRIVMSG #chat :last\r\n/);
  });
}

test("of private messages to the absent so many are told on return, and the latest of them", async () => {
  const server = new chat.Server({ rate: 0 });
  const [{ wire: ana }, { wire: bo }] = [await inside(server, "ana"), await inside(server, "bo")];
  bo.send("QUIT");
  for (let at = 1; at <= LIMITS.missed + 5; at++) ana.send(`PRIVMSG bo :${at}`);
  await ana.sync(); // else some may be said after the return
  const again = new Wire(server, true);
  again.send("PASS secret", "NICK bo", "USER x 0 * :x");
  await again.wait(new RegExp(`PRIVMSG bo :${LIMITS.missed + 5}\r\n`));
  const told = [...again.out.matchAll(/PRIVMSG bo :(\d+)\r\n/g)].map(([, number]) => Number(number));
  assert.deepEqual(told, Array.from({ length: LIMITS.missed }, (_, at) => at + 6));
});

test("the numbered lines of so many clients are remembered", async () => {
  const server = new chat.Server({ rate: 0 });
  const ana = new Wire(server, true);
  ana.send("CAP REQ message-tags", "PASS secret", "NICK ana", "USER x 0 * :x", "CAP END");
  await ana.wait(/ 366 ana /);
  for (let at = 0; at <= LIMITS.instances; at++) ana.send(`@chat.local/once=client${at}-1 PING x`);
  await ana.sync();
  const done = server.accounts.find("ana")?.done;
  assert.deepEqual([done?.size, done?.has("client0"), done?.has("client1")], [LIMITS.instances, false, true]);
});

test("the log tells of so many failures of a network in a minute, and of those of others still", () => {
  const log: string[] = [];
  const server = new chat.Server({ log: (text) => log.push(text) });
  for (let at = 0; at < LIMITS.failures + 5; at++) server.failed("10.0.0.1", "no TLS", "it hung up");
  assert.equal(log.length, LIMITS.failures);
  server.failed("10.0.0.2", "no TLS", "it hung up");
  assert.equal(log.at(-1), "no TLS from 10.0.0.2: it hung up");
});

test("a server that stops does not wait for those who read nothing", async (t) => {
  const { port, server, stop } = await serveHere(t);
  const [ana, bo] = [await enter(t, port, "ana"), await enter(t, port, "bo")];
  sleep(ana);
  const owed = () => Math.max(...[...server.sessions].map((session) => session.owed));
  for (let at = 0; owed() < LIMITS.owedBytes / 4; at++) {
    bo.send(`PRIVMSG #chat :${"x".repeat(400)}`);
    if (at % 100 === 0) await bo.sync();
  }
  await stop("The server is stopping");
  await bo.wait(/ERROR :The server is stopping\r\n/);
});

for (const runtime of ["binary", "deno"] as const) {
  test(`who sends without end is read slowly, or goes; the others do not notice (${runtime})`, async (t) => {
    const server = await serveProcess(t, ["--rate", "10"], { runtime });
    const [flooder, ana] = [await enter(t, server.port, "flooder"), await enter(t, server.port, "ana")];
    const flood = Buffer.from("PRIVMSG #chat :flood\r\n".repeat(10_000));
    let taken = 0;
    const pour = () => {
      while (!flooder.socket.destroyed && taken < 1000 && flooder.socket.write(flood)) taken++;
      if (!flooder.socket.destroyed && taken < 1000) taken++;
    };
    flooder.socket.on("drain", pour);
    pour();
    for (let at = 0; at < 20; at++) await ana.sync();
    if (runtime === "deno") { // which goes on reading
      await flooder.closed;
      await ana.sync();
      assert.match(ana.all, /:flooder!flooder@chat QUIT :Excess flood\r\n/);
    }
    const heard = ana.all.split("PRIVMSG #chat :flood").length - 1;
    assert.ok((heard >= 1 || runtime === "deno") && heard < 500, `${heard} lines went through`);
    assert.ok(taken < 100, `${taken} times 220 kB were taken in`);
    flooder.socket.destroy();
  });
}

/** Somebody who does not read what comes, from now on. */
function sleep(irc: Irc): void {
  irc.socket.pause();
}

test("who asks for more history than it reads has to wait, is not closed, and gets all of it", async (t) => {
  const { port } = await serveHere(t);
  const ana = await enter(t, port, "ana", "batch draft/chathistory");
  for (let at = 0; at < 100; at++) ana.send(`PRIVMSG #chat :${"x".repeat(400)}`);
  await ana.sync();
  sleep(ana);
  const times = 400; // 18 MB, of which 1 may be owed
  for (let at = 0; at < times; at++) ana.send("CHATHISTORY LATEST #chat * 100");
  const bo = await enter(t, port, "bo");
  await bo.sync();
  ana.socket.resume();
  for (let at = 0; at < times; at++) await ana.wait(/ BATCH -\w+\r\n/);
  await ana.sync();
});

test("who stops reading costs a mebibyte, then goes, with a reason; the others hear everything", async (t) => {
  const log: string[] = [];
  const { port, server } = await serveHere(t, { log: (text) => log.push(text) });
  const [sleeper, ana, bo] = await Promise.all(["sleeper", "ana", "bo"].map((nick) => enter(t, port, nick)));
  assert.ok(sleeper && ana && bo);
  sleep(sleeper);
  let most = 0;
  bo.send("PRIVMSG sleeper :it did not read this");
  for (let at = 0; log.every((text) => !/^sleeper left .*: Not reading$/.test(text)); at++) {
    for (let many = 0; many < 100; many++) bo.send(`PRIVMSG #chat :${at}.${many} ${"x".repeat(400)}`);
    await bo.sync();
    await ana.wait(new RegExp(` :${at}\\.99 x+\r\n`));
    most = Math.max(most, ...[...server.sessions].map(({ owed }) => owed));
  }
  assert.ok(most > LIMITS.owedBytes / 2 && most < LIMITS.owedBytes * 1.1, `${most} bytes were owed`);
  const back = await enter(t, port, "sleeper");
  await back.wait(/PRIVMSG sleeper :it did not read this\r\n/);
});

// ---- Connections that break

const residentKiB = (pid = 0) => Number(/VmRSS:\s*(\d+)/.exec(fs.readFileSync(`/proc/${pid}/status`, "utf8"))?.[1]);

/** Ways to connect and be gone. */
const GONE: readonly ((t: TestContext, port: number) => Promise<unknown>)[] = [
  (_, port) => raw(port, "", "destroy"),
  (_, port) => raw(port, "\x16\x03\x01\x02\x00\x01", "destroy"), // the beginning of a handshake
  (_, port) => raw(port, "GET / HTTP/1.0\r\n\r\n", "end"),
  (_, port) => raw(port, "\x15\x03\x03\x00\x02\x02\x28", "reset"), // a TLS alert
  async (t, port) => (await dial(t, port)).socket.destroy(),
  async (t, port) => {
    const irc = await dial(t, port);
    irc.socket.write("CAP LS 302\r\nNICK half"); // a half line, and half closed
    irc.socket.end();
    await irc.closed;
  },
  (t, port) => interfered(t, port, (wire) => wire.write("this is no TLS record")),
  (t, port) => interfered(t, port, (wire) => wire.write("\x17\x03\x03\x00\x10" + "x".repeat(16), "latin1")), // a forged one
  (t, port) => interfered(t, port, (wire) => wire.resetAndDestroy()),
  async (t, port) => {
    const irc = await dial(t, port);
    irc.send("CAP REQ sasl", "AUTHENTICATE SCRAM-SCRYPT-PLUS");
    await irc.wait(/AUTHENTICATE \+/);
    irc.socket.destroy();
  },
];

/** Connects by way of somebody who does something to the connection when there is TLS on it. */
async function interfered(t: TestContext, port: number, harm: (wire: net.Socket) => void): Promise<void> {
  const wires: net.Socket[] = [];
  const middle = net.createServer((near) => {
    const far = net.connect(port, "127.0.0.1");
    wires.push(far);
    for (const [one, other] of [[near, far], [far, near]] as const) {
      one.on("error", () => {}).on("data", (chunk) => other.write(chunk)).on("close", () => other.destroy());
    }
  });
  await new Promise<void>((up) => middle.listen(0, "127.0.0.1", up));
  const address = middle.address();
  const irc = await dial(t, typeof address === "object" && address ? address.port : 0);
  irc.send("NICK half", "PING x");
  await irc.wait(/PONG/);
  for (const wire of wires) harm(wire);
  await irc.closed.catch(() => {}); // by an alert
  middle.close();
}

function raw(port: number, text: string, how: "destroy" | "end" | "reset"): Promise<unknown> {
  const socket = net.connect(port, "127.0.0.1", () => {
    socket.write(text, "latin1", () => {
      if (how === "end") socket.end();
      else void (how === "reset" ? socket.resetAndDestroy() : socket.destroy());
    });
  });
  socket.resume().on("error", () => {});
  return new Promise((closed) => socket.on("close", closed));
}

test("connections that are dropped at every stage leave nothing behind, and a witness is answered", async (t) => {
  const { port, child } = await serveProcess(t, ["--per-address", "1000"]);
  const witness = await enter(t, port, "witness");
  const rounds = async (count: number) => {
    for (let at = 0; at < count; at += 20) {
      await Promise.all(Array.from({ length: 20 }, (_, more) => GONE[(at + more) % GONE.length]?.(t, port)));
      await witness.sync();
    }
  };
  await rounds(700);
  const before = residentKiB(child.pid);
  await rounds(Number(process.env["DROPS"] ?? 1400));
  const after = residentKiB(child.pid);
  t.diagnostic(`${before} KiB before, ${after} KiB after`);
  assert.ok(after < before * 1.2, `${before} KiB before, ${after} KiB after`);
});

test("a server that is told to stop while all talk delivers each line that it has acknowledged", async (t) => {
  const server = await serveProcess(t, ["--rate", "0", "--per-address", "1000"]);
  const people = await Promise.all(Array.from({ length: 200 }, async (_, at) => {
    await register(await dial(t, server.port), `n${at}`);
    const irc = await dial(t, server.port);
    await logIn(irc, `n${at}`, "echo-message");
    return irc;
  }));
  const closed = people.map((person) => person.closed.catch(() => {})); // or a write came too late
  let number = 0;
  const talk = setInterval(() => {
    for (const [at, one] of people.entries()) {
      if (!one.socket.readableEnded) one.send(`PRIVMSG #chat :from ${at} ${++number}`);
    }
  }, 20);
  t.after(() => clearInterval(talk));
  await people[0]?.wait(/from 199 4\d\d\d\r\n/);
  server.child.kill("SIGTERM");
  assert.equal(await server.ended, 0);
  clearInterval(talk);
  await Promise.all(closed);
  const heard = people.map(({ all }) =>
    [...all.matchAll(/PRIVMSG #chat :(from \d+ \d+)\r\n/g)].map(([, text]) => text)
  );
  const acknowledged = heard.flatMap((texts, at) => texts.filter((text) => text?.startsWith(`from ${at} `)));
  assert.ok(acknowledged.length > 1000);
  for (const texts of heard) {
    const all = new Set(texts);
    assert.equal(all.size, texts.length, "nothing twice");
    assert.deepEqual(acknowledged.filter((text) => !all.has(text)), []);
  }
});
