// The client's connection. Each line is delivered exactly once, however often the connection breaks: real clients, whose
// connections are cut at random points, hundreds of times. And the life of a client: it reconnects, it leaves, and it
// does not wait for ever for a server to log it in.
import assert from "node:assert/strict";
import { once } from "node:events";
import net from "node:net";
import path from "node:path";
import { test, type TestContext } from "node:test";
import tls from "node:tls";
import {
  COMMANDS,
  type Event,
  Fault,
  join,
  type JoinOptions,
  LIMITS,
  makeIdentity,
  type Server,
  type Ui,
  type UiEvents,
} from "../chat.ts";
import { enter, FakeClock, Running, serveHere, until } from "./helpers.ts";

/** A seeded generator of numbers from 0 up to 1. */
function dice(seed: number): () => number {
  return () => {
    seed = (seed * 1_664_525 + 1_013_904_223) % 2 ** 32;
    return seed / 2 ** 32;
  };
}

/** A TCP proxy that cuts each connection after some bytes in one direction: inside a TLS record, and so inside a line. */
async function cutter(
  t: TestContext,
  port: number,
  seed: number,
): Promise<{ port: number; cuts: () => number; calm: () => void; unplug: () => void }> {
  const roll = dice(seed);
  const open = new Set<net.Socket>();
  let [cuts, calm, unplugged] = [0, false, new Set<net.Socket>()];
  const proxy = net.createServer((client) => {
    const server = net.connect(port, "127.0.0.1");
    const upwards = roll() < 0.5;
    let left = upwards ? 2400 + roll() * 2600 : 4500 + roll() * 9000;
    const cut = () => {
      client.resetAndDestroy();
      server.resetAndDestroy();
    };
    for (const [from, to, counts] of [[client, server, upwards], [server, client, !upwards]] as const) {
      open.add(from);
      from.on("error", cut);
      from.on("close", () => {
        open.delete(from);
        to.destroy();
      });
      from.on("data", (chunk: Buffer) => {
        if (unplugged.has(from)) return;
        if (counts && !calm) left -= chunk.length;
        if (left > 0) return void to.write(chunk);
        cuts++;
        to.write(chunk.subarray(0, Math.max(0, chunk.length + Math.floor(left))), cut);
      });
    }
  });
  proxy.listen(0, "127.0.0.1");
  await once(proxy, "listening");
  t.after(() => {
    proxy.close();
    for (const socket of open) socket.destroy();
  });
  return {
    port: (proxy.address() as net.AddressInfo).port,
    cuts: () => cuts,
    calm: () => calm = true,
    unplug: () => unplugged = new Set(open),
  };
}

/** Collects every event of a server. */
function record(server: Server): Event[] {
  const events: Event[] = [];
  const original = server.history.record.bind(server.history);
  server.history.record = (log, happened) => {
    const event = original(log, happened);
    events.push(event);
    return event;
  };
  return events;
}

const said = (events: readonly Event[], nick: string, target: string) =>
  events.filter((event) => event.kind === "PRIVMSG" && event.nick === nick && event.target === target).map(({ text }) =>
    text
  );

/** Writes lines to all clients, one every 8 ms. */
async function write(clients: readonly Running[], lines: readonly string[]): Promise<void> {
  for (const line of lines) {
    for (const client of clients) client.write(`${line}\n`);
    await new Promise((tick) => setTimeout(tick, 8));
  }
}

/** A client that reconnects without a delay. */
const impatient = (t: TestContext, port = 0, ...args: readonly string[]) =>
  new Running(t, [process.execPath, path.join(import.meta.dirname, "impatient.ts"), String(port), ...args]);

const LINES = Array.from({ length: 900 }, (_, at) => `line ${at} ${"x".repeat(at % 50)}.`);

test("through a hundred cuts every line reaches the room and every reader exactly once and in order", async (t) => {
  const { port, server } = await serveHere(t, { history: 10_000 });
  const events = record(server);
  const witness = await enter(t, port, "witness");
  const proxies = [await cutter(t, port, 1), await cutter(t, port, 2)];
  const [ana, bo] = ["ana", "bo"].map((nick, at) => impatient(t, proxies[at]?.port, nick));
  assert.ok(ana && bo);
  await Promise.all([ana, bo].map((client) => client.err.wait(/in #chat as/)));
  await write([ana, bo], LINES);
  for (const proxy of proxies) proxy.calm();
  for (const client of [ana, bo]) await client.out.wait(/\tline 899 .*\n/, 60_000);
  for (const client of [ana, bo]) client.end();
  assert.deepEqual(await Promise.all([ana.ended, bo.ended]), [0, 0]);
  const cuts = proxies.reduce((sum, proxy) => sum + proxy.cuts(), 0);
  t.diagnostic(`${cuts} cuts`);
  assert.ok(cuts >= 100, `only ${cuts} cuts`);
  for (const nick of ["ana", "bo"]) assert.deepEqual(said(events, nick, "#chat"), LINES);
  const heard = (client: Running) =>
    [...client.out.all.matchAll(/^\S+\t\S+\t\S+\t(line .*)$/gm)].map(([, text]) => text);
  for (const client of [ana, bo]) assert.deepEqual(heard(client), LINES);
  await witness.sync();
  for (const nick of ["ana", "bo"]) {
    assert.equal(witness.all.split(`:${nick}!${nick}@chat JOIN`).length, 2, "joins once");
    assert.equal(witness.all.split(`:${nick}!${nick}@chat QUIT`).length, 2, "leaves once");
  }
});

test("lines also arrive exactly once with a short history, in a room without others, and from two clients of one account", async (t) => {
  const { port, server } = await serveHere(t, { history: 10 });
  const events = record(server);
  const proxies = [await cutter(t, port, 3), await cutter(t, port, 4), await cutter(t, port, 5)];
  const [alone, desk, laptop] = [["ana", "#alone"], ["bo", "#shared"], ["bo", "#shared"]].map(([nick, room = ""], at) =>
    impatient(t, proxies[at]?.port, nick ?? "", room)
  );
  assert.ok(alone && desk && laptop);
  await alone.err.wait(/in #alone as ana/);
  await desk.err.wait(/in #shared as bo/);
  await laptop.err.wait(/in #shared as bo/);
  const [ofDesk, ofLaptop] = ["desk", "laptop"].map((name) => LINES.map((line) => `${name} ${line}`));
  assert.ok(ofDesk && ofLaptop);
  await Promise.all([write([alone], LINES), write([desk], ofDesk), write([laptop], ofLaptop)]);
  for (const proxy of proxies) proxy.calm();
  for (const client of [alone, desk, laptop]) client.end();
  assert.deepEqual(await Promise.all([alone.ended, desk.ended, laptop.ended]), [0, 0, 0]);
  t.diagnostic(`${proxies.reduce((sum, proxy) => sum + proxy.cuts(), 0)} cuts`);
  assert.deepEqual(said(events, "ana", "#alone"), LINES);
  const shared = said(events, "bo", "#shared");
  assert.deepEqual(shared.filter((line) => line.startsWith("desk")), ofDesk);
  assert.deepEqual(shared.filter((line) => line.startsWith("laptop")), ofLaptop);
  assert.equal(shared.length, 2 * LINES.length);
});

/** A person at a terminal. It records what the client calls; a question stays open until a test answers it. */
class Person implements Ui {
  readonly hasPerson = true;
  readonly calls: string[] = []; // of every method, with its words
  readonly messages: Parameters<Ui["message"]>[0][] = [];
  readonly answers: ((answer: string) => void)[] = []; // of the questions that are open
  events: UiEvents | undefined;
  listen(events: UiEvents): void {
    this.events = events;
  }
  acceptLines = () => this.#called("acceptLines");
  message(message: Parameters<Ui["message"]>[0]): void {
    this.messages.push(message);
    this.#called(`message ${message.text}`);
  }
  note = (text: string) => this.#called(`note ${text}`);
  welcome = (room: string) => this.#called(`welcome ${room}`);
  aside = (text: string) => this.#called(`aside ${text}`);
  rule = (title: string) => this.#called(`rule ${title}`);
  ask(question: string): Promise<string> {
    this.#called(`ask ${question}`);
    return new Promise((answer) => this.answers.push(answer));
  }
  setPrompt = (prompt: string) => this.#called(`setPrompt ${prompt}`);
  holdInput = (hold: boolean) => this.#called(`holdInput ${hold}`);
  clear = () => this.#called("clear");
  close = () => this.#called("close");
  #called(what: string): void {
    this.calls.push(what);
  }
  /** Waits until the client has called a method with words that match. */
  called(pattern: RegExp): Promise<void> {
    return until(
      () => this.calls.some((call) => pattern.test(call)),
      () => `no ${pattern} in:\n${this.calls.join("\n")}`,
    );
  }
  type(line: string): void {
    this.events?.onLines([line], "typed");
  }
  leave(): void {
    this.events?.onLeave("Ctrl-D");
  }
}

/** Joins as `ana`, with a Person as the interface, who leaves when the test ends. */
function joinAs(
  t: TestContext,
  port: number,
  options: Partial<JoinOptions> = {},
): { person: Person; ended: Promise<number> } {
  const person = new Person();
  const ended = join({
    host: "127.0.0.1",
    port,
    nick: "ana",
    password: "x",
    ui: person,
    backOffMs: () => 0,
    ...options,
  });
  ended.catch(() => {}); // the test looks at it later
  t.after(() => person.leave());
  return { person, ended };
}

test("private messages arrive exactly once, also when the connections of both sides are cut", async (t) => {
  const { port, server } = await serveHere(t);
  const events = record(server);
  const proxies = [await cutter(t, port, 6), await cutter(t, port, 7)] as const;
  const { person: ana, ended: anaEnded } = joinAs(t, proxies[0].port);
  const { person: bo, ended: boEnded } = joinAs(t, proxies[1].port, { nick: "bo" });
  for (const person of [ana, bo]) await person.called(/^welcome/);
  for (const line of LINES) {
    ana.type(`/msg bo ${line}`);
    bo.type(`/msg ana ${line}`);
    await new Promise((tick) => setTimeout(tick, 8));
  }
  for (const proxy of proxies) proxy.calm();
  const heard = ([person, from, to]: readonly [Person, string, string]) =>
    person.messages.filter(({ isPrivate, nick, target }) => isPrivate && nick === from && target === to)
      .map(({ text }) => text);
  const views = [[ana, "bo", "ana"], [bo, "ana", "bo"], [ana, "ana", "bo"], [bo, "bo", "ana"]] as const;
  await until(
    () => views.every((view) => heard(view).length >= LINES.length),
    () => views.map((view) => `${view[1]} > ${view[2]}: ${heard(view).length}`).join("\n"),
    90_000,
  );
  t.diagnostic(`${proxies.reduce((sum, proxy) => sum + proxy.cuts(), 0)} cuts`);
  assert.deepEqual(said(events, "ana", "bo"), LINES);
  assert.deepEqual(said(events, "bo", "ana"), LINES);
  for (const view of views) assert.deepEqual(heard(view).sort(), [...LINES].sort());
  for (const person of [ana, bo]) person.leave();
  assert.deepEqual(await Promise.all([anaEnded, boEnded]), [0, 0]);
});

// ---- Reconnecting and leaving

/** Closes the connections of a member, with a reason. */
function disconnect(server: Server, nick: string, reason = "gone"): void {
  for (const session of [...server.sessions]) if (session.nick === nick) session.close(reason);
}

test("each retry is counted, and the count starts again after a connection that lasted", async (t) => {
  const { port, server } = await serveHere(t);
  const witness = await enter(t, port, "witness");
  const clock = new FakeClock();
  const tries: number[] = [];
  const { person, ended } = joinAs(t, port, { clock, backOffMs: (count) => tries.push(count) && 0 });
  const ban = async (lastedMs: number) => {
    await witness.wait(/:ana!ana@chat JOIN/);
    const welcomes = () => person.calls.filter((call) => /^(welcome|note back in)/.test(call)).length;
    await until(() => welcomes() > tries.length, () => person.calls.join("\n")); // its clock may be moved now
    clock.tick(lastedMs);
    disconnect(server, "ana", "You are banned here");
  };
  for (let times = 0; times < 4; times++) await ban(0);
  await ban(LIMITS.steadyMs);
  await ban(0);
  await witness.wait(/:ana!ana@chat JOIN/);
  assert.deepEqual(tries, [0, 1, 2, 3, 0, 1]);
  person.leave();
  assert.equal(await ended, 0);
});

/** A TCP proxy. It withholds all bytes of connections that are opened between `hold` and `release`. */
async function gate(
  t: TestContext,
  port: number,
): Promise<{ port: number; opened: () => number; hold: () => void; release: () => void }> {
  const held: (() => void)[] = [];
  let [isHolding, opened] = [false, 0];
  const proxy = net.createServer((client) => {
    opened++;
    const isHeld = isHolding;
    const server = net.connect(port, "127.0.0.1");
    for (const [from, to] of [[client, server], [server, client]] as const) {
      const pass = (act: () => void) => void (isHeld && isHolding ? held.push(act) : act());
      from.on("error", () => {}).on("data", (chunk) => pass(() => to.write(chunk))).on(
        "close",
        () => pass(() => to.destroy()),
      );
    }
    t.after(() => [client, server].forEach((socket) => socket.destroy()));
  });
  proxy.listen(0, "127.0.0.1");
  await once(proxy, "listening");
  t.after(() => proxy.close());
  const release = () => {
    isHolding = false;
    for (const act of held.splice(0)) act();
  };
  return {
    port: (proxy.address() as net.AddressInfo).port,
    opened: () => opened,
    hold: () => isHolding = true,
    release,
  };
}

/** Gives the event loop time for what should not happen. */
const pause = () => new Promise((over) => setTimeout(over, 300));

/** Asserts that a client that has left calls nothing any more, however much time passes, and has no connection. */
async function assertIsOver(person: Person, clock: FakeClock, server: Server): Promise<void> {
  const calls = person.calls.length;
  for (let times = 0; times < 3; times++) {
    await pause();
    clock.tick(3_600_000);
  }
  assert.deepEqual(person.calls.slice(calls), []);
  assert.deepEqual([...server.sessions].map(({ nick }) => nick), []);
}

test("a client that is left while it waits to reconnect does nothing more", async (t) => {
  const { port, server } = await serveHere(t);
  const clock = new FakeClock();
  let delays = 0;
  const { person, ended } = joinAs(t, port, { clock, backOffMs: () => ++delays * 5000 });
  await person.called(/^welcome/);
  const open = t.mock.method(server, "open");
  disconnect(server, "ana");
  await until(() => delays === 1, () => "it does not wait");
  person.leave();
  assert.equal(await ended, 0);
  await assertIsOver(person, clock, server);
  assert.deepEqual([open.mock.callCount(), delays], [0, 1]);
});

test("a client that is left while it connects does not log in", async (t) => {
  const { port, server } = await serveHere(t);
  const proxy = await gate(t, port);
  const clock = new FakeClock();
  const { person, ended } = joinAs(t, proxy.port, { clock });
  await person.called(/^welcome/);
  proxy.hold();
  disconnect(server, "ana");
  await until(() => proxy.opened() === 2, () => "it does not connect");
  const execute = t.mock.method(server, "execute");
  person.leave();
  assert.equal(await ended, 0);
  proxy.release();
  await assertIsOver(person, clock, server);
  assert.equal(execute.mock.callCount(), 0);
});

for (const isReturning of [false, true]) {
  test(`a client that is left while it logs in ${isReturning ? "again " : ""}does nothing more`, async (t) => {
    const { port, server } = await serveHere(t);
    const { AUTHENTICATE } = COMMANDS;
    assert.ok(AUTHENTICATE);
    const clock = new FakeClock();
    const begin = () => joinAs(t, port, { clock });
    const returning = isReturning ? begin() : undefined;
    await returning?.person.called(/^welcome/);
    let finish = () => {};
    const run = t.mock.method(AUTHENTICATE, "run", () => new Promise<void>((resolve) => finish = resolve)); // no answer
    disconnect(server, "ana");
    const { person, ended } = returning ?? begin();
    await until(() => run.mock.callCount() === 1, () => person.calls.join("\n"));
    person.leave();
    assert.equal(await ended, isReturning ? 0 : 1);
    finish();
    await assertIsOver(person, clock, server);
    assert.equal(run.mock.callCount(), 1);
  });
}

test("a client that is left during a question neither asks again nor logs in when it is answered", async (t) => {
  const { port, server } = await serveHere(t);
  const clock = new FakeClock();
  const leave = new AbortController();
  const { person, ended } = joinAs(t, port, { nick: undefined, clock, signal: leave.signal });
  await person.called(/^ask Nick/);
  leave.abort();
  assert.equal(await ended, 1);
  const calls = person.calls.length;
  person.answers[0]?.("this is not a nick");
  await pause();
  assert.deepEqual(person.calls.slice(calls), []);
  await assertIsOver(person, clock, server);
});

test("history that the server refused can be requested again, and a size that is none is not sent", async (t) => {
  const { port } = await serveHere(t);
  const { person, ended } = joinAs(t, port);
  await person.called(/^welcome/);
  person.type("/query nobody");
  for (
    const [command, says] of [
      ["/history", /^note you are not in that room, or there is no such account/],
      ["/history -1", /^note \/history \[N\]: show/],
      ["/history 1.5", /^note \/history \[N\]: show/],
      ["/history 5", /^note you are not in that room, or there is no such account/],
    ] as const
  ) {
    person.calls.length = 0;
    person.type(command);
    await person.called(says);
  }
  person.leave();
  assert.equal(await ended, 0);
});

test("a client that has left shows nothing more of who joined just before", async (t) => {
  const { port, server } = await serveHere(t);
  const clock = new FakeClock();
  const { person, ended } = joinAs(t, port, { clock });
  await person.called(/^welcome/);
  const bo = await enter(t, port, "bo");
  await until(() => person.events?.onTab?.("b").length === 1, () => "it does not know of bo");
  bo.socket.destroy();
  await bo.closed;
  person.leave();
  assert.equal(await ended, 0);
  disconnect(server, "bo");
  await assertIsOver(person, clock, server);
});

test("an unplugged cable is noticed within a minute, and a line typed meanwhile is delivered after the reconnect", async (t) => {
  const { port } = await serveHere(t);
  const witness = await enter(t, port, "witness");
  const proxy = await cutter(t, port, 3);
  proxy.calm();
  const clock = new FakeClock();
  const { person, ended } = joinAs(t, proxy.port, { clock });
  await person.called(/^welcome/);
  proxy.unplug(); // a new connection works
  person.type("said into the void");
  clock.tick(LIMITS.hushMs + 1);
  await new Promise((watched) => setTimeout(watched, 1500)); // the client looks at the clock once a second
  assert.ok(person.calls.every((call) => !/connection lost/.test(call)));
  clock.tick(LIMITS.hushMs);
  await person.called(/^note connection lost: nothing heard for a minute/);
  await witness.wait(/:ana!ana@chat PRIVMSG #chat :said into the void\r\n/);
  person.leave();
  assert.equal(await ended, 0);
});

test("a server that is silent for half a minute and then answers a PING keeps its client", async (t) => {
  const { port, server } = await serveHere(t);
  const clock = new FakeClock();
  const { person, ended } = joinAs(t, port, { clock });
  await person.called(/^welcome/);
  for (let times = 0; times < 3; times++) {
    clock.tick(LIMITS.hushMs + 1);
    await new Promise((watched) => setTimeout(watched, 1500));
  }
  assert.ok(person.calls.every((call) => !/connection lost/.test(call)));
  assert.equal(server.sessions.size, 1);
  person.leave();
  assert.equal(await ended, 0);
});

// ---- A server that does not bring the login to its end

/** What a client sends to log in, what a fake server answers, and a description of a server that does not. */
const LOGIN: readonly (readonly [command: RegExp, answer: string, stage: string])[] = [
  [
    /^CAP LS/,
    ":fake CAP * LS :sasl=SCRAM-SCRYPT-PLUS message-tags echo-message batch draft/chathistory",
    "never answers CAP LS",
  ],
  [/^CAP REQ/, ":fake CAP * ACK :sasl", "never answers CAP REQ"],
  [/^AUTHENTICATE SCRAM/, "AUTHENTICATE +", "never answers AUTHENTICATE"],
  [
    /^AUTHENTICATE \w{20}/,
    `AUTHENTICATE ${btoa("e=unknown-user")}\r\n:fake 904 * :unknown`,
    "never answers the first SASL message",
  ],
  [/^REGISTER/, ":fake REGISTER SUCCESS ana :registered", "never answers REGISTER"],
  [/^never$/, "", "forgets an account as soon as it is registered"],
];
const NOTICES = "PING :x\n:fake NOTICE * :please wait\n";
const ENDLESS_LIST = ":fake CAP * LS * :sasl\r\n:fake CAP * LS * :batch\n";

/**
 * Starts a TLS server that takes 1.5 s for each answer, leaves one command of LOGIN unanswered, and sends other lines all
 * the time.
 */
async function fakeServer(
  t: TestContext,
  clock: FakeClock,
  unanswered: number,
  noise: string,
): Promise<{ port: number; received: string[] }> {
  const { key, cert } = makeIdentity({});
  const received: string[] = [];
  const server = tls.createServer({ key, cert, minVersion: "TLSv1.3", ALPNProtocols: ["irc"] }, (socket) => {
    const sending = setInterval(() => socket.write(noise), 2);
    t.after(() => clearInterval(sending));
    socket.setEncoding("utf8").on("error", () => {}).on("close", () => clearInterval(sending));
    socket.on("data", (text: string) => {
      for (const line of text.split("\r\n")) {
        received.push(line);
        const answer = LOGIN.slice(0, unanswered).find(([command]) => command.test(line));
        if (!answer) continue;
        clock.tick(1500);
        socket.write(`${answer[1]}\r\n`);
      }
    });
  });
  server.listen(0, "127.0.0.1");
  await once(server, "listening");
  t.after(() => server.close());
  return { port: (server.address() as net.AddressInfo).port, received };
}

const STAGES = [
  ...LOGIN.map(([, , stage], at) => [stage, at, NOTICES] as const),
  ["never ends its list of capabilities", 0, ENDLESS_LIST] as const,
];

for (const [stage, unanswered, noise] of STAGES) {
  test(`a login fails after ten seconds in all if the server goes on sending lines and ${stage}`, async (t) => {
    const clock = new FakeClock();
    const began = clock.now();
    const { port, received } = await fakeServer(t, clock, unanswered, noise);
    const { ended } = joinAs(t, port, { clock });
    let fault: unknown;
    ended.catch((error: unknown) => fault = error);
    const [command] = LOGIN[unanswered] ?? [];
    await until(() => fault !== undefined || received.some((line) => command?.test(line)), () => received.join("\n"));
    while (fault === undefined && clock.now() - began < 20_000) {
      assert.ok(clock.now() - began < LIMITS.joinMs, "it waits for longer");
      clock.tick(500);
      await new Promise((tick) => setTimeout(tick, 20)); // many lines come
    }
    assert.ok(fault instanceof Fault);
    assert.deepEqual([fault.message, fault.status], ["it does not answer as a chat server does", 1]);
    const elapsed = clock.now() - began;
    assert.ok(elapsed >= LIMITS.joinMs && elapsed <= LIMITS.handshakeMs + 1500, `after ${elapsed} ms`);
  });
}

test("a connection attempt fails after ten seconds if the server does not complete the TLS handshake", async (t) => {
  const clock = new FakeClock();
  const server = net.createServer((socket) => void socket.resume().on("error", () => {}));
  server.listen(0, "127.0.0.1");
  t.after(() => server.close());
  await once(server, "listening");
  const { ended } = joinAs(t, (server.address() as net.AddressInfo).port, { clock });
  await once(server, "connection");
  clock.tick(LIMITS.joinMs - 1);
  assert.equal(await Promise.race([ended, pause()]), undefined);
  clock.tick(1);
  await assert.rejects(ended, /cannot join 127\.0\.0\.1:\d+: nothing answers there/);
});
