// Never lose a line, never say it twice: real clients, whose connections are cut at random points, hundreds of times.
import assert from "node:assert/strict";
import { once } from "node:events";
import net from "node:net";
import path from "node:path";
import { test, type TestContext } from "node:test";
import { type Event, join, LIMITS, type Screen, type Server } from "../chat.ts";
import { enter, joinProcess, Running, serveHere, until } from "./helpers.ts";

/** Numbers from 0 up to 1, the same in each run. */
function dice(seed: number): () => number {
  return () => {
    seed = (seed * 1_664_525 + 1_013_904_223) % 2 ** 32;
    return seed / 2 ** 32;
  };
}

/** A TCP proxy that cuts each connection after some bytes one way or the other: in mid-record, and so in mid-line. */
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

/** Everything that the server ever records. */
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

/** Writes lines, one after the other, as often as the clock ticks. */
async function write(clients: readonly Running[], lines: readonly string[]): Promise<void> {
  for (const line of lines) {
    for (const client of clients) client.write(`${line}\n`);
    await new Promise((tick) => setTimeout(tick, 8));
  }
}

/** A client that does not wait before it connects again. */
const impatient = (t: TestContext, port = 0, ...args: readonly string[]) =>
  new Running(t, [process.execPath, path.join(import.meta.dirname, "impatient.ts"), String(port), ...args]);

const LINES = Array.from({ length: 900 }, (_, at) => `line ${at} ${"x".repeat(at % 50)}.`);

test("through hundreds of cuts each line is in the room once and in order, and every reader has it once", async (t) => {
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
  const heard = (client: Running) => [...client.out.all.matchAll(/^\S+\t\S+\t(line .*)$/gm)].map(([, text]) => text);
  for (const client of [ana, bo]) assert.deepEqual(heard(client), LINES);
  await witness.sync();
  for (const nick of ["ana", "bo"]) {
    assert.equal(witness.all.split(`:${nick}!${nick}@chat JOIN`).length, 2, "seen to join once");
    assert.equal(witness.all.split(`:${nick}!${nick}@chat QUIT`).length, 2, "seen to leave once");
  }
});

test("that is so with little history, for one who is alone in a room, and for two clients of one account", async (t) => {
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

/** A person at a terminal, as far as the client needs one: it takes lines, and keeps what is shown. */
class Person {
  readonly kind = "plain";
  readonly shown: string[] = [];
  readonly columns = 80;
  prompt = "";
  onLines: (lines: readonly string[], pasted: boolean) => void = () => {};
  onEnd = () => {};
  onInterrupt = () => {};
  paint = (_code: unknown, text: string) => text;
  nick = (name: string) => name;
  say = (head: string, text: string) => void this.shown.push(head + text);
  note = (text: string) => void this.shown.push(`-- ${text}`);
  bell = () => {};
  ask = () => Promise.resolve(undefined);
}

test("that is so with private messages, also when both sides are cut", async (t) => {
  const { port, server } = await serveHere(t);
  const events = record(server);
  const proxies = [await cutter(t, port, 6), await cutter(t, port, 7)];
  const people = [new Person(), new Person()];
  t.after(() => people.forEach((person) => person.onInterrupt()));
  const ended = ["ana", "bo"].map((nick, at) =>
    join({
      host: "127.0.0.1",
      port: proxies[at]?.port ?? 0,
      nick,
      password: "x",
      screen: people[at] as unknown as Screen,
      backOffMs: () => 0,
    })
  );
  for (const person of people) {
    await until(() => person.shown.some((line) => /^Welcome/.test(line)), () => person.shown.join("\n"));
  }
  const [ana, bo] = people;
  assert.ok(ana && bo);
  for (const line of LINES) {
    ana.onLines([`/msg bo ${line}`], false);
    bo.onLines([`/msg ana ${line}`], false);
    await new Promise((tick) => setTimeout(tick, 8));
  }
  for (const proxy of proxies) proxy.calm();
  const heard = ([person, from, to]: readonly [Person, string, string]) =>
    person.shown.filter((line) => line.includes(` ${from} > ${to} `)).map((line) => line.split(` > ${to} `)[1]);
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
  for (const person of people) person.onInterrupt();
  assert.deepEqual(await Promise.all(ended), [0, 0]);
});

test("a connection that is lost at once is tried again later and later, one that lasted is tried again at once", async (t) => {
  const { port, server } = await serveHere(t);
  const witness = await enter(t, port, "witness");
  let later = 0;
  const real = performance.now.bind(performance);
  t.mock.method(performance, "now", () => real() + later);
  const person = new Person();
  const tries: number[] = [];
  const backOffMs = (count: number) => tries.push(count) && 0;
  const screen = person as unknown as Screen;
  const ended = join({ host: "127.0.0.1", port, nick: "ana", password: "x", screen, backOffMs });
  const ban = async (lastedMs: number) => {
    await witness.wait(/:ana!ana@chat JOIN/);
    later += lastedMs;
    for (const session of [...server.sessions]) if (session.nick === "ana") session.close("You are banned here");
  };
  for (let times = 0; times < 4; times++) await ban(0);
  await ban(LIMITS.steadyMs);
  await ban(0);
  await witness.wait(/:ana!ana@chat JOIN/);
  assert.deepEqual(tries, [0, 1, 2, 3, 0, 1]);
  person.onInterrupt();
  assert.equal(await ended, 0);
});

for (const when of ["while it waits to connect again", "while it connects"]) {
  test(`a client that is left ${when} connects no more`, async (t) => {
    const { port, server } = await serveHere(t);
    const person = new Person();
    let connects = () => {};
    const waits = new Promise<void>((resolve) => connects = resolve);
    const backOffMs = () => {
      connects();
      return when === "while it connects" ? 0 : 1e9;
    };
    const screen = person as unknown as Screen;
    const ended = join({ host: "127.0.0.1", port, nick: "ana", password: "x", screen, backOffMs });
    await until(() => person.shown.some((line) => /^Welcome/.test(line)), () => person.shown.join("\n"));
    const opened = t.mock.method(server, "open");
    for (const session of [...server.sessions]) session.close("gone");
    await waits;
    person.onInterrupt();
    assert.equal(await ended, 0);
    const witness = await enter(t, port, "witness");
    await witness.sync();
    assert.ok(opened.mock.callCount() <= 2, "the witness, and a connection that was under way");
    assert.equal([...server.sessions].filter(({ nick }) => nick === "ana").length, 0);
  });
}

test("a cable that is pulled out is noticed within a minute, and the line that was said meanwhile arrives", async (t) => {
  const { port } = await serveHere(t);
  const witness = await enter(t, port, "witness");
  const proxy = await cutter(t, port, 3);
  proxy.calm();
  const ana = joinProcess(t, `ana@127.0.0.1:${proxy.port}`);
  await ana.err.wait(/in #chat as/);
  proxy.unplug(); // what is open; a new connection goes through
  ana.write("said into the void\n");
  await ana.err.wait(/connection lost: nothing heard for a minute/, 90_000);
  await witness.wait(/:ana!ana@chat PRIVMSG #chat :said into the void\r\n/);
  ana.end();
  assert.equal(await ana.ended, 0);
});
