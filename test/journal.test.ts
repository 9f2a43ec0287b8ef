// Accounts that survive a restart: the journal on the standard streams, and what a restart without one means.
import assert from "node:assert/strict";
import { execFileSync, spawn, spawnSync } from "node:child_process";
import fs from "node:fs";
import os from "node:os";
import path from "node:path";
import { test, type TestContext } from "node:test";
import { Accounts, deriveKeys, formatVerifier, LIMITS, readVerifier, verifierOf } from "../chat.ts";
import {
  BINARY,
  dial,
  enter,
  environment,
  FakeClock,
  joinProcess,
  quickScrypt,
  serveHere,
  serveProcess,
  Terminal,
  Text,
  wants,
} from "./helpers.ts";

/** A folder with a journal of accounts, and a server that continues it. */
class Kept {
  readonly file: string;
  readonly #test: TestContext;
  constructor(test: TestContext, text = "") {
    const folder = fs.mkdtempSync(path.join(os.tmpdir(), "chat-journal-"));
    this.file = path.join(folder, "accounts.txt");
    this.#test = test;
    fs.writeFileSync(this.file, text);
    test.after(() => fs.rmSync(folder, { recursive: true }));
  }
  get text(): string {
    return fs.readFileSync(this.file, "utf8");
  }
  /** Starts a server on the file as a shell does. @returns its port, what it says, and how to end it */
  async serve(args: readonly string[] = []): Promise<{ port: number; err: Text; kill: () => Promise<unknown> }> {
    const stdio = [fs.openSync(this.file, "r"), fs.openSync(this.file, "a"), "pipe"] as const;
    const env = environment({ CHAT_SECRET: "a secret of more than 24 characters" });
    const child = spawn(BINARY, ["serve", "127.0.0.1:0", "--accounts", ...args], { stdio: [...stdio], env });
    fs.closeSync(stdio[0]);
    fs.closeSync(stdio[1]);
    const err = new Text();
    child.stderr?.setEncoding("utf8").on("data", (text: string) => err.add(text));
    const ended = new Promise((end) => child.on("close", end));
    const kill = () => {
      child.kill("SIGKILL");
      return ended;
    };
    this.#test.after(kill);
    const [, port] = await err.wait(/ join \S+:(\d+)\//);
    await err.wait(/accounts? read; new ones go to standard output\n/);
    return { port: Number(port), err, kill };
  }
}

test("an account that was answered is there after the server was killed, with its latest password", async (t) => {
  const kept = new Kept(t);
  const first = await kept.serve();
  for (let at = 0; at < 5; at++) await enter(t, first.port, `user${at}`, "", `password ${at}`);
  await first.kill();
  assert.match(kept.text, /^(user\d \d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ SCRAM-SCRYPT\$32768:\S+\n){5}$/);
  const second = await kept.serve();
  for (let at = 0; at < 5; at++) {
    const irc = await enter(t, second.port, `user${at}`, "", `password ${at}`);
    assert.doesNotMatch(irc.all, /is registered now/);
  }
  assert.equal(kept.text.split("\n").length, 6, "what was read is not written again");
});

test("the server is killed at random moments under registrations, and no answered account is missing", async (t) => {
  const kept = new Kept(t);
  const answered: string[] = [];
  for (let round = 0; round < 4; round++) {
    const { port, kill } = await kept.serve();
    const registering = Array.from({ length: 12 }, async (_, at) => {
      const nick = `r${round}x${at}`;
      await enter(t, port, nick);
      answered.push(nick);
    });
    await registering[Math.floor(Math.random() * 3)];
    await kill();
    for (const one of registering) one.catch(() => {});
  }
  const { port } = await kept.serve();
  t.diagnostic(`${answered.length} answered`);
  for (const nick of answered) {
    const irc = await enter(t, port, nick);
    assert.doesNotMatch(irc.all, /is registered now/, nick);
  }
});

test("lines that are no account are named and skipped, and a line that was cut off is lost", async (t) => {
  const good = formatVerifier(verifierOf(await deriveKeys("secret")));
  const lines = [
    "# a class",
    `ana 2026-11-25T20:31:00Z ${good}`,
    "nonsense",
    "foo! 2026-11-25T20:31:00Z barred",
    `bo 2026-11-25T20:31:00Z ${good.slice(0, -9)}`,
    `bo 2026-11-25T20:31:00Z ${good}?`, // its line break was not written in time
  ];
  const kept = new Kept(t, `${lines.join("\n")}\ncy 2026-11-25T20:31:00Z ${good.slice(0, 40)}`);
  const first = await kept.serve();
  assert.match(first.err.all, /chat: the last line of the accounts has no line break: it may have been cut off\n/);
  for (const at of [3, 4, 5, 6]) {
    assert.ok(first.err.all.includes(` line ${at} of the accounts is not an account, and is skipped\n`));
  }
  await enter(t, first.port, "ana");
  await enter(t, first.port, "dan");
  await first.kill();
  const second = await kept.serve();
  const dan = await enter(t, second.port, "dan");
  assert.doesNotMatch(dan.all, /is registered now/, "its record does not continue the one that was cut off");
});

test("a last line that is whole but has no line break counts, and the next record begins a line of its own", async (t) => {
  const verifier = formatVerifier(verifierOf(await deriveKeys("secret")));
  const kept = new Kept(t, `ana 2026-11-25T20:31:00Z ${verifier}`);
  for (const nicks of [["ana", "bo"], ["ana", "bo", "cy"]]) {
    const { port, err, kill } = await kept.serve();
    assert.doesNotMatch(err.all, /is skipped/);
    const seen = await Promise.all(nicks.map((nick) => enter(t, port, nick)));
    assert.deepEqual(
      seen.map(({ all }) => all.includes("is registered now")),
      nicks.map((nick) => nick === nicks.at(-1)),
    );
    await kill();
  }
});

test("what the operator decides is in the journal, and commands come on standard input after an empty line", async (t) => {
  const verifier = formatVerifier(verifierOf(await deriveKeys("secret")));
  const input =
    `ana 2026-11-25T20:31:00Z ${verifier}\n\n/forget ana\n/bar bo\n/unbar bo\n/admit cy\n/accounts\nhello\nbo 2026-11-25T20:31:00Z ${verifier}\n`;
  const child = spawn(BINARY, ["serve", "127.0.0.1:0", "--accounts"], { env: environment() });
  const [out, err] = [new Text(), new Text()];
  child.stdout.setEncoding("utf8").on("data", (text: string) => out.add(text));
  child.stderr.setEncoding("utf8").on("data", (text: string) => err.add(text));
  const ended = new Promise((end) => child.on("close", end));
  t.after(() => {
    child.kill("SIGKILL");
    return ended;
  });
  child.stdin.write(input);
  await err.wait(
    /chat: 0 accounts\nchat: barred: ana \(deleted\)\nchat: admitted: cy\nchat: commands begin with a slash\nchat: an account after an empty line is not read\n/,
  );
  const records = "ana \\S+Z forgotten\nbo \\S+Z barred\nbo \\S+Z unbarred\ncy \\S+Z admitted\n";
  await out.wait(new RegExp(`^#\n${records}$`));
  const accounts = new Accounts((nick, verifier) => ({ nick, verifier, networks: new Set<string>() }));
  for (const record of out.all.trim().split("\n")) assert.ok(accounts.apply(record), record);
  assert.deepEqual([...accounts.barred], [["ana", "forgotten"]]);
  assert.deepEqual(accounts.admitted, ["cy"]);
  child.stdin.end("/rooms"); // a command without a line break is no account that was cut off
  await err.wait(/chat: #chat: 0 people/);
  assert.doesNotMatch(err.all, /cut off/);
});

test("a registration and a new password are refused with words while they cannot be written", async (t) => {
  quickScrypt(t);
  let works = false;
  const { port, server } = await serveHere(t, { journal: () => Promise.resolve(works) });
  const irc = await enterOrRefuse(t, port);
  await irc.wait(/ 464 ana :The server cannot write new accounts down at the moment\r\n/);
  assert.equal(server.accounts.find("ana"), undefined);
  works = true;
  irc.send("PASS secret");
  await irc.wait(/ 001 ana /);
  works = false;
  const account = server.accounts.find("ana");
  assert.ok(account);
  assert.equal(await server.accounts.change(account, verifierOf(await deriveKeys("other"))), false);
  await enter(t, port, "ana", "", "secret");
});

/** Tries to register as ana by PASS. */
async function enterOrRefuse(t: TestContext, port: number) {
  const irc = await dial(t, port);
  irc.send("PASS secret", "NICK ana", "USER a 0 * :a");
  return irc;
}

test(
  "a disk that is full refuses registrations, and the journal is whole when there is space again",
  wants("prlimit"),
  async (t) => {
    const folder = fs.mkdtempSync(path.join(os.tmpdir(), "chat-full-"));
    t.after(() => fs.rmSync(folder, { recursive: true }));
    const file = path.join(folder, "accounts.txt");
    fs.writeFileSync(file, "");
    // A limit on the size of files cuts a write as a full disk does. The file has room for about five accounts.
    const command = 'trap "" XFSZ; ulimit -S -f 2; exec "$0" serve 127.0.0.1:0 --accounts <"$1" >>"$1"';
    const child = spawn("sh", ["-c", command, BINARY, file], { env: environment() });
    t.after(() => child.kill("SIGKILL"));
    const err = new Text();
    child.stderr.setEncoding("utf8").on("data", (text: string) => err.add(text));
    const ended = new Promise((end) => child.on("close", end));
    const [, port] = await err.wait(/ join \S+:(\d+)\//);
    const answered: string[] = [];
    const refused: string[] = [];
    for (let at = 0; at < 40 && refused.length < 3; at++) {
      const irc = await dial(t, Number(port));
      irc.send("PASS secret", `NICK u${at}`, "USER u 0 * :u");
      const [all] = await irc.wait(/ 001 u| 464 u\d+ :The server cannot write new accounts down at the moment\r\n/);
      if (all.startsWith(" 001")) answered.push(`u${at}`);
      else refused.push(`u${at}`);
    }
    assert.equal(refused.length, 3);
    execFileSync("prlimit", ["--pid", String(child.pid), "--fsize=unlimited"]);
    await enter(t, Number(port), "later");
    child.kill("SIGKILL");
    await ended;
    const accounts = new Accounts((nick, verifier) => ({ nick, verifier, networks: new Set<string>() }));
    for (const record of fs.readFileSync(file, "utf8").split("\n")) accounts.apply(record);
    for (const nick of [...answered, "later"]) assert.ok(accounts.find(nick), nick);
    for (const nick of refused) assert.equal(accounts.find(nick), undefined, nick);
  },
);

test(
  "chat verifier prints an account line, for a password from the environment or one that it asks for",
  wants("tmux"),
  async (t) => {
    const env = environment({ CHAT_PASSWORD: "secret" });
    const { status, stdout, stderr } = spawnSync(BINARY, ["verifier", "Ana"], { env, encoding: "utf8" });
    assert.deepEqual([status, stderr], [0, ""]);
    const [, text = ""] = /^Ana \d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ (SCRAM-SCRYPT\$\S+)\n$/.exec(stdout) ?? [];
    const verifier = readVerifier(text);
    assert.ok(typeof verifier === "object");
    assert.deepEqual(verifierOf(await deriveKeys("secret", verifier.salt)), verifier);
    const kept = new Kept(t);
    const asking = new Terminal(t, ["sh", "-c", `${BINARY} verifier bo >>${kept.file}`]);
    await asking.wait(/^Password of bo:$/);
    asking.enter("hidden");
    await asking.wait(/^Repeat it:$/m);
    asking.enter("hidden");
    await asking.wait(/\[exit 0\]/);
    assert.doesNotMatch(asking.screen({ history: true }), /hidden|SCRAM/);
    const { port } = await kept.serve(["--lock"]);
    await enter(t, port, "bo", "", "hidden");
  },
);

test("--accounts with a terminal is a usage error that shows how it is meant", wants("tmux"), async (t) => {
  const terminal = new Terminal(t, [BINARY, "serve", "--accounts"], { columns: 120 });
  await terminal.wait(
    /--accounts reads and writes files\nchat: hint: \S+chat serve --accounts <accounts.txt >>accounts.txt\n\[exit 2\]/,
  );
});

test("--lock starts with registration closed", async (t) => {
  const { port } = await serveProcess(t, ["--lock"]);
  const script = joinProcess(t, `ana@127.0.0.1:${port}`);
  script.end("x\n");
  assert.equal(await script.ended, 1);
  assert.match(script.err.all, /registration is closed; the operator can admit a nick\nchat: hint: ask whoever/);
});

test("10,000 accounts are read, and an admission is over when its hour is", async () => {
  const clock = new FakeClock();
  const accounts = new Accounts((nick, verifier) => ({ nick, verifier, networks: new Set<string>() }), 0, clock);
  const verifier = formatVerifier(verifierOf(await deriveKeys("secret")));
  for (let at = 0; at < LIMITS.accounts; at++) assert.ok(accounts.apply(`u${at} 2026-11-25T20:31:00Z ${verifier}`));
  assert.equal(accounts.byNick.size, LIMITS.accounts);
  accounts.apply(`dan ${new Date(clock.wall()).toISOString()} admitted`);
  accounts.apply(`dan ${new Date(clock.wall()).toISOString()} ${verifier}`); // it was admitted once, and has registered
  accounts.apply(`cy ${new Date(clock.wall() - LIMITS.admitMs + 60_000).toISOString()} admitted`);
  assert.deepEqual(accounts.admitted, ["cy"]);
  clock.tick(60_000);
  assert.deepEqual(accounts.admitted, []);
});

test(
  "after a restart without a journal a waiting private line is shown and not sent",
  wants("tmux"),
  async (t) => {
    const secret = { CHAT_SECRET: "a secret of more than 24 characters" };
    const first = await serveProcess(t, [], { env: secret });
    const bo = new Terminal(t, [BINARY, "join", `bo@127.0.0.1:${first.port}`], {
      env: { CHAT_PASSWORD: "b" },
      columns: 120,
    });
    await bo.wait(/Welcome/);
    first.child.kill("SIGKILL");
    await bo.wait(/connection lost/);
    bo.enter("/msg ana between us");
    bo.enter("for the room");
    await bo.wait(/\[offline, 2 waiting\]/);
    await first.ended;
    const second = await serveProcess(t, [], { env: secret, address: `127.0.0.1:${first.port}` });
    const thief = await enter(t, second.port, "ana");
    bo.enter("/reconnect");
    await bo.wait(
      /-- the server was restarted without its accounts: nicks may belong to others now\n-- not sent: \/msg ana between us\n/,
    );
    await bo.wait(/\d bo +for the room/);
    await thief.sync();
    assert.doesNotMatch(thief.all, /between us/);
  },
);
