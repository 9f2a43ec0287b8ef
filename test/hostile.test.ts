// Hostile and broken clients: no other member notices them, and the server's memory stays bounded.
// FUZZ_SECONDS makes the fuzzer run longer, FUZZ_SEED repeats a run, LINES and DROPS change how much is sent.
import assert from "node:assert/strict";
import crypto from "node:crypto";
import fs from "node:fs";
import net from "node:net";
import { test, type TestContext } from "node:test";
import tls from "node:tls";
import * as chat from "../chat.ts";
import {
  dial,
  enter,
  FakeClock,
  logIn,
  quickScrypt,
  random,
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

/** A connection without a socket. With `keeps` it keeps what the server writes. */
class Wire implements chat.Peer {
  readonly address: string;
  readonly session: chat.Session;
  readonly keeps: boolean;
  out = "";
  ended = false;
  flowing = true;
  #sent = 0;
  constructor(server: chat.Server, keeps = false, address = "127.0.0.1") {
    this.keeps = keeps;
    this.address = address;
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
  /** Sends lines in one chunk. They end with CR LF and with a bare LF in turn. */
  send(...lines: readonly string[]): void {
    this.session.inbox.push(Buffer.from(lines.map((line) => line + (this.#sent++ % 2 ? "\n" : "\r\n")).join("")));
  }
  wait(pattern: RegExp): Promise<void> {
    return until(() => pattern.test(this.out), () => `no ${pattern} in:\n${this.out.slice(-3000)}`);
  }
  /** Forgets what was written so far, and waits until everything that was sent has been executed. */
  async sync(): Promise<void> {
    this.out = "";
    this.send("PING sync");
    await this.wait(/ PONG chat\.server sync\r\n/);
  }
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

/** A line that is valid, or nearly. */
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

/** Whether a line is one that the server may send: tags, a source, a command, and a body of at most 512 bytes. */
function conforms(text: string): boolean {
  const [, tags = "", body = ""] = /^(@[^ ]+ )?(.*)$/s.exec(text) ?? [];
  return tags.length <= LIMITS.serverTagBytes && Buffer.byteLength(body) <= LIMITS.bodyBytes - 2 &&
    /^(:[^ ]+ )?([A-Z]+|\d{3})( |$)/.test(body) && !/[\0\r\n]/.test(text);
}

test("random input in every state neither stops the server nor keeps a member from getting every line intact and in order", async (t) => {
  const seed = Number(process.env["FUZZ_SEED"] ?? Math.floor(Math.random() * 2 ** 31));
  const below = random(seed);
  const log: string[] = [];
  const server = new chat.Server({ rate: 0, perAddress: 1000, log: (text) => log.push(text) });
  const caps = "message-tags server-time account-tag batch away-notify extended-join cap-notify labeled-response";
  const [witness, friend] = [new Wire(server, true), new Wire(server)];
  witness.send(`CAP REQ :${caps}`, "PASS right", "NICK witness", "USER w 0 * :w", "CAP END");
  await witness.wait(/ 366 witness /); // or else the friend may join first
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
    const middle = below(bytes.length + 1); // chunks end anywhere
    peer.session.inbox.push(bytes.subarray(0, middle));
    peer.session.inbox.push(bytes.subarray(middle));
    if (below(50)) continue;
    friend.send(`PRIVMSG #chat :number ${++said}`);
    witness.send("PING x"); // or else it would time out in a long run
    await turn();
    if (!below(20)) server.sweep();
    if (witness.out.length < 1_000_000) continue;
    await witness.wait(new RegExp(`friend@chat PRIVMSG #chat :number ${said}\r\n`));
    check(witness);
  }
  friend.send(`PRIVMSG #chat :number ${++said}`);
  await witness.wait(new RegExp(`friend@chat PRIVMSG #chat :number ${said}\r\n`));
  check(witness);
  t.diagnostic(`${lines} random lines of seed ${seed}, ${said} messages, ${server.accounts.byNick.size} accounts`);
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

test("rooms in which something was said are kept up to a limit, and silent rooms are not kept at all", async () => {
  const server = new chat.Server({ rate: 0 });
  const { wire } = await inside(server, "mal");
  for (let at = 0; at < 100_000; at++) {
    wire.send(`JOIN #silent${at}`, `PART #silent${at}`);
    if (at % 1000 === 999) await wire.sync();
  }
  assert.equal(server.rooms.size, 1);
  for (let at = 0; at < 10_000; at++) {
    wire.send(`JOIN #room${at}`, `PRIVMSG #room${at} :x`, `PART #room${at}`);
    if (at % 1000 === 999) await wire.sync();
  }
  assert.equal(server.rooms.size, LIMITS.rooms);
  assert.deepEqual([server.rooms.has("#room9999"), server.rooms.has("#room1")], [true, false]);
  wire.session.close("The test is over");
});

test("a million messages of one member reach another member completely and in order, and memory stays bounded", async (t) => {
  const server = new chat.Server({ rate: 0 });
  const [{ wire: ana }, { wire: bo }] = [await inside(server, "ana"), await inside(server, "bo")];
  const count = Number(process.env["LINES"] ?? 1_000_000);
  const memory: number[] = [];
  for (let at = 0; at < count;) {
    const numbers = Array.from({ length: 1000 }, () => at++);
    bo.out = "";
    ana.send(...numbers.map((number) => `PRIVMSG #chat :number ${number}`));
    await bo.wait(new RegExp(` :number ${at - 1}\r\n$`));
    const heard = [...bo.out.matchAll(/:ana!ana@chat PRIVMSG #chat :number (\d+)\r\n/g)].map(([, text]) =>
      Number(text)
    );
    assert.deepEqual(heard, numbers);
    if (at % Math.ceil(count / 10) < 1000) memory.push(Math.round(process.memoryUsage().rss / 2 ** 20));
  }
  t.diagnostic(`${memory.join(", ")} MiB`);
  assert.ok((memory.at(-1) ?? 0) < (memory[0] ?? 0) + 64, `${memory} MiB`);
  assert.equal(server.lobby.log.messages.length, server.options.history);
});

test("a bug that throws while a line is executed ends that session only, and is logged", async (t) => {
  const log: string[] = [];
  const { port, server } = await serveHere(t, { log: (text) => log.push(text) });
  const [ana, bo] = [await enter(t, port, "ana"), await enter(t, port, "bo")];
  const find = server.accounts.find.bind(server.accounts);
  t.mock.method(server.accounts, "find", (nick: string) => {
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

test("text from clients reaches the log without control characters", async (t) => {
  const log: string[] = [];
  const { port } = await serveHere(t, { log: (text) => log.push(text) });
  const ana = await enter(t, port, "ana");
  ana.send("QUIT :\x1b[2J\x1b[31mchat: to join: ./chat join evil");
  await ana.closed;
  const bo = await dial(t, port);
  bo.send("PASS \x1b[2J", "NICK \x1b[2J", "USER x 0 * :x", "QUIT");
  await bo.closed;
  assert.match(log.join("\n"), /^ana left .*: Quit: \uFFFD\[2J/m);
  // deno-lint-ignore no-control-regex -- the log must not contain them
  assert.doesNotMatch(log.join(""), /[\x00-\x1f]/);
});

test("a kick also closes a connection that has logged in and has not been welcomed yet", async () => {
  const server = new chat.Server();
  const [inside, halfway] = [new Wire(server, true), new Wire(server, true)];
  inside.send("PASS secret", "NICK eve", "USER e 0 * :e");
  await inside.wait(/ 366 eve /);
  const plain = Buffer.from("\0eve\0secret").toString("base64");
  halfway.send("CAP REQ sasl", "NICK eve", "USER e 0 * :e", "AUTHENTICATE PLAIN", `AUTHENTICATE ${plain}`);
  await halfway.wait(/ 903 /);
  const eve = server.accounts.find("eve");
  assert.ok(eve);
  server.accounts.barred.set("eve", "barred");
  server.kick(eve, "out");
  assert.deepEqual([inside.ended, halfway.ended], [true, true]);
  assert.equal(eve.sessions.size, 0);
});

// ---- Limits

test("when too many connections have not logged in, the oldest of the site with most of them makes way", () => {
  const server = new chat.Server({ perAddress: 10_000, maxClients: 1000 });
  const few = new Wire(server, false, "2001:db8:1::1");
  const many = Array.from(
    { length: LIMITS.unauthenticated - 1 },
    (_, at) => new Wire(server, at === 0, `2001:db8:2:${at.toString(16)}::1`),
  );
  const others = [new Wire(server, false, "10.0.0.1"), new Wire(server, false, "10.0.0.2")];
  assert.deepEqual(many.map(({ ended }) => ended), many.map((_, at) => at < 2));
  assert.match(many[0]?.out ?? "", /^ERROR :Too many connections, and you had not logged in\r\n$/);
  assert.ok([few, ...others].every(({ ended }) => !ended));
  for (const wire of [few, ...many, ...others]) wire.session.close("The test is over");
});

test("when a network has too many connections, the oldest of its own that has not logged in makes way", async () => {
  const server = new chat.Server({ perAddress: 3 });
  const { wire: ana } = await inside(server, "ana");
  const [first, second, other] = [new Wire(server), new Wire(server), new Wire(server, false, "10.0.0.2")];
  const third = new Wire(server);
  assert.deepEqual([ana, first, second, third, other].map(({ ended }) => ended), [false, true, false, false, false]);
  const members = [await inside(server, "bo"), await inside(server, "cy")];
  assert.deepEqual([second, third].map(({ ended }) => ended), [true, true]);
  const late = new Wire(server, true);
  assert.match(late.out, /^ERROR :Too many connections from your address\r\n$/, "members do not make way");
  for (const { wire } of members) assert.equal(wire.ended, false);
});

test("nothing is written to a connection that was lost in the turn in which it was sent something", async () => {
  const server = new chat.Server();
  const wire = new Wire(server, true);
  wire.send("CAP LS 302");
  wire.session.lost("reset");
  await turn();
  await turn();
  assert.equal(wire.out, "");
  assert.equal(wire.session.outbox.queued, 0);
});

test("a client that connects again from the port of a connection that is being closed takes one place", async (t) => {
  const { port, server } = await serveHere(t);
  for (let at = 0; at < 20; at++) {
    const first = net.connect({ port, host: "127.0.0.1" }).on("error", () => {});
    await new Promise((connected) => first.once("connect", connected));
    const { localPort = 0 } = first;
    first.resetAndDestroy();
    const again = net.connect({ port, host: "127.0.0.1", localPort });
    const socket = tls.connect({ socket: again, rejectUnauthorized: false });
    await new Promise((secure) => socket.once("secureConnect", secure));
    await until(() => server.occupancy.guests === 1, () => `${server.occupancy.guests} places`);
    socket.destroy();
    await until(() => server.occupancy.guests === 0, () => `${server.occupancy.guests} places`);
  }
});

test("TCP connections count from their accept on, whether they speak TLS or not", async (t) => {
  const { port } = await serveHere(t, { perAddress: 2 });
  const sockets = Array.from({ length: 5 }, () => net.connect(port, "127.0.0.1"));
  const closed = sockets.map((socket) =>
    new Promise((gone) => socket.resume().on("error", () => {}).on("close", gone))
  );
  await Promise.all(closed.slice(0, 3));
  assert.deepEqual(sockets.slice(3).map(({ destroyed }) => destroyed), [false, false]);
  const later = await enter(t, port, "ana");
  await later.sync();
});

test("handshakes of one network beyond the first ones are spread over time, and those of others are not", async (t) => {
  const clock = new FakeClock();
  const { port } = await serveHere(t, { clock, perAddress: 20 });
  const shake = (localAddress: string) => {
    const tcp = net.connect({ host: "127.0.0.1", port, localAddress });
    const socket = tls.connect({ socket: tcp, rejectUnauthorized: false }).on("error", () => {});
    t.after(() => socket.destroy());
    return new Promise<string>((done) => socket.on("secureConnect", () => done(localAddress)));
  };
  const first = Array.from({ length: LIMITS.handshakeBurst }, () => shake("127.0.0.2"));
  await Promise.all(first);
  const [later, other] = [shake("127.0.0.2"), shake("127.0.0.3")];
  assert.equal(await Promise.race([later, other]), "127.0.0.3");
  clock.tick(1000 / (LIMITS.handshakes * 20));
  await later;
});

test("a TLS handshake that does not end, or does not begin, times out after a minute", async (t) => {
  const original = tls.createServer;
  let timeout = 0;
  t.mock.method(tls, "createServer", (options: tls.TlsOptions) => {
    timeout = options.handshakeTimeout ?? 0;
    return original({ ...options, handshakeTimeout: timeout / 60 }); // by a clock of its own: this one is 60 times as fast
  });
  const { port } = await serveHere(t);
  assert.equal(timeout, 60_000);
  const hello = Buffer.from("1603010200010001fc0303".padEnd(1000, "0"), "hex");
  await Promise.all([0, 1].map(async (bytes) => {
    const socket = net.connect(port, "127.0.0.1");
    let sent = 0;
    const drip = setInterval(() => socket.write(hello.subarray(sent, sent += bytes)), 100);
    t.after(() => socket.destroy());
    await new Promise((closed) => socket.on("error", () => {}).on("close", closed));
    clearInterval(drip);
  }));
});

test("a connection that sends a byte a second is closed if it has not logged in after five minutes", () => {
  const clock = new FakeClock();
  const server = new chat.Server({ rate: 0, clock });
  const wire = new Wire(server, true);
  const seconds = LIMITS.loginMs / 1000;
  for (let second = 0; second <= seconds + 1; second++) {
    assert.equal(wire.ended, second > seconds, `after ${second} seconds`);
    clock.tick(1000);
    wire.session.inbox.push(Buffer.from("x"));
    server.sweep();
  }
});

test("a connection that sends nothing is closed after a minute", () => {
  const clock = new FakeClock();
  const server = new chat.Server({ clock });
  const wire = new Wire(server, true);
  const seconds = LIMITS.silenceMs / 1000;
  for (let second = 0; second <= seconds + 1; second++) {
    assert.equal(wire.ended, second > seconds, `after ${second} seconds`);
    clock.tick(1000);
    server.sweep();
  }
});

test("a member whose unexecuted input exceeds its limit is disconnected, where reading cannot be paused", async () => {
  const server = new chat.Server({ rate: 1 });
  const { wire } = await inside(server, "ana");
  const lines = "PING x\r\n".repeat(1024);
  for (let bytes = 0; bytes <= LIMITS.inputBytes; bytes += lines.length) {
    assert.equal(wire.ended, false);
    wire.session.inbox.push(Buffer.from(lines));
  }
  assert.equal(wire.ended, true);
  await wire.wait(/ERROR :Excess flood\r\n$/);
});

test("a new member gets the whole list of names in order, even if it quits at once", async () => {
  const server = new chat.Server({ rate: 0 });
  const nicks = Array.from({ length: 200 }, (_, at) => `somebody_called_${at}`);
  for (const nick of nicks) {
    const member = await server.accounts.register(nick, "secret", { address: "127.0.0.1", closed: false });
    if (typeof member !== "string") server.lobby.members.add(member);
  }
  for (const [last, end] of [["PING last", /PONG chat\.server last\r\n/], ["QUIT", /ERROR :Quit\r\n$/]] as const) {
    const wire = new Wire(server, true);
    wire.send("PASS secret", "NICK ana", "USER x 0 * :x", last);
    await wire.wait(end);
    const names = [...wire.out.matchAll(/ 353 ana = #chat :(.*)\r\n/g)].flatMap(([, line = ""]) => line.split(" "));
    assert.deepEqual(names.slice(0, 200), nicks);
  }
});

/** A member whose connection has no socket. */
async function inside(server: chat.Server, nick: string): Promise<{ wire: Wire; member: chat.Member }> {
  const wire = new Wire(server, true);
  wire.send("PASS secret", `NICK ${nick}`, "USER x 0 * :x");
  await wire.wait(new RegExp(` 366 ${nick} `));
  const member = server.accounts.find(nick);
  assert.ok(member);
  return { wire, member };
}

/** How many units a member has used of its burst, at a rate at which it may use that many. */
function unitsUsed({ rate }: chat.Member, burst: number): number {
  rate.charge(burst);
  const used = rate.excess;
  rate.refund(burst);
  return used;
}

for (const chunk of ["x", "\n", "\r\n\n", "\r\n".repeat(256), "PING x\r\n"]) {
  test(`a connection that exceeds the rate limit before login is closed: ${JSON.stringify(chunk.slice(0, 8))}`, () => {
    const log: string[] = [];
    const server = new chat.Server({ rate: 0, clock: new FakeClock(), log: (text) => log.push(text) }); // for members
    const wire = new Wire(server, true);
    let count = 0;
    for (; count < 10_000 && !wire.ended; count++) wire.session.inbox.push(Buffer.from(chunk));
    const units = LIMITS.chunkUnits + chunk.length / LIMITS.unitBytes + Number(chunk.startsWith("PING"));
    const most = LIMITS.burstSeconds * LIMITS.loginRate / units;
    assert.ok(Math.abs(count - most) < 2, `${count} chunks, not about ${most}`);
    assert.equal(wire.ended, true);
    assert.equal(wire.flowing, false);
    assert.match(log.join("\n"), /^a connection was closed from 127\.0\.0\.1: excess flood$/);
  });

  test(`a member over its rate limit is not read, and is disconnected if it goes on sending: ${JSON.stringify(chunk.slice(0, 8))}`, async () => {
    const server = new chat.Server();
    const { wire } = await inside(server, "ana");
    const send = () => wire.session.inbox.push(Buffer.from(chunk));
    for (let count = 0; wire.flowing && count < 10_000; count++) send();
    assert.deepEqual([wire.flowing, wire.ended], [false, false]);
    for (let count = 0; !wire.ended && count < 100_000; count++) send(); // Deno cannot pause a socket
    assert.equal(wire.ended, true);
  });
}

test("a login typed letter by letter stays within the rate limit", async () => {
  const server = new chat.Server();
  const wire = new Wire(server, true);
  for (const letter of "PASS secret\nNICK ana\r\nUSER x 0 * :x\n") wire.session.inbox.push(Buffer.from(letter));
  await wire.wait(/ 366 ana /);
});

for (const runtime of ["binary", "deno"] as const) {
  for (const state of ["before login", "after login"] as const) {
    test(
      `a flood of TLS KeyUpdates, which bring no text, ends the connection (${state}, ${runtime})`,
      OPENSSL,
      async (t) => {
        const server = await serveProcess(t, ["--rate", "0"], { runtime });
        const witness = await enter(t, server.port, "witness");
        const client = new Running(t, ["openssl", "s_client", "-connect", `127.0.0.1:${server.port}`, "-tls1_3"]);
        await client.out.wait(/---\n/);
        if (state === "after login") client.write("PASS secret\nNICK ana\nUSER a 0 * :a\n");
        if (state === "after login") await witness.wait(/ana!ana@chat JOIN/);
        const flood = setInterval(() => client.write("k\n"), 1); // makes openssl send a KeyUpdate
        t.after(() => clearInterval(flood));
        await client.ended; // Deno's TLS closes the connection of its own accord
        if (state === "after login") await witness.wait(/ana!ana@chat QUIT :(Excess flood|Connection lost)\r\n/);
        else if (runtime === "binary") {
          await server.err.wait(/a connection was closed from 127\.0\.0\.1: excess flood\n/);
        }
        await witness.sync();
      },
    );
  }
}

for (const runtime of ["binary", "deno"] as const) {
  test(`text in very small and very large TLS records is not mistaken for a flood of KeyUpdates (${runtime})`, async (t) => {
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

test("members over their rate limit cost little memory, even if every line is a TLS record of its own", async (t) => {
  const { port, child } = await serveProcess(t);
  const before = residentKiB(child.pid);
  const flooders = await Promise.all(Array.from({ length: 5 }, async (_, at) => {
    const { socket } = await enter(t, port, `flooder${at}`);
    for (let count = 0; count < 20_000; count++) await new Promise((sent) => socket.write("x\n", sent)); // one record
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

test("a long line costs as many units as several short ones", async () => {
  const clock = new FakeClock();
  const server = new chat.Server({ rate: 10, clock });
  const { wire, member } = await inside(server, "ana");
  const burst = 10 * LIMITS.burstSeconds;
  const costOf = (line: string) => {
    const before = unitsUsed(member, burst);
    wire.send(line);
    return unitsUsed(member, burst) - before;
  };
  const [short, long] = [costOf("PRIVMSG #chat :x"), costOf(`@+x=${"x".repeat(4000)} PRIVMSG #chat :x`)];
  assert.ok(short > 1 && long > 7 * short, `${short} and ${long} units`);
});

test("a member that does not answer a PING times out, but not in the sweep after the machine was asleep", async () => {
  const clock = new FakeClock();
  const server = new chat.Server({ clock });
  const { wire } = await inside(server, "ana");
  wire.session.ping();
  clock.tick(3 * LIMITS.pingMs);
  server.sweep();
  assert.equal(wire.ended, false, "its answer may be waiting to be read");
  wire.send("PONG chat.server");
  await turn();
  wire.out = "";
  for (let ms = 0; ms < 2 * LIMITS.pingMs; ms += 1000) {
    clock.tick(1000);
    server.sweep();
    assert.equal(wire.ended, false, `after ${ms} ms`);
  }
  await turn();
  assert.equal(wire.out, "PING chat.server\r\n");
  for (let ms = 0; ms < 3000; ms += 1000) {
    clock.tick(1000);
    server.sweep();
  }
  assert.equal(wire.ended, true);
});

test("nobody times out when the time of day is set, and messages stay in order", async () => {
  const clock = new FakeClock();
  const server = new chat.Server({ clock });
  const { wire } = await inside(server, "ana");
  wire.session.ping();
  for (const days of [365, -365]) {
    clock.setWall(clock.wall() + days * 86_400_000);
    clock.tick(1000);
    server.sweep();
    wire.send(`PRIVMSG #chat :${days}`);
  }
  await wire.sync();
  assert.equal(wire.ended, false);
  const [first, second] = server.lobby.log.messages;
  assert.ok(first && second && first.time <= second.time);
});

test("a member whose lines wait for the rate limit does not time out, and all of them are executed", async () => {
  const clock = new FakeClock();
  const server = new chat.Server({ rate: 0.1, clock });
  const { wire } = await inside(server, "ana");
  wire.send(...Array.from({ length: 30 }, (_, at) => `PING ${at}`));
  assert.equal(wire.flowing, false);
  for (let ms = 0; ms < 4 * LIMITS.pingMs; ms += 1000) {
    clock.tick(1000);
    server.sweep();
    assert.equal(wire.ended, false, `after ${ms} ms`);
  }
  await turn();
  const executed = wire.out.split("PONG").length - 1;
  assert.ok(executed > 20 && executed < 30, `${executed} lines were executed`);
  assert.doesNotMatch(wire.out, /^PING/m);
  clock.tick(100_000);
  await wire.wait(/PONG chat\.server 29\r\n/);
});

test("a login does not time out while its password is hashed, and a registration survives a disconnect", async (t) => {
  const clock = new FakeClock();
  const log: string[] = [];
  const server = new chat.Server({ clock, log: (text) => log.push(text) });
  const finish: ((error: null, key: Buffer) => void)[] = [];
  t.mock.method(crypto, "scrypt", (...args: [...unknown[], (error: null, key: Buffer) => void]) => {
    finish.push(args.at(-1) as (error: null, key: Buffer) => void);
  });
  const hashed = async () => {
    await until(() => finish.length > 0, () => "nothing is hashed");
    return () => finish.shift()?.(null, Buffer.alloc(32));
  };
  const [wire, silent] = [new Wire(server, true), new Wire(server)];
  wire.send("PASS secret", "NICK ana", "USER x 0 * :x");
  const finishAna = await hashed();
  for (let ms = 0; ms < 2 * LIMITS.silenceMs; ms += 1000) {
    clock.tick(1000);
    server.sweep();
    assert.equal(wire.ended, false, `after ${ms} ms`);
  }
  finishAna();
  await wire.wait(/ 366 ana /);
  const late = new Wire(server);
  late.send("PASS secret", "NICK bo", "USER x 0 * :x");
  const finishBo = await hashed();
  late.session.lost("gone");
  finishBo();
  await until(() => server.accounts.find("bo") !== undefined, () => "bo is not registered");
  assert.ok(log.includes("bo registered from 127.0.0.1"));
  assert.equal(silent.ended, true, "a connection that sends nothing times out meanwhile");
});

test("a TAGMSG to a nick starts no log, and a deleted account leaves none behind", async () => {
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

test("a member that logged in by PASS cannot change its verifier, even if it began a SCRAM login before", async () => {
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
  test(`a client that half-closes (FIN) after its last line has all lines executed and gets the replies (${runtime})`, async (t) => {
    const { port } = await serveProcess(t, ["--rate", "20"], { runtime });
    const witness = await enter(t, port, "witness");
    const irc = await dial(t, port);
    irc.send("PASS secret", "NICK ana", "USER x 0 * :x", "PRIVMSG #chat :first");
    for (let at = 0; at < 100; at++) irc.send(`PING ${at}`); // more than a burst
    irc.socket.end("PRIVMSG #chat :last\n");
    await irc.wait(/PONG chat\.server 99\r\n/);
    await irc.closed;
    await witness.wait(/PRIVMSG #chat :first\r\n[\s\S]*PRIVMSG #chat :last\r\n/);
  });
}

test("a returning member gets the latest private messages that it missed, up to a limit", async () => {
  const server = new chat.Server({ rate: 0, history: 2 * LIMITS.missed });
  const [{ wire: ana }, { wire: bo }] = [await inside(server, "ana"), await inside(server, "bo")];
  bo.send("QUIT");
  for (let at = 1; at <= LIMITS.missed + 5; at++) ana.send(`PRIVMSG bo :${at}`);
  await ana.sync(); // or else some may be sent after the return
  const again = new Wire(server, true);
  again.send("PASS secret", "NICK bo", "USER x 0 * :x");
  await again.wait(new RegExp(`PRIVMSG bo :${LIMITS.missed + 5}\r\n`));
  const replayed = [...again.out.matchAll(/PRIVMSG bo :(\d+)\r\n/g)].map(([, number]) => Number(number));
  assert.deepEqual(replayed, Array.from({ length: LIMITS.missed }, (_, at) => at + 6));
});

test("idempotency keys are remembered for the latest client instances of an account, up to a limit", async () => {
  const server = new chat.Server({ rate: 0 });
  const ana = new Wire(server, true);
  ana.send("CAP REQ message-tags", "PASS secret", "NICK ana", "USER x 0 * :x", "CAP END");
  await ana.wait(/ 366 ana /);
  for (let at = 0; at <= LIMITS.instances; at++) ana.send(`@chat.local/once=client${at}-1 PING x`);
  await ana.sync();
  const executed = server.accounts.find("ana")?.executed;
  assert.deepEqual([executed?.size, executed?.has("client0"), executed?.has("client1")], [
    LIMITS.instances,
    false,
    true,
  ]);
});

test("failures of one network are logged up to a limit per minute, and those of another network still are", () => {
  const log: string[] = [];
  const server = new chat.Server({ clock: new FakeClock(), log: (text) => log.push(text) });
  for (let at = 0; at < LIMITS.failuresPerMinute + 5; at++) server.failed("10.0.0.1", "no TLS", "it hung up");
  assert.equal(log.length, LIMITS.failuresPerMinute);
  server.failed("10.0.0.2", "no TLS", "it hung up");
  assert.equal(log.at(-1), "no TLS from 10.0.0.2: it hung up");
});

test("a server that stops does not wait for a client that does not read", async (t) => {
  const { port, server, stop } = await serveHere(t);
  const [ana, bo] = [await enter(t, port, "ana"), await enter(t, port, "bo")];
  ana.socket.pause();
  const queued = () => Math.max(...[...server.sessions].map((session) => session.outbox.queued));
  for (let at = 0; queued() < LIMITS.queueBytes / 4; at++) {
    bo.send(`PRIVMSG #chat :${"x".repeat(400)}`);
    if (at % 100 === 0) await bo.sync();
  }
  await stop("The server is stopping");
  await bo.wait(/ERROR :The server is stopping\r\n/);
});

test("records that come while a member is paused count as text, however small they are", async (t) => {
  const { port } = await serveProcess(t, ["--rate", "300"]);
  const irc = await enter(t, port, "ana");
  const count = 2500; // more than the burst, and then three seconds' units
  for (let at = 0; at < count; at++) await new Promise((sent) => irc.socket.write(`PING ${at}\r\n`, sent));
  await irc.wait(new RegExp(`PONG chat\\.server ${count - 1}\r\n`));
  await irc.sync();
});

for (const runtime of ["binary", "deno"] as const) {
  test(`a flooding client is slowed down or disconnected, and another member is served meanwhile (${runtime})`, async (t) => {
    const server = await serveProcess(t, [], { runtime });
    const [flooder, ana] = [await enter(t, server.port, "flooder"), await enter(t, server.port, "ana")];
    const flood = Buffer.from("PRIVMSG #chat :flood\n".repeat(10_000));
    let taken = 0;
    const pour = () => {
      while (!flooder.socket.destroyed && taken < 1000 && flooder.socket.write(flood)) taken++;
      if (!flooder.socket.destroyed && taken < 1000) taken++;
    };
    flooder.socket.on("drain", pour);
    pour();
    for (let at = 0; at < 20; at++) await ana.sync();
    if (runtime === "deno") { // it cannot pause a socket
      await flooder.closed;
      await ana.sync();
      assert.match(ana.all, /:flooder!flooder@chat QUIT :Excess flood\r\n/);
    }
    const heard = ana.all.split("PRIVMSG #chat :flood").length - 1;
    assert.ok((heard >= 1 || runtime === "deno") && heard < 500, `${heard} lines went through`);
    assert.ok(taken < 100, `${taken} times 210 kB were taken`);
    flooder.socket.destroy();
  });
}

test("a client that requests more history than it reads has to wait, is not disconnected, and gets all of it", async (t) => {
  const { port } = await serveHere(t);
  const ana = await enter(t, port, "ana", "batch draft/chathistory");
  for (let at = 0; at < 100; at++) ana.send(`PRIVMSG #chat :${"x".repeat(400)}`);
  await ana.sync();
  ana.socket.pause();
  const times = 400; // 18 MB, of which 1 MiB may be queued
  for (let at = 0; at < times; at++) ana.send("CHATHISTORY LATEST #chat * 100");
  const bo = await enter(t, port, "bo");
  await bo.sync();
  ana.socket.resume();
  for (let at = 0; at < times; at++) await ana.wait(/ BATCH -\w+\r\n/);
  await ana.sync();
});

test("a client that does not read is disconnected at a mebibyte of queue, and the others miss nothing", async (t) => {
  const log: string[] = [];
  const { port, server } = await serveHere(t, { log: (text) => log.push(text) });
  const [sleeper, ana, bo] = await Promise.all(["sleeper", "ana", "bo"].map((nick) => enter(t, port, nick)));
  assert.ok(sleeper && ana && bo);
  sleeper.socket.pause();
  let most = 0;
  bo.send("PRIVMSG sleeper :it did not read this");
  for (let at = 0; log.every((text) => !/^sleeper left .*: Not reading$/.test(text)); at++) {
    for (let many = 0; many < 100; many++) bo.send(`PRIVMSG #chat :${at}.${many} ${"x".repeat(400)}`);
    await bo.sync();
    await ana.wait(new RegExp(` :${at}\\.99 x+\r\n`));
    most = Math.max(most, ...[...server.sessions].map(({ outbox }) => outbox.queued));
  }
  assert.ok(most > LIMITS.queueBytes / 2 && most < LIMITS.queueBytes * 1.1, `${most} bytes were queued`);
  const back = await enter(t, port, "sleeper");
  await back.wait(/PRIVMSG sleeper :it did not read this\r\n/);
});

test("a client that does not read is disconnected at the default settings as well, when many members talk", async (t) => {
  const server = await serveProcess(t);
  const sleeper = await enter(t, server.port, "sleeper");
  sleeper.socket.pause();
  sleeper.closed.catch(() => {}); // it is reset
  const talkers = await Promise.all(Array.from({ length: 90 }, async (_, at) => {
    const irc = await dial(t, server.port);
    await register(irc, `n${at}`);
    await logIn(irc, `n${at}`);
    irc.socket.removeAllListeners("data").resume(); // it reads, and keeps nothing
    irc.closed.catch(() => {}); // it may be reset when the server is killed
    return irc;
  }));
  const text = "x".repeat(450);
  const talk = setInterval(() => {
    for (const talker of talkers) for (let many = 0; many < 10; many++) talker.send(`PRIVMSG #chat :${text}`);
  }, 1000);
  t.after(() => clearInterval(talk));
  await server.err.wait(/sleeper left from \S+: Not reading\n/, 55_000);
  clearInterval(talk);
  const ana = await enter(t, server.port, "ana");
  await ana.sync();
});

// ---- Connections that break

const residentKiB = (pid = 0) => Number(/VmRSS:\s*(\d+)/.exec(fs.readFileSync(`/proc/${pid}/status`, "utf8"))?.[1]);

/** Ways in which a connection breaks, at every stage. */
const GONE: readonly ((t: TestContext, port: number) => Promise<unknown>)[] = [
  (_, port) => raw(port, "", "destroy"),
  (_, port) => raw(port, "\x16\x03\x01\x02\x00\x01", "destroy"), // the beginning of a handshake
  (_, port) => raw(port, "GET / HTTP/1.0\r\n\r\n", "end"),
  (_, port) => raw(port, "\x15\x03\x03\x00\x02\x02\x28", "reset"), // a TLS alert
  async (t, port) => (await dial(t, port)).socket.destroy(),
  async (t, port) => {
    const irc = await dial(t, port);
    irc.socket.write("CAP LS 302\r\nNICK half"); // half a line, and a FIN
    irc.socket.end();
    await irc.closed;
  },
  (t, port) => interfered(t, port, (wire) => wire.write("this is no TLS record")),
  (t, port) => interfered(t, port, (wire) => wire.write("\x17\x03\x03\x00\x10" + "x".repeat(16), "latin1")), // a forged record
  (t, port) => interfered(t, port, (wire) => wire.resetAndDestroy()),
  async (t, port) => {
    const irc = await dial(t, port);
    irc.send("CAP REQ sasl", "AUTHENTICATE SCRAM-SCRYPT-PLUS");
    await irc.wait(/AUTHENTICATE \+/);
    irc.socket.destroy();
  },
];

/** Connects through a relay that tampers with the connection once TLS is established. */
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
  await irc.closed.catch(() => {}); // an alert may have come
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

test("connections dropped at every stage leak no memory, and a member is served meanwhile", async (t) => {
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

test("a server that is stopped under load delivers every message that it has acknowledged", async (t) => {
  const server = await serveProcess(t, ["--rate", "0", "--per-address", "1000"]);
  const people = await Promise.all(Array.from({ length: 200 }, async (_, at) => {
    await register(await dial(t, server.port), `n${at}`);
    const irc = await dial(t, server.port);
    await logIn(irc, `n${at}`, "echo-message");
    return irc;
  }));
  const closed = people.map((person) => person.closed.catch(() => {})); // a write may have come too late
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
